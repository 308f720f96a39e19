"""Models whose experts are simulated: everything else stays the checkpoint's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.offload.dense_reads import WantedTensor, read_dense
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.mapping import ConversionOptions, make_plan
from localrun.quant.checkpoint.source import CheckpointSource
from tests.checkpoints import write_small
from tools.tier_quality import SimulatedSource


def test_dense_tensors_come_from_the_checkpoint_however_they_are_read(tmp_path: Path) -> None:
    path = write_small(tmp_path / "source")
    plan = make_plan(Checkpoint.open(path), ConversionOptions(base=GGMLQuantizationType.F32))
    simulated = SimulatedSource(plan)
    simulated.write_experts(tmp_path / "experts", lambda layer, expert: GGMLQuantizationType.MXFP4, None)
    exact = CheckpointSource(plan)
    dense = {name: info for name, info in exact.tensors.items() if "_exps" not in name}
    read = {name: np.zeros(info.n_bytes, np.uint8) for name, info in dense.items()}

    def put(name: str, begin: int, rows: npt.NDArray[np.uint8]) -> None:
        read[name][begin : begin + rows.size] = rows

    wanted = [
        WantedTensor(name, info.n_bytes, lambda begin, rows, name=name: put(name, begin, rows))  # type: ignore[misc]
        for name, info in dense.items()
    ]
    assert read_dense(simulated, wanted)
    for name in dense:
        np.testing.assert_array_equal(read[name], exact.read_tensor(name), err_msg=name)
        np.testing.assert_array_equal(read[name], simulated.read_tensor(name), err_msg=name)

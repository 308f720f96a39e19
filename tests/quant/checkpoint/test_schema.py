"""The tensors that a config implies, against the published counts and sizes of the official releases."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from localrun.quant.checkpoint.model_config import parse_config
from localrun.quant.checkpoint.safetensors import DTYPE_BYTES
from localrun.quant.checkpoint.schema import TensorSpec, mtp_tensors, trunk_tensors
from tests.reference import NAMES, read_safetensors, unpack
from tools.synthetic_config import FLASH, PRO

PATH = Path("config.json")
DSPARK_FLASH = FLASH | {
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
    "compress_ratios": FLASH["compress_ratios"] + [0, 0],
}
DSPARK_PRO = PRO | {
    "dspark_target_layer_ids": [58, 59, 60],
    "dspark_markov_rank": 512,
    "compress_ratios": PRO["compress_ratios"] + [0, 0],
}


def stored(specs: list[TensorSpec], experts: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) in a file, scales included."""
    result = {}
    for spec in specs:
        dtype = experts if spec.expert is not None else spec.dtype
        shape, scale = spec.stored(dtype)
        result[spec.name] = (dtype, shape)
        if scale is not None:
            result[spec.scale_name] = ("F8_E8M0", scale)
    return result


@pytest.mark.parametrize(
    ("raw", "dspark", "experts", "n_tensors", "n_bytes"),
    [
        (FLASH, False, "I8", 69_187, 159_609_485_896),
        (PRO, False, "I8", 145_116, 864_704_792_696),
        (DSPARK_FLASH, True, "I8", 72_317, 166_878_536_440),
        (DSPARK_PRO, True, "I8", 149_782, 892_727_580_904),
    ],
)
def test_counts_and_bytes_are_those_of_the_official_releases(
    raw: dict[str, Any], dspark: bool, experts: str, n_tensors: int, n_bytes: int
) -> None:
    config = parse_config(PATH, raw)
    specs = [*trunk_tensors(config), *mtp_tensors(config, 3 if dspark else 1, dspark=dspark)]
    tensors = stored(specs, experts)
    assert len(tensors) == n_tensors
    assert sum(math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in tensors.values()) == n_bytes


def test_base_checkpoints_have_fp8_experts_with_square_scale_blocks() -> None:
    config = parse_config(PATH, FLASH)
    tensors = stored([*trunk_tensors(config), *mtp_tensors(config, 1, dspark=False)], "F8_E4M3")
    assert len(tensors) == 69_187
    assert tensors["layers.5.ffn.experts.7.w2.weight"] == ("F8_E4M3", (4096, 2048))
    assert tensors["layers.5.ffn.experts.7.w2.scale"] == ("F8_E8M0", (32, 16))


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_dtypes_are_those_of_the_oracle(name: str, tmp_path: Path) -> None:
    import json

    oracle = unpack(name, tmp_path)
    config = parse_config(PATH, json.loads((oracle.path / "config.json").read_text()))
    written = read_safetensors(oracle.path / "model.safetensors")
    expected = stored(list(trunk_tensors(config)), "I8")
    assert expected == {key: (dtype, tuple(shape)) for key, (dtype, shape, _) in written.items()}


def test_every_gguf_name_is_used_once_and_experts_share_their_stack() -> None:
    config = parse_config(PATH, FLASH)
    names: dict[str, int] = {}
    for spec in trunk_tensors(config):
        assert spec.gguf is not None
        names[spec.gguf] = names.get(spec.gguf, 0) + 1
    stacks = {name for name, count in names.items() if count == 256}
    assert len(stacks) == 43 * 3
    assert all(re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)_exps\.weight", name) for name in stacks)
    assert all(count == 1 for name, count in names.items() if name not in stacks)

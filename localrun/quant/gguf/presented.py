"""Presents tensors in the form that llama.cpp requires, if files store them differently.

* Vectors in F16 or BF16: ggml adds and multiplies element by element only by F32 (`binary_op`), and aborts otherwise.
* A hash layer's table as I64: `get_rows` gives ids as I32 only.
* * Gate and up of the experts in one tensor (`ffn_gate_up_exps`), gate's rows first: presented as two. llama.cpp supports this
  for other architectures (`create_tensor_gate_up_exps`), but not for deepseek4.
* * Scales that are 1: omitted. deepseek4's graph applies none, so any other value would give silently wrong answers.

All conversions are exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.errors import FormatError, UnsupportedModelError
from localrun.quant.model.source import TensorInfo

_FUSED = re.compile(r"(blk\.(?:0|[1-9][0-9]*)\.ffn_)gate_up(_exps\.weight)")
_TABLE = re.compile(r"blk\.[0-9]+\.ffn_gate_tid2eid\.weight")
_SCALE = re.compile(r"(?P<matrix>.+)\.(?P<kind>scale|input_scale)")
_HALF = (GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


@dataclass(frozen=True, slots=True)
class Presented:
    """A file's tensors in the form that llama.cpp requires.

    Attributes:
        tensors: as presented.
        stored: stored tensors by name, for those presented as another type.
        fused: by the name of a presented stack, the tensor that contains it and its half (0 or 1).
        scales: names of omitted scales, which must be 1.
    """

    tensors: dict[str, TensorInfo]
    stored: dict[str, TensorInfo] = field(default_factory=dict)
    fused: dict[str, tuple[str, int]] = field(default_factory=dict)
    scales: list[str] = field(default_factory=list)


def present(tensors: Mapping[str, TensorInfo], *, drop_scales: bool) -> Presented:
    """How to present a file's tensors.

    Args:
        tensors: by name.
        drop_scales: the architecture's graph applies no scales.
    """
    shown = Presented({})
    for name, info in tensors.items():
        scale = _SCALE.fullmatch(name) if drop_scales else None
        if scale is not None and scale["matrix"] + ".weight" in tensors:
            # What quantizes activations has no meaning where they are not: only weights' scales must be 1.
            if scale["kind"] == "scale":
                shown.scales.append(name)
        elif (fused := _FUSED.fullmatch(name)) is not None and len(info.shape) == 3 and info.shape[1] % 2 == 0:
            n_in, n_out, n_experts = info.shape
            for half, projection in enumerate(("gate", "up")):
                part = f"{fused[1]}{projection}{fused[2]}"
                shown.tensors[part] = TensorInfo(part, (n_in, n_out // 2, n_experts), info.type, info.n_bytes // 2)
                shown.fused[part] = (name, half)
        elif (target := _target(name, info)) is not None:
            n_bytes = 4 * int(np.prod(info.shape))
            shown.tensors[name] = replace(info, type=target, n_bytes=n_bytes)
            shown.stored[name] = info
        else:
            shown.tensors[name] = info
    return shown


def _target(name: str, info: TensorInfo) -> GGMLQuantizationType | None:
    if info.type in _HALF and all(extent == 1 for extent in info.shape[1:]):
        return GGMLQuantizationType.F32
    if info.type == GGMLQuantizationType.I64 and _TABLE.fullmatch(name):
        return GGMLQuantizationType.I32
    return None


def converted(path: Path, stored: TensorInfo, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A tensor's bytes in its presented type.

    Raises:
        FormatError: an invalid id.
    """
    match stored.type:
        case GGMLQuantizationType.F16:
            return raw.view("<f2").astype("<f4").view(np.uint8)
        case GGMLQuantizationType.BF16:
            return (raw.view("<u2").astype("<u4") << 16).view(np.uint8)
    ids = raw.view("<i8")
    if ids.size and (ids.min() < 0 or ids.max() >= 1 << 31):
        raise FormatError(
            f"{path}: {stored.name}: {ids.max()} is not a valid expert number", hint="download the file again"
        )
    return ids.astype("<i4").view(np.uint8)


def refuse_scale(path: Path, name: str, values: npt.NDArray[np.float32]) -> None:
    """Raises UnsupportedModelError for a scale that would have to be applied."""
    if not (values == 1).all():
        raise UnsupportedModelError(
            f"{path}: {name}: a scale of {values[values != 1][0]:g}, which neither localrun nor its llama.cpp supports for this"
            " architecture",
            hint="use a file without scales (any type but NVFP4), or convert the official checkpoint",
        )

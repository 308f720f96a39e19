"""How much of a model a machine with little memory can measure: fewer layers with experts of their own, then fewer layers."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

from localrun.engine.planner.compute_buffers import compute_bytes
from localrun.engine.planner.hardware import PROCESS_BYTES
from localrun.engine.planner.sizes import ModelSizes, sizes_of
from localrun.errors import LocalrunError
from localrun.units import format_size
from tools.synthetic_config import PRESETS, scaled_config

SPARE_BYTES = 1 << 30
LEAST_LAYERS = 3
"""One of each kind."""
_CONTEXT, _BATCH = 1024, 512


class Fit(NamedTuple):
    """Attributes:
    layers: of the model; None: all.
    own_layers: of these, how many have experts of their own.
    left_out: what and why, for the result; empty: nothing.
    """

    layers: int | None
    own_layers: int
    left_out: str = ""


def whole_that_fits(preset: str, own_layers: int, room: int | None) -> Fit:
    """As much of a model as fits into memory twice over: its files, which lie there, and the loaded model.

    Args:
        own_layers: layers with experts of their own, at most.
        room: bytes; None: enough.

    Raises:
        LocalrunError: not even three layers fit.
    """
    full = PRESETS[preset]["num_hidden_layers"]
    needed = _needed(sizes_with(preset, full), own_layers)
    if room is None or needed <= room:
        return Fit(None, own_layers)
    why = f"with all of them it needs {format_size(needed)}, and {format_size(room)} are free"
    for own in range(own_layers - 1, 0, -1):
        if _needed(sizes_with(preset, full), own) <= room:
            return Fit(None, own, f"whole {preset}: experts of {own} instead of {own_layers} layers: {why}")
    layers = (
        bisect_right(range(LEAST_LAYERS, full), room, key=lambda n: _needed(sizes_with(preset, n), 1))
        + LEAST_LAYERS
        - 1
    )
    if layers >= LEAST_LAYERS:
        return Fit(layers, 1, f"whole {preset}: {layers} of its {full} layers: {why}")
    least = _needed(sizes_with(preset, LEAST_LAYERS), 1)
    raise LocalrunError(
        f"{LEAST_LAYERS} layers of {preset} need {format_size(least)} of memory, and {format_size(room)} are free"
    )


def check_slice(preset: str, layers: int, room: int | None) -> None:
    """Raises LocalrunError if a slice with all of its experts, as a checkpoint and converted, does not fit into memory."""
    sizes = sizes_with(preset, layers)
    needed = 2 * (sizes.dense_bytes + sizes.expert_file_bytes) + PROCESS_BYTES + SPARE_BYTES
    if room is not None and needed > room:
        raise LocalrunError(
            f"{layers} layers with all experts need {format_size(needed)} of memory, and {format_size(room)} are free"
        )


def sizes_with(preset: str, layers: int) -> ModelSizes:
    """Of a preset with so many layers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(scaled_config(preset, layers=layers)))
        return sizes_of(str(path))


def _needed(sizes: ModelSizes, own_layers: int) -> int:
    experts = own_layers * sizes.expert_file_bytes // max(1, len(sizes.shape.moe_layers))
    loaded = sizes.dense_bytes + sizes.kv_bytes(_CONTEXT, "f16", _BATCH) + compute_bytes(sizes, _CONTEXT, _BATCH)
    return sizes.dense_bytes + experts + loaded + 2 * sizes.floor_bytes + PROCESS_BYTES + SPARE_BYTES

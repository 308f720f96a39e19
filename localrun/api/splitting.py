"""Splits a converted model into files for media with a size limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from localrun.api.following import Follower
from localrun.units import format_size

if TYPE_CHECKING:
    from localrun.quant.checkpoint.mapping import ConversionPlan


def check(plan: ConversionPlan, size: int, out: Follower) -> None:
    """Reports how many files there will be; rejects an impossible size before hours of conversion.

    Raises:
        UsageError: a single tensor is larger.
    """
    from localrun.quant.checkpoint.mapping import ALIGNMENT
    from localrun.quant.convert.split import plan_split

    if plan.file_size <= size:
        out.note(f"split:  not needed, the model takes {format_size(plan.file_size)}")
        return
    infos = [tensor.info for tensor in plan.tensors.values()]
    parts = plan_split(plan.metadata, infos, ALIGNMENT, size)
    largest = format_size(max(part.size_bytes for part in parts))
    out.note(f"split:  {len(parts)} files of at most {largest}; needs the same space again while splitting")


def is_waiting(source: Path, target: Path) -> bool:
    """Whether the finished model in `target` was made from the checkpoint `source`, is a single file, and can be split.

    Raises:
        UsageError: it was made from another checkpoint.
    """
    from localrun.quant.convert.converter import open_checkpoint
    from localrun.quant.convert.repair import check_source
    from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest

    manifest = read_manifest(target / MANIFEST_NAME)
    check_source(manifest, open_checkpoint(source))
    return len(manifest.files) == 1 and manifest.overlay is None


def split(target: Path, size: int, out: Follower) -> None:
    """Splits the finished model in `target`.

    Raises:
        DiskSpaceError, StoreError: the disk; the model stays as it is.
    """
    from localrun.quant.convert.split import split_model

    parts = split_model(target, size, out.splitting())
    out.clear_status()
    if parts:
        out.note(f"split into {len(parts)} files: {parts[0].name} to {parts[-1].name}")

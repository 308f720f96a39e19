"""`localrun convert --split SIZE`: the step after the conversion that cuts the model into files for media with a size limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from localrun.commands.output import Output
from localrun.errors import UsageError
from localrun.units import format_size

if TYPE_CHECKING:
    from localrun.quant.plan import ConversionPlan


def check(plan: ConversionPlan, size: int, out: Output) -> None:
    """Says how many files there will be; refuses a size before hours of converting.

    Raises:
        UsageError: a tensor alone is larger.
    """
    from localrun.quant.plan import ALIGNMENT
    from localrun.quant.split import plan_split

    if plan.file_size <= size:
        out.note(f"split:  not needed, the model takes {format_size(plan.file_size)}")
        return
    infos = [tensor.info for tensor in plan.tensors.values()]
    parts = plan_split(plan.metadata, infos, ALIGNMENT, size)
    largest = format_size(max(part.size_bytes for part in parts))
    out.note(f"split:  {len(parts)} files of at most {largest}; takes as much space again while it is done")


def is_waiting(target: Path, plan: ConversionPlan) -> bool:
    """An earlier run converted this very plan into `target` and was ended before it split the model.

    Raises:
        UsageError: the target holds another model.
    """
    from localrun.quant.manifest import MANIFEST_NAME, checksum, read_manifest

    if not (target / MANIFEST_NAME).is_file():
        return False
    manifest = read_manifest(target / MANIFEST_NAME)
    same = manifest.source.get("identity") == plan.checkpoint.identity
    if not same or len(manifest.files) != 1 or manifest.files[0].header_checksum != checksum(plan.header):
        raise UsageError(f"{target} holds a finished model", hint="choose another directory, or delete this one")
    return True


def split(target: Path, size: int, out: Output) -> None:
    """Splits the finished model in `target`."""
    from localrun.quant.split import split_model

    def progress(done: int, total: int) -> None:
        out.status(f"splitting {done / total:4.0%}  {format_size(done)} of {format_size(total)}")

    parts = split_model(target, size, progress)
    out.clear_status()
    if parts:
        out.note(f"split into {len(parts)} files: {parts[0].name} to {parts[-1].name}")

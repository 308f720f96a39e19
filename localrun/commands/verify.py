"""`localrun verify MODEL`: checks a model's files for damage: every checksum of a converted one; `--repair` rebuilds damaged
parts.

An interrupted run resumes as long as the files are unchanged. A model without a manifest (another program's GGUF, an official
checkpoint) has no checksums: its structure is checked, and its weights are searched for zeros that an incomplete download or a
failing drive leaves. The output says so.
"""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localrun import paths
from localrun.commands import common
from localrun.commands.output import Output, ProgressLine
from localrun.errors import LocalrunError, UsageError
from localrun.units import format_bytes_rate, format_duration, format_size

if TYPE_CHECKING:
    from localrun.quant.checkpoint.mapping import ImportanceLookup
    from localrun.quant.convert.integrity import Damage
    from localrun.quant.convert.lost_weights import LostPart
    from localrun.quant.model.source import ModelSource

EXAMPLES = """\
examples:
  localrun verify ~/models/v4-flash
  localrun verify ~/models/v4-flash --json
  localrun verify /media/usb/v4-flash --repair ~/downloads/DeepSeek-V4-Flash
"""

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun verify`."""
    parser.epilog = EXAMPLES
    common.add_model_argument(parser, optional=False)
    parser.add_argument(
        "--repair",
        type=Path,
        metavar="SOURCE",
        help="rebuild damaged or missing data from the checkpoint the model was converted from",
    )
    parser.add_argument("--restart", action="store_true", help="start over instead of resuming an interrupted run")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code: 1 when something is damaged and stays so."""
    from localrun.quant.gguf.source import GgufSource
    from localrun.quant.open import open_model

    out = Output()
    model = common.named_model(args.model, out, command="verify")
    if args.repair is not None:
        args.repair = common.named_checkpoint(str(args.repair), command=f"verify {shlex.quote(args.model)} --repair")
    restored = _restore(model, args.repair, out) if args.repair is not None else False
    out.status("checking the structure")
    source = open_model(model, unchecked=True)
    out.clear_status()
    if not isinstance(source, GgufSource) or source.manifest is None:
        if args.repair is not None:
            raise UsageError(f"{source.path} has no checksums", hint="--repair is for models that localrun converted")
        return _without_checksums(source, out, as_json=args.json)
    return _with_checksums(source, args, out, restored=restored)


def _restore(model: Path, checkpoint: Path, out: Output) -> bool:
    """Makes files openable that are missing, short, or have a damaged header; True if there were any."""
    from localrun.quant.convert.converter import open_checkpoint
    from localrun.quant.convert.repair import restore_files
    from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest

    if not (model / MANIFEST_NAME).is_file():
        raise UsageError(f"{model} is not a converted model", hint="pass the folder that localrun convert wrote")
    out.status("checking the files")
    restored = restore_files(model, read_manifest(model / MANIFEST_NAME), open_checkpoint(checkpoint))
    out.clear_status()
    for path in restored:
        out.note(f"restored: {path}: size and header; contents are repaired next")
    return bool(restored)


def _without_checksums(source: ModelSource, out: Output, *, as_json: bool) -> int:
    from localrun.quant.convert.lost_weights import find_lost_weights

    layers = len(source.moe_layers)
    out.note(
        f"{source.path}: {len(source.tensors)} tensors, {layers} layers with experts: names, types and shapes are correct"
    )
    problems = find_lost_weights(source, ProgressLine(out))
    out.clear_status()
    for problem in problems[:_SHOWN]:
        out.note(f"damaged: {problem}")
    if len(problems) > _SHOWN:
        out.note(f"and {len(problems) - _SHOWN} more")
    if problems:
        out.note("hint: the download is incomplete or the drive lost data: download these files again")
    else:
        out.note("no zeros in place of weights; no manifest (localrun.json), so no checksums: weights not verified")
    if as_json:
        out.json(
            {
                "model": str(source.path),
                "ok": not problems,
                "checksums": False,
                "tensors": len(source.tensors),
                "damaged": [_lost_as_json(problem) for problem in problems],
            }
        )
    return 1 if problems else 0


def _with_checksums(source: Any, args: argparse.Namespace, out: Output, *, restored: bool) -> int:
    from localrun.quant.convert.integrity import planned_checks, verify
    from localrun.quant.convert.verify_journal import VerifyJournal
    from localrun.quant.model.manifest import checksum

    checks = planned_checks(source, source.manifest)
    n_bytes = sum(check.n_bytes for check in checks)
    journal = VerifyJournal(
        paths.cache_dir() / "verify", source.files, checksum(source.manifest.to_json().encode("utf-8", "surrogatepass"))
    )
    if args.restart or restored:
        journal.restart()
    skipped = sum(check.n_bytes for check in checks[: journal.next_check])
    if skipped:
        out.note(f"resuming after {format_size(skipped)} read by an interrupted run (--restart starts over)")
    started = time.monotonic()
    damages = verify(source, source.manifest, ProgressLine(out, skipped=skipped), journal)
    seconds = time.monotonic() - started
    out.clear_status()
    n_damaged = len(damages)
    _describe(damages, source, out)
    if damages and args.repair is not None:
        damages = _repair(source, damages, args.repair, out)
    speed = f"{format_size(n_bytes - skipped)} in {format_duration(seconds)}"
    speed += f", {format_bytes_rate((n_bytes - skipped) / max(seconds, 1e-9))}"
    if damages:
        out.note(f"{source.path}: {len(damages)} of {len(checks)} checksums are wrong ({speed})")
        out.note("hint: restore the files above from an intact copy, use --repair SOURCE, or convert again")
    else:
        repaired = f", {n_damaged} after repair" if n_damaged else ""
        out.note(f"{source.path}: all {len(checks)} checksums are correct{repaired} ({speed})")
    if source.manifest.kept is not None:
        out.note(
            f"not checked: the experts in {source.manifest.kept.path}, which have no checksums; it matches by names, sizes,"
            " headers and samples of each file"
        )
    if args.json:
        out.json(
            {
                "model": str(source.path),
                "ok": not damages,
                "checksums": True,
                "experts_checked": source.manifest.kept is None,
                "checked": len(checks),
                "bytes": n_bytes,
                "bytes_read": n_bytes - skipped,
                "seconds": round(seconds, 3),
                "repaired": n_damaged - len(damages),
                "damaged": [_as_json(damage) for damage in damages],
            }
        )
    return 1 if damages else 0


def _describe(damages: list[Damage], source: Any, out: Output) -> None:
    """What is damaged, and in which files."""
    for damage in damages[:_SHOWN]:
        out.note(f"damaged: {damage}")
    if len(damages) > _SHOWN:
        out.note(f"and {len(damages) - _SHOWN} more")
    if len(source.files) > 1:
        for path in source.files:
            if n := sum(damage.path == path for damage in damages):
                out.note(f"file to restore: {path.name} ({n} damaged)")


def _repair(source: Any, damages: list[Damage], checkpoint: Path, out: Output) -> list[Damage]:
    """Rebuilds the damaged ranges and rechecks them; returns what is still damaged."""
    from localrun.quant.convert.converter import open_checkpoint
    from localrun.quant.convert.integrity import recheck
    from localrun.quant.convert.repair import repair

    left, opened = damages, open_checkpoint(checkpoint)
    for importance in _importances(source, out):
        left = repair(
            source,
            source.manifest,
            opened,
            left,
            importance=importance,
            progress=lambda done, total: out.status(f"repairing {done} of {total}"),
        )
        if not left:
            break
    out.clear_status()
    for damage in left[:_SHOWN]:
        out.note(f"not repaired: {damage}")
    impossible = {damage.check: damage for damage in left}
    return [impossible.get(damage.check, damage) for damage in recheck(source, damages)]


def _importances(source: Any, out: Output) -> list[ImportanceLookup | None]:
    """Candidates for the importance data used in quantization: the importance files next to the model, or none."""
    from localrun.quant.precision.imatrix import read_imatrix

    found: list[ImportanceLookup | None] = []
    for path in sorted(source.path.glob("imatrix*.gguf")) if source.path.is_dir() else []:
        try:
            found.append(read_imatrix(path, source.moe_layers))
        except LocalrunError as error:
            out.note(f"ignored: {error}")
    return [*found, None]


def _lost_as_json(lost: LostPart) -> dict[str, object]:
    """The same keys as for a wrong checksum; null where there is none."""
    return {
        "file": None if lost.path is None else lost.path.name,
        "tensor": lost.tensor,
        "expert": lost.expert,
        "offset": lost.offset,
        "bytes": lost.n_bytes,
        "expected": None,
        "found": None,
        "problem": lost.problem,
    }


def _as_json(damage: Damage) -> dict[str, object]:
    check = damage.check
    return {
        "file": damage.path.name,
        "tensor": check.tensor,
        "expert": check.expert,
        "offset": check.offset,
        "bytes": check.n_bytes,
        "expected": check.digest,
        "found": damage.found,
        "problem": damage.problem,
    }

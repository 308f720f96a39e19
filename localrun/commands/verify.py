"""`localrun verify MODEL`: every checksum of a converted model, read from the disk.

A model without a manifest (somebody else's GGUF, an official checkpoint) has no checksums: its structure is checked and said so.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localrun.commands.output import Output
from localrun.units import format_duration, format_size

if TYPE_CHECKING:
    from localrun.quant.integrity import Damage
    from localrun.quant.source import ModelSource

EXAMPLES = """\
examples:
  localrun verify ~/models/v4-flash
  localrun verify ~/models/v4-flash --json
"""

_SHOWN = 20
_LINE_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun verify`."""
    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="MODEL", type=Path, help="a converted directory, a GGUF, or a checkpoint")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code: 1 when something is damaged."""
    from localrun.quant.gguf_source import GgufSource
    from localrun.quant.source import open_model

    out = Output()
    out.status("checking the structure")
    source = open_model(args.model.expanduser())
    out.clear_status()
    if not isinstance(source, GgufSource) or source.manifest is None:
        return _without_checksums(source, out, as_json=args.json)
    return _with_checksums(source, out, as_json=args.json)


def _without_checksums(source: ModelSource, out: Output, *, as_json: bool) -> int:
    layers = len(source.moe_layers)
    out.note(
        f"{source.path}: {len(source.tensors)} tensors, {layers} layers with experts: names, types and shapes are right"
    )
    out.note("no manifest (localrun.json), so no checksums: the weights were not checked")
    if as_json:
        out.json({"model": str(source.path), "ok": True, "checksums": False, "tensors": len(source.tensors)})
    return 0


def _with_checksums(source: Any, out: Output, *, as_json: bool) -> int:
    from localrun.quant.integrity import planned_checks, verify

    checks = planned_checks(source, source.manifest)
    n_bytes = sum(check.n_bytes for check in checks)
    started = time.monotonic()
    damages = verify(source, source.manifest, _Progress(out, started))
    seconds = time.monotonic() - started
    out.clear_status()
    for damage in damages[:_SHOWN]:
        out.note(f"damaged: {damage}")
    if len(damages) > _SHOWN:
        out.note(f"and {len(damages) - _SHOWN} more")
    speed = f"{format_size(n_bytes)} in {format_duration(seconds)}, {n_bytes / max(seconds, 1e-9) / 1e9:.2f} GB/s"
    if damages:
        out.note(f"{source.path}: {len(damages)} of {len(checks)} checksums differ ({speed})")
        out.note("hint: convert the model again, or copy the named files again from where they are whole")
    else:
        out.note(f"{source.path}: all {len(checks)} checksums are right ({speed})")
    if as_json:
        out.json(
            {
                "model": str(source.path),
                "ok": not damages,
                "checksums": True,
                "checked": len(checks),
                "bytes": n_bytes,
                "seconds": round(seconds, 3),
                "damaged": [_as_json(damage) for damage in damages],
            }
        )
    return 1 if damages else 0


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


class _Progress:
    """Share, speed and time left: a transient line on a terminal, else a line every ten seconds."""

    def __init__(self, out: Output, started: float) -> None:
        self._out = out
        self._started = started
        self._shown = started

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._shown < (0.1 if self._out.err_is_terminal else _LINE_SECONDS):
            return
        self._shown = now
        rate = done / max(now - self._started, 1e-9)
        left = format_duration((total - done) / max(rate, 1.0))
        text = f"{done / total:4.0%}  {format_size(done)} of {format_size(total)}  {rate / 1e9:.2f} GB/s, {left} left"
        if self._out.err_is_terminal:
            self._out.status(text)
        else:
            self._out.note(text)

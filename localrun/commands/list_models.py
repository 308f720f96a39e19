"""`localrun list`: the models on this machine, by name and path, with size and fit."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from localrun import config
from localrun.api import models
from localrun.commands.output import Output
from localrun.engine.model_finder import FoundModel, default_folders, find_models, fit
from localrun.errors import UsageError
from localrun.units import format_size

EXAMPLES = """\
examples:
  localrun list
  localrun list /media/usb --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun list`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "folder",
        nargs="*",
        type=Path,
        metavar="DIR",
        help="folders to search (default: the current folder, ~/models, localrun's own folders, LOCALRUN_MODELS)",
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    out, settings = Output(), config.load()
    names = models.named(settings)
    for folder in args.folder:
        if not folder.expanduser().exists():
            raise UsageError(f"{folder}: no such folder")
    folders = [*(args.folder or [*default_folders(), *(path.parent for path in names)])]
    out.status("looking for models")
    found = sorted(find_models(folders), key=lambda model: (bool(model.problem), model.name.lower()))
    out.clear_status()
    if args.json:
        out.json([_as_json(model, names) for model in found])
        return 0
    for model in found:
        name = names.get(model.path.resolve())
        size = format_size(model.n_bytes) if model.n_bytes else ""
        out.line(f"{name or model.name:<32} {size:>11}  {model.kind:<10}  {fit(model)}")
        out.line(f"    {model.path}")
    for path, name in names.items():
        if not path.exists():
            out.note(f"[models] {name}: {path}: no such file or directory")
    if not found:
        out.note("no models found; localrun list DIR searches another folder, localrun chat demo opens the demo model")
    return 0


def _as_json(model: FoundModel, names: dict[Path, str]) -> dict[str, object]:
    return {**asdict(model), "path": str(model.path), "alias": names.get(model.path.resolve()), "fit": fit(model)}

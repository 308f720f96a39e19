"""`localrun show MODEL`: what a model is, what it consists of, and where it is stored. Reads headers only."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localrun.commands import common
from localrun.commands.output import Output
from localrun.units import format_size

if TYPE_CHECKING:
    from localrun.engine.planner.sizes import ModelSizes
    from localrun.quant.model.source import ModelSource

EXAMPLES = """\
examples:
  localrun show demo
  localrun show ~/models/v4-flash --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun show`."""
    parser.epilog = EXAMPLES
    common.add_model_argument(parser, optional=False)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from localrun.engine.planner.sizes import sizes_of_source
    from localrun.quant.open import open_model

    out = Output()
    path = common.named_model(args.model, out, command="show")
    out.status("reading headers")
    source = open_model(path)
    facts = _facts(path, source, sizes_of_source(source))
    out.clear_status()
    if args.json:
        out.json(facts)
        return 0
    for line in _lines(facts):
        out.line(line)
    return 0


def _facts(path: Path, source: ModelSource, sizes: ModelSizes) -> dict[str, Any]:
    from localrun.quant.checkpoint.kept import KeptSource
    from localrun.quant.locate import locate

    return {
        "path": str(path.absolute()),
        "kind": locate(path).kind,
        "name": sizes.name,
        "architecture": sizes.shape.architecture,
        "identity": source.identity,
        "experts_in": str(source.checkpoint) if isinstance(source, KeptSource) else None,
        "files": [{"name": file.name, "size_bytes": file.stat().st_size} for file in source.files],
        "n_layers": sizes.shape.n_layers,
        "n_moe_layers": len(source.moe_layers),
        "n_experts": sizes.shape.n_experts,
        "n_experts_used": sizes.shape.n_used,
        "context": sizes.shape.n_ctx_train,
        "dense_bytes": sizes.dense_bytes,
        "dense": dict(sizes.dense),
        "experts": [{"type": g.name, "count": g.count, "size_bytes": g.count * g.file_bytes} for g in sizes.experts],
        "convertible": sizes.convertible,
        "has_tokenizer": "tokenizer.ggml.tokens" in source.metadata,
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    files = facts["files"]
    by_size = sorted(facts["dense"].items(), key=lambda part: -part[1])
    total = format_size(sum(file["size_bytes"] for file in files))
    lines = [
        f"model    {facts['name']} ({facts['architecture']}), {facts['n_layers']} layers",
        f"path     {facts['path']}",
        f"kind     {facts['kind']}",
        f"files    {len(files)}, {total}: {files[0]['name']}" + (f" to {files[-1]['name']}" if len(files) > 1 else ""),
        f"dense    {format_size(facts['dense_bytes'])}: "
        + ", ".join(f"{part} {format_size(size)}" for part, size in by_size),
    ]
    if facts["n_moe_layers"]:
        lines.append(
            f"experts  {facts['n_experts']} in each of {facts['n_moe_layers']} layers, {facts['n_experts_used']} per token: "
            + ", ".join(f"{g['count']} in {g['type']} ({format_size(g['size_bytes'])})" for g in facts["experts"])
        )
    if facts["experts_in"] is not None:
        lines.append(f"         read from the checkpoint {facts['experts_in']}")
    lines.append(f"context  {facts['context'] or 'unknown'} tokens at most")
    if not facts["has_tokenizer"]:
        lines.append("note     no tokenizer: bench works, but chat doesn't")
    return lines

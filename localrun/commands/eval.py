"""`localrun eval`: logits of given tokens, or perplexity of a text and its distance from a reference model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import structs

from localrun import paths
from localrun.api.options import engine_options
from localrun.api.texts import read_text
from localrun.commands import common
from localrun.commands.output import Output, ProgressLine
from localrun.engine.options import EngineOptions
from localrun.engine.process.process import EngineProcess
from localrun.engine.process.protocol import EvalText, EvalTextResult
from localrun.errors import UsageError

EXAMPLES = """\
examples:
  localrun eval ~/models/v4-flash --tokens ids.json --logits logits.npy
  localrun eval ~/models/v4-flash-2bit --text book.txt --reference ~/models/v4-flash --max-tokens 4096
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun eval`."""
    parser.epilog = EXAMPLES
    common.add_model_argument(parser, optional=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tokens", type=Path, metavar="FILE", help="JSON list of token ids; needs --logits")
    what.add_argument("--text", type=Path, metavar="FILE", help="text to measure perplexity on")
    parser.add_argument(
        "--logits",
        type=Path,
        metavar="OUT.npy",
        help="write the logits of all positions to this file, float32 (T, n_vocab)",
    )
    parser.add_argument("--reference", metavar="MODEL", help="with --text: compare with this model's distributions")
    parser.add_argument(
        "--window", type=common.count(2), default=512, metavar="N", help="with --text: tokens per window (512)"
    )
    parser.add_argument(
        "--max-tokens", type=common.count(0), default=0, metavar="N", help="with --text: only the first N tokens"
    )
    parser.add_argument("--math", choices=("int8", "f32"), default="int8", help="arithmetic of the experts (int8)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_load_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    out = Output()
    settings = common.settings_of(args)
    options = engine_options(settings, math=args.math)
    model = common.model_path(args, settings, out)
    if args.tokens is not None:
        return _logits(args, model, options, out)
    if args.logits is not None:
        raise UsageError("--logits needs --tokens")
    return _text(args, model, options, out)


def _logits(args: argparse.Namespace, model: Path, options: EngineOptions, out: Output) -> int:
    if args.logits is None:
        raise UsageError("--tokens needs --logits OUT.npy")
    tokens = _read_tokens(args.tokens)
    # Without --context the context is as long as the tokens need.
    options = replace(options, n_ctx=options.n_ctx or len(tokens))
    with _loaded(args, model, options, out) as engine:
        for event in engine.evaluate(tokens, args.logits.absolute()):
            common.show_progress(event, out)
    out.clear_status()
    if args.json:
        out.json({"n_tokens": len(tokens), "logits": str(args.logits)})
    else:
        out.note(f"{args.logits}: logits of {len(tokens)} positions")
    return 0


def compare(
    args: argparse.Namespace, model: Path, reference: Path, options: EngineOptions, command: EvalText, out: Output
) -> EvalTextResult:
    """Runs both models on one text, one after the other, because each may need all memory."""
    with paths.scratch_folder("eval-") as folder:
        _measure(args, reference, replace(options, dense=None), structs.replace(command, save_folder=str(folder)), out)
        return _measure(args, model, options, structs.replace(command, reference_folder=str(folder)), out)


def _text(args: argparse.Namespace, model: Path, options: EngineOptions, out: Output) -> int:
    options = replace(options, n_ctx=options.n_ctx or args.window)
    command = EvalText(text=read_text(args.text), window=args.window, max_tokens=args.max_tokens)
    if args.reference is None:
        result = _measure(args, model, options, command, out)
    else:
        result = compare(args, model, common.named_model(args.reference, out, command="eval"), options, command, out)
    values = {key: value for key, value in structs.asdict(result).items() if key != "request" and value is not None}
    if args.json:
        out.json({"model": str(model), "window": args.window, **values})
        return 0
    out.line(f"perplexity {result.perplexity:.4f} over {result.n_tokens} tokens in windows of {args.window}")
    if result.kl_mean is not None:
        out.line(f"reference perplexity {result.reference_perplexity:.4f}")
        out.line(
            f"KL from the reference: mean {result.kl_mean:.6f}, median {result.kl_median:.6f}, 99th percentile "
            f"{result.kl_p99:.6f}, largest {result.kl_max:.6f} nats"
        )
        out.line(f"same top token: {result.top1_agreement:.2%}")
    return 0


def _measure(
    args: argparse.Namespace, model: Path, options: EngineOptions, command: EvalText, out: Output
) -> EvalTextResult:
    with _loaded(args, model, options, out) as engine:
        progress = ProgressLine(out, in_bytes=False, unit="tokens")
        for event in engine.evaluate_text(command):
            if isinstance(event, EvalTextResult):
                out.clear_status()
                return event
            progress(event.done, event.total)
    raise AssertionError("the iterator ends with EvalTextResult")


@contextmanager
def _loaded(args: argparse.Namespace, model: Path, options: EngineOptions, out: Output) -> Iterator[EngineProcess]:
    with common.engine_process(args, out) as engine:
        common.load(engine, model, options, out)
        yield engine


def _read_tokens(path: Path) -> tuple[int, ...]:
    try:
        value: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path}: not JSON: {error}") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if not isinstance(value, list) or not value or not all(type(token) is int for token in value):
        raise UsageError(f"{path}: expected a JSON list of token ids")
    return tuple(value)

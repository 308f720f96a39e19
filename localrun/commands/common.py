"""What commands that load a model share: options, the choice of the model, loading with progress."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from localrun import config
from localrun.commands import demo
from localrun.commands.output import Output
from localrun.engine.facts import ModelFacts, Timings
from localrun.engine.options import EngineOptions, SamplingOptions
from localrun.engine.process.process import EngineProcess
from localrun.engine.process.protocol import Event, Loading, PromptProgress, Ready
from localrun.errors import UsageError
from localrun.units import format_duration, parse_size


def size(text: str) -> int:
    """argparse type of a size option."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error} ({error.hint})") from None


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that loads a model; the user's settings are the defaults."""
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--ram", type=size, metavar="SIZE", help="memory for experts, e.g. 16GiB (default: what is free)"
    )
    group.add_argument("--vram", type=size, metavar="SIZE", help="memory on the GPU (default: what is free)")
    group.add_argument("--gpu", metavar="auto|none|NAME,...", help="which GPUs")
    group.add_argument("--rpc", metavar="HOST:PORT,...", help="GPUs of other machines: their llama.cpp rpc-server")
    group.add_argument("--context", type=int, metavar="N", help="tokens of context")
    group.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="tokens of a prompt per step (512): more read long prompts faster, from the drive or through a GPU, and need memory",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: physical cores)")
    group.add_argument("--mirror", metavar="MODEL", help="a second copy on another drive, read in parallel")
    group.add_argument(
        "--adaptive",
        action="store_true",
        default=None,
        help="answer a miss from the smaller copy, fetch the better one later; the same seed may give other tokens",
    )
    group.add_argument("--kv", metavar="f16|bf16|q8_0|q4_0|f32", help="number format of the KV cache (f16)")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that generates text."""
    group = parser.add_argument_group("answers")
    group.add_argument("--think", metavar="off|high|max", help="how much the model reasons before it answers")
    group.add_argument(
        "--temp", dest="temperature", type=float, metavar="T", help="temperature; 0: always the most likely token"
    )
    group.add_argument("--top-p", type=float, metavar="P", help="keep the most likely tokens of this total probability")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely tokens; 0: all")
    group.add_argument("--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the first")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same answer")
    group.add_argument("--max-tokens", type=int, metavar="N", help="end the answer after N tokens")


def settings_of(args: argparse.Namespace) -> config.Settings:
    """The user's settings, overridden by what was typed."""
    settings = config.load()
    return config.Settings(**{f.name: _override(getattr(settings, f.name), args) for f in dataclasses.fields(settings)})


def engine_options(settings: config.Settings, *, math: Literal["int8", "f32"] = "int8") -> EngineOptions:
    """How to load a model."""
    engine = settings.engine
    return EngineOptions(
        ram_bytes=engine.ram,
        vram_bytes=engine.vram,
        gpu=engine.gpu,
        rpc=engine.rpc,
        n_ctx=engine.context,
        n_threads=engine.threads,
        n_batch=engine.batch,
        kv_type=engine.kv,
        mirror=engine.mirror,
        adaptive=engine.adaptive,
        math=math,
    )


def sampling_options(settings: config.Settings, seed: int | None) -> SamplingOptions:
    """How to choose tokens."""
    sampling = settings.sampling
    return SamplingOptions(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=seed,
    )


def model_path(settings: config.Settings, out: Output) -> Path:
    """The model that was named, or the demo model, converted on its first use.

    Raises:
        UsageError: none was named and this installation has no demo model.
    """
    if settings.engine.model is not None:
        return Path(settings.engine.model).expanduser()
    out.status("preparing the demo model")
    path = demo.converted()
    out.clear_status()
    return path


@contextmanager
def engine_process(args: argparse.Namespace, out: Output) -> Iterator[EngineProcess]:
    """An engine process for the command's time; with `--debug` its log is shown at the end."""
    with EngineProcess() as engine:
        engine.start()  # it imports its libraries while we look for the model
        try:
            yield engine
        finally:
            out.end_line()
            if args.debug:
                for line in engine.log_tail():
                    out.note(line)


def load(
    engine: EngineProcess,
    path: Path,
    options: EngineOptions,
    out: Output,
    *,
    each: Callable[[Loading | Ready], None] | None = None,
) -> ModelFacts:
    """Loads a model and shows how far it is; `each` is handed every event, too."""
    for event in engine.load(path, options):
        if isinstance(event, Loading) and out.err_is_terminal:
            for line in event.plan:
                out.note(line)
        show_progress(event, out)
        if each is not None:
            each(event)
    facts = engine.facts
    assert facts is not None
    return facts


def show_progress(event: Event, out: Output) -> None:
    """Puts loading and prefill on the status line."""
    if isinstance(event, Loading):
        out.status(f"loading {event.progress:4.0%}  {event.text}")
    elif isinstance(event, PromptProgress) and event.total - event.reused > 1:
        rest_s = event.elapsed_s / max(1, event.done - event.reused) * (event.total - event.done)
        left = f", {format_duration(rest_s)} left" if event.done > event.reused else ""
        out.status(f"reading the prompt: {event.done} of {event.total} tokens{left}")
    elif isinstance(event, Ready):
        out.clear_status()


def speed(timings: Timings, plan: Mapping[str, Any] | None = None) -> str:
    """One line about the cost of an answer, beside what the load's plan said."""
    parts = [f"{timings.new_tokens} tokens"]
    if (rate := timings.decode_tokens_per_s) is not None:
        said = (plan or {}).get("decode")
        expected = f" (planned: {_rate(said['low'])} to {_rate(said['high'])})" if said else ""
        parts.append(f"{rate:.1f} tokens/s{expected}")
    if (rate := timings.prompt_tokens_per_s) is not None:
        parts.append(f"prompt {timings.prompt_tokens - timings.reused_tokens} tokens at {rate:.1f} tokens/s")
    return ", ".join(parts)


def _rate(estimate: Mapping[str, Any]) -> str:
    return f"{estimate['tokens_per_s']:.2g}"


def _override(table: Any, args: argparse.Namespace) -> Any:
    """`table` with the values of those options that were typed; options are named as the settings are."""
    names = [f.name for f in dataclasses.fields(table)]
    typed = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    return dataclasses.replace(table, **typed)

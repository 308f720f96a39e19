"""Every option that a user may set, declared once: name, type, bounds, unit, meaning, and where it applies.

Everything else is derived from here: the tables of `config.toml` and the `LOCALRUN_*` variables (`config.py`), the commands'
flags (`add_flags`), `/set` and the settings dialog of the terminal UI, shell completion, the engine's checks (`check`), and
the reference in docs/options.md. The server parses request fields with `Option.parse`, by the same names.

Standard library only. Limits of the machine or the model are checked elsewhere: see `engine/memory.py` and `Engine.open`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from localrun.errors import UsageError
from localrun.option import Option, OptionKind, Where

KV_TYPES = ("f16", "bf16", "q8_0", "q4_0", "f32")
"""Number formats of the KV cache, by ggml's names in lower case."""
OWN_KV_TYPES = ("f16", "q8_0")
"""Those that our kernels for DeepSeek-V4's attention read (`offload/kernels/attention.py`: ROW_TYPES)."""

DENSE_CHOICES = ("q8_0", "q6_k", "q5_k", "q4_k", "bf16", "f32")
"""What dense matrices can become: repeated from `quant.checkpoint.mapping`, which takes long to import; a test compares them."""

THINK_MODES = ("off", "high", "max")
"""Of the models that localrun is made for; another model may have others (`ModelFacts.think_modes`)."""


_LOAD = frozenset({Where.FILE, Where.FLAG, Where.DIALOG})
_ANSWER = frozenset({Where.FILE, Where.FLAG, Where.CHAT})
_FLAG = frozenset({Where.FLAG})
_ONE_ANSWER = frozenset({Where.FLAG, Where.CHAT})
_REQUEST = frozenset({Where.REQUEST})

MAX_SEED = 2**32 - 2
"""2**32 - 1 is llama.cpp's LLAMA_DEFAULT_SEED, "draw one"."""

OPTIONS: tuple[Option, ...] = (
    Option(
        name="model",
        table="engine",
        kind=OptionKind.PATH,
        help="model to use when none is given: a path, or a name from [models]",
        unset="without one: the demo model",
        where=frozenset({Where.FILE}),
    ),
    Option(
        name="ram",
        table="engine",
        kind=OptionKind.SIZE,
        field="ram_bytes",
        help="RAM for experts",
        unset="without it: what is free, minus some headroom",
        where=_LOAD,
    ),
    Option(
        name="vram",
        table="engine",
        kind=OptionKind.SIZE,
        field="vram_bytes",
        help="GPU memory to use, across all GPUs",
        unset="without it: what is free",
        where=_LOAD,
    ),
    Option(
        name="gpu",
        table="engine",
        kind=OptionKind.TEXT,
        field="gpu",
        default="auto",
        choices=("auto", "none"),
        help="GPUs to use: auto, none, or a comma-separated list of names from `localrun doctor`",
        metavar="auto|none|NAME,...",
        where=_LOAD,
    ),
    Option(
        name="rpc",
        table="engine",
        kind=OptionKind.TEXT,
        field="rpc",
        help="GPUs on other machines: comma-separated addresses of llama.cpp rpc-servers",
        unset="without it: none",
        metavar="HOST:PORT,...",
    ),
    Option(
        name="context",
        table="engine",
        kind=OptionKind.COUNT,
        field="n_ctx",
        default=0,
        low=0,
        high=2**24,
        unit="tokens",
        help="context length in tokens; 0: what the model was trained for, at most 32768",
        where=_LOAD,
    ),
    Option(
        name="threads",
        table="engine",
        kind=OptionKind.COUNT,
        field="n_threads",
        default=0,
        low=0,
        high=4096,
        help="CPU threads; 0: one per physical core",
        where=_LOAD,
    ),
    Option(
        name="batch",
        table="engine",
        kind=OptionKind.COUNT,
        field="n_batch",
        default=0,
        low=0,
        high=16384,
        unit="tokens",
        help="prompt tokens per batch; larger batches read long prompts faster but need more memory; 0: the plan chooses",
        where=_LOAD,
    ),
    Option(
        name="kv",
        table="engine",
        kind=OptionKind.CHOICE,
        field="kv_type",
        default="f16",
        choices=KV_TYPES,
        help="data type of the KV cache",
        where=_LOAD,
    ),
    Option(
        name="dense",
        table="engine",
        kind=OptionKind.CHOICE,
        field="dense",
        choices=DENSE_CHOICES,
        help="official checkpoints only: type to convert the FP8 dense matrices to when loading",
        unset="without it: q8_0",
        where=_FLAG,
    ),
    Option(
        name="keep_dense",
        table="engine",
        kind=OptionKind.SIZE,
        field="keep_dense_bytes",
        default=40 << 30,
        help="official checkpoints only: most space in the cache folder for dense matrices that were converted when loading, of"
        " the last two models; the next start only reads them; 0B: none",
    ),
    Option(
        name="mirror",
        table="engine",
        kind=OptionKind.PATH,
        field="mirror",
        help="a second copy of the model on another drive; both are read in parallel",
        unset="without it: none",
        metavar="MODEL",
    ),
    Option(
        name="adaptive",
        table="engine",
        kind=OptionKind.SWITCH,
        field="adaptive",
        default=False,
        help="on a miss, use the smaller copy and fetch the better one later; the same seed may then give different tokens",
        where=_LOAD,
    ),
    Option(
        name="temperature",
        table="sampling",
        kind=OptionKind.NUMBER,
        field="temperature",
        default=1.0,
        low=0,
        high=100,
        flag="--temp",
        short=("temp",),
        metavar="T",
        help="sampling temperature; 0 always picks the most likely token",
        where=_ANSWER,
    ),
    Option(
        name="top_p",
        table="sampling",
        kind=OptionKind.NUMBER,
        field="top_p",
        default=1.0,
        low=0,
        high=1,
        short=("p",),
        metavar="P",
        help="keep the most likely tokens up to this total probability; 1 keeps all",
        where=_ANSWER,
    ),
    Option(
        name="top_k",
        table="sampling",
        kind=OptionKind.COUNT,
        field="top_k",
        default=0,
        low=0,
        high=2**31 - 1,
        short=("k",),
        metavar="K",
        help="keep the K most likely tokens; 0 keeps all",
        where=_ANSWER,
    ),
    Option(
        name="min_p",
        table="sampling",
        kind=OptionKind.NUMBER,
        field="min_p",
        default=0.0,
        low=0,
        high=1,
        metavar="P",
        help="keep tokens at least P times as likely as the most likely one; 0 keeps all",
        where=_ANSWER,
    ),
    Option(
        name="seed",
        table="sampling",
        kind=OptionKind.COUNT,
        field="seed",
        low=0,
        high=MAX_SEED,
        help="random seed; the same seed, model and prompt give the same answer",
        unset="without it: a different one each time",
        where=_ONE_ANSWER,
    ),
    Option(
        name="max_tokens",
        table="sampling",
        kind=OptionKind.COUNT,
        low=1,
        high=2**24,
        unit="tokens",
        short=("max",),
        help="stop an answer after this many tokens",
        unset="without it: until the context is full",
        where=_ONE_ANSWER,
    ),
    Option(
        name="repeat_penalty",
        table="sampling",
        kind=OptionKind.NUMBER,
        field="repeat_penalty",
        default=1.0,
        low=0.01,
        high=100,
        help="divides the logits of tokens already in the answer; 1 has no effect",
        where=_REQUEST,
    ),
    Option(
        name="presence_penalty",
        table="sampling",
        kind=OptionKind.NUMBER,
        field="presence_penalty",
        default=0.0,
        low=-2,
        high=2,
        help="subtracted from the logits of tokens already in the answer",
        where=_REQUEST,
    ),
    Option(
        name="frequency_penalty",
        table="sampling",
        kind=OptionKind.NUMBER,
        field="frequency_penalty",
        default=0.0,
        low=-2,
        high=2,
        help="subtracted from the logits of tokens already in the answer, once per occurrence",
        where=_REQUEST,
    ),
    Option(
        name="think",
        table="sampling",
        kind=OptionKind.TEXT,
        default="off",
        choices=THINK_MODES,
        metavar="off|high|max",
        help="how much the model reasons before answering",
    ),
    Option(
        name="notify",
        table="interface",
        kind=OptionKind.CHOICE,
        default="bell",
        choices=("bell", "desktop", "off"),
        help="how the terminal UI announces a long answer: terminal bell, desktop notification, or not at all",
        where=frozenset({Where.FILE}),
    ),
)

BY_NAME: Mapping[str, Option] = {option.name: option for option in OPTIONS}
TABLES: tuple[str, ...] = tuple(dict.fromkeys(option.table for option in OPTIONS))


def those(table: str | None = None, where: Where | None = None) -> tuple[Option, ...]:
    """Options of a table and a place, in their order."""
    return tuple(o for o in OPTIONS if table in (None, o.table) and (where is None or where in o.where))


def check(**values: Any) -> None:
    """Checks values by option name. Raises UsageError."""
    for name, value in values.items():
        BY_NAME[name].check(value)


def check_fields(table: str, owner: object) -> None:
    """Checks an `EngineOptions` or `SamplingOptions`, by its fields. Raises UsageError."""
    for option in those(table):
        if option.field:
            option.check(getattr(owner, option.field))


def fields_of(table: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for `EngineOptions` or `SamplingOptions` from values by option name; missing ones keep their defaults."""
    return {o.field: values[o.name] for o in those(table) if o.field and o.name in values}


def add_flags(parser: argparse.ArgumentParser, title: str, options: Iterable[Option]) -> None:
    """Adds the flags of these options, in a group; they all default to None, "not typed".

    `option_names` of the parsed arguments lists the options whose flags a command has.
    """
    group = parser.add_argument_group(title)
    for option in options:
        if option.kind is OptionKind.SWITCH:
            group.add_argument(
                option.flag_name, dest=option.name, action="store_true", default=None, help=_help(option)
            )
            continue
        action = group.add_argument(
            option.flag_name,
            dest=option.name,
            type=_argument(option),
            metavar=option.metavar or _metavar(option),
            help=_help(option),
        )
        if option.kind is OptionKind.CHOICE:
            action.choices = option.choices
    names: Sequence[str] = parser.get_default("option_names") or ()
    parser.set_defaults(option_names=(*names, *(option.name for option in options)))


def _argument(option: Option) -> Any:
    """argparse's `type` of an option."""

    def parse(text: str) -> Any:
        try:
            return option.parse(text)
        except UsageError as error:
            # argparse puts the flag before it.
            reason = str(error).removeprefix(f"{option.name}: ").removeprefix(f"{option.name} ")
            raise argparse.ArgumentTypeError(f"{reason}{f' ({error.hint})' if error.hint else ''}") from None

    return parse


def _metavar(option: Option) -> str:
    if option.kind is OptionKind.CHOICE:
        return "|".join(option.choices)
    return {OptionKind.SIZE: "SIZE", OptionKind.COUNT: "N", OptionKind.NUMBER: "X", OptionKind.PATH: "PATH"}.get(
        option.kind, "TEXT"
    )


def _help(option: Option) -> str:
    """With the default, for `--help`."""
    if option.kind is OptionKind.SWITCH:
        text = option.help
    elif option.default is None:
        text = f"{option.help} ({option.unset.replace('without it: ', 'default: ')})" if option.unset else option.help
    else:
        text = f"{option.help} ({option.show(option.default)})"
    return text.replace("%", "%%")


def reference() -> str:
    """docs/options.md: all options in tables."""
    lines = [_REFERENCE_HEAD]
    for table in TABLES:
        lines += [f"## [{table}]\n", "| name | flag | value | default | what it does |", "|---|---|---|---|---|"]
        for option in those(table):
            flag = f"`{option.flag_name}`" if Where.FLAG in option.where else ""
            where = " (requests to a server)" if Where.REQUEST in option.where else " (not in the file)"
            name = f"`{option.name}`" + ("" if Where.FILE in option.where else where)
            default = f"`{option.show(option.default)}`" if option.default is not None else ""
            more = f"; {option.unset}" if option.unset else ""
            value = option.bounds + (f" {option.unit}" if option.unit else "")
            if option.kind is OptionKind.TEXT and option.choices:
                value += ", …"
            lines.append(f"| {name} | {flag} | {value} | {default} | {option.help}{more} |")
        lines.append("")
    return "\n".join(lines)


_REFERENCE_HEAD = """\
# Options

Generated from `localrun/options.py`; a test compares them. Each option has one name and one meaning, wherever it is set:

* in `~/.config/localrun/config.toml` (or `$LOCALRUN_CONFIG_DIR/config.toml`), in the table named in the section heading,
* as the environment variable `LOCALRUN_<NAME>`,
* as a flag of the commands that load a model or generate text,
* in the terminal UI, with `/set NAME VALUE` or in the settings (F4).

Defaults < file < environment < flag. Sizes need a unit: `16GiB` is 16 × 2³⁰ bytes, `16GB` is 16 × 10⁹.

Model names go in the table `[models]` and can be used wherever a command takes a MODEL:

    [models]
    flash2 = "/models/v4-flash-2bit"

`LOCALRUN_CACHE_DIR`, `LOCALRUN_DATA_DIR`, `LOCALRUN_CONFIG_DIR` and `LOCALRUN_KERNEL_DIR` move localrun's folders.
`LOCALRUN_MODELS` is a colon-separated list of folders that `localrun list` and the terminal UI search for models.
"""


if __name__ == "__main__":
    print(reference(), end="")

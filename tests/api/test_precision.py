"""Formats that were asked for: recipe and options together, and what excludes what, before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as QT

from localrun.api.precision import FormatOptions, Request, evaluation_types, format_options, needs_learning
from localrun.errors import UsageError
from localrun.quant.model.source import MoeLayer
from localrun.quant.precision.solver import HotBudget, Target

GIB = 1 << 30


def asked(**options: Any) -> FormatOptions:
    return format_options(Request(source=Path("in"), target_folder=Path("out"), **options), "q8_0")


def test_without_options_nothing_is_to_be_learned() -> None:
    options = asked()
    assert (options.base, options.dense, options.hot, options.target) == (None, "q8_0", (), None)
    assert not options.wants_better_copies
    assert not needs_learning(options, Request(source=Path("in"), target_folder=Path("out")))


def test_formats_and_budgets_are_read() -> None:
    options = asked(base="q2_k", dense="bf16", hot=["mxfp4:8GiB", "q8_0:500MB"])
    assert (options.base, options.dense) == (QT.Q2_K, "bf16")
    assert options.hot == (HotBudget(QT.MXFP4, 8 * GIB), HotBudget(QT.Q8_0, 500_000_000))
    assert options.wants_better_copies
    assert asked(target="24GiB-vram,64GiB-ram").target == Target(vram_bytes=24 * GIB, ram_bytes=64 * GIB)


def test_none_takes_better_copies_away() -> None:
    options = asked(hot=["none"])
    assert options.remove_overlay
    assert not options.wants_better_copies


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base": "q9"}, "q9"),
        ({"dense": "q9"}, "q9"),
        ({"hot": ["mxfp4"]}, "mxfp4"),
        ({"hot": ["q9:1GiB"]}, "q9"),
        ({"hot": ["none", "mxfp4:1GiB"]}, "none"),
        ({"hot": ["mxfp4:1GiB"], "target": "8GiB-ram"}, "--hot|--target"),
        ({"target": "lots"}, "lots"),
        ({"recipe": "no such recipe"}, "no such recipe"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        asked(**options)


def test_models_are_compared_with_formats_that_say_something() -> None:
    layers = {0: MoeLayer(0, 4, 256, 256, (QT.MXFP4,) * 3, 1)}

    def types(words: str, text: Path | None = Path("book.txt")) -> list[QT]:
        wanted = Request(source=Path("in"), target_folder=Path("out"), evaluate=text, evaluate_types=words)
        return evaluation_types(wanted, layers)

    assert types("q4_k,q2_k") == [QT.Q4_K, QT.Q2_K]
    assert types("") == []
    with pytest.raises(UsageError, match="q9"):
        types("q9")
    with pytest.raises(UsageError, match="needs a text"):
        types("q4_k", None)

"""One declaration per option: everything that takes a value takes the same ones."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

import pytest

from localrun import config, options
from localrun.engine.engine import check_options
from localrun.engine.options import EngineOptions, SamplingOptions, check_answer, check_lengths
from localrun.engine.sampling import check
from localrun.errors import UsageError
from localrun.option import Option, OptionKind, Where
from localrun.options import BY_NAME, OPTIONS, those
from localrun.tui.options import ChatOptions, with_value
from localrun.units import parse_rate, parse_size

NO_OPTIONS = {"logit_bias"}
"""A list, which only a request to a server can have; the sampler checks it against the vocabulary."""

NO_FLAGS = {"math", "cache_in_ram"}
"""For comparisons, and what a load sets itself when a card has no room for the KV cache."""

BOUNDED = [option for option in OPTIONS if option.kind in (OptionKind.COUNT, OptionKind.NUMBER)]


def test_every_field_is_declared_and_every_declared_field_exists() -> None:
    declared = {option.field for option in those("engine") if option.field}
    assert declared == {field.name for field in fields(EngineOptions)} - NO_FLAGS
    declared = {option.field for option in those("sampling") if option.field}
    assert declared == {field.name for field in fields(SamplingOptions)} - NO_OPTIONS
    assert EngineOptions() == EngineOptions(**options.fields_of("engine", config.Settings().values))
    assert SamplingOptions() == SamplingOptions(**options.fields_of("sampling", config.Settings().values))


@pytest.mark.parametrize("option", BOUNDED, ids=lambda option: option.name)
def test_bounds_agree_in_file_environment_flag_chat_and_engine(option: Option, tmp_path: Path) -> None:
    step = 1 if option.kind is OptionKind.COUNT else 0.01
    inside = [option.low, option.high] if option.name != "threads" else [option.low]
    for value, right in [*((v, True) for v in inside), (option.low - step, False), (option.high + step, False)]:
        typed = int(value) if option.kind is OptionKind.COUNT else value
        takers = [_in_file, _in_environment] if Where.FILE in option.where else []
        takers += [_as_flag] if Where.FLAG in option.where else []
        takers += [_in_chat] if Where.CHAT in option.where else []
        takers += [_in_engine] if option.field else []
        for taker in takers:
            if right:
                taker(option, typed, tmp_path)
            else:
                with pytest.raises((UsageError, SystemExit)):
                    taker(option, typed, tmp_path)


def _in_file(option: Option, value: float, folder: Path) -> None:
    path = folder / "config.toml"
    path.write_text(f"[{option.table}]\n{option.name} = {value}\n")
    assert config.load(path, {})[option.name] == value


def _in_environment(option: Option, value: float, folder: Path) -> None:
    assert config.load(folder / "none.toml", {option.variable: str(value)})[option.name] == value


def _as_flag(option: Option, value: float, folder: Path) -> None:
    parser = argparse.ArgumentParser()
    options.add_flags(parser, "t", [option])
    assert getattr(parser.parse_args([f"{option.flag_name}={value}"]), option.name) == value


def _in_chat(option: Option, value: float, folder: Path) -> None:
    with_value(ChatOptions(), option.name, str(value))


def _in_engine(option: Option, value: float, folder: Path) -> None:
    if option.table == "engine":
        check_options(replace(EngineOptions(), **{option.field: value}))
    else:
        check(replace(SamplingOptions(), **{option.field: value}))


@pytest.mark.parametrize("value", [True, "", "many", "nan", 1.5, [], None, "1e999"])
def test_what_is_no_whole_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(UsageError, match="top_k"):
        BY_NAME["top_k"].parse(value)


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), True, "warm"])
def test_what_is_no_temperature_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="temperature"):
        BY_NAME["temperature"].parse(value)


def test_values_of_json_and_text_mean_the_same() -> None:
    assert BY_NAME["temperature"].parse(1) == BY_NAME["temperature"].parse("1.0") == 1.0
    assert BY_NAME["seed"].parse(7.0) == BY_NAME["seed"].parse("7") == 7
    assert BY_NAME["adaptive"].parse(True) is BY_NAME["adaptive"].parse("yes") is True
    assert BY_NAME["kv"].parse("q8_0") == "q8_0"
    with pytest.raises(UsageError, match="f16, bf16"):
        BY_NAME["kv"].parse("q9_0")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_what_is_shown_can_be_typed(option: Option) -> None:
    if option.default is not None:
        assert option.parse(option.show(option.default)) == option.default


@pytest.mark.parametrize(
    ("text", "meant"),
    [("24", "24GiB"), ("500", "500GiB"), ("20000", "20000MiB"), ("1073741824", "1073741824B (1.00 GiB)")],
)
def test_sizes_without_a_unit_are_refused_with_what_was_meant(text: str, meant: str) -> None:
    with pytest.raises(UsageError, match="no unit") as refused:
        parse_size(text)
    assert refused.value.hint == f"did you mean {meant}?"


def test_zero_needs_no_unit() -> None:
    assert parse_size("0") == 0


def test_a_size_beyond_any_machine_is_refused() -> None:
    with pytest.raises(UsageError, match="larger than any machine"):
        parse_size("99999999999TiB")


@pytest.mark.parametrize(
    ("text", "bytes_per_s"), [("7GB/s", 7 * 10**9), ("1.5 GiB/s", 3 << 29), (" 930GB ", 930 * 10**9)]
)
def test_rates_are_bytes_per_second(text: str, bytes_per_s: int) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize("text", ["7", "0", "0GB/s", "-1GB/s", "7Gb/min", "nan", ""])
def test_rates_without_a_unit_or_of_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a rate") as refused:
        parse_rate(text)
    assert refused.value.hint == "write for example 7GB/s"


def test_reference_is_up_to_date() -> None:
    path = Path(options.__file__).parent.parent / "docs/options.md"
    assert path.read_text("utf-8") == options.reference(), "python -m localrun.options > docs/options.md"


def test_misspelt_names_in_the_chat_are_answered_with_the_right_one() -> None:
    with pytest.raises(UsageError) as refused:
        with_value(ChatOptions(), "temprature", "1")
    assert "did you mean temperature?" in str(refused.value.hint)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_none_is_a_value_of_options_without_a_default_only(option: Option) -> None:
    if option.default is None or option.kind not in (
        OptionKind.COUNT,
        OptionKind.NUMBER,
        OptionKind.SIZE,
        OptionKind.CHOICE,
    ):
        option.check(None)
        return
    with pytest.raises(UsageError, match=f"{option.name} None: expected"):
        option.check(None)


@pytest.mark.parametrize("option", BOUNDED, ids=lambda option: option.name)
@pytest.mark.parametrize("value", ["1", True, [1]])
def test_what_is_no_number_is_out_of_every_bound(option: Option, value: object) -> None:
    with pytest.raises(UsageError, match=f"{option.name} .*: expected"):
        option.check(value)


@pytest.mark.parametrize(("value", "text"), [(0.3, "0.3"), (1.0, "1"), (0.00002, "0.00002"), (0.05, "0.05")])
def test_numbers_are_shown_without_exponents(value: float, text: str) -> None:
    assert BY_NAME["min_p"].show(value) == text


def test_lengths_are_checked_against_the_model() -> None:
    check_lengths(4096, n_ctx=4096, n_batch=4096)
    check_lengths(0, n_ctx=2**20, n_batch=16384)  # a model that doesn't say
    check_lengths(256, n_ctx=256, n_batch=0)  # the plan keeps to it
    with pytest.raises(UsageError, match="a context of 4097 tokens"):
        check_lengths(4096, n_ctx=4097, n_batch=512)
    with pytest.raises(UsageError, match="steps of 4097 tokens"):
        check_lengths(4096, n_ctx=0, n_batch=4097)
    check_lengths(0, n_ctx=256, n_batch=256)
    check_lengths(4096, n_ctx=1024, n_batch=1024)
    with pytest.raises(UsageError, match="steps of 1025 tokens are longer than a context of 1024"):
        check_lengths(4096, n_ctx=1024, n_batch=1025)
    check_answer(None, 512)
    check_answer(512, 512)
    with pytest.raises(UsageError, match="an answer of 513 tokens"):
        check_answer(513, 512)

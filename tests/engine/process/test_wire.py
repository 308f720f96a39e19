"""Messages survive their encoding, and nothing else decodes."""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, fields
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localrun.engine.facts import ModelFacts, Timings
from localrun.engine.options import EngineOptions, SamplingOptions
from localrun.engine.process import protocol
from localrun.engine.process.protocol import (
    CLOSING_EVENTS,
    Command,
    Delta,
    Event,
    Failed,
    Finished,
    Generate,
    Load,
    PromptCommand,
    Stats,
)
from localrun.engine.process.wire import ProtocolError, decode_command, decode_event, encode, messages

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    messages=st.lists(st.dictionaries(st.text(max_size=8), JSON, max_size=4), max_size=3).map(tuple),
    tokens=st.none() | st.lists(st.integers(0, 2**31), max_size=5).map(tuple),
    temperature=st.floats(0, 10),
    seed=st.none() | st.integers(0, 2**32),
)
def test_any_command_comes_back_equal_from_one_line(
    messages: tuple[dict[str, Any], ...], tokens: tuple[int, ...] | None, temperature: float, seed: int | None
) -> None:
    sampling = SamplingOptions(temperature=temperature, seed=seed)
    command = Generate(request=3, messages=messages, tokens=tokens, sampling=sampling)
    line = encode(command)
    assert line.isascii()
    assert line.index(b"\n") == len(line) - 1
    assert decode_command(line) == command


@given(text=st.text(st.characters(blacklist_categories=())), tokens=st.lists(st.integers(0, 2**31)).map(tuple))
def test_any_text_comes_back_equal_even_lone_surrogates(text: str, tokens: tuple[int, ...]) -> None:
    event = Delta(request=1, kind="thinking", text=text, tokens=tokens)
    assert decode_event(encode(event)) == event


def example(kind: type) -> Any:
    """An instance with a value in every required field."""
    values: dict[str, Any] = {
        "facts": {f.name: "x" if f.type == "str" else 1 for f in fields(ModelFacts) if f.default is MISSING},
        "timings": {"new_tokens": 3},
        "telemetry": {"a": [1, 2.5]},
        "kind": "text",
        "reason": "eos",
        "tokens": [1],
    }
    values["facts"]["has_tokenizer"] = True
    simple = {int: 1, float: 0.5, str: "x", bool: True}
    required = [field for field in msgspec.structs.fields(kind) if field.required]
    body = {f.name: values[f.name] if f.name in values else simple[f.type] for f in required}
    decode = decode_command if issubclass(kind, Command) else decode_event
    return decode(json.dumps({"type": kind.__name__, **body}).encode())


MESSAGES: list[type] = [*messages(Command), *messages(Event)]


def test_every_message_of_the_protocol_can_be_sent() -> None:
    bases = (Command, Event, PromptCommand)
    defined = [v for v in vars(protocol).values() if isinstance(v, type) and issubclass(v, (Command, Event))]
    assert set(MESSAGES) == set(defined) - set(bases)


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_message_decodes_to_itself(kind: type) -> None:
    message = example(kind)
    assert type(message) is kind
    decode = decode_command if issubclass(kind, Command) else decode_event
    assert decode(encode(message)) == message


@pytest.mark.parametrize("kind", [kind for kind in MESSAGES if issubclass(kind, Event)])
def test_docstrings_name_the_closing_event_of_a_command(kind: type) -> None:
    named = any(f"{kind.__name__}." in (command.__doc__ or "") for command in MESSAGES if issubclass(command, Command))
    assert (kind in CLOSING_EVENTS) == (named or kind is Failed)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"", "not a message"),
        (b"llama_decode: failed\n", "not a message"),
        (b"[1]", "not a message"),
        (b"[" * 100_000, "not a message"),
        (b"{}", "unknown event None"),
        (b'{"type":"Load"}', "unknown event 'Load'"),
        (b'{"type":"Event","request":1}', "unknown event 'Event'"),
        (b'{"type":"Json"}', "unknown event 'Json'"),
        (b'{"type":["Delta"]}', "unknown event"),
        (b'{"type":"Delta","request":1,"text":""}', "Delta: .*missing required field `kind`"),
        (b'{"type":"Delta","request":1,"kind":"text","text":"","more":1}', "Delta: .*unknown field `more`"),
        (b'{"type":"Delta","request":1,"kind":"song","text":""}', r"Delta: Invalid .*\.kind"),
        (b'{"type":"Delta","request":true,"kind":"text","text":""}', r"Delta: Expected `int`.*\.request"),
        (b'{"type":"Delta","request":1.0,"kind":"text","text":""}', r"Delta: Expected `int`.*\.request"),
        (
            b'{"type":"Delta","request":1,"kind":"text","text":"","tokens":[1,"2"]}',
            r"`int`, got `str` - at `\$.tokens\[1\]`",
        ),
        (b'{"type":"Stats","request":1,"busy":1,"context_used":0,"n_ctx":0,"rss_bytes":0,"telemetry":{}}', r"\.busy"),
        (b'{"type":"Finished","request":1,"reason":"eos","timings":[],"seed":1}', r"\.timings"),
        (
            b'{"type":"Finished","request":1,"reason":"eos","timings":{"x":1},"seed":1}',
            r"unknown field `x` - at `\$.timings",
        ),
    ],
)
def test_anything_else_is_refused(line: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        decode_event(line)


def test_bases_are_no_messages() -> None:
    with pytest.raises(ProtocolError, match="unknown command 'PromptCommand'"):
        decode_command(b'{"type":"PromptCommand"}')


def test_file_names_that_are_not_utf8_arrive_as_they_are() -> None:
    name = os.fsdecode(b"/models/caf\xe9.gguf")
    load = decode_command(encode(Load(path=name)))
    assert isinstance(load, Load)
    assert os.fsencode(load.path) == b"/models/caf\xe9.gguf"


def test_options_are_checked_inside_commands() -> None:
    line = encode(Load(path="x", options=EngineOptions(math="int8"))).replace(b'"int8"', b'"int4"')
    with pytest.raises(ProtocolError, match=r"Load: .*int4.*options.math"):
        decode_command(line)


def test_rates_are_none_where_nothing_was_measured() -> None:
    assert Timings().prompt_tokens_per_s is None
    assert Timings().decode_tokens_per_s is None
    timings = Timings(prompt_tokens=30, reused_tokens=10, prompt_s=2.0, new_tokens=8, decode_s=4.0)
    assert timings.prompt_tokens_per_s == 10
    assert timings.decode_tokens_per_s == 2


def test_numbers_without_json_form_travel_too() -> None:
    event = Finished(request=1, reason="eos", timings=Timings(prompt_s=float("inf")), seed=1)
    assert decode_event(encode(event)) == event
    stats = Stats(request=1, busy=False, context_used=0, n_ctx=0, rss_bytes=0, telemetry={"x": float("inf")})
    assert decode_event(encode(stats)) == stats

"""The whole way with the demo model: SDKs, HTTP, the engine process, llama.cpp; prefixes that are found again."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from localrun.api import demo
from localrun.engine.options import EngineOptions, SamplingOptions
from localrun.engine.process.process import EngineProcess
from tests.server.raw import post, send
from tests.server.running import Running, serving, wait_until

pytestmark = pytest.mark.engine_process

OPTIONS = EngineOptions(n_ctx=8192, n_threads=1, ram_bytes=64 << 20)
GREEDY = SamplingOptions(temperature=0, seed=1)
HI: list[Any] = [{"role": "user", "content": "Hello"}]
STORY: list[Any] = [{"role": "user", "content": "Tell me a long story about the sea."}]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FILLER = "The ship sailed along the coast and the men looked at the water. " * 40


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with EngineProcess() as engine:
        list(engine.load(demo.converted(), OPTIONS))
        yield engine


@pytest.fixture(scope="module")
def running(engine: EngineProcess) -> Iterator[Running]:
    with serving(engine, sampling=GREEDY, keep_alive_s=0.2) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(running: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=running.url, api_key="any", max_retries=0) as client:
        yield client


def asked(running: Running, messages: list[Any], **body: Any) -> dict[str, Any]:
    reply = post(running, "/v1/chat/completions", {"messages": messages, "max_tokens": 8, **body})
    assert reply.status == 200, reply.body
    result: dict[str, Any] = reply.json
    return result


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_same_answer_in_every_api_whole_and_streamed(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    whole = client.chat.completions.create(model="m", messages=HI, max_tokens=12).choices[0].message.content
    assert whole
    chunks = client.chat.completions.create(model="m", messages=HI, max_tokens=12, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert client.responses.create(model="m", input="Hello", max_output_tokens=12).output_text == whole
    with claude.messages.stream(model="m", messages=HI, max_tokens=12) as stream:
        assert "".join(stream.text_stream) == whole


def test_an_answer_that_may_not_end_is_as_long_as_its_bound(running: Running) -> None:
    free, endless = (asked(running, HI, max_tokens=300, ignore_eos=ignored) for ignored in (False, True))
    assert free["choices"][0]["finish_reason"] == "stop"
    assert endless["choices"][0]["finish_reason"] == "length"
    assert endless["usage"]["completion_tokens"] == 300


def test_thinking_and_its_budget(claude: anthropic.Anthropic) -> None:
    free = claude.messages.create(model="m", messages=HI, max_tokens=60, thinking={"type": "adaptive"})
    assert free.content[0].type == "thinking"
    short = claude.messages.create(
        model="m",
        messages=HI,
        max_tokens=60,
        thinking={"type": "enabled", "budget_tokens": 1024},
        extra_body={"thinking": {"type": "enabled", "budget_tokens": 2}},
    )
    assert [block.type for block in short.content] == ["thinking", "text"]
    assert len(short.content[0].thinking) < len(free.content[0].thinking)  # type: ignore[union-attr]


@pytest.mark.parametrize("effort", ["none", "high"])
def test_json_schema_is_enforced_behind_the_reasoning(client: openai.OpenAI, effort: Any) -> None:
    answer = client.chat.completions.create(
        model="m",
        messages=HI,
        max_tokens=300,
        reasoning_effort=effort,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}},
        extra_body={"thinking_budget": 20},
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert value["city"] in ("Oslo", "Rome")
    assert 1 <= value["days"] <= 9


def test_required_call_is_made_and_none_forbids_it(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
    answer = client.chat.completions.create(
        model="m", messages=HI, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=300
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    assert answer.choices[0].finish_reason == "tool_calls"
    silent = client.chat.completions.create(model="m", messages=HI, tools=tools, tool_choice="none", max_tokens=20)
    assert silent.choices[0].message.tool_calls is None
    assert silent.usage is not None
    assert answer.usage is not None
    assert silent.usage.prompt_tokens == answer.usage.prompt_tokens


@pytest.mark.parametrize("allowed", ["left", "right"])
def test_only_allowed_tools_are_called_and_the_prompt_is_the_same(client: openai.OpenAI, allowed: str) -> None:
    names = ("left", "right", "up")
    tools: Any = [{"type": "function", "function": {"name": name, "parameters": CITY}} for name in names]
    choice: Any = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": allowed}}]},
    }
    ask = functools.partial(client.chat.completions.create, model="m", messages=HI, tools=tools, max_tokens=200)
    answer = ask(tool_choice=choice, parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == allowed
    free = ask(tool_choice="auto", max_tokens=1)
    assert answer.usage is not None
    assert free.usage is not None
    assert answer.usage.prompt_tokens == free.usage.prompt_tokens


def test_log_probabilities_are_the_models(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=HI, max_tokens=5, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(t.token for t in logprobs.content) == answer.choices[0].message.content
    for token in logprobs.content:
        assert token.token == token.top_logprobs[0].token  # greedy
        assert token.logprob <= 0
        assert [t.logprob for t in token.top_logprobs] == sorted((t.logprob for t in token.top_logprobs), reverse=True)


def test_bias_and_penalties_change_the_answer(client: openai.OpenAI, running: Running) -> None:
    plain = client.chat.completions.create(model="m", messages=HI, max_tokens=4).choices[0].message.content
    first = post(running, "/tokenize", {"content": plain}).json["tokens"][0]
    banned = client.chat.completions.create(model="m", messages=HI, max_tokens=4, logit_bias={str(first): -100})
    assert banned.choices[0].message.content != plain
    wild = {"messages": STORY, "max_tokens": 40, "presence_penalty": 2, "frequency_penalty": 2}
    assert asked(running, **wild)["choices"][0]["message"]["content"] != asked(running, STORY, max_tokens=40)


@pytest.mark.parametrize(
    "body", [{"logit_bias": {"99999999": 1}}, {"presence_penalty": 7}, {"temperature": -1}, {"top_p": 2}]
)
def test_options_out_of_bounds_are_the_requests_fault(running: Running, body: dict[str, Any]) -> None:
    assert post(running, "/v1/chat/completions", {"messages": HI, **body}).status == 400


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "<x>", "arguments": "{}"}}]}, *HI], "name"),
        ([*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{}"}}]}], "continued"),
    ],
)
def test_messages_that_the_engine_refuses_are_the_requests_fault(
    running: Running, messages: list[Any], says: str
) -> None:
    for stream in (False, True):
        reply = post(running, "/v1/chat/completions", {"messages": messages, "stream": stream})
        assert reply.status == 400
        assert says in reply.json["error"]["message"]


def test_stop_string_and_what_was_counted(running: Running) -> None:
    whole = asked(running, HI, max_tokens=12)["choices"][0]["message"]["content"]
    stop = whole.split()[2]
    cut = asked(running, HI, max_tokens=12, stop=[stop])
    assert cut["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    counted = post(running, "/v1/messages/count_tokens", {"messages": HI}).json["input_tokens"]
    assert counted == cut["usage"]["prompt_tokens"]


def test_completion_of_raw_text(client: openai.OpenAI) -> None:
    text = client.completions.create(model="m", prompt="Once upon a time", max_tokens=6, logprobs=1)
    assert text.choices[0].text
    assert text.usage is not None
    assert text.usage.completion_tokens == 6
    ids = client.completions.create(model="m", prompt=[5, 6, 7], max_tokens=2)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3


def test_two_conversations_in_turn_cost_what_is_new_in_each(running: Running) -> None:
    """Also with answers that come back serialised anew, and beginnings that they share."""
    systems = {"role": "system", "content": FILLER}
    talks: list[list[Any]] = [[systems, {"role": "user", "content": f"Talk {i}: hello"}] for i in range(2)]
    fresh: list[int] = []
    for turn in range(3):
        for i, talk in enumerate(talks):
            answer = asked(running, talk)
            fresh.append(answer["usage"]["prompt_tokens"] - cached(answer))
            message = answer["choices"][0]["message"]
            talk.append({"role": "assistant", "content": f" {message['content']} "})
            talk.append({"role": "user", "content": f"Talk {i}, turn {turn}: go on"})
    assert fresh[0] > 400  # the system prompt, once
    assert all(n < 60 for n in fresh[1:]), fresh


def test_call_that_comes_back_with_other_blanks_costs_nothing(running: Running) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
    options = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300}
    talk: list[Any] = [{"role": "user", "content": "What is the weather?"}]
    message = asked(running, talk, **options)["choices"][0]["message"]
    (call,) = message["tool_calls"]
    arguments = json.dumps(json.loads(call["function"]["arguments"]), separators=(",", ":"))
    replayed = {**call, "function": {"name": "weather", "arguments": arguments}}
    talk += [
        {"role": "assistant", "content": "", "tool_calls": [replayed]},
        {"role": "tool", "tool_call_id": call["id"], "content": "rain"},
    ]
    asked(running, HI)  # another conversation in between
    answer = asked(running, talk, tools=tools)
    assert answer["usage"]["prompt_tokens"] - cached(answer) < 40  # the end of the block and the result


def test_client_that_leaves_stops_the_computing(running: Running, engine: EngineProcess) -> None:
    n_before = len(running.lines)
    body = {"messages": STORY, "max_tokens": 4000, "min_tokens": 4000}
    for stream in (True, False):
        with socket.create_connection(("127.0.0.1", running.port)) as sock:
            data = json.dumps({**body, "stream": stream}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
            sock.sendall(head.encode() + data)
            wait_until(lambda: engine.stats().busy)
        wait_until(lambda: not engine.stats().busy)
    wait_until(lambda: len(running.lines) == n_before + 2)
    assert [line.outcome for line in list(running.lines)[n_before:]] == ["left", "left"]
    assert asked(running, HI, max_tokens=3, ignore_eos=True)["choices"][0]["finish_reason"] == "length"


def test_engine_that_is_killed_in_an_answer_comes_back(running: Running, engine: EngineProcess) -> None:
    body = {"messages": STORY, "max_tokens": 4000, "min_tokens": 4000, "stream": True}
    with (
        httpx2.Client(timeout=300) as http,
        http.stream("POST", f"{running.url}/v1/chat/completions", json=body) as reply,
    ):
        killed, last = False, ""
        for line in reply.iter_lines():
            if not killed and '"content":"' in line and '"content":""' not in line:
                assert engine.pid is not None
                os.kill(engine.pid, signal.SIGKILL)
                killed = True
            last = line or last
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_died"
    assert asked(running, HI)["choices"][0]["message"]["content"]
    assert send(running, "GET", "/health").json["status"] == "ok"


def test_metrics_tell_what_happened(running: Running) -> None:
    for _ in range(2):
        asked(running, HI)
    text = send(running, "GET", "/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["localrun_answer_tokens_total"]) > 0
    assert float(values["localrun_prompt_cached_tokens_total"]) > 0
    assert float(values["localrun_engine_up"]) == 1
    assert "localrun_expert_hit_rate" in values
    assert "localrun_drive_read_bytes_total" in values


def test_states_are_found_again_after_a_restart() -> None:
    talk: list[Any] = [{"role": "system", "content": "Restart. " + FILLER}, {"role": "user", "content": "Hello"}]
    left = []
    for _ in range(2):
        with EngineProcess() as engine:
            list(engine.load(demo.converted(), OPTIONS))
            with serving(engine, sampling=GREEDY) as running:
                answer = asked(running, talk)
                left.append(answer["usage"]["prompt_tokens"] - cached(answer))
                message = answer["choices"][0]["message"]
                talk += [message, {"role": "user", "content": "And now?"}]
    assert left[0] > 400
    assert left[1] < 60

"""A loaded model's methods over a scripted engine: what it is asked to do, and errors as the API promises them."""

from __future__ import annotations

from typing import Any, cast

import pytest

from localrun.api.model import Model, generate_command
from localrun.api.options import given
from localrun.engine.process.process import EngineProcess
from localrun.engine.process.protocol import Finished
from localrun.errors import EngineDiedError, LocalrunError, UsageError
from tests.server.scripted import ScriptedEngine, call_text, calls_text

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {}}}


class Engine(ScriptedEngine):
    """With what a model's engine has besides."""

    closed = 0

    def count_tokens(self, text: str) -> int:
        return len(self.tokenize(text))

    def close(self) -> None:
        self.closed += 1
        self.facts = None


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def model(engine: Engine) -> Model:
    return Model(cast(EngineProcess, engine), given({}))


def test_an_answer_is_the_whole_of_its_events(model: Model, engine: Engine) -> None:
    answer = model.ask("Hi", system="Be brief.", temperature=0.5, max_tokens=30)
    assert str(answer) == "Hello! How can I help you?"
    (command,) = engine.commands
    assert command.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    assert (command.sampling.temperature, command.max_tokens) == (0.5, 30)
    *_, last = model.stream([{"role": "user", "content": "Hi"}])
    assert isinstance(last, Finished)


def test_functions_are_taken_with_or_without_openai_s_wrapper(model: Model, engine: Engine) -> None:
    engine.play = lambda command: calls_text(call_text("weather"))
    for tool in (WEATHER, {"type": "function", "function": WEATHER}):
        answer = model.ask("Rain?", tools=[tool], tool_choice="required")
        assert [call.name for call in answer.tool_calls] == ["weather"]
        assert engine.commands[-1].tools[0]["name"] == "weather"
        assert engine.commands[-1].tool_choice == "required"
    with pytest.raises(UsageError):
        model.ask("Rain?", tools=[{"type": "function"}])


def test_a_conversation_is_not_wrapped_and_nothing_is_added() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    command = generate_command(talk, given({"think": "high"}), stop=["x", "y"])
    assert command.messages == tuple(talk)
    assert (command.think, command.stop, command.tools, command.json_schema) == ("high", ("x", "y"), (), None)


def test_a_model_says_what_it_is_until_it_is_closed(model: Model, engine: Engine) -> None:
    with model:
        assert engine.facts is not None
        assert repr(model) == f"<Model {engine.facts.name}, context {engine.facts.n_ctx}>"
        assert model.facts is engine.facts
        assert model.tokenize("x" * 40) == list(engine.tokenize("x" * 40))
        assert model.count_tokens("x" * 40) == len(model.tokenize("x" * 40))
        assert model.count_tokens([{"role": "user", "content": "x" * 400}]) > 40
    assert engine.closed == 1
    assert repr(model) == "<Model, closed>"
    with pytest.raises(LocalrunError, match="no model is loaded") as caught:
        _ = model.facts
    assert "localrun.load" in str(caught.value.hint)
    with pytest.raises(EngineDiedError):
        model.stats()


def test_an_engine_that_does_not_answer_in_time_is_an_error_of_ours(model: Model, engine: Engine) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise TimeoutError("the engine did not answer GetStats within 5 s")

    engine.stats = engine.tokenize = late
    for ask in (model.stats, lambda: model.tokenize("x")):
        with pytest.raises(LocalrunError, match="within 5 s") as caught:
            ask()
        assert caught.value.hint is not None


def test_stopping_reaches_the_engine(model: Model, engine: Engine) -> None:
    engine.play = lambda command: ["word "] * 5
    events = model.stream("go on")
    next(events)
    model.stop()
    *_, last = events
    assert isinstance(last, Finished)
    assert last.reason == "stopped"

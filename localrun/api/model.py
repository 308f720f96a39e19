"""A loaded model in a process of its own: ask it, follow its answer as it is written, count tokens.

    with localrun.load("demo") as model:
        print(model.ask("Hello! Who are you?"))

Everything a model does happens in its engine process (`engine/process/process.py`): a crash there costs the running answer, and
the next question loads the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack

from localrun import config
from localrun.api import demo, models
from localrun.api.answer import Answer, Gathered
from localrun.api.options import AnswerOptions, LoadOptions, engine_options, given, sampling_options
from localrun.engine.facts import ModelFacts
from localrun.engine.process.process import EngineProcess, GenerateEvent
from localrun.engine.process.protocol import CountTokens, Generate, Loading, Stats
from localrun.errors import LocalrunError, UsageError

_T = TypeVar("_T")

Messages = Sequence[Mapping[str, Any]]
"""A conversation in the shape of OpenAI's API: `{"role": "user", "content": "..."}`, ..."""


class Model:
    """A loaded model. A context manager; `close` ends its process, and so does the end of this one.

    It answers one conversation at a time; calls from other threads wait. It keeps no conversation: hand over all messages each
    time, and what they have in common with the last ones is not computed again.
    """

    def __init__(self, engine: EngineProcess, settings: config.Settings) -> None:
        """
        Args:
            engine: with a model in it; this object closes it.
            settings: defaults of answers.
        """
        self._engine = engine
        self._settings = settings

    @property
    def facts(self) -> ModelFacts:
        """Name, sizes, context and placement of the model. Raises LocalrunError: it is closed, or its process has ended."""
        facts = self._engine.facts
        if facts is None:
            raise LocalrunError("no model is loaded", hint="localrun.load(MODEL) loads one")
        return facts

    def ask(
        self,
        question: str | Messages,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: Literal["auto", "none", "required"] = "auto",
        json_schema: Mapping[str, Any] | None = None,
        stop: Sequence[str] = (),
        **options: Unpack[AnswerOptions],
    ) -> Answer:
        """The whole answer.

        Args:
            question: a text, or a whole conversation.
            system: the system message before it.
            tools: functions that the model may call, in the shape of OpenAI's API; calls are returned, not run.
            tool_choice: `required`: at least one call, enforced while the answer is written.
            json_schema: the answer is made to follow it.
            stop: texts that end the answer.

        Raises:
            UsageError: an option that can't be.
            LocalrunError: the answer failed; the model can be asked again.
        """
        gathered = Gathered()
        for event in self.stream(
            question,
            system=system,
            tools=tools,
            tool_choice=tool_choice,
            json_schema=json_schema,
            stop=stop,
            **options,
        ):
            gathered.take(event)
        return gathered.answer()

    def stream(
        self,
        question: str | Messages,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: Literal["auto", "none", "required"] = "auto",
        json_schema: Mapping[str, Any] | None = None,
        stop: Sequence[str] = (),
        **options: Unpack[AnswerOptions],
    ) -> Iterator[GenerateEvent]:
        """The events of an answer as they happen; the last one is `Finished`. Leaving the loop early stops the answer.

        Arguments and errors as `ask`. Events: `PromptProgress` while the prompt is read, `Delta` for each piece of the answer, of
        its reasoning or of a tool call's arguments, `ToolCallBegun` and `ToolCall`; `Loading` and `Ready` first, if the process had
        to be started again.
        """
        command = generate_command(
            question,
            given(options, self._settings),
            system=system,
            tools=tools,
            tool_choice=tool_choice,
            json_schema=json_schema,
            stop=stop,
        )
        return self._engine.generate(command)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text. Raises LocalrunError."""
        return list(self._in_time(lambda: self._engine.tokenize(text)))

    def count_tokens(self, text: str | Messages, *, tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Length in tokens of a text, or of the prompt that a conversation becomes. Raises LocalrunError."""
        if isinstance(text, str):
            return self._in_time(lambda: self._engine.count_tokens(text))
        command = CountTokens(messages=tuple(text), tools=_functions(tools), think=self._settings["think"])
        return self._in_time(lambda: self._engine.count(command))

    def stats(self) -> Stats:
        """Counters since the model was loaded: memory, context, hits and misses; also while an answer is written.

        Raises:
            LocalrunError: the process has ended, or does not answer.
        """
        return self._in_time(self._engine.stats)

    def stop(self) -> None:
        """Ends the running answer, from another thread; its last event says `stopped`. Returns at once."""
        self._engine.stop()

    def close(self) -> None:
        """Ends the process. May be called twice."""
        self._engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        facts = self._engine.facts
        return f"<Model {facts.name}, context {facts.n_ctx}>" if facts is not None else "<Model, closed>"

    @staticmethod
    def _in_time(question: Callable[[], _T]) -> _T:
        try:
            return question()
        except TimeoutError as error:
            raise LocalrunError(str(error), hint="ask again, or close the model and load it again") from None


def load(
    model: str | Path | None = None,
    *,
    progress: Callable[[float, str], None] | None = None,
    **options: Unpack[LoadOptions],
) -> Model:
    """Loads a model; blocks until it is ready.

    Args:
        model: a converted directory, a GGUF, an official checkpoint, a name from `[models]` in the user's settings, or `demo`;
            None: the user's default model, else the demo model.
        progress: called with 0 to 1 and what is being done.
        options: as of `localrun chat`: `ram="48GiB"`, `gpu="none"`, `context=8192`, ...

    Raises:
        UsageError, BudgetError: there is no such model, or it can't be loaded like that.
        LocalrunError: the files are damaged, or no model that localrun runs.
    """
    settings = given(options)
    chosen = engine_options(settings)
    named = settings["model"] if model is None else str(model)
    engine = EngineProcess()
    try:
        engine.start()  # it imports its libraries while we look for the model
        path = models.resolve(named, settings) if named is not None else None
        for event in engine.load(path or demo.converted(), chosen):
            if progress is not None and isinstance(event, Loading):
                progress(event.progress, event.text)
    except BaseException:
        engine.close()
        raise
    if progress is not None:
        progress(1.0, "ready")
    return Model(engine, settings)


def generate_command(
    question: str | Messages,
    settings: config.Settings,
    *,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: Literal["auto", "none", "required"] = "auto",
    json_schema: Mapping[str, Any] | None = None,
    stop: Sequence[str] = (),
) -> Generate:
    """What the engine is asked to do; `settings` has the options of the answer."""
    messages = ({"role": "user", "content": question},) if isinstance(question, str) else tuple(question)
    if system:
        messages = ({"role": "system", "content": system}, *messages)
    return Generate(
        messages=messages,
        tools=_functions(tools),
        tool_choice=tool_choice,
        json_schema=json_schema,
        stop=tuple(stop),
        think=settings["think"],
        sampling=sampling_options(settings),
        max_tokens=settings["max_tokens"],
    )


def _functions(tools: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The function objects in them, with or without OpenAI's wrapper. Raises UsageError."""
    if not tools:
        return ()
    from localrun.engine.chat.messages import MessageError, tools_from_json

    try:
        return tuple(dict(tool.function) for tool in tools_from_json(tools))
    except MessageError as error:
        raise UsageError(str(error), hint=error.hint or "a list of functions as in the OpenAI API") from None

"""A loaded model in a separate process: ask it, stream its answers, count tokens.

    with localrun.load("demo") as model:
        print(model.ask("Hello! Who are you?"))

The model runs in its engine process (`engine/process/process.py`). If that crashes, only the running answer is lost, and the
next question reloads the model.
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
    """A loaded model. A context manager; its process ends with `close` or with this process.

    It answers one request at a time; calls from other threads wait. It does not store the conversation: pass all messages each
    time; the prefix shared with the previous request is not recomputed.
    """

    def __init__(self, engine: EngineProcess, settings: config.Settings) -> None:
        """
        Args:
            engine: has a model loaded; this object closes it.
            settings: defaults for answers.
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
            question: a string, or a whole conversation.
            system: the system message before it.
            tools: functions that the model may call, in the OpenAI API's format; calls are returned, not executed.
            tool_choice: `required`: at least one call, enforced during decoding.
            json_schema: decoding is constrained to it.
            stop: strings that end the answer.

        Raises:
            UsageError: an invalid option.
            LocalrunError: the answer failed; the model is still usable.
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

        Arguments and errors as for `ask`. Events: `PromptProgress` while the prompt is read, `Delta` for each piece of the
        answer, its reasoning or a tool call's arguments, `ToolCallBegun` and `ToolCall`; preceded by `Loading` and `Ready` if
        the process had to be restarted.
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
        """Counters since the model was loaded: memory, context, hits and misses. Works while an answer is running, too.

        Raises:
            LocalrunError: the process has ended, or does not answer.
        """
        return self._in_time(self._engine.stats)

    def stop(self) -> None:
        """Stops the running answer from another thread; its last event says `stopped`. Returns immediately."""
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
        options: those of `localrun chat`: `ram="48GiB"`, `gpu="none"`, `context=8192`, ...

    Raises:
        UsageError, BudgetError: there is no such model, or it can't be loaded with these options.
        LocalrunError: the files are damaged, or not a model that localrun runs.
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

"""DeepSeek-V4's prompt format: a conversation becomes special tokens and text.

Follows the official `encoding/encoding_dsv4.py` byte for byte, for both generations, which differ in the efforts only:
`v4` (first release of Flash and Pro) and `v4-0731` (Flash-0731, Pro-0813). The chat templates that llama.cpp ships
differ from it in corners; `tests/engine/test_chat_format.py` lists them.

What is easily overlooked:

* Consecutive user and tool messages are one user turn; tool results are put into the order of the calls.
* Reasoning before the last user turn is dropped, and developer messages there with it, unless a message offers tools.
* Tool results are not escaped: a literal `</tool_result>` in one ends it early for the model, as it does officially.
* A system message has no marker and stands where it is.

Departures from the official encoder, which renders these conversations without `<｜Assistant｜>` or not at all:

* An assistant message always stands behind `<｜Assistant｜>` and a thinking marker, also if it opens the conversation
  or follows another assistant message; a system message between a question and its answer does not take them away.
* An answer can be continued inside its reasoning (`resume`).
* A task on a user message that is merged into the turn before it is an error; officially it is silently lost.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from localrun.engine.dsml import render_tool_calls, to_json, tool_instructions
from localrun.engine.messages import (
    AssistantMessage,
    DeveloperMessage,
    Json,
    Message,
    MessageError,
    SystemMessage,
    Task,
    ToolMessage,
    ToolSchema,
    UserMessage,
    role_of,
)
from localrun.engine.prompt_parts import (
    ASSISTANT,
    BOS,
    EOS,
    EXTRACTED_URL,
    LATEST_REMINDER,
    TASK_TOKENS,
    THINK_END,
    THINK_START,
    USER,
    Part,
    Special,
    Text,
    merge_texts,
    render,
)
from localrun.errors import UnsupportedModelError, UsageError

__all__ = [
    "ENCODERS",
    "Boundary",
    "ChatEncoder",
    "Effort",
    "Part",
    "Prompt",
    "Special",
    "Text",
    "encoder_for",
]

_MAX_EFFORT_CONTEXT = 384 * 1024
"""Tokens of context that DeepSeek's model cards ask for where the effort prefix below is in use."""

_ABSOLUTE_MAXIMUM = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
_BEYOND_MAXIMUM = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the \
problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause \
rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no \
assumption remains unchecked and no error remains undiscovered.

"""
_RESPONSE_FORMAT = (
    "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"  # then the schema
)


@dataclass(frozen=True, slots=True)
class Effort:
    """A level of thinking.

    Attributes:
        prefix: text right behind the begin token.
        advised_context: tokens of context that it needs to be of use; 0: nothing special.
    """

    prefix: str = ""
    advised_context: int = 0


@dataclass(frozen=True, slots=True)
class Boundary:
    """A place between two parts at which a message has just ended: where a session takes snapshots.

    Attributes:
        message: index of that message; of several that make one turn the last; -1 for a system part of our own making.
        part: the prompt's parts before this index are this message and all before it. The token that asks for an
            answer (`<｜Assistant｜>` and what follows) lies behind it.
        stable: these parts stay a prefix of the prompt when the conversation is answered and the user writes again.
    """

    message: int
    part: int
    stable: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """An encoded conversation.

    Attributes:
        parts: no two texts are neighbours.
        boundaries: ascending. A message that ends inside a text (it was merged with the next one) or that was left
            out has none.
        completion: how the model's output begins, for the stream parser; None if it is not the model's turn.
    """

    parts: tuple[Part, ...]
    boundaries: tuple[Boundary, ...]
    completion: Literal["thinking", "content"] | None

    def render(self) -> str:
        """The whole prompt as the official encoder writes it. For tests and people: tokenise `parts`, not this."""
        return render(self.parts)


@dataclass(frozen=True, slots=True)
class ChatEncoder:
    """One generation of the prompt format.

    Attributes:
        name: `v4` or `v4-0731`.
        efforts: what each thinking mode prepends.
        default_mode: the thinking mode without any prefix.
    """

    name: str
    efforts: Mapping[str, Effort]
    default_mode: str

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes that the user can choose from, least thinking first."""
        return ("off", *self.efforts)

    def normal_mode(self, mode: str | None) -> str:
        """The mode's own name; None is the default mode.

        Raises:
            UsageError: this generation has no such mode.
        """
        name = self.default_mode if mode is None else "max" if mode == "xhigh" else mode
        if name not in self.modes:
            raise UsageError(f"thinking mode {mode!r}: this model knows {', '.join(self.modes)}")
        return name

    def max_context_advice(self, mode: str | None, n_ctx: int) -> str | None:
        """One line for the user if `mode` is meant for a longer context than `n_ctx` tokens."""
        effort = self.efforts.get(self.normal_mode(mode), Effort())
        if n_ctx >= effort.advised_context:
            return None
        return (
            f"thinking mode {mode} is meant for a context of at least {effort.advised_context:,} tokens; "
            f"with {n_ctx:,} it may run out in the middle of its thoughts"
        )

    def encode_prompt(
        self,
        messages: Sequence[Message],
        *,
        mode: str | None = None,
        tools: Sequence[ToolSchema] = (),
        response_format: Json = None,
        task: Task | None = None,
        drop_thinking: bool = True,
        resume: bool = False,
    ) -> Prompt:
        """Encodes a conversation, up to where the model goes on if it is the model's turn.

        Args:
            messages: the whole conversation.
            mode: one of `modes`, `xhigh`, or None for the default.
            tools: offered by the first system message, or one put before all if there is none.
            response_format: a JSON schema for the answer; goes where `tools` go.
            task: a quick instruction; put on the last message.
            drop_thinking: leave out reasoning of earlier turns (never if a message offers tools).
            resume: the last message is an answer that was cut off and that the model shall continue. An answer that
                was cut off inside a tool call is continued from before its calls.

        Raises:
            MessageError: the conversation can't be encoded.
            UsageError: unknown mode.
        """
        mode = self.normal_mode(mode)
        effort = self.efforts.get(mode, Effort())
        messages, shift = _attach(messages, tools, response_format, task)
        if resume and not (messages and isinstance(messages[-1], AssistantMessage) and not messages[-1].tool_calls):
            raise MessageError("only an assistant message without tool calls, as the last one, can be continued")
        thinking = mode != "off"
        drop = thinking and drop_thinking and not any(_offers_tools(message) for message in messages)
        turns = _order_tool_results(_merge_turns(messages))
        if drop:
            turns = _drop_old_developers(turns)
        writer = _Writer(turns, thinking=thinking, drop=drop, resume=resume)
        return writer.write(effort.prefix, shift)


ENCODERS: Mapping[str, ChatEncoder] = MappingProxyType(
    {
        "v4": ChatEncoder(
            "v4",
            MappingProxyType({"high": Effort(), "max": Effort(_ABSOLUTE_MAXIMUM, _MAX_EFFORT_CONTEXT)}),
            default_mode="high",
        ),
        "v4-0731": ChatEncoder(
            "v4-0731",
            MappingProxyType(
                {
                    "low": Effort(),
                    "high": Effort(_ABSOLUTE_MAXIMUM, _MAX_EFFORT_CONTEXT),
                    "max": Effort(_BEYOND_MAXIMUM, _MAX_EFFORT_CONTEXT),
                }
            ),
            default_mode="low",
        ),
    }
)


def encoder_for(metadata: Mapping[str, object]) -> ChatEncoder:
    """The encoder that a model was trained with.

    Args:
        metadata: the GGUF's. `localrun.chat_encoder` decides if it is there; else a chat template or a name that only
            the second generation has; else it is the first one.

    Raises:
        UnsupportedModelError: `localrun.chat_encoder` names an encoder that this version does not know.
    """
    if (name := metadata.get("localrun.chat_encoder")) is not None:
        if name not in ENCODERS:
            raise UnsupportedModelError(
                f"localrun.chat_encoder: {name!r} is none of {', '.join(ENCODERS)}",
                hint="the model was converted by a newer localrun: update this one",
            )
        return ENCODERS[str(name)]
    templates = [str(value) for key, value in metadata.items() if key.startswith("tokenizer.chat_template")]
    if any("Reasoning Effort: Beyond maximum" in template for template in templates):
        return ENCODERS["v4-0731"]
    if any("Reasoning Effort: Absolute maximum" in template for template in templates):
        return ENCODERS["v4"]
    names = " ".join(str(metadata.get(f"general.{key}", "")) for key in ("name", "basename", "version", "finetune"))
    return ENCODERS["v4-0731" if re.search(r"(?<!\d)(0731|0813)(?!\d)", names) else "v4"]


# --- from messages to turns -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Turn:
    """What the format knows as one message.

    Attributes:
        role: `user` for user and tool messages, else the message's.
        messages: several only for `user`.
        last: index of the last of them in the conversation.
    """

    role: str
    messages: list[Message]
    last: int
    task: Task | None = field(init=False)

    def __post_init__(self) -> None:
        self.task = getattr(self.messages[0], "task", None)

    @property
    def is_question(self) -> bool:
        return self.role in ("user", "developer")


def _offers_tools(message: Message) -> bool:
    return isinstance(message, SystemMessage | DeveloperMessage) and bool(message.tools)


def _attach(
    messages: Sequence[Message], tools: Sequence[ToolSchema], response_format: Json, task: Task | None
) -> tuple[list[Message], int]:
    """The messages with the options of the call in their places, and the number of messages put before them."""
    result = list(messages)
    shift = 0
    if task is not None:
        if not result or not isinstance(result[-1], UserMessage | DeveloperMessage | AssistantMessage):
            raise MessageError(f"task {task}: there is no user, developer or assistant message at the end")
        result[-1] = dataclasses.replace(result[-1], task=task)
    if tools or response_format:
        index = next((i for i, message in enumerate(result) if isinstance(message, SystemMessage)), None)
        if index is None:
            result.insert(0, SystemMessage())
            index, shift = 0, 1
        system = result[index]
        assert isinstance(system, SystemMessage)
        if tools and system.tools:
            raise MessageError("tools are given with the system message and beside it")
        result[index] = dataclasses.replace(
            system,
            tools=tuple(tools) or system.tools,
            response_format=response_format if response_format else system.response_format,
        )
    return result, shift


def _merge_turns(messages: Iterable[Message]) -> list[_Turn]:
    turns: list[_Turn] = []
    for i, message in enumerate(messages):
        role = "user" if isinstance(message, ToolMessage) else role_of(message)
        turn = turns[-1] if turns and turns[-1].role == role == "user" else None
        # A task closes its turn for further text, but not for tool results.
        if turn is None or (turn.task is not None and not isinstance(message, ToolMessage)):
            turns.append(_Turn(role, [message], i))
            continue
        if isinstance(message, UserMessage) and message.task:
            raise MessageError(f"task {message.task} on a user message that continues a user turn")
        turn.messages.append(message)
        turn.last = i
    return turns


def _order_tool_results(turns: list[_Turn]) -> list[_Turn]:
    """Results stand in the order of the calls; texts between them stay where they are."""
    order: dict[str, int] = {}
    for turn in turns:
        first = turn.messages[0]
        if isinstance(first, AssistantMessage) and first.tool_calls:
            order = {call.id: i for i, call in enumerate(first.tool_calls) if call.id}
        elif turn.role == "user" and order:
            results = [message for message in turn.messages if isinstance(message, ToolMessage)]
            results.sort(key=lambda result: order.get(result.tool_call_id, 0))
            in_order = iter(results)
            turn.messages = [next(in_order) if isinstance(m, ToolMessage) else m for m in turn.messages]
    return turns


def _last_question(turns: Sequence[_Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.is_question), default=-1)


def _drop_old_developers(turns: list[_Turn]) -> list[_Turn]:
    last = _last_question(turns)
    return [turn for i, turn in enumerate(turns) if i >= last or turn.role != "developer"]


# --- from turns to parts --------------------------------------------------------------------------------------------


class _Writer:
    """Writes turns one after the other. `answer_open`: an answer was asked for and has not ended yet."""

    def __init__(self, turns: Sequence[_Turn], *, thinking: bool, drop: bool, resume: bool) -> None:
        self.turns = turns
        self.thinking = thinking
        self.drop = drop
        self.resume = resume
        self.last_question = _last_question(turns)
        self.parts: list[Part] = []
        self.answer_open = False
        self.unanswered: int | None = None
        self.late_task = False  # a system message stands between a task and its answer
        self.completion: Literal["thinking", "content"] | None = None
        self.ends: list[tuple[int, int]] = []  # (message, len(parts) there)
        self.stable: int | None = None  # len(parts) up to which nothing changes later

    def write(self, prefix: str, shift: int) -> Prompt:
        self.parts.append(Special(BOS))
        if self.turns:
            self.parts.append(Text(prefix))
        for i, turn in enumerate(self.turns):
            self._write_turn(i, turn)
            following = self.turns[i + 1].role if i + 1 < len(self.turns) else None
            if following in (None, "assistant", "latest_reminder"):
                self._ask(i, turn)
        return self._finish(shift)

    def _write_turn(self, i: int, turn: _Turn) -> None:
        if not self.answer_open:
            self.completion = None
        match turn.messages[0]:
            case SystemMessage() as message:
                self._text(message.content)
                self._extras(message)
            case DeveloperMessage() as message:
                if self.drop and i == self.last_question:
                    self._mark_unstable()
                self._question(i, message.content)
                self._extras(message)
            case UserMessage() | ToolMessage():
                self._question(i, "\n\n".join(_in_user_turn(message) for message in turn.messages))
            case AssistantMessage() as message:
                self._answer(i, message)
            case message:
                self.parts.append(Special(LATEST_REMINDER))
                self._text(message.content)
        self.ends.append((turn.last, len(self.parts)))

    def _text(self, text: str) -> None:
        self.parts.append(Text(text))

    def _question(self, i: int, text: str) -> None:
        self.answer_open = False
        self.unanswered = i
        self.parts.append(Special(USER))
        self._text(text)

    def _extras(self, message: SystemMessage | DeveloperMessage) -> None:
        if message.tools:
            self.parts += [Text("\n\n"), *tool_instructions(message.tools)]
        if message.response_format:
            self._text(_RESPONSE_FORMAT + to_json(message.response_format))

    def _ask(self, i: int, turn: _Turn) -> None:
        """Asks for an answer, if `turn` is one to be answered and its own tokens do not do so already."""
        if turn.role == "system" and self.unanswered is not None and not self.answer_open:
            i, turn = self.unanswered, self.turns[self.unanswered]
            self.late_task = turn.task is not None
        if turn.task is not None:
            if turn.task == "action":
                self.parts += [Special(ASSISTANT), Special(THINK_START if self.thinking else THINK_END)]
            if isinstance(question := turn.messages[0], UserMessage) and question.extracted_url:
                self.parts += [Special(EXTRACTED_URL), Text(question.extracted_url)]
            self.parts.append(Special(TASK_TOKENS[turn.task]))
            self.completion = "content"
            self.answer_open = True
        elif turn.is_question:
            self._open_answer(i)

    def _open_answer(self, i: int) -> None:
        """`i`: the question, or the answer itself where there is none."""
        self.answer_open = True
        self.parts.append(Special(ASSISTANT))
        thinks = self.thinking and (not self.drop or i >= self.last_question)
        if thinks and self.drop:
            self._mark_unstable()
        self.parts.append(Special(THINK_START if thinks else THINK_END))
        self.completion = "thinking" if thinks else "content"

    def _answer(self, i: int, message: AssistantMessage) -> None:
        if not self.answer_open:
            self._open_answer(i)
        resumes = self.resume and i == len(self.turns) - 1
        answers_task = self.late_task or (i > 0 and self.turns[i - 1].task is not None)
        thinks = self.thinking and not answers_task and (not self.drop or i > self.last_question)
        self.completion, self.answer_open, self.unanswered, self.late_task = None, False, None, False
        if thinks:
            self._text(message.reasoning)
            if resumes and message.thinking_open:
                self.completion = "thinking"
                return
            self.parts.append(Special(THINK_END))
        self._text(message.content)
        if message.tool_calls:
            self.parts += render_tool_calls(message.tool_calls)
        if resumes or message.wo_eos:
            self.completion = "content"
        else:
            self.parts.append(Special(EOS))

    def _mark_unstable(self) -> None:
        if self.stable is None:
            self.stable = len(self.parts)

    def _finish(self, shift: int) -> Prompt:
        """Merges texts; keeps the ends of messages that still lie between two parts."""
        stable = len(self.parts) if self.stable is None else self.stable
        if self.completion is not None and isinstance(self.parts[-1], Text):
            stable = min(stable, len(self.parts) - 1)  # the model goes on in this text
        edges = _edges_after_merge(self.parts)
        boundaries: dict[int, Boundary] = {}
        for message, end in self.ends:
            if (part := edges[end]) is not None:
                boundaries[part] = Boundary(message - shift, part, end <= stable)
        return Prompt(tuple(merge_texts(self.parts)), tuple(boundaries.values()), self.completion)


def _edges_after_merge(parts: Sequence[Part]) -> list[int | None]:
    """Where the edge before `parts[i]` (or behind the last one) is among the merged parts; None: inside a text."""
    kinds = ["" if part == Text("") else type(part).__name__ for part in parts]
    following = [""] * (len(parts) + 1)  # kind of the next part that is not empty
    for i in range(len(parts) - 1, -1, -1):
        following[i] = kinds[i] or following[i + 1]
    edges: list[int | None] = []
    n_merged, previous = 0, ""
    for i in range(len(parts) + 1):
        edges.append(None if previous == following[i] == "Text" else n_merged)
        if i < len(parts) and kinds[i]:
            n_merged += not (previous == kinds[i] == "Text")
            previous = kinds[i]
    return edges


def _in_user_turn(message: Message) -> str:
    return f"<tool_result>{message.content}</tool_result>" if isinstance(message, ToolMessage) else message.content

"""The core of the prompt format: messages become turns, turns become parts. `format.py` documents the rules.

Knows nothing about models, modes and the origin of tools.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from localrun.engine.chat.dsml import render_tool_calls, to_json, tool_instructions
from localrun.engine.chat.messages import (
    AssistantMessage,
    DeveloperMessage,
    Message,
    MessageError,
    SampledAnswer,
    SystemMessage,
    Task,
    ToolMessage,
    UserMessage,
    role_of,
)
from localrun.engine.chat.parts import (
    ASSISTANT,
    BOS,
    EOS,
    EXTRACTED_URL,
    LATEST_REMINDER,
    TASK_TOKENS,
    THINK_END,
    THINK_START,
    USER,
    PromptPart,
    Sampled,
    Special,
    Text,
    merge_texts,
    render,
)

_RESPONSE_FORMAT = (
    "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"  # then the schema
)


@dataclass(frozen=True, slots=True)
class Boundary:
    """A position between two parts where a message ends: where a session takes snapshots.

    Attributes:
        message: index of that message, or of the last one in its turn; -1 for a generated system part.
        part: the parts before this index are this message and all earlier ones. The cue for an answer (`<｜Assistant｜>` and what
            follows) comes after it.
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
        boundaries: ascending. A message that ends inside a text (merged with the next one) or was dropped has none.
        completion: the start of the model's output, for the stream parser; None if it is not the model's turn.
    """

    parts: tuple[PromptPart, ...]
    boundaries: tuple[Boundary, ...]
    completion: Literal["thinking", "content"] | None

    def render(self) -> str:
        """The whole prompt as the official encoder writes it. For tests and people: tokenise `parts`, not this."""
        return render(self.parts)


# --- from messages to turns -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Turn:
    """What the format treats as one message.

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


def merge_turns(messages: Iterable[Message]) -> list[Turn]:
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        role = "user" if isinstance(message, ToolMessage) else role_of(message)
        turn = turns[-1] if turns and turns[-1].role == role == "user" else None
        # A task closes its turn for further text, but not for tool results.
        if turn is None or (turn.task is not None and not isinstance(message, ToolMessage)):
            turns.append(Turn(role, [message], i))
            continue
        if isinstance(message, UserMessage) and message.task:
            raise MessageError(f"task {message.task} on a user message that continues a user turn")
        turn.messages.append(message)
        turn.last = i
    return turns


def order_tool_results(turns: list[Turn]) -> list[Turn]:
    """Sorts results in call order; texts between them stay in place."""
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


def _last_question(turns: Sequence[Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.is_question), default=-1)


def drop_old_developers(turns: list[Turn]) -> list[Turn]:
    last = _last_question(turns)
    return [turn for i, turn in enumerate(turns) if i >= last or turn.role != "developer"]


# --- from turns to parts --------------------------------------------------------------------------------------------


class PromptWriter:
    """Writes turns one after the other. `answer_open`: an answer was asked for and has not ended yet."""

    def __init__(self, turns: Sequence[Turn], *, thinking: bool, drop: bool, resume: bool) -> None:
        self.turns = turns
        self.thinking = thinking
        self.drop = drop
        self.resume = resume
        self.last_question = _last_question(turns)
        self.parts: list[PromptPart] = []
        self.answer_open = False
        self.unanswered: int | None = None
        self.late_task = False  # a system message separates a task from its answer
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

    def _write_turn(self, i: int, turn: Turn) -> None:
        if not self.answer_open:
            self.completion = None
        match turn.messages[0]:
            case SystemMessage() as message:
                self._text(message.content)
                self._extras(message)
            case DeveloperMessage() as message:
                if self.drop and i == self.last_question:
                    # It is left out once another question follows.
                    following = self.turns[i + 1].role if i + 1 < len(self.turns) else None
                    self._mark_unstable(text_joins=self.answer_open or following == "system")
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

    def _ask(self, i: int, turn: Turn) -> None:
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
        """`i`: the question, or the answer itself if there is none."""
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
        if message.sampled is not None and not resumes:
            self._sampled(message.sampled, thinks=thinks)
            if not message.wo_eos:
                self.parts.append(Special(EOS))
            return
        if thinks:
            if self.drop:
                self._mark_unstable(text_joins=True)
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

    def _sampled(self, answer: SampledAnswer, *, thinks: bool) -> None:
        if thinks:
            if self.drop:
                self._mark_unstable(text_joins=True)
            self.parts += [Sampled(answer.thinking or (), ""), Special(THINK_END)]
        self.parts.append(Sampled(answer.rest, answer.text))

    def _mark_unstable(self, *, text_joins: bool = False) -> None:
        """Everything from here on changes with the next question. `text_joins`: the next question may put a text here, which
        merges with the text before it."""
        if self.stable is None:
            end = len(self.parts)
            while text_joins and isinstance(self.parts[end - 1], Text):
                end -= 1
            self.stable = end

    def _finish(self, shift: int) -> Prompt:
        """Merges texts; keeps the message ends that are still between two parts."""
        stable = len(self.parts) if self.stable is None else self.stable
        if self.completion is not None and isinstance(self.parts[-1], Text):
            stable = min(stable, len(self.parts) - 1)  # the model continues this text
        edges = _edges_after_merge(self.parts)
        boundaries: dict[int, Boundary] = {}
        for message, end in self.ends:
            if (part := edges[end]) is not None:
                boundaries[part] = Boundary(message - shift, part, end <= stable)
        return Prompt(tuple(merge_texts(self.parts)), tuple(boundaries.values()), self.completion)


def _edges_after_merge(parts: Sequence[PromptPart]) -> list[int | None]:
    """Position among the merged parts of the edge before `parts[i]` (or after the last one); None if inside a text."""
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

"""DeepSeek-V4's prompt format: turns a conversation into special tokens and text.

Follows the official `encoding/encoding_dsv4.py` byte for byte, for both generations, which differ in the efforts only:
`v4` (first release of Flash and Pro) and `v4-0731` (Flash-0731, Pro-0813). The chat templates that llama.cpp ships
differ from it in corners; `tests/engine/chat/test_format.py` lists them.

Easily overlooked:

* * Consecutive user and tool messages are one user turn; tool results are sorted in call order.
* Reasoning before the last user turn is dropped, and developer messages there with it, unless a message offers tools.
* Tool results are not escaped: a literal `</tool_result>` in one ends it early for the model, as it does officially.
* * A system message has no marker and stays in place.

Departures from the official encoder, which renders these conversations without `<｜Assistant｜>` or not at all:

* * An assistant message always follows `<｜Assistant｜>` and a thinking marker, even if it opens the conversation or follows
  another assistant message, or if a system message separates it from its question.
* An answer can be continued inside its reasoning (`resume`).
* * A task on a user message that is merged into the previous turn is an error; the official encoder drops it silently.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from localrun.engine.chat.messages import (
    AssistantMessage,
    DeveloperMessage,
    Json,
    Message,
    MessageError,
    SystemMessage,
    Task,
    ToolSchema,
    UserMessage,
)
from localrun.engine.chat.parts import PromptPart, Special, Text
from localrun.engine.chat.writer import (
    Boundary,
    Prompt,
    PromptWriter,
    drop_old_developers,
    merge_turns,
    order_tool_results,
)
from localrun.errors import UnsupportedModelError, UsageError

__all__ = [
    "ENCODERS",
    "Boundary",
    "ChatEncoder",
    "Effort",
    "Prompt",
    "PromptPart",
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


@dataclass(frozen=True, slots=True)
class Effort:
    """A level of thinking.

    Attributes:
        prefix: text right after the begin token.
        advised_context: minimum useful context in tokens; 0: no requirement.
    """

    prefix: str = ""
    advised_context: int = 0


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
            raise UsageError(f"thinking mode {mode!r}: this model supports {', '.join(self.modes)}")
        return name

    def max_context_advice(self, mode: str | None, n_ctx: int) -> str | None:
        """One line for the user if `mode` is meant for a longer context than `n_ctx` tokens."""
        effort = self.efforts.get(self.normal_mode(mode), Effort())
        if n_ctx >= effort.advised_context:
            return None
        return (
            f"thinking mode {mode} needs a context of at least {effort.advised_context:,} tokens; "
            f"with {n_ctx:,} it may run out mid-thought"
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
        """Encodes a conversation, up to where the model continues if it is the model's turn.

        Args:
            messages: the whole conversation.
            mode: one of `modes`, `xhigh`, or None for the default.
            tools: offered by the first system message, which is added if there is none.
            response_format: a JSON schema for the answer; goes where `tools` go.
            task: a quick instruction; put on the last message.
            drop_thinking: leave out reasoning of earlier turns (never if a message offers tools).
            resume: the last message is a truncated answer for the model to continue. An answer truncated inside a tool call is
                continued from before its calls.

        Raises:
            MessageError: the conversation can't be encoded.
            UsageError: unknown mode.
        """
        mode = self.normal_mode(mode)
        effort = self.efforts.get(mode, Effort())
        messages, shift = _attach(messages, tools, response_format, task)
        if resume and not (messages and isinstance(messages[-1], AssistantMessage) and not messages[-1].tool_calls):
            raise MessageError("only a final assistant message without tool calls can be continued")
        thinking = mode != "off"
        drop = thinking and drop_thinking and not any(_offers_tools(message) for message in messages)
        turns = order_tool_results(merge_turns(messages))
        if drop:
            turns = drop_old_developers(turns)
        writer = PromptWriter(turns, thinking=thinking, drop=drop, resume=resume)
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
        metadata: the GGUF's. `localrun.chat_encoder` decides if present. Otherwise it is the second generation if a chat
            template has its wording, or if the model or a template is named after its dates; else the first.

    Raises:
        UnsupportedModelError: `localrun.chat_encoder` names an encoder that this version does not know.
    """
    if (name := metadata.get("localrun.chat_encoder")) is not None:
        if str(name) not in ENCODERS:
            raise UnsupportedModelError(
                f"localrun.chat_encoder: {name!r} is not one of {', '.join(ENCODERS)}",
                hint="the model was converted by a newer localrun: update localrun",
            )
        return ENCODERS[str(name)]
    templates = {key: str(value) for key, value in metadata.items() if key.startswith("tokenizer.chat_template")}
    names = [str(metadata.get(f"general.{key}", "")) for key in ("name", "basename", "version", "finetune")]
    is_0731 = any("Reasoning Effort: Beyond maximum" in template for template in templates.values()) or any(
        re.search(r"(?<!\d)(0731|0813)(?!\d)", name) for name in (*names, *templates)
    )
    return ENCODERS["v4-0731" if is_0731 else "v4"]


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
            raise MessageError("tools are given both in the system message and separately")
        result[index] = dataclasses.replace(
            system,
            tools=tuple(tools) or system.tools,
            response_format=response_format if response_format else system.response_format,
        )
    return result, shift

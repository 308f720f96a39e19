"""The messages between a user interface and the engine process; `wire` puts each of them on a line.

Commands go to the engine, events come back. Every command has a `request` number that its sender chooses; every event
carries the number of the command that it answers, so that statistics can be asked for in the middle of an answer. A
command is finished by exactly one closing event: `Failed`, or the one named in its docstring.

A new message is a new subclass of `Command` or `Event`, a new field one with a default: `wire` finds both by themselves. Fields
are msgspec's types, or dataclasses of `facts` and `options`; sequences are tuples.

This module imports the standard library and msgspec only: a user interface can use it without loading numpy, numba or llama.cpp.
It knows nothing about pipes and processes (`process.py`, `worker.py`) or models (`engine.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct, field

from localrun.engine.facts import FinishReason, Json, ModelFacts, Timings
from localrun.engine.options import EngineOptions, SamplingOptions, ThinkMode


class _Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag=True):
    """Base of all: immutable, compared by value, named on the wire by its class. `msgspec.structs.replace` makes changed copies."""


# --- commands -------------------------------------------------------------------------------------------------------


class Command(_Message, frozen=True, kw_only=True):
    """Base of what a user interface sends. `request` is assigned by `EngineProcess`."""

    request: int = 0


class Load(Command, frozen=True, kw_only=True):
    """Closes the present model and loads another. Events: Loading*, then Ready."""

    path: str
    options: EngineOptions = field(default_factory=EngineOptions)


class Conversation(Command, frozen=True, kw_only=True):
    """Base of commands about a prompt made of messages.

    Attributes:
        messages: in the shape of the OpenAI API: `{"role": ..., "content": ...}`, optionally `reasoning_content`,
            `tool_calls`, ...
        think: no reasoning, reasoning, or the longest reasoning.
        tools: OpenAI `function` objects.
        response_format: a JSON schema that the answer is asked to follow.
        task: name of a quick-instruction task.
        resume: the last message is an answer that was cut off and shall be continued.
    """

    messages: tuple[Mapping[str, Json], ...] = ()
    think: ThinkMode = "off"
    tools: tuple[Mapping[str, Json], ...] = ()
    response_format: Mapping[str, Json] | None = None
    task: str | None = None
    resume: bool = False


class Generate(Conversation, frozen=True, kw_only=True):
    """One answer to a whole conversation. Events: PromptProgress*, (Delta | ToolCall)*, then Finished.

    The sender hands over the full list every time; the engine reuses what its context already holds.

    Attributes:
        tokens: the prompt as token ids instead of messages (models without a tokenizer, measurements).
        text: the prompt as plain text instead of messages, behind the token that a text begins with.
        max_tokens: bound of the answer; None: until the context is full.
        min_tokens: no end token before so many.
        ignore_eos: go on after the end token (measurements).
        stop: texts that end the answer where they appear in it, outside of reasoning and tool calls; not part of it.
        think_budget: most tokens of reasoning; then it is ended.
        tool_choice: `none`: no calls, though the tools are shown; `required`: at least one, enforced while sampling.
        tool_name: with `required`: this tool.
        max_tool_calls: the answer ends after so many calls.
        json_schema: the answer (not the reasoning) is made to follow it while sampling; what the model is told is
            `response_format`.
        logprobs: report each token's log probability and those of so many alternatives.
    """

    tokens: tuple[int, ...] | None = None
    text: str | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    think_budget: int | None = None
    tool_choice: Literal["auto", "none", "required"] = "auto"
    tool_name: str | None = None
    max_tool_calls: int | None = None
    json_schema: Mapping[str, Json] | None = None
    logprobs: int | None = None


class Stop(Command, frozen=True, kw_only=True):
    """Ends the running command `target` within one layer's time; too late or unknown targets are ignored. Has no event
    of its own: the target ends with `Finished(reason="stopped")` or `Failed(kind="StoppedError")`."""

    target: int


class GetStats(Command, frozen=True, kw_only=True):
    """Counters, answered at once also in the middle of an answer. Events: Stats.

    Attributes:
        expert_map: also the state of every expert (a few bytes each).
    """

    expert_map: bool = False


class CountTokens(Conversation, frozen=True, kw_only=True):
    """Length in tokens of a text, or of the prompt that a conversation becomes; answered also in the middle of an answer.
    Events: TokenCount.

    Attributes:
        text: counted as text alone; None: the conversation is.
        ids: also give the token ids.
    """

    text: str | None = None
    ids: bool = False


class Snapshot(Command, frozen=True, kw_only=True):
    """Writes the session's state (tokens, KV) to a file, atomically. Events: Saved."""

    path: str


class Restore(Command, frozen=True, kw_only=True):
    """Reads a state that Snapshot wrote for the same model. Events: Restored."""

    path: str


class EvalLogits(Command, frozen=True, kw_only=True):
    """Logits of all positions of `tokens`, written as a .npy file, float32 (T, n_vocab). Events: PromptProgress*,
    EvalResult."""

    tokens: tuple[int, ...]
    logits_path: str


class EvalText(Command, frozen=True, kw_only=True):
    """Perplexity of a text, and how far from a reference's distributions. Events: PromptProgress*, EvalTextResult.

    Attributes:
        window: tokens per window; each starts with an empty context.
        max_tokens: evaluate only the first ones; 0: all.
        save_folder: write every window's logits there, as `reference_folder` of another model's run.
        reference_folder: compare with what the reference saved there.
    """

    text: str
    window: int = 512
    max_tokens: int = 0
    save_folder: str | None = None
    reference_folder: str | None = None


class Close(Command, frozen=True, kw_only=True):
    """Frees the model and ends the process. Events: Closed."""


# --- events ---------------------------------------------------------------------------------------------------------


class Event(_Message, frozen=True, kw_only=True):
    """Base of what the engine sends; `request` is the command that it answers."""

    request: int


class Loading(Event, frozen=True, kw_only=True):
    """Progress of a load, 0 to 1, and what is being done; once, where there is something to say, the lines of its plan."""

    progress: float
    text: str
    plan: tuple[str, ...] = ()


class Ready(Event, frozen=True, kw_only=True):
    """The model is loaded; `plan` is what was planned (`planner.Plan.to_json`)."""

    facts: ModelFacts
    load_s: float
    plan: Mapping[str, Json] = field(default_factory=dict)


class PromptProgress(Event, frozen=True, kw_only=True):
    """Prefill: `done` of `total` prompt tokens are in the context; the first `reused` of them did not have to be computed (the
    context or a saved state had them), the others have taken `elapsed_s`."""

    done: int
    total: int
    reused: int
    elapsed_s: float


class TokenLogprob(Struct, frozen=True, kw_only=True):
    """A token and the logarithm of the probability that the model gave it, before sampling options.

    Attributes:
        data: its bytes; a token may be part of a character.
        top: the most likely tokens at this place, most likely first.
    """

    token: int
    data: tuple[int, ...]
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class Delta(Event, frozen=True, kw_only=True):
    """A piece of the answer: whole characters, in order.

    Concatenated per kind they are the reasoning, the text, and the JSON arguments of the tool call that is being written (shown
    while it lasts; the ToolCall that follows has them all). `tokens` are the ids sampled since the last Delta or ToolCall: none,
    if the sampled token gives several pieces, or more than one, if a character or a tag took several.
    """

    kind: Literal["thinking", "text", "tool"]
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class ToolCallBegun(Event, frozen=True, kw_only=True):
    """The model has begun a tool call; Deltas of its arguments and a ToolCall of the same `id` follow."""

    index: int
    name: str
    id: str


class ToolCall(Event, frozen=True, kw_only=True):
    """A tool call that the model wrote, complete.

    Attributes:
        arguments: a JSON object as text.
        usable: it is whole and may be run.
        problems: what had to be guessed (`stream_events.Problem`).
    """

    index: int
    name: str
    arguments: str
    id: str
    usable: bool = True
    problems: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()


class Finished(Event, frozen=True, kw_only=True):
    """The answer is over.

    Attributes:
        reason: the model's end token; `max_tokens` reached; context full; stopped by the user; a stop string.
        stop_string: the one that was found.
        seed: what the sampler was seeded with.
        problems: what was wrong with the form of the answer (`stream_events.Problem`), e.g. `unclosed_think`.
        warning: one line that the user should know.
        tokens: ids that no Delta or ToolCall carried.
    """

    reason: FinishReason
    timings: Timings
    seed: int
    problems: tuple[str, ...] = ()
    warning: str | None = None
    tokens: tuple[int, ...] = ()
    stop_string: str | None = None


class Stats(Event, frozen=True, kw_only=True):
    """Counters since the model was loaded.

    Attributes:
        busy: a command is running.
        context_used: tokens in the session's context, of `n_ctx`.
        telemetry: the expert engine's counters by name (see `offload/cache/telemetry.py`).
        experts: if asked for: what `expert_map()` of the expert engine gives.
    """

    busy: bool
    context_used: int
    n_ctx: int
    rss_bytes: int
    telemetry: Mapping[str, Json]
    experts: Mapping[str, Json] | None = None


class TokenCount(Event, frozen=True, kw_only=True):
    """Answer to CountTokens."""

    n_tokens: int
    ids: tuple[int, ...] = ()


class Saved(Event, frozen=True, kw_only=True):
    """Answer to Snapshot."""

    n_tokens: int
    n_bytes: int


class Restored(Event, frozen=True, kw_only=True):
    """Answer to Restore."""

    n_tokens: int


class EvalResult(Event, frozen=True, kw_only=True):
    """Answer to EvalLogits."""

    n_tokens: int
    n_vocab: int
    elapsed_s: float


class EvalTextResult(Event, frozen=True, kw_only=True):
    """Answer to EvalText.

    Attributes:
        n_tokens: tokens that were predicted.
        perplexity: exp of the mean negative log-likelihood.
        reference_perplexity: of the reference; None without one, like all that follows.
        kl_mean, kl_median, kl_p99, kl_max: KL(reference || model) in nats over positions.
        top1_agreement: share of positions with the reference's most likely token.
    """

    n_tokens: int
    n_windows: int
    perplexity: float
    elapsed_s: float
    reference_perplexity: float | None = None
    kl_mean: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None


class Closed(Event, frozen=True, kw_only=True):
    """Answer to Close."""


class Failed(Event, frozen=True, kw_only=True):
    """A command failed; the engine lives on.

    Attributes:
        kind: class name in `localrun.errors`, or the name of an unexpected exception.
        message, hint: for people.
        trace: the Python traceback, for `--debug` and bug reports.
    """

    kind: str
    message: str
    hint: str | None = None
    trace: str = ""


CLOSING_EVENTS: tuple[type[Event], ...] = (
    Ready,
    Finished,
    Stats,
    TokenCount,
    Saved,
    Restored,
    EvalResult,
    EvalTextResult,
    Closed,
    Failed,
)
"""Events after which nothing more comes for their request."""

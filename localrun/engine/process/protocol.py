"""The messages between a user interface and the engine process; `wire` encodes each as a line.

Commands go to the engine, events come back. Every command has a `request` number chosen by its sender; every event carries the
number of the command it answers, so statistics can be requested during an answer. Exactly one closing event ends a command:
`Failed`, or the one named in its docstring.

To add a message, subclass `Command` or `Event`; to add a field, give it a default. `wire` picks up both. Fields are msgspec
types, or dataclasses of `facts` and `options`; sequences are tuples.

Imports only the standard library and msgspec, so a user interface can use it without loading numpy, numba or llama.cpp. Knows
nothing about pipes and processes (`process.py`, `worker.py`) or models (`engine.py`).
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
    """Closes the current model and loads another. Events: Loading*, then Ready."""

    path: str
    options: EngineOptions = field(default_factory=EngineOptions)


class PromptCommand(Command, frozen=True, kw_only=True):
    """Base of commands about a prompt made of messages.

    Attributes:
        messages: in the OpenAI API's format: `{"role": ..., "content": ...}`, optionally `reasoning_content`,
            `tool_calls`, ...
        think: no reasoning, reasoning, or maximum reasoning.
        tools: OpenAI `function` objects.
        response_format: a JSON schema that the prompt asks the answer to follow.
        task: name of a quick-instruction task.
        resume: the last message is a truncated answer to continue.
    """

    messages: tuple[Mapping[str, Json], ...] = ()
    think: ThinkMode = "off"
    tools: tuple[Mapping[str, Json], ...] = ()
    response_format: Mapping[str, Json] | None = None
    task: str | None = None
    resume: bool = False


class Generate(PromptCommand, frozen=True, kw_only=True):
    """One answer to a whole conversation. Events: PromptProgress*, (Delta | ToolCall)*, then Finished.

    The sender always passes the full list; the engine reuses what its context already holds.

    Attributes:
        tokens: the prompt as token ids instead of messages (models without a tokenizer, measurements).
        text: the prompt as plain text instead of messages, after the begin token.
        max_tokens: limit of the answer; None: until the context is full.
        min_tokens: no end token before this many.
        ignore_eos: continue after the end token (for measurements).
        stop: strings that end the answer, outside of reasoning and tool calls; not included in it.
        think_budget: maximum tokens of reasoning, which is then ended.
        tool_choice: `none`: no calls, although the tools are shown; `required`: at least one, enforced during sampling.
        tool_names: the tools that may be called, although all are shown; None: all.
        max_tool_calls: end the answer after this many calls.
        json_schema: constrains sampling of the answer (not the reasoning); `response_format` is what the prompt says.
        logprobs: report each token's log probability and those of this many alternatives.
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
    tool_names: tuple[str, ...] | None = None
    max_tool_calls: int | None = None
    json_schema: Mapping[str, Json] | None = None
    logprobs: int | None = None


class Stop(Command, frozen=True, kw_only=True):
    """Stops the running command `target` within one layer's time; finished or unknown targets are ignored. Has no event: the
    target ends with `Finished(reason="stopped")` or `Failed(kind="StoppedError")`."""

    target: int


class GetStats(Command, frozen=True, kw_only=True):
    """Requests counters; answered immediately, even during an answer. Events: Stats.

    Attributes:
        expert_map: also the state of every expert (a few bytes each).
    """

    expert_map: bool = False


class CountTokens(PromptCommand, frozen=True, kw_only=True):
    """Counts the tokens of a text, or of a conversation's prompt; answered even during an answer. Events: TokenCount.

    Attributes:
        text: text to count; None: count the conversation.
        ids: also return the token ids.
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
    """Perplexity of a text, and divergence from a reference. Events: PromptProgress*, EvalTextResult.

    Attributes:
        window: tokens per window; each starts with an empty context.
        max_tokens: evaluate only the first ones; 0: all.
        save_folder: write every window's logits there, as `reference_folder` of another model's run.
        reference_folder: compare with the logits that the reference saved there.
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
    """Progress of a load, 0 to 1, and the current step; once, if available, the lines of its plan."""

    progress: float
    text: str
    plan: tuple[str, ...] = ()


class Ready(Event, frozen=True, kw_only=True):
    """The model is loaded; `plan` is what was planned (`planner.Plan.to_json`)."""

    facts: ModelFacts
    load_s: float
    plan: Mapping[str, Json] = field(default_factory=dict)


class PromptProgress(Event, frozen=True, kw_only=True):
    """Prefill: `done` of `total` prompt tokens are in the context; the first `reused` came from the context or a saved state,
    the others have taken `elapsed_s`."""

    done: int
    total: int
    reused: int
    elapsed_s: float


class TokenLogprob(Struct, frozen=True, kw_only=True):
    """A token and its log probability before sampling options.

    Attributes:
        data: its bytes, possibly part of a character.
        top: the most likely tokens at this position, most likely first.
    """

    token: int
    data: tuple[int, ...]
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class Delta(Event, frozen=True, kw_only=True):
    """A piece of the answer: whole characters, in order.

    Concatenated by kind they give the reasoning, the text, and the JSON arguments of the current tool call (repeated in full by
    the ToolCall that follows). `tokens` are the ids sampled since the last Delta or ToolCall: empty if a token gives several
    pieces, several if a character or a tag took more than one token.
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
    """A complete tool call.

    Attributes:
        arguments: a JSON object as text.
        usable: it is complete and may be executed.
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
    """The answer has ended.

    Attributes:
        reason: the model's end token; `max_tokens` reached; context full; stopped by the user; a stop string.
        stop_string: the one found.
        seed: what the sampler was seeded with.
        problems: formal defects of the answer (`stream_events.Problem`), e.g. `unclosed_think`.
        warning: one line for the user.
        tokens: remaining ids, not in any Delta or ToolCall.
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
        experts: if requested, the result of the expert engine's `expert_map()`.
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
    """A command failed; the engine continues.

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

"""OpenAI's Responses API: writes answers to `POST /v1/responses`. `responses_input.py` reads the requests."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Delta, Finished, ToolCall, ToolCallBegun
from localrun.server import asks
from localrun.server.choices import Block, Choice, total_usage
from localrun.server.faults import ApiError
from localrun.server.http import Writer, sse
from localrun.server.openai_common import logprob
from localrun.server.responses_input import Offered, ParsedRequest
from localrun.server.responses_store import ResponseStore
from localrun.server.signatures import Signer

Json = Any


class ResponsesWriter(Writer):
    """Events of a response, or the whole of it. Each block of the answer is an output item."""

    def __init__(self, question: ParsedRequest, signer: Signer, store: ResponseStore) -> None:
        super().__init__(question.ask)
        self._question, self._signer, self._store = question, signer, store
        self.id = asks.new_id("resp_")
        self._created = int(time.time())
        self._n_events = 0
        self._items: list[tuple[Block, str]] = []  # block, id of its item
        self._open: Block | None = None

    @property
    def _choice(self) -> Choice:
        return self.choices[0]

    # --- streaming

    def opening(self) -> bytes:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def event(self, choice: int, event: GenerateEvent) -> bytes:
        blocks = self._choice.blocks
        match event:
            case Delta() if event.text and blocks and (blocks[-1].kind == "tool") == (event.kind == "tool"):
                return self._begin(blocks[-1]) + self._delta(blocks[-1], event)
            case ToolCallBegun():
                return self._begin(blocks[-1])
            case ToolCall() if event.name:
                return self._end_item()
            case Finished(reason="stopped"):
                return b""
            case Finished():
                return self._end_item()
        return b""

    def _begin(self, block: Block) -> bytes:
        if self._open is block:
            return b""
        data = self._end_item()
        self._open = block
        prefix = {"thinking": "rs_", "text": "msg_", "tool": "fc_"}[block.kind]
        item_id = asks.new_id(prefix)
        self._items.append((block, item_id))
        item = self._item(block, item_id, "in_progress", empty=True)
        data += self._event("response.output_item.added", output_index=self._index, item=item)
        if block.kind == "thinking":
            empty = {"type": "summary_text", "text": ""}
            data += self._event("response.reasoning_summary_part.added", **self._position, summary_index=0, part=empty)
        elif block.kind == "text":
            data += self._event(
                "response.content_part.added", **self._position, content_index=0, part=_text_part("", None)
            )
        return data

    def _delta(self, block: Block, delta: Delta) -> bytes:
        if block.kind == "thinking":
            kind = "response.reasoning_summary_text.delta"
            return self._event(kind, **self._position, summary_index=0, delta=delta.text)
        if block.kind == "text":
            logprobs = [] if self.ask.logprobs is None else [logprob(token, data=False) for token in delta.logprobs]
            kind = "response.output_text.delta"
            return self._event(kind, **self._position, content_index=0, delta=delta.text, logprobs=logprobs)
        if self._offered(block).kind == "custom":
            return b""  # its text is inside of JSON until it is whole
        return self._event("response.function_call_arguments.delta", **self._position, delta=delta.text)

    def _end_item(self) -> bytes:
        block, self._open = self._open, None
        if block is None:
            return b""
        self._open, position = None, self._position
        data = b""
        if block.kind == "thinking":
            whole = {"type": "summary_text", "text": block.text}
            data += self._event("response.reasoning_summary_text.done", **position, summary_index=0, text=block.text)
            data += self._event("response.reasoning_summary_part.done", **position, summary_index=0, part=whole)
        elif block.kind == "text":
            whole = _text_part(block.text, self._logprobs())
            shown = [] if self.ask.logprobs is None else [logprob(t, data=False) for t in self._choice.logprobs]
            data += self._event(
                "response.output_text.done", **position, content_index=0, text=block.text, logprobs=shown
            )
            data += self._event("response.content_part.done", **position, content_index=0, part=whole)
        elif self._offered(block).kind == "custom":
            data += self._event("response.custom_tool_call_input.delta", **position, delta=_custom_input(block))
            data += self._event("response.custom_tool_call_input.done", **position, input=_custom_input(block))
        else:
            name = self._offered(block).name
            data += self._event("response.function_call_arguments.done", **position, name=name, arguments=block.text)
        item = self._item(block, self._items[-1][1], "completed")
        return data + self._event("response.output_item.done", output_index=self._index, item=item)

    def keep_alive(self, waiting: Mapping[str, Json]) -> bytes:
        return self._event("response.in_progress", response=self._response("in_progress"), localrun=waiting)

    def error(self, error: ApiError) -> bytes:
        response = self._response("failed")
        code = "rate_limit_exceeded" if error.kind == "overloaded" else "server_error"
        response["error"] = {"code": code, "message": error.message}
        return self._event("response.failed", response=response)

    def closing(self) -> bytes:
        response = self._whole_response()
        kind = "response.completed" if response["status"] == "completed" else "response.incomplete"
        return self._event(kind, response=response)

    # --- whole

    def whole(self) -> dict[str, Json]:
        prefixes = {"thinking": "rs_", "text": "msg_", "tool": "fc_"}
        self._items = [(block, asks.new_id(prefixes[block.kind])) for block in self._choice.blocks]
        return self._whole_response()

    def _whole_response(self) -> dict[str, Json]:
        cut = self._choice.finish == "length"
        response = self._response("incomplete" if cut else "completed")
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = time.time()
        response["output"] = [
            self._item(block, item_id, "incomplete" if cut and block is self._items[-1][0] else "completed")
            for block, item_id in self._items
        ]
        response["usage"] = _usage(self._choice)
        if self._question.store:
            self._store.put(self.id, self._question.items, response["output"], response)
        return response

    # --- both

    @property
    def _index(self) -> int:
        return len(self._items) - 1

    @property
    def _position(self) -> dict[str, Json]:
        return {"item_id": self._items[-1][1], "output_index": self._index}

    def _event(self, kind: str, **fields: Json) -> bytes:
        data = {"type": kind, "sequence_number": self._n_events, **fields}
        self._n_events += 1
        return sse(data, event=kind)

    def _response(self, status: str) -> dict[str, Json]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **self._question.echo,
        }

    def _offered(self, block: Block) -> Offered:
        return self._question.tools.get(block.name) or Offered(block.name)

    def _item(self, block: Block, item_id: str, status: str, *, empty: bool = False) -> dict[str, Json]:
        text = "" if empty else block.text
        if block.kind == "thinking":
            item: dict[str, Json] = {"id": item_id, "type": "reasoning", "summary": []}
            if not empty:
                item["summary"] = [{"type": "summary_text", "text": text}]
                item["encrypted_content"] = self._signer.seal(text)
            return item
        if block.kind == "text":
            content = [] if empty else [_text_part(text, self._logprobs())]
            return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": content}
        offered = self._offered(block)
        call: dict[str, Json] = {"id": item_id, "call_id": block.call_id, "name": offered.name}
        if offered.namespace is not None:
            call["namespace"] = offered.namespace
        if offered.kind == "custom":
            return {**call, "type": "custom_tool_call", "input": "" if empty else _custom_input(block)}
        return {**call, "type": "function_call", "status": status, "arguments": text}

    def _logprobs(self) -> list[Json] | None:
        return None if self.ask.logprobs is None else [logprob(token) for token in self._choice.logprobs]


def _text_part(text: str, logprobs: list[Json] | None) -> dict[str, Json]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def _custom_input(block: Block) -> str:
    try:
        value = json.loads(block.text or "{}")
    except (ValueError, RecursionError):
        return block.text
    return str(value.get("input", block.text)) if isinstance(value, dict) else block.text


def _usage(answer: Choice) -> dict[str, Json]:
    prompt, cached, new, thinking = total_usage([answer])
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": new,
        "output_tokens_details": {"reasoning_tokens": thinking},
        "total_tokens": prompt + new,
    }

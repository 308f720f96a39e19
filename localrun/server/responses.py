"""OpenAI's Responses API: writes answers to `POST /v1/responses`. `responses_input.py` reads the requests."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Delta, Finished, ToolCall, ToolCallBegun
from localrun.server import asks
from localrun.server.answers import Answer, Part, total_usage
from localrun.server.faults import ApiError
from localrun.server.http import Writer, sse
from localrun.server.openai_common import logprob
from localrun.server.responses_input import Offered, Question
from localrun.server.responses_store import ResponseStore
from localrun.server.signatures import Signer

Json = Any


class ResponsesWriter(Writer):
    """Events of a response, or the whole of it. Each part of the answer is an output item."""

    def __init__(self, question: Question, signer: Signer, store: ResponseStore) -> None:
        super().__init__(question.ask)
        self._question, self._signer, self._store = question, signer, store
        self.id = asks.new_id("resp_")
        self._created = int(time.time())
        self._n_events = 0
        self._items: list[tuple[Part, str]] = []  # part, id of its item
        self._open: Part | None = None

    @property
    def _answer(self) -> Answer:
        return self.answers[0]

    # --- streaming

    def opening(self) -> bytes:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def event(self, choice: int, event: GenerateEvent) -> bytes:
        parts = self._answer.parts
        match event:
            case Delta() if event.text and parts and (parts[-1].kind == "tool") == (event.kind == "tool"):
                return self._begin(parts[-1]) + self._delta(parts[-1], event)
            case ToolCallBegun():
                return self._begin(parts[-1])
            case ToolCall() if event.name:
                return self._end_item()
            case Finished(reason="stopped"):
                return b""
            case Finished():
                return self._end_item()
        return b""

    def _begin(self, part: Part) -> bytes:
        if self._open is part:
            return b""
        data = self._end_item()
        self._open = part
        prefix = {"thinking": "rs_", "text": "msg_", "tool": "fc_"}[part.kind]
        item_id = asks.new_id(prefix)
        self._items.append((part, item_id))
        item = self._item(part, item_id, "in_progress", empty=True)
        data += self._event("response.output_item.added", output_index=self._index, item=item)
        if part.kind == "thinking":
            empty = {"type": "summary_text", "text": ""}
            data += self._event("response.reasoning_summary_part.added", **self._place, summary_index=0, part=empty)
        elif part.kind == "text":
            data += self._event(
                "response.content_part.added", **self._place, content_index=0, part=_text_part("", None)
            )
        return data

    def _delta(self, part: Part, delta: Delta) -> bytes:
        if part.kind == "thinking":
            kind = "response.reasoning_summary_text.delta"
            return self._event(kind, **self._place, summary_index=0, delta=delta.text)
        if part.kind == "text":
            logprobs = [] if self.ask.logprobs is None else [logprob(token, data=False) for token in delta.logprobs]
            kind = "response.output_text.delta"
            return self._event(kind, **self._place, content_index=0, delta=delta.text, logprobs=logprobs)
        if self._offered(part).kind == "custom":
            return b""  # its text is inside of JSON until it is whole
        return self._event("response.function_call_arguments.delta", **self._place, delta=delta.text)

    def _end_item(self) -> bytes:
        part, self._open = self._open, None
        if part is None:
            return b""
        self._open, place = None, self._place
        data = b""
        if part.kind == "thinking":
            whole = {"type": "summary_text", "text": part.text}
            data += self._event("response.reasoning_summary_text.done", **place, summary_index=0, text=part.text)
            data += self._event("response.reasoning_summary_part.done", **place, summary_index=0, part=whole)
        elif part.kind == "text":
            whole = _text_part(part.text, self._logprobs())
            shown = [] if self.ask.logprobs is None else [logprob(t, data=False) for t in self._answer.logprobs]
            data += self._event("response.output_text.done", **place, content_index=0, text=part.text, logprobs=shown)
            data += self._event("response.content_part.done", **place, content_index=0, part=whole)
        elif self._offered(part).kind == "custom":
            data += self._event("response.custom_tool_call_input.delta", **place, delta=_custom_input(part))
            data += self._event("response.custom_tool_call_input.done", **place, input=_custom_input(part))
        else:
            name = self._offered(part).name
            data += self._event("response.function_call_arguments.done", **place, name=name, arguments=part.text)
        item = self._item(part, self._items[-1][1], "completed")
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
        self._items = [(part, asks.new_id(prefixes[part.kind])) for part in self._answer.parts]
        return self._whole_response()

    def _whole_response(self) -> dict[str, Json]:
        cut = self._answer.finish == "length"
        response = self._response("incomplete" if cut else "completed")
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = time.time()
        response["output"] = [
            self._item(part, item_id, "incomplete" if cut and part is self._items[-1][0] else "completed")
            for part, item_id in self._items
        ]
        response["usage"] = _usage(self._answer)
        if self._question.store:
            self._store.put(self.id, self._question.items, response["output"], response)
        return response

    # --- both

    @property
    def _index(self) -> int:
        return len(self._items) - 1

    @property
    def _place(self) -> dict[str, Json]:
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

    def _offered(self, part: Part) -> Offered:
        return self._question.tools.get(part.name) or Offered(part.name)

    def _item(self, part: Part, item_id: str, status: str, *, empty: bool = False) -> dict[str, Json]:
        text = "" if empty else part.text
        if part.kind == "thinking":
            item: dict[str, Json] = {"id": item_id, "type": "reasoning", "summary": []}
            if not empty:
                item["summary"] = [{"type": "summary_text", "text": text}]
                item["encrypted_content"] = self._signer.seal(text)
            return item
        if part.kind == "text":
            content = [] if empty else [_text_part(text, self._logprobs())]
            return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": content}
        offered = self._offered(part)
        call: dict[str, Json] = {"id": item_id, "call_id": part.call_id, "name": offered.name}
        if offered.namespace is not None:
            call["namespace"] = offered.namespace
        if offered.kind == "custom":
            return {**call, "type": "custom_tool_call", "input": "" if empty else _custom_input(part)}
        return {**call, "type": "function_call", "status": status, "arguments": text}

    def _logprobs(self) -> list[Json] | None:
        return None if self.ask.logprobs is None else [logprob(token) for token in self._answer.logprobs]


def _text_part(text: str, logprobs: list[Json] | None) -> dict[str, Json]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def _custom_input(part: Part) -> str:
    try:
        value = json.loads(part.text or "{}")
    except (ValueError, RecursionError):
        return part.text
    return str(value.get("input", part.text)) if isinstance(value, dict) else part.text


def _usage(answer: Answer) -> dict[str, Json]:
    prompt, cached, new, thinking = total_usage([answer])
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": new,
        "output_tokens_details": {"reasoning_tokens": thinking},
        "total_tokens": prompt + new,
    }

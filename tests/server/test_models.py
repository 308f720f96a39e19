"""The list of models, as OpenAI's and Anthropic's clients read it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from localrun.server.models import anthropic_models, openai_models

SERVICE: Any = SimpleNamespace(created=1_767_225_600, defaults=SimpleNamespace(model="flash", n_ctx=8192))
"""Since 2026 began."""


def test_openai() -> None:
    assert openai_models(SERVICE) == {
        "object": "list",
        "data": [
            {
                "id": "flash",
                "object": "model",
                "created": 1_767_225_600,
                "owned_by": "localrun",
                "max_model_len": 8192,
                "context_length": 8192,
            }
        ],
    }


def test_anthropic() -> None:
    found = anthropic_models(SERVICE)
    (model,) = found["data"]
    assert (found["has_more"], found["first_id"], found["last_id"]) == (False, "flash", "flash")
    assert model["created_at"] == "2026-01-01T00:00:00Z"
    assert (model["id"], model["type"], model["max_input_tokens"], model["max_tokens"]) == (
        "flash",
        "model",
        8192,
        8192,
    )

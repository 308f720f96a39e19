"""The list of models, in both dialects. There is one model, and every name is an alias of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from localrun.server.service import Service

Json = Any


def openai_models(service: Service) -> dict[str, Json]:
    defaults = service.defaults
    model = {
        "id": defaults.model,
        "object": "model",
        "created": service.created,
        "owned_by": "localrun",
        # vLLM's and OpenRouter's names for what editors want to know
        "max_model_len": defaults.n_ctx,
        "context_length": defaults.n_ctx,
    }
    return {"object": "list", "data": [model]}


def anthropic_models(service: Service) -> dict[str, Json]:
    defaults = service.defaults
    model = {
        "type": "model",
        "id": defaults.model,
        "display_name": defaults.model,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": defaults.n_ctx,
        "max_tokens": defaults.n_ctx,
    }
    return {"data": [model], "has_more": False, "first_id": defaults.model, "last_id": defaults.model}

"""Ready-made configurations for common clients (`localrun serve --print-config NAME`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Configuration:
    """A client's configuration.

    Attributes:
        hint: where the text goes, and what to do next.
        text: as it goes into a file or a shell.
    """

    hint: str
    text: str


@dataclass(frozen=True, slots=True)
class Address:
    """The server's address and model.

    Attributes:
        key: the API key; any word if the server requires none.
    """

    host: str
    port: int
    model: str
    key: str
    n_ctx: int

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def _claude_code(at: Address) -> Configuration:
    text = f"""\
export ANTHROPIC_BASE_URL={at.url}
export ANTHROPIC_API_KEY={at.key}
export CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1
export CLAUDE_CODE_ATTRIBUTION_HEADER=0
export CLAUDE_CODE_MAX_OUTPUT_TOKENS=8192
"""
    return Configuration(f"in the shell that starts claude; then: claude --model {at.model}", text)


def _opencode(at: Address) -> Configuration:
    config = {
        "$schema": "https://opencode.ai/config.json",
        "model": f"localrun/{at.model}",
        "small_model": f"localrun/{at.model}",
        "provider": {
            "localrun": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "localrun",
                "options": {"baseURL": f"{at.url}/v1", "apiKey": at.key},
                "models": {at.model: {"name": at.model, "limit": {"context": at.n_ctx, "output": at.n_ctx // 4}}},
            }
        },
    }
    return Configuration("~/.config/opencode/opencode.json; then: opencode", json.dumps(config, indent=2))


def _codex(at: Address) -> Configuration:
    text = f"""\
model = "{at.model}"
model_provider = "localrun"
model_context_window = {at.n_ctx}

[model_providers.localrun]
name = "localrun"
base_url = "{at.url}/v1"
env_key = "LOCALRUN_KEY"
wire_api = "responses"
stream_idle_timeout_ms = 600000
"""
    return Configuration(f"~/.codex/config.toml; then: LOCALRUN_KEY={at.key} codex", text)


def _pi(at: Address) -> Configuration:
    config = {
        "providers": {
            "localrun": {
                "baseUrl": f"{at.url}/v1",
                "apiKey": at.key,
                "api": "openai-completions",
                "models": [
                    {
                        "id": at.model,
                        "name": at.model,
                        "reasoning": True,
                        "input": ["text"],
                        "contextWindow": at.n_ctx,
                        "maxTokens": at.n_ctx // 4,
                        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
                    }
                ],
            }
        }
    }
    hint = f"~/.pi/agent/models.json; then: pi --provider localrun --model {at.model}"
    return Configuration(hint, json.dumps(config, indent=2))


def _qwen(at: Address) -> Configuration:
    text = f"""\
export OPENAI_BASE_URL={at.url}/v1
export OPENAI_API_KEY={at.key}
export OPENAI_MODEL={at.model}
"""
    return Configuration("in the shell that starts qwen; then: qwen --auth-type openai", text)


def _continue(at: Address) -> Configuration:
    text = f"""\
name: localrun
version: 1.0.0
schema: v1
models:
  - name: {at.model}
    provider: openai
    model: {at.model}
    apiBase: {at.url}/v1
    apiKey: {at.key}
    roles: [chat, edit, apply]
    capabilities: [tool_use]
    defaultCompletionOptions:
      contextLength: {at.n_ctx}
"""
    return Configuration("~/.continue/config.yaml", text)


def _zed(at: Address) -> Configuration:
    config = {
        "language_models": {
            "openai_compatible": {
                "localrun": {
                    "api_url": f"{at.url}/v1",
                    "available_models": [
                        {
                            "name": at.model,
                            "max_tokens": at.n_ctx,
                            "capabilities": {"tools": True, "images": False, "parallel_tool_calls": True},
                        }
                    ],
                }
            }
        }
    }
    return Configuration("Zed's settings.json; LOCALRUN_API_KEY holds the key", json.dumps(config, indent=2))


CLIENTS: dict[str, Callable[[Address], Configuration]] = {
    "claude-code": _claude_code,
    "opencode": _opencode,
    "codex": _codex,
    "pi": _pi,
    "qwen": _qwen,
    "continue": _continue,
    "zed": _zed,
}
"""Client name -> its configuration."""

"""The demo model that ships with localrun: a trained DeepSeek-V4 of 33 million parameters in the official checkpoint format.

`docs/demo-model.md` in the repository tells how it was trained and how well it answers.
"""

from __future__ import annotations

from pathlib import Path


def checkpoint_dir() -> Path:
    """The folder with config.json, model.safetensors and the tokenizer; read-only."""
    return Path(__file__).resolve().parent

"""Hand-written training text, one entry a line."""

from __future__ import annotations

from pathlib import Path


def read_table(name: str) -> list[str]:
    """The lines of `<name>.txt` in this folder."""
    lines = (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]

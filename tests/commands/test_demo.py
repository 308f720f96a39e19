"""The demo model's place in the cache is remembered, and found again only for the very same files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localrun import paths
from localrun.commands import demo
from localrun.errors import LocalrunError


def test_the_converted_model_is_found_without_a_look_into_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALRUN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "checkpoint", lambda: tmp_path / "checkpoint")
    (tmp_path / "checkpoint").mkdir()
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.write_bytes(b"no weights: a look at them fails")
    target = paths.cache_dir() / "demo-1"
    target.mkdir(parents=True)
    stamp = paths.cache_dir() / f"demo-{demo._files_digest(tmp_path / 'checkpoint')}.stamp"
    stamp.write_text("demo-1")
    assert demo.converted() == target
    stamp.write_text("../cache")  # nonsense leads nowhere
    with pytest.raises(LocalrunError):
        demo.converted()
    stamp.write_text("demo-1")
    os.utime(weights, ns=(1, 1))
    with pytest.raises(LocalrunError):
        demo.converted()

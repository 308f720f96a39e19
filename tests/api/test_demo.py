"""The demo model's place in the cache is remembered, and found again only for the very same files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localrun import paths
from localrun.api import demo
from localrun.errors import LocalrunError
from localrun.quant.model import manifest


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
    (target / "model.gguf").write_bytes(b"1234")
    (target / demo.MANIFEST_NAME).write_text('{"files": [{"name": "model.gguf", "size_bytes": 4}]}')
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


def test_a_damaged_copy_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALRUN_CACHE_DIR", str(tmp_path))
    target = demo.converted()
    assert demo.converted() == target
    size = (target / "model.gguf").stat().st_size
    left, at_work = tmp_path / "demo-1.aa.partial", tmp_path / "demo-1.bb.partial"
    for folder in (left, at_work):
        folder.mkdir()
    os.utime(left, (1, 1))
    for damage in (b"", None):
        if damage is None:
            (target / "model.gguf").unlink()
        else:
            (target / "model.gguf").write_bytes(damage)
        assert demo.converted() == target
        assert (target / "model.gguf").stat().st_size == size
    (target / demo.MANIFEST_NAME).write_bytes(b"{")
    assert demo.converted() == target
    assert (target / "model.gguf").stat().st_size == size
    assert not left.exists(), "what killed runs left goes"
    assert at_work.exists(), "what may be at work stays"


def test_the_manifest_has_the_name_that_the_converter_gives_it() -> None:
    assert demo.MANIFEST_NAME == manifest.MANIFEST_NAME

"""The manifest: what is written is read, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localrun.errors import FormatError, StoreError
from localrun.quant.model.manifest import (
    MANIFEST_NAME,
    Manifest,
    ModelFile,
    checksum,
    read_manifest,
    write_manifest,
)

A, B, C = checksum(b"a"), checksum(b"b"), checksum(b"c")
SAMPLE = Manifest(
    files=(ModelFile("model-00001-of-00002.gguf", 1 << 40, A), ModelFile("Modell, Größe 2.gguf", 17, B)),
    tensors={"token_embd.weight": A, "blk.0.attn_norm.weight": B},
    experts={0: ([A, B], [B, C], [C, A]), 11: ([A], [B], [C])},
    source={"kind": "checkpoint", "files": [{"name": "x", "size_bytes": 5}]},
    tools={"localrun": "0.1.0"},
    options={"dense": "q8_0", "jobs": 4},
)


def test_checksum_is_xxh3_64() -> None:
    # Published test vector: XXH3_64bits of nothing, seed 0.
    assert checksum(b"") == "2d06800538d394c2"
    assert checksum(bytearray(b"a")) == checksum(memoryview(b"a")) == A


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_manifest(SAMPLE, tmp_path)
    assert path == tmp_path / MANIFEST_NAME
    assert read_manifest(path) == SAMPLE
    assert [entry.name for entry in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_flash_s_checksums_stay_near_a_megabyte() -> None:
    experts = {layer: ([A] * 256, [B] * 256, [C] * 256) for layer in range(43)}
    text = Manifest(SAMPLE.files, {}, experts).to_json()
    assert len(text) < 1.02 * 43 * 256 * 3 * 16


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    broken = Manifest(SAMPLE.files, {}, {}, options={"not json": object()})
    with pytest.raises(TypeError):
        write_manifest(broken, tmp_path)
    assert list(tmp_path.iterdir()) == []


def put(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / MANIFEST_NAME
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def edited(change: Callable[[dict[str, Any]], None]) -> str:
    data = json.loads(SAMPLE.to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
        ("[]", "not a localrun manifest"),
        ('{"format": "other"}', "not a localrun manifest"),
        ('{"format": "localrun-model", "format": "localrun-model"}', "key 'format' occurs twice"),
        ('{"format": "localrun-model", "version": 2}', "manifest version 2, this program reads version 1"),
        ('{"format": "localrun-model", "version": true}', "manifest version True"),
        ('{"format": "localrun-model", "version": 1}', "no field 'experts'"),
    ],
)
def test_text_that_is_no_manifest(tmp_path: Path, text: str | bytes, problem: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_manifest(put(tmp_path, text))
    assert problem in str(caught.value)
    assert MANIFEST_NAME in str(caught.value)


def change(path: str, value: Any) -> str:
    """The sample with the field at `path` replaced."""

    def apply(data: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        target: Any = data
        for parent in parents:
            target = target[parent] if isinstance(target, dict) else target[int(parent)]
        target[last if isinstance(target, dict) else int(last)] = value

    return edited(apply)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (change("surprise", 1), "unknown field 'surprise'"),
        (change("files", []), "files: expected a list with at least one file"),
        (change("files", {}), "files: expected a list"),
        (change("files/0", "model.gguf"), "files[0]: expected an object"),
        (change("files/0/extra", 1), "files[0]: expected an object with name"),
        (change("files/0/size_bytes", -1), "files[0].size_bytes: -1 is not a file size"),
        (change("files/0/size_bytes", 1.5), "files[0].size_bytes: 1.5 is not a file size"),
        (change("files/0/size_bytes", True), "files[0].size_bytes: True is not a file size"),
        (change("files/0/size_bytes", 1 << 70), "is not a file size"),
        (change("files/0/header_checksum", "xyz"), "files[0].header_checksum: expected"),
        (change("files/1/name", "model-00001-of-00002.gguf"), "files: a name occurs twice"),
        (change("tensors", []), "tensors: expected an object"),
        (change("tensors/token_embd.weight", A * 2), "tensors.token_embd.weight: expected 16 hex digits"),
        (change("tensors/token_embd.weight", A.upper()), "tensors.token_embd.weight: expected"),
        (change("tensors/token_embd.weight", 5), "tensors.token_embd.weight: expected a string"),
        (change("experts/0", []), "experts.0: expected an object with gate, up, down"),
        (change("experts/0/gate", A), "experts.0: 1, 2 and 2 checksums"),
        (change("experts/0/gate", A + "0"), "experts.0.gate: expected a multiple of 16 hex digits"),
        (change("experts/-1", {"gate": A, "up": A, "down": A}), "experts.-1: not a layer number"),
        (change("experts/01", {"gate": A, "up": A, "down": A}), "experts.01: not a layer number"),
        (change("experts/99999", {"gate": A, "up": A, "down": A}), "experts.99999: not a layer number"),
        (change("tools/localrun", 1), "tools.localrun: expected a string"),
        (change("options", 3), "options: expected an object"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_manifest(put(tmp_path, text))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../model.gguf", "/etc/passwd", "a/b.gguf", "a\\b.gguf", "C:model.gguf", "..", ".", "", "a\0b", "a\nb", 7, None],
)
def test_no_name_leaves_the_folder(tmp_path: Path, name: object) -> None:
    with pytest.raises(FormatError, match=r"files\[0\].name"):
        read_manifest(put(tmp_path, change("files/0/name", name)))


def test_a_missing_manifest_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="can't be read"):
        read_manifest(tmp_path / MANIFEST_NAME)


@pytest.mark.parametrize("part", ["source", "options", "tools", "tiers"])
def test_what_was_changed_or_got_lost_is_noticed(tmp_path: Path, part: str) -> None:
    text = json.loads(
        edited(lambda data: data.update(source={"a": 1}, options={"b": 2}, tools={"c": "3"}, tiers={"d": 4}))
    )
    text.pop("checksum", None)
    manifest = read_manifest(put(tmp_path, json.dumps(text)))
    written = json.loads(manifest.to_json())
    assert read_manifest(put(tmp_path, json.dumps(written, indent=7))) == manifest, "the layout does not count"
    del written[part]
    with pytest.raises(FormatError, match="edited or damaged"):
        read_manifest(put(tmp_path, json.dumps(written)))

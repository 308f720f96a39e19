"""`localrun.json`: what a converted model's folder holds and the checksum of everything in it.

Strictly read: a manifest decides which files are opened, so every field is checked and no name can leave the folder.
Knows JSON and digests; knows nothing about GGUF. Checksums are xxh3_64 as 16 hex digits: they find damage, they don't
protect against somebody who forges a file.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from localrun.errors import FormatError, StoreError
from localrun.quant.source import PROJECTIONS

MANIFEST_NAME = "localrun.json"
FORMAT = "localrun-model"
VERSION = 1
DIGEST_CHARS = 16
MAX_MANIFEST_BYTES = 64 << 20
"""Pro's 23,424 experts take 1.2 MB; anything near this bound is not a manifest."""

_HEX = re.compile(r"(?:[0-9a-f]{16})*")
_REQUIRED_KEYS = {"format", "version", "files", "tensors", "experts"}
_OPTIONAL_KEYS = {"source", "tools", "options"}


def checksum(data: Any) -> str:
    """xxh3_64 of a bytes-like object as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One GGUF of the model.

    Attributes:
        name: plain file name inside the manifest's folder.
        size_bytes: exact size.
        header_checksum: digest of all bytes before the tensor data, padding included.
    """

    name: str
    size_bytes: int
    header_checksum: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of a converted model. Immutable.

    Attributes:
        files: GGUF parts in order.
        tensors: dense tensor name -> checksum of its bytes.
        experts: layer -> for gate, up and down the checksums of all experts' ggml rows, in order of expert number.
        source: where the weights came from (free JSON: kind, names, sizes, hashes).
        tools: program versions that wrote the files.
        options: what the user asked of the converter.
    """

    files: tuple[ModelFile, ...]
    tensors: Mapping[str, str]
    experts: Mapping[int, tuple[Sequence[str], Sequence[str], Sequence[str]]]
    source: Mapping[str, object] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's text. Each layer's projection is one string of concatenated digests: a list would be half as long
        again and a hundred times as many lines."""
        experts = {
            str(layer): {name: "".join(digests) for name, digests in zip(PROJECTIONS, self.experts[layer], strict=True)}
            for layer in sorted(self.experts)
        }
        data = {
            "format": FORMAT,
            "version": VERSION,
            "source": dict(self.source),
            "tools": dict(self.tools),
            "options": dict(self.options),
            "files": [
                {"name": f.name, "size_bytes": f.size_bytes, "header_checksum": f.header_checksum} for f in self.files
            ],
            "tensors": dict(self.tensors),
            "experts": experts,
        }
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def write_manifest(manifest: Manifest, folder: Path) -> Path:
    """Writes `folder/localrun.json` atomically and durably; returns its path."""
    path = folder / MANIFEST_NAME
    partial = folder / f"{MANIFEST_NAME}.{uuid.uuid4().hex}.partial"
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder_fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest.

    Args:
        path: the file itself.

    Raises:
        FormatError: not a manifest, damaged, or of another version; names the field.
        StoreError: can't be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise StoreError(f"{path}: can't be read: {error.strerror}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise FormatError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
    return _Parser(path).manifest(data)


class _Parser:
    """Turns JSON into a Manifest; every method names the field it complains about."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _error(self, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {problem}", hint="convert the model again, or restore this file from a copy")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise self._error(f"key '{key}' occurs twice")
            result[key] = value
        return result

    def manifest(self, data: bytes) -> Manifest:
        try:
            root = json.loads(data, object_pairs_hook=self._object)
        except (FormatError, MemoryError):
            raise
        except (ValueError, RecursionError) as error:
            raise self._error(f"not valid JSON: {error}") from None
        if not isinstance(root, dict) or root.get("format") != FORMAT:
            raise self._error(f"not a localrun manifest (no format '{FORMAT}')")
        if type(root.get("version")) is not int or root["version"] != VERSION:
            raise FormatError(
                f"{self.path}: manifest version {root.get('version')!r}, this program reads version {VERSION}",
                hint="update localrun, or convert the model again",
            )
        missing, unknown = _REQUIRED_KEYS - root.keys(), root.keys() - _REQUIRED_KEYS - _OPTIONAL_KEYS
        if missing:
            raise self._error(f"no field '{min(missing)}'")
        if unknown:
            raise self._error(f"unknown field '{min(unknown)}'")
        return Manifest(
            files=self._files(root["files"]),
            tensors={name: self._digest(f"tensors.{name}", v) for name, v in self._map("tensors", root).items()},
            experts=self._experts(self._map("experts", root)),
            source=self._map("source", root),
            tools={name: self._string(f"tools.{name}", v) for name, v in self._map("tools", root).items()},
            options=self._map("options", root),
        )

    def _map(self, name: str, root: dict[str, Any]) -> dict[str, Any]:
        value = root.get(name, {})
        if not isinstance(value, dict):
            raise self._error(f"{name}: expected an object")
        return value

    def _string(self, where: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self._error(f"{where}: expected a string")
        return value

    def _digests(self, where: str, value: Any) -> list[str]:
        text = self._string(where, value)
        if not _HEX.fullmatch(text):
            raise self._error(f"{where}: expected a multiple of {DIGEST_CHARS} hex digits")
        return [text[i : i + DIGEST_CHARS] for i in range(0, len(text), DIGEST_CHARS)]

    def _digest(self, where: str, value: Any) -> str:
        digests = self._digests(where, value)
        if len(digests) != 1:
            raise self._error(f"{where}: expected {DIGEST_CHARS} hex digits")
        return digests[0]

    def _files(self, value: Any) -> tuple[ModelFile, ...]:
        if not isinstance(value, list) or not value:
            raise self._error("files: expected a list with at least one file")
        files = []
        for index, entry in enumerate(value):
            where = f"files[{index}]"
            if not isinstance(entry, dict) or entry.keys() != {"name", "size_bytes", "header_checksum"}:
                raise self._error(f"{where}: expected an object with name, size_bytes and header_checksum")
            size = entry["size_bytes"]
            if type(size) is not int or not 0 < size < 1 << 63:
                raise self._error(f"{where}.size_bytes: {size!r} is not a file size")
            name = self._file_name(f"{where}.name", entry["name"])
            files.append(ModelFile(name, size, self._digest(f"{where}.header_checksum", entry["header_checksum"])))
        if len({file.name for file in files}) != len(files):
            raise self._error("files: a name occurs twice")
        return tuple(files)

    def _file_name(self, where: str, value: Any) -> str:
        name = self._string(where, value)
        # A plain name only: separators of any system, drive letters and parent references could leave the folder.
        if not name or name in (".", "..") or any(c in name for c in "/\\:\0") or not name.isprintable():
            raise self._error(f"{where}: {name!r} is not a plain file name")
        return name

    def _experts(self, value: dict[str, Any]) -> dict[int, tuple[list[str], list[str], list[str]]]:
        experts = {}
        for key, entry in value.items():
            where = f"experts.{key}"
            if not re.fullmatch(r"0|[1-9][0-9]{0,3}", key):
                raise self._error(f"{where}: not a layer number")
            if not isinstance(entry, dict) or entry.keys() != set(PROJECTIONS):
                raise self._error(f"{where}: expected an object with {', '.join(PROJECTIONS)}")
            gate, up, down = (self._digests(f"{where}.{name}", entry[name]) for name in PROJECTIONS)
            if not len(gate) == len(up) == len(down) > 0:
                raise self._error(f"{where}: {len(gate)}, {len(up)} and {len(down)} checksums for gate, up and down")
            experts[int(key)] = (gate, up, down)
        return experts

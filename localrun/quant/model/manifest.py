"""`localrun.json`: the contents of a converted model's folder, with checksums of everything in it.

The base is described by `files`, `tensors` and `experts`, an overlay with better copies by `overlay`, experts that stay in a
checkpoint elsewhere by `kept`. `tiers`, `profile` and `report` are JSON written by the choice of copies and the measurements;
this module only stores them.

Parsed strictly: a manifest determines which files are opened, so every field is checked and no name can point outside the
folder; only `kept` refers elsewhere, to a checkpoint that must be unchanged. Knows JSON and digests, but nothing about GGUF.
Checksums are xxh3_64 as 16 hex digits: they detect damage, not forgery. The last key is a checksum of the manifest's contents.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from localrun.atomic import replacing
from localrun.errors import FormatError
from localrun.paths import is_plain_name
from localrun.quant.model.source import PROJECTIONS
from localrun.reading import read_small

MANIFEST_NAME = "localrun.json"
WORK_NAME = ".convert"
"""Folder of a conversion under way beside its output; without a manifest, the output is unfinished."""
FORMAT = "localrun-model"
VERSION = 1
DIGEST_CHARS = 16
MAX_MANIFEST_BYTES = 64 << 20
"""Pro's 23,424 experts take 1.2 MB; anything near this bound is not a manifest."""

_HEX = re.compile(r"(?:[0-9a-f]{16})*")
_REQUIRED_KEYS = {"format", "version", "files", "tensors", "experts"}
_FREE_KEYS = {"tiers": "better_copies", "profile": "profile", "report": "report"}
"""Key in the file -> attribute."""
_OVERLAY_KEYS = {"files", "experts", "options", "rounding"}
_KEPT_KEYS = {"path", "identity", "files"}
_OPTIONAL_KEYS = {"source", "tools", "options", "overlay", "kept", "checksum", *_FREE_KEYS}


def checksum(data: Any) -> str:
    """xxh3_64 of a bytes-like object as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def _digest_of(data: Mapping[str, object]) -> str:
    """Checksum of a manifest's contents without this key, independent of formatting: a lost overlay key or option would
    otherwise leave a different but valid model."""
    said = json.dumps({key: value for key, value in data.items() if key != "checksum"}, ensure_ascii=True)
    return checksum(json.dumps(json.loads(said), sort_keys=True, separators=(",", ":")).encode())


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


def _file_json(file: ModelFile) -> dict[str, object]:
    return {"name": file.name, "size_bytes": file.size_bytes, "header_checksum": file.header_checksum}


@dataclass(frozen=True, slots=True)
class OverlayStack:
    """The copies of one layer's experts in one type.

    Attributes:
        ids: expert numbers in the order of the stack, ascending.
        checksums: of the ggml rows of gate, up and down, in the same order.
    """

    ids: tuple[int, ...]
    checksums: tuple[Sequence[str], Sequence[str], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Overlay:
    """Better copies of some experts. Immutable.

    Attributes:
        files: their GGUFs; currently one.
        experts: layer -> lower-case ggml type -> experts.
        options: what the user asked for, and the digest of the plan (`plan`).
        rounding: losses by `source dtype -> ggml type` (free JSON).
    """

    files: tuple[ModelFile, ...]
    experts: Mapping[int, Mapping[str, OverlayStack]]
    options: Mapping[str, object] = field(default_factory=dict)
    rounding: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return {
            "files": [_file_json(file) for file in self.files],
            "experts": {
                str(layer): {
                    kind: {
                        "ids": list(stack.ids),
                        **{name: "".join(sums) for name, sums in zip(PROJECTIONS, stack.checksums, strict=True)},
                    }
                    for kind, stack in by_type.items()
                }
                for layer, by_type in sorted(self.experts.items())
            },
            "options": dict(self.options),
            "rounding": dict(self.rounding),
        }


@dataclass(frozen=True, slots=True)
class KeptExperts:
    """Experts that stay in the source checkpoint. Immutable.

    Attributes:
        path: the checkpoint's folder, absolute.
        identity: of its weights (`Checkpoint.identity`).
        files: sizes of its shards by name.
    """

    path: str
    identity: str
    files: Mapping[str, int]

    def to_json(self) -> dict[str, object]:
        return {"path": self.path, "identity": self.identity, "files": dict(self.files)}


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of a converted model. Immutable.

    Attributes:
        files: GGUF parts in order.
        tensors: dense tensor name -> checksum of its bytes.
        experts: layer -> for gate, up and down the checksums of all experts' ggml rows, in order of expert number.
        source: origin of the weights (free JSON: kind, names, sizes, hashes).
        tools: program versions that wrote the files.
        options: the user's conversion options.
        overlay: better copies of some experts; None without.
        kept: location of the experts, if they are not in `files`; `experts` is then empty.
        better_copies, profile, report: the experts in the overlay (`BetterCopies`, key `tiers`), use counts, and quality (free
            JSON; may be empty).
    """

    files: tuple[ModelFile, ...]
    tensors: Mapping[str, str]
    experts: Mapping[int, tuple[Sequence[str], Sequence[str], Sequence[str]]]
    source: Mapping[str, object] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    overlay: Overlay | None = None
    kept: KeptExperts | None = None
    better_copies: Mapping[str, object] = field(default_factory=dict)
    profile: Mapping[str, object] = field(default_factory=dict)
    report: Mapping[str, object] = field(default_factory=dict)

    @property
    def base_digest(self) -> str:
        """Digest of the base's complete contents, by which an overlay identifies its base."""
        digest = xxhash.xxh3_128()
        digest.update("".join(f"{file.size_bytes} {file.header_checksum}\n" for file in self.files).encode())
        digest.update("".join(f"{name} {checksum}\n" for name, checksum in sorted(self.tensors.items())).encode())
        for layer in sorted(self.experts):
            for checksums in self.experts[layer]:
                digest.update(f"{layer} {''.join(checksums)}\n".encode())
        if self.kept is not None:
            digest.update(self.kept.identity.encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        """The file's text. Each layer's projection is one string of concatenated digests: a list would be half again as long
        with a hundred times as many lines."""
        experts = {
            str(layer): {name: "".join(digests) for name, digests in zip(PROJECTIONS, self.experts[layer], strict=True)}
            for layer in sorted(self.experts)
        }
        data: dict[str, object] = {
            "format": FORMAT,
            "version": VERSION,
            "source": dict(self.source),
            "tools": dict(self.tools),
            "options": dict(self.options),
            "files": [_file_json(file) for file in self.files],
            "tensors": dict(self.tensors),
            "experts": experts,
        }
        if self.overlay is not None:
            data["overlay"] = self.overlay.to_json()
        if self.kept is not None:
            data["kept"] = self.kept.to_json()
        data |= {key: dict(value) for key, name in _FREE_KEYS.items() if (value := getattr(self, name))}
        data["checksum"] = _digest_of(data)
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def write_manifest(manifest: Manifest, folder: Path) -> Path:
    """Writes `folder/localrun.json` atomically and durably; returns its path."""
    path = folder / MANIFEST_NAME
    with replacing(path) as file:
        file.write(manifest.to_json().encode())
    return path


def is_unfinished(folder: Path) -> bool:
    """Whether a conversion into this folder has not come to its end."""
    # In this order: a conversion that ends in between has a manifest before its work folder goes.
    return (folder / WORK_NAME).is_dir() and not (folder / MANIFEST_NAME).is_file()


def refuse_unfinished_conversion(folder: Path) -> None:
    """Raises FormatError if a conversion into this folder has not come to its end."""
    if is_unfinished(folder):
        raise FormatError(
            f"{folder}: an unfinished conversion",
            hint="wait for it, or run the same 'localrun convert' again: it continues where it stopped",
        )


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest.

    Args:
        path: the file itself.

    Raises:
        FormatError: not a manifest, damaged, or of another version; names the field.
        StoreError: can't be read.
    """
    return _Parser(path).manifest(read_small(path, MAX_MANIFEST_BYTES, "a manifest"))


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
        files = self._files("files", root["files"])
        overlay = self._overlay(root["overlay"]) if "overlay" in root else None
        if overlay is not None and {file.name for file in files} & {file.name for file in overlay.files}:
            raise self._error("overlay.files: a name also occurs in files")
        manifest = self._manifest(root, files, overlay)
        if "checksum" in root and root["checksum"] != _digest_of(root):  # models of other versions may have none
            raise self._error("its checksum is wrong: it was edited or damaged")
        return manifest

    def _manifest(self, root: dict[str, Any], files: tuple[ModelFile, ...], overlay: Overlay | None) -> Manifest:
        return Manifest(
            files=files,
            tensors={name: self._digest(f"tensors.{name}", v) for name, v in self._map("tensors", root).items()},
            experts=self._experts(self._map("experts", root)),
            source=self._map("source", root),
            tools={name: self._string(f"tools.{name}", v) for name, v in self._map("tools", root).items()},
            options=self._map("options", root),
            overlay=overlay,
            kept=self._kept(root["kept"]) if "kept" in root else None,
            **{name: self._map(key, root) for key, name in _FREE_KEYS.items()},
        )

    def _map(self, name: str, root: dict[str, Any], where: str = "") -> dict[str, Any]:
        value = root.get(name, {})
        if not isinstance(value, dict):
            raise self._error(f"{where}{name}: expected an object")
        return value

    def _overlay(self, value: Any) -> Overlay:
        if not isinstance(value, dict) or not {"files", "experts"} <= value.keys() <= _OVERLAY_KEYS:
            raise self._error(f"overlay: expected an object with {', '.join(sorted(_OVERLAY_KEYS))}")
        experts: dict[int, dict[str, OverlayStack]] = {}
        for layer in self._map("experts", value, "overlay."):
            where = f"overlay.experts.{layer}"
            by_type = self._map(layer, value["experts"], "overlay.experts.")
            experts[self._layer(where, layer)] = {
                kind: self._stack(f"{where}.{kind}", stack) for kind, stack in by_type.items()
            }
        options, rounding = self._map("options", value, "overlay."), self._map("rounding", value, "overlay.")
        return Overlay(self._files("overlay.files", value["files"]), experts, options, rounding)

    def _kept(self, value: Any) -> KeptExperts:
        if not isinstance(value, dict) or value.keys() != _KEPT_KEYS:
            raise self._error(f"kept: expected an object with {', '.join(sorted(_KEPT_KEYS))}")
        path = self._string("kept.path", value["path"])
        if not path.startswith("/") or "\0" in path:
            raise self._error(f"kept.path: {path!r} is not an absolute path")
        files = self._map("files", value, "kept.")
        for name, size in files.items():
            self._file_name("kept.files", name)
            if type(size) is not int or not 0 < size < 1 << 63:
                raise self._error(f"kept.files.{name}: {size!r} is not a file size")
        if not files:
            raise self._error("kept.files: expected at least one file")
        return KeptExperts(path, self._string("kept.identity", value["identity"]), files)

    def _stack(self, where: str, value: Any) -> OverlayStack:
        if not isinstance(value, dict) or value.keys() != {"ids", *PROJECTIONS}:
            raise self._error(f"{where}: expected an object with ids, {', '.join(PROJECTIONS)}")
        ids = value["ids"]
        if not isinstance(ids, list) or not all(type(number) is int and number >= 0 for number in ids):
            raise self._error(f"{where}.ids: expected a list of expert numbers")
        if not ids or any(b <= a for a, b in itertools.pairwise(ids)):
            raise self._error(f"{where}.ids: expected ascending expert numbers, each once")
        gate, up, down = (self._digests(f"{where}.{name}", value[name]) for name in PROJECTIONS)
        if not len(gate) == len(up) == len(down) == len(ids):
            raise self._error(
                f"{where}: {len(gate)}, {len(up)} and {len(down)} checksums for gate, up and down of {len(ids)} experts"
            )
        return OverlayStack(tuple(ids), (gate, up, down))

    def _layer(self, where: str, key: str) -> int:
        if not re.fullmatch(r"0|[1-9][0-9]{0,3}", key):
            raise self._error(f"{where}: not a layer number")
        return int(key)

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

    def _files(self, field: str, value: Any) -> tuple[ModelFile, ...]:
        if not isinstance(value, list) or not value:
            raise self._error(f"{field}: expected a list with at least one file")
        files = []
        for index, entry in enumerate(value):
            where = f"{field}[{index}]"
            if not isinstance(entry, dict) or entry.keys() != {"name", "size_bytes", "header_checksum"}:
                raise self._error(f"{where}: expected an object with name, size_bytes and header_checksum")
            size = entry["size_bytes"]
            if type(size) is not int or not 0 < size < 1 << 63:
                raise self._error(f"{where}.size_bytes: {size!r} is not a file size")
            name = self._file_name(f"{where}.name", entry["name"])
            files.append(ModelFile(name, size, self._digest(f"{where}.header_checksum", entry["header_checksum"])))
        if len({file.name for file in files}) != len(files):
            raise self._error(f"{field}: a name occurs twice")
        return tuple(files)

    def _file_name(self, where: str, value: Any) -> str:
        name = self._string(where, value)
        # A plain name only: separators of any system, drive letters and parent references could leave the folder.
        if not is_plain_name(name) or ":" in name or not name.isprintable():
            raise self._error(f"{where}: {name[:80]!r} is not a plain file name")
        return name

    def _experts(self, value: dict[str, Any]) -> dict[int, tuple[list[str], list[str], list[str]]]:
        experts = {}
        for key, entry in value.items():
            where = f"experts.{key}"
            layer = self._layer(where, key)
            if not isinstance(entry, dict) or entry.keys() != set(PROJECTIONS):
                raise self._error(f"{where}: expected an object with {', '.join(PROJECTIONS)}")
            gate, up, down = (self._digests(f"{where}.{name}", entry[name]) for name in PROJECTIONS)
            if not len(gate) == len(up) == len(down) > 0:
                raise self._error(f"{where}: {len(gate)}, {len(up)} and {len(down)} checksums for gate, up and down")
            experts[layer] = (gate, up, down)
        return experts

"""Splits a converted model into files of bounded size, for media and file systems with a limit.

llama.cpp's layout: `model-00001-of-00003.gguf`; the first part has all metadata, every part its own list of whole tensors.
Tensors keep their order and bytes, so the manifest's checksums stay valid except for headers. The parts are complete on disk
before the manifest names them, and only then is the old file deleted: readers find one or the other, wherever this is killed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import GGUFValueType

from localrun.alignment import align_up, ceil_div
from localrun.disk_space import check_free
from localrun.errors import StoreError, UsageError
from localrun.quant.gguf.file import ALIGNMENT_KEY, GgufValue, build_header, tensor_offsets
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.manifest import ModelFile, checksum, write_manifest
from localrun.quant.model.source import TensorInfo
from localrun.units import format_size

STEM = "model"
_COPY_BYTES = 64 << 20
_MAX_PARTS = 9999
_KEYS_BYTES = 256
"""More than the header's preamble and the keys that every part has."""
_ENTRY_BYTES = 64
"""More than a tensor's entry in a header, without its name."""


@dataclass(frozen=True, slots=True)
class SplitFile:
    """One file of a split model.

    Attributes:
        name: file name.
        header: its bytes before the first tensor.
        tensors: names and their offsets in this file, in order.
        size_bytes: all of it.
    """

    name: str
    header: bytes
    tensors: tuple[tuple[str, int], ...]
    size_bytes: int


def plan_split(
    metadata: Mapping[str, GgufValue], tensors: Sequence[TensorInfo], alignment: int, max_bytes: int
) -> list[SplitFile]:
    """Assigns tensors to files; deterministic.

    Args:
        max_bytes: maximum file size.

    Raises:
        UsageError: a single tensor is larger.
    """
    # A converter's metadata lacks the alignment, a file's has it somewhere: both must give the same bytes.
    metadata = {key: value for key, value in metadata.items() if key != ALIGNMENT_KEY}
    # Upper bounds: a header's exact length depends on what else gets into the file.
    room = max_bytes - len(build_header(metadata, [], alignment)) - _KEYS_BYTES - alignment
    groups: list[list[TensorInfo]] = [[]]
    for tensor in tensors:
        size = align_up(tensor.n_bytes, alignment) + _ENTRY_BYTES + len(tensor.name.encode())
        if size > room and groups[-1]:
            groups.append([])
            room = max_bytes - _KEYS_BYTES - alignment
        if size > room:
            needed = size + max_bytes - room
            raise UsageError(
                f"{tensor.name} alone takes {format_size(size)}: it does not fit into a file of {format_size(max_bytes)}",
                hint=f"--split {ceil_div(needed, 10**6)}MB or more",
            )
        groups[-1].append(tensor)
        room -= size
    if len(groups) > _MAX_PARTS:
        raise UsageError(f"{len(groups)} files are more than the format can number", hint="use a larger --split")
    return [_part(metadata, group, alignment, i, len(groups), len(tensors)) for i, group in enumerate(groups)]


def _part(
    metadata: Mapping[str, GgufValue],
    tensors: Sequence[TensorInfo],
    alignment: int,
    number: int,
    count: int,
    n_tensors: int,
) -> SplitFile:
    # llama.cpp, src/llama-model-loader.cpp: split.no and split.count are u16, split.tensors.count is i32.
    keys = {
        "split.no": GgufValue.scalar(GGUFValueType.UINT16, number),
        "split.count": GgufValue.scalar(GGUFValueType.UINT16, count),
        "split.tensors.count": GgufValue.scalar(GGUFValueType.INT32, n_tensors),
    }
    header = build_header({**(metadata if number == 0 else {}), **keys}, tensors, alignment)
    offsets = [len(header) + offset for offset in tensor_offsets(tensors, alignment)]
    size = align_up(offsets[-1] + tensors[-1].n_bytes, alignment)
    places = tuple((tensor.name, offset) for tensor, offset in zip(tensors, offsets, strict=True))
    return SplitFile(f"{STEM}-{number + 1:05}-of-{count:05}.gguf", header, places, size)


def split_model(
    folder: Path, max_bytes: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[SplitFile]:
    """Splits the model in `folder`, which must be a finished conversion with one file; returns the parts.

    A small enough model is unchanged. Needs as much free space as the model takes, because the old file is deleted last.

    Args:
        progress: called with (bytes copied, total bytes).

    Raises:
        UsageError: no such model, it is already split, or it has an overlay, which is tied to the base's files.
        DiskSpaceError, StoreError: the disk.
    """
    source = GgufSource.open(folder)
    manifest = source.manifest
    if manifest is None or not folder.is_dir():
        raise UsageError(f"{folder} is not a model converted by localrun")
    if len(manifest.files) != 1:
        raise UsageError(f"{folder}: the model is already split", hint="convert it again to split it differently")
    if getattr(manifest, "overlay", None) is not None:
        raise UsageError(f"{folder}: the model has an overlay", hint="split the base first, then make the overlay")
    (whole,) = source.headers
    if whole.size_bytes <= max_bytes:
        return []
    infos = [tensor.info for tensor in whole.tensors.values()]
    parts = plan_split(whole.metadata, infos, whole.alignment, max_bytes)
    _check_space(folder, parts)
    total, done = sum(part.size_bytes for part in parts), 0
    partials: list[Path] = []
    try:
        with whole.path.open("rb") as old:
            for part in parts:
                partial = folder / f"{part.name}.partial"
                partials.append(partial)
                offsets = {name: whole.tensors[name].offset for name, _ in part.tensors}
                done = _write_part(partial, part, old.fileno(), offsets, source.tensors, done, total, progress)
        for part, partial in zip(parts, partials, strict=True):
            partial.rename(folder / part.name)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{folder}: the parts can't be written: {error.strerror}") from error
    finally:
        for partial in partials:
            with contextlib.suppress(OSError):
                partial.unlink()
    files = tuple(ModelFile(part.name, part.size_bytes, checksum(part.header)) for part in parts)
    options = {**manifest.options, "split": max_bytes}
    write_manifest(replace(manifest, files=files, options=options), folder)
    try:
        whole.path.unlink()
    except OSError as error:
        raise StoreError(
            f"{whole.path}: can't be deleted: {error.strerror}", hint="the parts are complete without it"
        ) from error
    return parts


def _check_space(folder: Path, parts: Sequence[SplitFile]) -> None:
    needed = sum(part.size_bytes for part in parts)
    check_free(folder, needed, what="splitting", otherwise="split on another disk; the original is deleted last")


def _write_part(
    path: Path,
    part: SplitFile,
    old: int,
    offsets: Mapping[str, int],
    tensors: Mapping[str, TensorInfo],
    done: int,
    total: int,
    progress: Callable[[int, int], None],
) -> int:
    """Writes one file durably; returns the bytes of all files so far."""
    with path.open("wb", buffering=0) as new:
        new.write(part.header)
        for name, offset in part.tensors:
            copied = 0
            while copied < tensors[name].n_bytes:
                n_bytes = min(_COPY_BYTES, tensors[name].n_bytes - copied)
                copied += _copy(old, offsets[name] + copied, new.fileno(), offset + copied, n_bytes)
                progress(done + offset + copied, total)
        new.truncate(part.size_bytes)
        os.fsync(new.fileno())
    progress(done + part.size_bytes, total)
    return done + part.size_bytes


def _copy(source: int, source_at: int, target: int, target_at: int, n_bytes: int) -> int:
    """Copies a piece; the kernel does it where it can, without reading where the file system shares blocks."""
    n = 0
    if hasattr(os, "copy_file_range"):
        try:
            n = os.copy_file_range(source, target, n_bytes, source_at, target_at)
        except OSError:
            n = 0
    if n == 0:
        data = os.pread(source, n_bytes, source_at)
        if not data:
            raise StoreError("the model's file got shorter")
        n = os.pwrite(target, data, target_at)
    return n

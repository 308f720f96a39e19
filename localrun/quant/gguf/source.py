"""A model stored as GGUF: a converted directory, or any llama.cpp GGUF of a mixture-of-experts model.

Opens one file, all parts of a split one, or a folder; merges the parts into one list of tensors and checks the whole
before anything is passed to llama.cpp (`gguf_checks`, `deepseek4_layout`). The store reads experts; this module only locates
them.

Departures from llama.cpp: values are presented in the form it requires (`presented.py`); any part of a split model may be
opened; blocks for next-token prediction are skipped; models without an output matrix get the embedding under that name, because
llama.cpp can't tie them without a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from gguf import GGMLQuantizationType, GGUFValueType

from localrun.errors import ChecksumError, FormatError, StoreError, UnsupportedModelError
from localrun.quant.gguf.checks import EXPERT_STACK, check_common, check_dense_types, drop_next_token_layers, moe_layers
from localrun.quant.gguf.deepseek4 import ARCHITECTURE as DEEPSEEK4
from localrun.quant.gguf.deepseek4 import check_deepseek4
from localrun.quant.gguf.file import GgufFile, GgufTensor, GgufValue, build_header, read_gguf
from localrun.quant.gguf.folder import only_model, split_files
from localrun.quant.gguf.overlay_index import OverlayIndex, stack_name
from localrun.quant.gguf.presented import converted, present, refuse_scale
from localrun.quant.gguf.relatives import relative_of
from localrun.quant.model.manifest import (
    MANIFEST_NAME,
    Manifest,
    ModelFile,
    checksum,
    read_manifest,
    refuse_unfinished_conversion,
)
from localrun.quant.model.shape import ModelShape
from localrun.quant.model.source import (
    PROJECTIONS,
    Bytes,
    DenseReading,
    DenseSlice,
    Encoding,
    Extent,
    MoeLayer,
    Projection,
    TensorInfo,
    slice_rows,
)
from localrun.quant.unfinished import refuse_holes, refuse_unfinished
from localrun.quant.zeros import refuse_torn, refuse_zero_norm
from localrun.reading import read_fully

_IDENTITY_SAMPLES = 64
_SAMPLE_BYTES = 4096
_DAMAGED = "the file is damaged or incomplete: download or convert it again"


class GgufSource:
    """One opened GGUF model (`localrun.quant.model.source.ModelSource`).

    Owns descriptions only: files are opened for each read, so nothing needs closing. Immutable and safe to read from
    several threads.
    """

    def __init__(
        self,
        path: Path,
        headers: Sequence[GgufFile],
        metadata: dict[str, GgufValue],
        tensors: dict[str, TensorInfo],
        manifest: Manifest | None,
        overlay: GgufFile | None = None,
        *,
        unchecked: bool = False,
    ) -> None:
        self._path = path
        self._unchecked = unchecked
        self._base_headers = tuple(headers)
        self._headers = self._base_headers if overlay is None else (*headers, overlay)
        self._files = tuple(header.path for header in self._headers)
        self._where = {
            name: (index, tensor) for index, header in enumerate(headers) for name, tensor in header.tensors.items()
        }
        self._typed = metadata
        # Before the architecture is checked, so read leniently.
        arch = metadata["general.architecture"].value if "general.architecture" in metadata else ""
        self._presented = present(tensors, drop_scales=arch == DEEPSEEK4)
        tensors = self._presented.tensors
        common = check_common(self._files[0], metadata, tensors)
        self._tensors = tensors
        self._moe_layers = moe_layers(self._files[0], metadata, tensors, common.arch)
        self._manifest = manifest
        self._experts = {
            layer: tuple(f"blk.{layer}.ffn_{projection}_exps.weight" for projection in PROJECTIONS)
            for layer in self._moe_layers
        }
        self._stacks = {name for names in self._experts.values() for name in names}
        if not (unchecked and manifest is not None):
            self._refuse_holes()  # before values are looked at: zeros there would be told as damage
        if common.arch == DEEPSEEK4:
            self._check_contents(check_deepseek4(self._files[0], metadata, tensors, common))
        else:
            check_dense_types(self._files[0], tensors)
            self._tie_output()
        self._overlay: OverlayIndex | None = None
        if manifest is not None:
            self._check_manifest(manifest)
            if overlay is not None:
                self._overlay = OverlayIndex(overlay, manifest, self._moe_layers)
                self._moe_layers = {n: self._overlay.describe(layer) for n, layer in self._moe_layers.items()}
        self._metadata = _PlainValues(metadata)
        if not unchecked:
            self._check_headers()
        self._identity = self._digest()

    @classmethod
    def open(cls, path: Path, *, unchecked: bool = False) -> GgufSource:
        """Opens a GGUF (any part of a split one), or a folder that holds exactly one model.

        Args:
            path: file or folder.
            unchecked: also accept a converted model that differs from its checksums or has parts that were never written, to
                check it.

        Raises:
            FormatError: damaged or inconsistent files, or an unfinished conversion.
            UnsupportedModelError: a valid model of a kind that localrun does not run.
            StoreError: a file can't be read.
            ChecksumError: a header, or a tensor that is looked at, differs from the manifest.
        """
        manifest_path = (path if path.is_dir() else path.parent) / MANIFEST_NAME
        refuse_unfinished_conversion(manifest_path.parent)
        manifest = read_manifest(manifest_path) if manifest_path.is_file() else None
        if manifest is not None and manifest.kept is not None:
            raise FormatError(
                f"{path}: the dense part of a model whose experts are in {manifest.kept.path}",
                hint=f"pass the folder: {manifest_path.parent}",
            )
        if manifest is not None and not path.is_dir() and path.name not in {file.name for file in manifest.files}:
            # A foreign file next to a converted model.
            manifest = None
        overlay = None
        if manifest is not None:
            paths = listed_files(manifest_path, manifest.files)
            if manifest.overlay is not None:
                overlay = read_overlay(listed_files(manifest_path, manifest.overlay.files))
        else:
            paths = split_files(only_model(path) if path.is_dir() else path)
        for part in paths:
            refuse_unfinished(part)
        headers = _read_headers(paths)
        metadata, tensors = _merge(headers)
        if (relative := relative_of(metadata, tensors)) is not None:
            raise relative.error(headers[0].path)
        metadata, tensors = drop_next_token_layers(headers[0].path, metadata, tensors)
        return cls(path, headers, metadata, tensors, manifest, overlay, unchecked=unchecked)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def files(self) -> Sequence[Path]:
        return self._files

    @property
    def headers(self) -> Sequence[GgufFile]:
        """The checked headers behind `files`, in the same order: the base's, then the overlay's."""
        return self._headers

    @property
    def manifest(self) -> Manifest | None:
        """The converter's manifest; None for other GGUFs."""
        return self._manifest

    @property
    def metadata(self) -> Mapping[str, object]:
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def moe_layers(self) -> Mapping[int, MoeLayer]:
        return self._moe_layers

    @property
    def identity(self) -> str:
        return self._identity

    def gguf_header(self) -> bytes:
        return build_header(self._typed, list(self._tensors.values()), self._base_headers[0].alignment)

    def read_tensor(self, name: str) -> npt.NDArray[np.uint8]:
        """All bytes of a dense tensor, compared with its checksum if it has one; the array is the caller's.

        Raises:
            KeyError: no such tensor.
            ValueError: a stack of experts; see `expert`.
            StoreError: the file can't be read or is shorter than its header says.
            ChecksumError: it differs from the manifest.
            FormatError: zeros in place of weights, in a file without checksums.
        """
        if name in self._stacks:
            raise ValueError(f"{name} is a stack of experts")
        extent = self.tensor_extent(name)
        array = np.empty(extent.n_bytes, dtype=np.uint8)
        _read_exactly(self._files[extent.file], extent.offset, array.data, name)
        promised = self.promised(name)
        if promised is not None and checksum(array.data) != promised:
            raise _differs(self._files[extent.file], name)
        self.refuse_zeros(name, array, extent.offset)
        stored = self._presented.stored.get(name)
        return array if stored is None else converted(self._files[extent.file], stored, array)

    def dense_reading(self, name: str, slice_bytes: int) -> DenseReading | None:
        """How to read the same bytes in slices; None for those that are stored in another type."""
        if name in self._presented.stored:
            return None
        return _TensorReading(self, name, slice_bytes)

    def promised(self, name: str) -> str | None:
        """A dense tensor's checksum, if reading compares it."""
        if self._manifest is None or self._unchecked:
            return None
        return self._manifest.tensors.get(self._where[name][1].info.name)

    def refuse_zeros(self, name: str, array: Bytes, offset: int) -> None:
        """Raises FormatError for zeros in place of weights, in a file without checksums: whole rows from `offset` on."""
        if self._manifest is None:
            self._refuse_zeros(name, array, offset)

    def _refuse_zeros(self, name: str, array: Bytes, offset: int) -> None:
        index, tensor = self._where[name]
        where = f"{self._files[index]}: {name}"
        if name.endswith("norm.weight"):
            refuse_zero_norm(where, array)
        refuse_torn(where, array, tensor.info.n_bytes // prod(tensor.info.shape[1:]), offset)

    def tensor_extent(self, name: str) -> Extent:
        """Location of a tensor's bytes in the file, regardless of the presented type (including stacks of experts)."""
        index, tensor = self._where[name]
        return Extent(index, tensor.offset, tensor.info.n_bytes)

    def expert(self, layer: int, expert: int) -> tuple[Projection, Projection, Projection]:
        """The better copy if the overlay has one, else the base's.

        Raises:
            IndexError: the layer has fewer experts.
        """
        base = self.base_expert(layer, expert)
        copy = None if self._overlay is None else self._overlay.copies.get(layer, {}).get(expert)
        if copy is None:
            return base
        kind, number = copy
        assert self._manifest is not None
        assert self._manifest.overlay is not None
        stack = self._manifest.overlay.experts[layer][kind.name.lower()]
        index, part = len(self._base_headers), self._headers[-1]
        gate, up, down = (
            _slice(index, part.tensors[stack_name(layer, i, kind)], number, stack.checksums[i][number])
            for i in range(len(PROJECTIONS))
        )
        return gate, up, down

    def base_expert(self, layer: int, expert: int) -> tuple[Projection, Projection, Projection]:
        """The copy that every expert has.

        Raises:
            IndexError: the layer has fewer experts.
        """
        shape = self._moe_layers[layer]
        if not 0 <= expert < shape.n_experts:
            raise IndexError(f"layer {layer} has experts 0 to {shape.n_experts - 1}, asked for {expert}")
        checksums = self._manifest.experts[layer] if self._manifest is not None else None
        gate, up, down = (
            self._projection(name, expert, checksums[index][expert] if checksums else None)
            for index, name in enumerate(self._experts[layer])
        )
        return gate, up, down

    def _projection(self, name: str, expert: int, checksum: str | None) -> Projection:
        holder, half = self._presented.fused.get(name, (name, 0))
        whole = _slice(*self._where[holder], expert, checksum)
        if holder == name:
            return whole
        (extent,), n_bytes = whole.extents, whole.n_bytes // 2
        extent = Extent(extent.file, extent.offset + half * n_bytes, n_bytes)
        return replace(whole, n_out=whole.n_out // 2, n_bytes=n_bytes, extents=(extent,))

    def _tie_output(self) -> None:
        embedding = self._where.get("token_embd.weight")
        if "output.weight" not in self._tensors and embedding is not None:
            self._tensors = {
                **self._tensors,
                "output.weight": replace(self._tensors["token_embd.weight"], name="output.weight"),
            }
            self._where["output.weight"] = embedding

    def _check_contents(self, shape: ModelShape) -> None:
        """Checks values that llama.cpp uses as indices or sorts by (token-to-expert tables, router biases), and scales that it
        does not apply."""
        for name in self._presented.scales:
            if self._where[name][1].info.type != GGMLQuantizationType.F32:
                raise FormatError(f"{self._file_of(name)}: {name}: a scale that is not F32", hint=_DAMAGED)
            refuse_scale(self._file_of(name), name, self.read_tensor(name).view(np.float32))
        for layer in range(shape.n_layers):
            table, bias = f"blk.{layer}.ffn_gate_tid2eid.weight", f"blk.{layer}.exp_probs_b.bias"
            if table in self._tensors:
                ids = self.read_tensor(table).view(np.int32)
                if ids.min() < 0 or ids.max() >= shape.n_experts:
                    raise FormatError(
                        f"{self._file_of(table)}: {table}: expert {ids[(ids < 0) | (ids >= shape.n_experts)][0]} "
                        f"of {shape.n_experts}",
                        hint=_DAMAGED,
                    )
            # Sorting NaN is undefined behaviour in C++.
            elif not np.isfinite(self.read_tensor(bias).view(np.float32)).all():
                raise FormatError(f"{self._file_of(bias)}: {bias}: not a finite number", hint=_DAMAGED)

    def _file_of(self, name: str) -> Path:
        return self._files[self._where[name][0]]

    def _check_manifest(self, manifest: Manifest) -> None:
        """A checksum for exactly what is there."""
        where = self._files[0].parent / MANIFEST_NAME
        stacks = [stack for name in self._where if (stack := EXPERT_STACK.fullmatch(name))]
        dense = {name for part in self._base_headers for name in part.tensors} - {stack[0] for stack in stacks}
        for problem, names in (
            ("no checksum for tensor", dense - manifest.tensors.keys()),
            ("checksum of an unknown tensor", manifest.tensors.keys() - dense),
        ):
            if names:
                raise FormatError(f"{where}: {problem} '{min(names)}'", hint=_DAMAGED)
        layers = {int(stack[1]) for stack in stacks}
        if manifest.experts.keys() != layers:
            odd = min(manifest.experts.keys() ^ layers)
            raise FormatError(f"{where}: experts.{odd}: layers differ from the model's", hint=_DAMAGED)
        for stack in stacks:
            n_experts = self._where[stack[0]][1].info.shape[-1]
            n_checksums = len(manifest.experts[int(stack[1])][0])
            if n_checksums != n_experts:
                raise FormatError(
                    f"{where}: experts.{stack[1]}: {n_checksums} checksums for {n_experts} experts", hint=_DAMAGED
                )

    def _check_headers(self) -> None:
        """Last, because whatever else is wrong with a header is told in more words."""
        if self._manifest is None:
            return
        overlay = () if self._manifest.overlay is None else self._manifest.overlay.files
        for part, file in zip(self._headers, (*self._manifest.files, *overlay), strict=True):
            if part.header_checksum != file.header_checksum:
                raise _differs(part.path, "its header")

    def _refuse_holes(self) -> None:
        for part in self._headers:
            fd = _open(part.path)
            try:
                refuse_holes(part.path, fd, part.data_offset, part.size_bytes)
            finally:
                os.close(fd)

    def _digest(self) -> str:
        """Digest of headers, sizes and samples of the data, so that models of equal shape with different weights differ."""
        digest = xxhash.xxh3_128()
        for part in self._headers:
            digest.update(part.header_digest.encode())
            digest.update(part.size_bytes.to_bytes(8, "little"))
            span = part.size_bytes - part.data_offset
            if span <= 0:
                continue
            step = max(1, span // _IDENTITY_SAMPLES)
            fd = _open(part.path)
            try:
                for offset in range(part.data_offset, part.size_bytes, step):
                    digest.update(os.pread(fd, _SAMPLE_BYTES, offset))
            except OSError as error:
                raise StoreError(f"{part.path}: can't be read: {error.strerror}") from error
            finally:
                os.close(fd)
        return digest.hexdigest()


class _TensorReading:
    """Implements `DenseReading`: rows as they are in the file."""

    def __init__(self, source: GgufSource, name: str, slice_bytes: int) -> None:
        self._source, self._name = source, name
        extent, shape = source.tensor_extent(name), source.tensors[name].shape
        n_rows = prod(shape[1:])
        row_bytes = extent.n_bytes // n_rows
        step = slice_rows(row_bytes, slice_bytes)
        self.files = source.files
        self.slices = []
        for first in range(0, n_rows, step):
            count = min(step, n_rows - first)
            begin, n_bytes = first * row_bytes, count * row_bytes
            part = Extent(extent.file, extent.offset + begin, n_bytes)
            self.slices.append(DenseSlice((part,), begin, n_bytes, count, first + count == n_rows))

    def rows(self, slice_: DenseSlice, raw: Sequence[Bytes], room: Callable[[int], Bytes]) -> Bytes:
        self._source.refuse_zeros(self._name, raw[0], slice_.extents[0].offset)
        return raw[0]

    def check(self, digest: Callable[[], str]) -> None:
        promised = self._source.promised(self._name)
        if promised is not None and digest() != promised:
            raise _differs(self.files[self.slices[0].extents[0].file], self._name)


class _PlainValues(Mapping[str, object]):
    """Metadata as Python values, decoded when asked for: a vocabulary costs 0.1 s that many users never need."""

    def __init__(self, typed: Mapping[str, GgufValue]) -> None:
        self._typed = typed

    def __getitem__(self, key: str) -> Any:
        return self._typed[key].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._typed)

    def __len__(self) -> int:
        return len(self._typed)


def _slice(file: int, tensor: GgufTensor, number: int, checksum: str | None) -> Projection:
    """One expert of a stack."""
    n_in, n_out, n_experts = tensor.info.shape
    n_bytes = tensor.info.n_bytes // n_experts
    extent = Extent(file, tensor.offset + number * n_bytes, n_bytes)
    return Projection(tensor.info.type, n_out, n_in, Encoding.GGML, (extent,), n_bytes, checksum)


def _differs(path: Path, what: str) -> ChecksumError:
    return ChecksumError(
        f"{path}: {what} does not match its checksum",
        hint="the file is damaged; run `localrun verify` to see how much, then copy or convert it again",
    )


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise StoreError(f"{path}: can't be opened: {error.strerror}") from error


def _read_exactly(path: Path, offset: int, buffer: memoryview, what: str) -> None:
    """Fills `buffer` from `offset` on."""
    fd = _open(path)
    try:
        read_fully(fd, f"{path}: {what}", offset, buffer, hint=_DAMAGED)
    finally:
        os.close(fd)


def read_overlay(paths: Sequence[Path]) -> GgufFile:
    """The header of an overlay's one file."""
    if len(paths) != 1:
        raise UnsupportedModelError(f"{paths[0]}: an overlay of {len(paths)} files", hint="update localrun")
    return read_gguf(paths[0])


def listed_files(manifest_path: Path, files: Sequence[ModelFile]) -> list[Path]:
    """Paths of the files that a manifest lists.

    Raises:
        FormatError: one is missing or has another size.
    """
    paths = []
    for file in files:
        path = manifest_path.parent / file.name
        if not path.is_file():
            raise FormatError(f"{path}: missing, but listed in {manifest_path.name}", hint=_DAMAGED)
        size = path.stat().st_size
        if size != file.size_bytes:
            raise FormatError(f"{path}: {size} bytes, {manifest_path.name} says {file.size_bytes}", hint=_DAMAGED)
        paths.append(path)
    return paths


def _read_headers(paths: Sequence[Path]) -> list[GgufFile]:
    """Headers of all parts, each checked to match its name."""
    headers = [read_gguf(path) for path in paths]
    for index, header in enumerate(headers):
        count = _split_number(header, "split.count", 1)
        if count != len(headers):
            hint = "keep the names NAME-00001-of-0000N.gguf of a split model" if len(headers) == 1 else _DAMAGED
            raise FormatError(f"{header.path}: one of {count} parts, but {len(headers)} were found", hint=hint)
        number = _split_number(header, "split.no", 0)
        if number != index:
            raise FormatError(f"{header.path}: is part {number + 1}, its name says {index + 1}", hint=_DAMAGED)
    if len(headers) > 1:
        n_tensors = sum(len(header.tensors) for header in headers)
        claimed = _split_number(headers[0], "split.tensors.count", n_tensors)
        if claimed != n_tensors:
            raise FormatError(f"{paths[0]}: split.tensors.count {claimed}, the parts hold {n_tensors}", hint=_DAMAGED)
    return headers


def _split_number(header: GgufFile, key: str, default: int) -> int:
    value = header.metadata.get(key)
    if value is None:
        return default
    if value.type not in (GGUFValueType.UINT16, GGUFValueType.INT32, GGUFValueType.UINT32):
        raise FormatError(f"{header.path}: {key}: expected UINT16 or INT32, got {value.type.name}", hint=_DAMAGED)
    # Some tools write 0 for unsplit files.
    return int(value.value) or default


def _merge(headers: Sequence[GgufFile]) -> tuple[dict[str, GgufValue], dict[str, TensorInfo]]:
    metadata = {key: value for key, value in headers[0].metadata.items() if not key.startswith("split.")}
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise FormatError(f"{header.path}: tensor '{name}' is in another part too", hint=_DAMAGED)
            tensors[name] = tensor.info
    return metadata, tensors

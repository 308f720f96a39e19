"""Rewrites damaged parts of a converted model from its checkpoint.

Works like the converter on single tensors and experts: a damaged part is converted again, and overwritten only if the checksum
matches the manifest's. So intact data is never touched, an interrupted repair leaves damage that `verify` finds again, and a
different checkpoint or converter version can't make things worse.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from localrun.errors import FormatError, LocalrunError, StoreError, UsageError
from localrun.quant.checkpoint.directory import Checkpoint, SourceTensor
from localrun.quant.checkpoint.mapping import (
    ALIGNMENT,
    BASE_TYPES,
    DENSE_TYPES,
    ConversionOptions,
    ConversionPlan,
    ImportanceLookup,
    TensorPart,
    make_plan,
    shape_tensor,
)
from localrun.quant.convert.direct_io import AlignedBuffer, DirectReader
from localrun.quant.convert.integrity import HEADER, Check, Damage
from localrun.quant.convert.overlay import plan_overlay
from localrun.quant.convert.split import plan_split
from localrun.quant.convert.writing import slice_rows
from localrun.quant.gguf.overlay_index import stack_name
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.manifest import Manifest, ModelFile, checksum
from localrun.quant.model.source import PROJECTIONS
from localrun.quant.precision.copies import BetterCopies
from localrun.quant.precision.dense_solver import DENSE_TYPES_OPTION, types_from_text


def check_source(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Rejects a checkpoint other than the model's.

    Raises:
        UsageError: it is a different one, or the manifest does not identify it.
    """
    if manifest.source.get("identity") != checkpoint.identity:
        raise UsageError(
            f"{checkpoint.path} is not the checkpoint this model was made from",
            hint="pass the directory of that checkpoint, or convert again",
        )


def restore_files(
    folder: Path, manifest: Manifest, checkpoint: Checkpoint, importance: ImportanceLookup | None = None
) -> list[Path]:
    """Restores size and header of files that are missing, have the wrong size or a damaged header, so that the model can be
    opened; `repair` restores their contents. Returns those files.

    Raises:
        UsageError: a different checkpoint.
        FormatError: a header can't be rebuilt.
        StoreError: can't be written.
    """
    check_source(manifest, checkpoint)
    overlay = manifest.overlay
    bad = [file for file in _all_files(manifest) if not _is_sound(folder / file.name, file)]
    if not bad:
        return []
    headers = _base_headers(manifest, checkpoint, importance)
    if overlay is not None:
        plan = plan_overlay(checkpoint, BetterCopies.from_json(manifest.better_copies), manifest, importance)
        headers[overlay.files[0].name] = plan.header
    for file in bad:
        header = headers.get(file.name, b"")
        if checksum(header) != file.header_checksum:
            raise FormatError(
                f"{folder / file.name}: its header can't be rebuilt from {checkpoint.path}",
                hint="convert again; another version of localrun wrote this model",
            )
        _write_header(folder / file.name, header, file.size_bytes)
    return [folder / file.name for file in bad]


def _all_files(manifest: Manifest) -> Sequence[ModelFile]:
    return manifest.files if manifest.overlay is None else (*manifest.files, *manifest.overlay.files)


def _is_sound(path: Path, file: ModelFile) -> bool:
    """Whether size and header are correct. The header's length is not recorded, so it counts as correct if the file can be
    opened."""
    from localrun.quant.gguf.file import read_gguf

    if not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    try:
        n_bytes = read_gguf(path).data_offset
    except LocalrunError:
        return False
    with path.open("rb") as opened:
        return checksum(opened.read(n_bytes)) == file.header_checksum


def _base_headers(manifest: Manifest, checkpoint: Checkpoint, importance: ImportanceLookup | None) -> dict[str, bytes]:
    plan = _base_plan(manifest, checkpoint, importance)
    split = manifest.options.get("split")
    if len(manifest.files) == 1:
        return {manifest.files[0].name: plan.header}
    if type(split) is not int or split <= 0:
        raise FormatError("the manifest does not say how the model was split", hint="convert again")
    infos = [tensor.info for tensor in plan.tensors.values()]
    return {part.name: part.header for part in plan_split(plan.metadata, infos, ALIGNMENT, split)}


def _base_plan(manifest: Manifest, checkpoint: Checkpoint, importance: ImportanceLookup | None) -> ConversionPlan:
    dense, base = manifest.options.get("dense"), manifest.options.get("base")
    if dense not in DENSE_TYPES or not (base == "default" or base in BASE_TYPES):
        raise FormatError(f"the manifest's options {dense!r}, {base!r} are unknown", hint="convert again")
    kept = manifest.kept is not None
    single = types_from_text(manifest.options.get(DENSE_TYPES_OPTION), "the manifest")
    options = ConversionOptions(DENSE_TYPES[str(dense)], BASE_TYPES.get(str(base)), importance, kept, single)
    return make_plan(checkpoint, options)


def _write_header(path: Path, header: bytes, size: int) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(fd, size)
            done = 0
            while done < len(header):
                done += os.pwrite(fd, header[done:], done)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path}: can't be written: {error.strerror}",
        hint="a model on read-only media: copy it to a drive, repair it there",
    )


def repair(
    source: GgufSource,
    manifest: Manifest,
    checkpoint: Checkpoint,
    damages: Sequence[Damage],
    *,
    importance: ImportanceLookup | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Damage]:
    """Rewrites the damage found by `integrity.verify`; returns what is still damaged, with the reason.

    Args:
        importance: used for the model's rounding types, if any.
        progress: called with (repaired ranges, total ranges).

    Raises:
        UsageError: a different checkpoint.
        StoreError: can't be written.
    """
    check_source(manifest, checkpoint)
    maker = _Maker(source, manifest, checkpoint, importance)
    left = []
    try:
        for number, damage in enumerate(damages):
            problem = maker.repair(damage)
            if problem is not None:
                left.append(Damage(damage.check, damage.path, damage.found, problem))
            progress(number + 1, len(damages))
    finally:
        maker.close()
    return left


class _Maker:
    """Makes single parts again: open shards, buffers, and who is who."""

    def __init__(
        self, source: GgufSource, manifest: Manifest, checkpoint: Checkpoint, importance: ImportanceLookup | None
    ) -> None:
        self._source = source
        self._checkpoint = checkpoint
        self._importance = importance
        self._tensors: dict[tuple[str | None, int | None], SourceTensor] = {
            (tensor.spec.gguf, tensor.spec.expert): tensor for tensor in checkpoint.tensors
        }
        self._base_names = _base_names(manifest)
        self._readers: list[DirectReader] = []
        try:
            for shard in checkpoint.shards:
                self._readers.append(DirectReader(shard.path, shard.size))
        except BaseException:
            self.close()
            raise
        self._weights, self._scales, self._out = AlignedBuffer(), AlignedBuffer(), AlignedBuffer()

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def repair(self, damage: Damage) -> str | None:
        """Rewrites one range; None, or why it can't be."""
        check = damage.check
        if check.tensor == HEADER:
            return "the header is damaged"  # `restore_files` comes first
        part = self._part(check)
        if part is None:
            return "the checkpoint has no such tensor"
        digest = xxhash.xxh3_64()
        for _, data in self._converted(part):
            digest.update(data.data)
        if digest.hexdigest() != check.digest:
            # Types that round take other bytes from other importances.
            return "the checkpoint yields different bytes (the model was made with an importance matrix, or by another version)"
        path = self._source.files[check.file]
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                for offset, data in self._converted(part):
                    _write_all(fd, check.offset + offset, data)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if isinstance(error, LocalrunError):
                raise
            raise _unwritable(path, error) from error
        return None

    def _part(self, check: Check) -> TensorPart | None:
        info = self._source.headers[check.file].tensors[check.tensor].info
        name = self._base_names.get(check.tensor, check.tensor)
        tensor = self._tensors.get((name, check.expert))
        if tensor is None:
            return None
        _, (part,) = shape_tensor(check.tensor, info.type, [tensor], self._checkpoint.config.n_routed_experts)
        return part if part.n_bytes == check.n_bytes else None

    def _converted(self, part: TensorPart) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """The part's bytes in pieces, with their offsets; a piece is valid until the next one."""
        importance: Any = part.importance(self._importance)
        step = slice_rows(part)
        for first in range(0, part.n_out, step):
            n_rows = min(step, part.n_out - first)
            weight_at, scale_at = part.extents(first, n_rows)
            reader = self._readers[weight_at.file]
            weight = reader.read(weight_at.offset, weight_at.n_bytes, self._weights)
            scale = np.empty(0, np.uint8)
            if scale_at is not None:
                scale = self._readers[scale_at.file].read(scale_at.offset, scale_at.n_bytes, self._scales)
            n_bytes = part.output_bytes(n_rows)
            out = self._out.array(n_bytes)[:n_bytes]
            part.convert(n_rows, weight, scale, out, f"{reader.path}: {part.source.spec.name}", importance)
            yield part.output_bytes(first), out


def _base_names(manifest: Manifest) -> Mapping[str, str]:
    """Names of the overlay's stacks -> names of the base's."""
    if manifest.overlay is None:
        return {}
    return {
        stack_name(layer, projection, BASE_TYPES[kind]): f"blk.{layer}.ffn_{name}_exps.weight"
        for layer, by_type in manifest.overlay.experts.items()
        for kind in by_type
        for projection, name in enumerate(PROJECTIONS)
    }


def _write_all(fd: int, offset: int, data: npt.NDArray[np.uint8]) -> None:
    done = 0
    while done < data.size:
        done += os.pwrite(fd, data.data[done:], offset + done)

"""A small directory next to a checkpoint: it holds the dense part, tokenizer and better copies; all other experts stay in place.

    DST/dense.gguf            dense matrices in the chosen type, and all metadata
    DST/overlay-XXXXXXXX.gguf  copies of chosen experts, as beside any base
    DST/localrun.json         checksums of both, and which checkpoint has the experts (`Manifest.kept`)

The checkpoint must be unchanged: folder, names, sizes, headers and samples of each shard's data are compared when the model is
opened. Its experts have no checksums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import xxhash
from gguf import GGMLQuantizationType

from localrun.errors import FormatError
from localrun.quant.checkpoint.mapping import DENSE_TYPES
from localrun.quant.checkpoint.source import CheckpointSource
from localrun.quant.gguf.file import GgufFile, read_gguf
from localrun.quant.gguf.source import GgufSource, listed_files, read_overlay
from localrun.quant.model.manifest import MANIFEST_NAME, KeptExperts, Manifest, read_manifest
from localrun.quant.model.source import Projection, TensorInfo
from localrun.quant.precision.dense_solver import DENSE_TYPES_OPTION, types_from_text


class KeptSource(GgufSource):
    """Implements `ModelSource`: a GGUF's dense part with a checkpoint's experts. Immutable, safe to read from several threads.

    `parts` are the files of the directory; the checkpoint's shards follow them in `files`.
    """

    def __init__(
        self,
        path: Path,
        part: GgufFile,
        manifest: Manifest,
        checkpoint: CheckpointSource,
        overlay: GgufFile | None,
        *,
        unchecked: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        stacks = {name: info for name, info in checkpoint.tensors.items() if "_exps." in name}
        dense = {name: tensor.info for name, tensor in part.tensors.items()}
        _check_tensors(part, dense, checkpoint)
        super().__init__(path, [part], part.metadata, dense | stacks, manifest, overlay, unchecked=unchecked)

    @classmethod
    def open(cls, path: Path, *, unchecked: bool = False) -> KeptSource:
        """Opens a directory that `localrun convert --keep-experts` wrote.

        Raises:
            FormatError: damaged files, or the checkpoint is missing or has changed.
            StoreError: a file can't be read.
        """
        manifest_path = path / MANIFEST_NAME
        manifest = read_manifest(manifest_path)
        assert manifest.kept is not None
        paths = listed_files(manifest_path, manifest.files)
        overlay = None
        if manifest.overlay is not None:
            overlay = read_overlay(listed_files(manifest_path, manifest.overlay.files))
        if len(paths) != 1:
            raise FormatError(f"{manifest_path}: a dense part of {len(paths)} files", hint="update localrun")
        dense = _dense_type(manifest_path, manifest)
        dense_types = types_from_text(manifest.options.get(DENSE_TYPES_OPTION), str(manifest_path))
        checkpoint = _open_checkpoint(path, manifest.kept, dense, dense_types)
        return cls(path, read_gguf(paths[0]), manifest, checkpoint, overlay, unchecked=unchecked)

    @property
    def checkpoint(self) -> Path:
        """The folder that has the experts."""
        return self._checkpoint.path

    @property
    def own_files(self) -> Sequence[Path]:
        """Those in the directory."""
        return self._files

    @property
    def files(self) -> Sequence[Path]:
        return self._all_files

    @cached_property
    def _all_files(self) -> tuple[Path, ...]:
        return (*self._files, *self._checkpoint.files)

    def base_expert(self, layer: int, expert: int) -> tuple[Projection, Projection, Projection]:
        """The checkpoint's."""
        gate, up, down = (self._moved(projection) for projection in self._checkpoint.expert(layer, expert))
        return gate, up, down

    def _moved(self, projection: Projection) -> Projection:
        extents = tuple(replace(extent, file=extent.file + len(self._files)) for extent in projection.extents)
        return replace(projection, extents=extents)

    def _digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{super()._digest()}\n{self._checkpoint.identity}".encode())


def is_kept(folder: Path) -> bool:
    """Whether a converted directory has its experts elsewhere."""
    return read_manifest(folder / MANIFEST_NAME).kept is not None


def _dense_type(manifest_path: Path, manifest: Manifest) -> GGMLQuantizationType:
    name = manifest.options.get("dense")
    if name not in DENSE_TYPES:
        raise FormatError(f"{manifest_path}: options.dense: {name!r} is unknown", hint="update localrun")
    return DENSE_TYPES[str(name)]


def _open_checkpoint(
    folder: Path,
    kept: KeptExperts,
    dense: GGMLQuantizationType,
    dense_types: Mapping[str, GGMLQuantizationType],
) -> CheckpointSource:
    """The checkpoint that has the experts, checked to be the same."""
    path = Path(kept.path)
    moved = f"if it was moved: localrun convert NEW_PATH {folder} --keep-experts"
    if not path.is_dir():
        raise FormatError(f"{folder}: its experts were in {path}, which is gone", hint=moved)
    for name, size in kept.files.items():
        file = path / name
        if not file.is_file():
            raise FormatError(f"{folder}: its experts were in {file}, which is missing", hint=moved)
        if (now := file.stat().st_size) != size:
            raise FormatError(
                f"{file}: {now} bytes, it had {size} when {folder} was made from it",
                hint=f"restore the original file; {moved}",
            )
    checkpoint = CheckpointSource.open(path, dense=dense, dense_types=dense_types)
    if checkpoint.plan.checkpoint.identity != kept.identity:
        raise FormatError(
            f"{path}: not the checkpoint {folder} was made from",
            hint=f"restore the original files, or convert into another directory; {moved}",
        )
    return checkpoint


def _check_tensors(part: GgufFile, dense: Mapping[str, TensorInfo], checkpoint: CheckpointSource) -> None:
    """The dense part is what this program would make."""
    expected = {name: info for name, info in checkpoint.tensors.items() if "_exps." not in name}
    if dense != expected:
        odd = min(name for name in dense.keys() | expected.keys() if dense.get(name) != expected.get(name))
        raise FormatError(
            f"{part.path}: {odd}: not what this version makes from {checkpoint.path}",
            hint="delete the directory and convert again",
        )

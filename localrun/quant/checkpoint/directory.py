"""An official checkpoint directory: config.json plus safetensors, fully checked before use.

`Checkpoint.open` reads the config, the index and every shard's header (no weights but a few kilobytes of scales and samples) and
compares them with the schema. The result is complete and consistent: no further checks are needed except on the weights' values
(NaN), which `formats` does while converting.

Knows nothing about GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from localrun.errors import CheckpointError, FormatError, UnsupportedModelError
from localrun.paths import is_plain_name
from localrun.quant.checkpoint.model_config import MAX_LAYERS, ModelConfig, parse_config
from localrun.quant.checkpoint.safetensors import SafetensorsFile, TensorEntry, parse_json_object
from localrun.quant.checkpoint.schema import ROLE_DTYPES, Role, TensorSpec, mtp_tensors, trunk_tensors
from localrun.quant.model.source import Extent
from localrun.reading import read_small

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

MAX_JSON_BYTES = 64 << 20
"""Pro's index has 12 MB; more is damage, and reading it would cost memory."""

_E8M0_NAN = 0xFF
_NAMED = 4
_SAMPLE_BYTES = 64 << 10
_VISION = re.compile(r"^(vision|aligner)\.|^image_|\.gate\.bias_vl$")


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the schema and the location of its bytes.

    Attributes:
        spec: its specification.
        dtype: safetensors dtype of the weight.
        weight: its bytes; `file` is an index into `Checkpoint.files`.
        scale: the quantization scales' bytes (E8M0), for FP8 and FP4.
    """

    spec: TensorSpec
    dtype: str
    weight: Extent
    scale: Extent | None


@dataclass(frozen=True, slots=True)
class MtpSummary:
    """The `mtp.*` tensors of a checkpoint, which the GGUF omits.

    Attributes:
        kind: `MTP` (first release) or `DSpark`.
        n_blocks: number of blocks or stages.
        n_tensors, n_bytes: as stored.
    """

    kind: str
    n_blocks: int
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked checkpoint. Immutable, holds no descriptors, safe to read from several threads.

    Attributes:
        path: the directory.
        config: parsed config.json.
        shards: opened safetensors files.
        tensors: the trunk's tensors in schema order.
        mtp: the `mtp.*` tensors, None without them.
        n_tensors, n_bytes: everything in the shards.
        warnings: for the user.
        identity: digest of config, headers, sizes and a sample of each shard's bytes.
    """

    path: Path
    config: ModelConfig
    shards: tuple[SafetensorsFile, ...]
    tensors: tuple[SourceTensor, ...]
    mtp: MtpSummary | None
    n_tensors: int
    n_bytes: int
    warnings: tuple[str, ...]
    identity: str

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards' paths; `Extent.file` counts in this order."""
        return tuple(shard.path for shard in self.shards)

    def read(self, extent: Extent) -> npt.NDArray[np.uint8]:
        """The bytes of an extent.

        Raises:
            StoreError: I/O error, or the file has changed since it was opened.
        """
        out = np.empty(extent.n_bytes, np.uint8)
        self.shards[extent.file].read_at(extent.offset, out)
        return out

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Opens and checks a checkpoint directory.

        Raises:
            FormatError: a damaged file. StoreError: one that can't be read.
            CheckpointError: tensors missing, unknown, mis-shaped, mistyped, or an index that disagrees with the shards.
            UnsupportedModelError: a valid checkpoint of another model.
        """
        config_path = path / CONFIG_NAME
        config_bytes = read_small(config_path, MAX_JSON_BYTES, "a checkpoint file")
        config = parse_config(config_path, parse_json_object(config_path, config_bytes))
        warnings: list[str] = []
        shards = _open_shards(path, warnings)
        stored = _collect(path, shards)
        _refuse_vision(path, stored)
        tensors, mtp = _match(path, config, stored)
        checkpoint = cls(
            path=path,
            config=config,
            shards=shards,
            tensors=tensors,
            mtp=mtp,
            n_tensors=len(stored),
            n_bytes=sum(entry.n_bytes for _, entry in stored.values()),
            warnings=tuple(warnings),
            identity=_identity(config_bytes, shards),
        )
        checkpoint._check_matrix_scales()
        return checkpoint

    def _check_matrix_scales(self) -> None:
        # A few hundred reads of some kilobytes; the experts' scales (a sixteenth of the file) are checked while converting.
        for tensor in self.tensors:
            if tensor.scale is not None and tensor.spec.role is Role.MATRIX:
                bad = np.flatnonzero(self.read(tensor.scale) == _E8M0_NAN)
                if len(bad):
                    file = self.shards[tensor.scale.file].path
                    raise CheckpointError(
                        f"{file}: {tensor.spec.scale_name}: {len(bad)} scales are NaN, the first at index {bad[0]}",
                        hint="download the file again",
                    )


def _open_shards(path: Path, warnings: list[str]) -> tuple[SafetensorsFile, ...]:
    index_path = path / INDEX_NAME
    if not index_path.is_file():
        single = path / SINGLE_NAME
        if not single.is_file():
            raise CheckpointError(
                f"{path}: found neither {INDEX_NAME} nor {SINGLE_NAME}",
                hint="pass the directory of the downloaded checkpoint",
            )
        return (SafetensorsFile.open(single),)
    index = parse_json_object(index_path, read_small(index_path, MAX_JSON_BYTES, "a checkpoint file"))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError(f"{index_path}: weight_map is not an object of file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        # A name must be in this folder, but the file itself may be a link, as in download caches.
        if not is_plain_name(name):
            raise FormatError(
                f"{index_path}: file name {name[:80]!r} is invalid or points outside the checkpoint's folder"
            )
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise CheckpointError(f"{path}: {_some(absent, 'shard')} missing", hint="download the rest of the checkpoint")
    shards = tuple(SafetensorsFile.open(path / name) for name in names)
    _compare_index(index_path, weight_map, names, shards)
    total = index.get("metadata", {}).get("total_size") if isinstance(index.get("metadata"), dict) else None
    n_bytes = sum(entry.n_bytes for shard in shards for entry in shard.tensors.values())
    if type(total) is int and total != n_bytes:
        warnings.append(f"{index_path}: total_size says {total} bytes, the shards hold {n_bytes}")
    return shards


def _compare_index(
    index_path: Path, weight_map: Mapping[str, str], names: Sequence[str], shards: Sequence[SafetensorsFile]
) -> None:
    by_name = dict(zip(names, shards, strict=True))
    absent = [name for name, file in weight_map.items() if name not in by_name[file].tensors]
    if absent:
        raise CheckpointError(f"{index_path}: {_some(absent, 'tensor')} not in the shard named by the index")
    for file, shard in by_name.items():
        unlisted = [name for name in shard.tensors if weight_map.get(name) != file]
        if unlisted:
            raise CheckpointError(
                f"{shard.path}: {_some(unlisted, 'tensor')} in this shard, but the index says otherwise"
            )


def _collect(path: Path, shards: Iterable[SafetensorsFile]) -> dict[str, tuple[int, TensorEntry]]:
    stored: dict[str, tuple[int, TensorEntry]] = {}
    for number, shard in enumerate(shards):
        for name, entry in shard.tensors.items():
            if name in stored:
                raise CheckpointError(f"{path}: {name} is in more than one shard")
            stored[name] = (number, entry)
    return stored


def _refuse_vision(path: Path, stored: Iterable[str]) -> None:
    name = next((name for name in stored if _VISION.search(name)), None)
    if name is not None:
        raise UnsupportedModelError(
            f"{path}: this is a vision variant of DeepSeek-V4 (tensor {name}), which localrun does not run",
            hint="use the text checkpoint of the same release",
        )


class _Matcher:
    """Matches specs with stored tensors, collecting all mismatches for one message."""

    def __init__(self, stored: Mapping[str, tuple[int, TensorEntry]]) -> None:
        self._stored = stored
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def match(self, spec: TensorSpec) -> SourceTensor | None:
        located = self._stored.get(spec.name)
        if located is None:
            self.missing.append(spec.name)
            return None
        file, entry = located
        self.used.add(spec.name)
        allowed = ROLE_DTYPES[spec.role]
        if entry.dtype not in allowed:
            self.wrong.append(f"{spec.name} has dtype {entry.dtype}, expected {' or '.join(allowed)}")
            return None
        shape, scale_shape = spec.stored(entry.dtype)
        if entry.shape != shape:
            self.wrong.append(f"{spec.name} has shape {list(entry.shape)}, expected {list(shape)}")
            return None
        scale = None
        if scale_shape is not None:
            scale = self._match_scale(spec.scale_name, scale_shape)
            if scale is None:
                return None
        return SourceTensor(spec, entry.dtype, Extent(file, entry.offset, entry.n_bytes), scale)

    def _match_scale(self, name: str, shape: tuple[int, ...]) -> Extent | None:
        located = self._stored.get(name)
        if located is None:
            self.missing.append(name)
            return None
        file, entry = located
        self.used.add(name)
        if entry.dtype != "F8_E8M0" or entry.shape != shape:
            self.wrong.append(f"{name} is {entry.dtype} {list(entry.shape)}, expected F8_E8M0 {list(shape)}")
            return None
        return Extent(file, entry.offset, entry.n_bytes)


def _match(
    path: Path, config: ModelConfig, stored: Mapping[str, tuple[int, TensorEntry]]
) -> tuple[tuple[SourceTensor, ...], MtpSummary | None]:
    # Bounds the work by the bytes that are there: a hostile config may ask for half a million tensors.
    if config.num_hidden_layers * config.n_routed_experts * 3 > 2 * len(stored):
        n_needed = config.num_hidden_layers * config.n_routed_experts * 3
        raise CheckpointError(
            f"{path}: {config.num_hidden_layers} layers of {config.n_routed_experts} experts need {n_needed} expert"
            f" tensors, the shards hold {len(stored)} tensors in all"
        )
    matcher = _Matcher(stored)
    tensors = [matcher.match(spec) for spec in trunk_tensors(config)]
    mtp = _match_mtp(config, stored, matcher)
    extra = [name for name in stored if name not in matcher.used]
    problems = []
    if matcher.missing:
        problems.append(f"{_some(matcher.missing, 'tensor')} missing")
    if matcher.wrong:
        problems.append(_first(matcher.wrong))
    if extra:
        problems.append(f"{_some(extra, 'tensor')} unknown")
    if problems:
        hint = "the checkpoint is incomplete, damaged, or not the model its config.json describes"
        if any(name.startswith("model.layers.") for name in extra):
            hint = "the names are those of a transformers export; localrun reads the official release's files"
        raise CheckpointError(f"{path}: {'; '.join(problems)}", hint=hint)
    complete = tuple(tensor for tensor in tensors if tensor is not None)
    _check_uniform(path, complete)
    return complete, mtp


def _match_mtp(
    config: ModelConfig, stored: Mapping[str, tuple[int, TensorEntry]], matcher: _Matcher
) -> MtpSummary | None:
    names = [name for name in stored if name.startswith("mtp.")]
    numbers = {int(match[1]) for name in names if (match := re.match(r"mtp\.(\d{1,4})\.", name))}
    if not numbers or max(numbers) >= MAX_LAYERS:
        return None
    dspark = "mtp.0.main_proj.weight" in stored
    n_blocks = max(numbers) + 1
    for spec in mtp_tensors(config, n_blocks, dspark=dspark):
        matcher.match(spec)
    n_bytes = sum(stored[name][1].n_bytes for name in names)
    return MtpSummary("DSpark" if dspark else "MTP", n_blocks, len(names), n_bytes)


def _check_uniform(path: Path, tensors: Iterable[SourceTensor]) -> None:
    """Experts of a layer end in one stacked tensor, which has one type."""
    first: dict[str, SourceTensor] = {}
    for tensor in tensors:
        if tensor.spec.expert is None or tensor.spec.gguf is None:
            continue
        other = first.setdefault(tensor.spec.gguf, tensor)
        if tensor.dtype != other.dtype:
            raise CheckpointError(
                f"{path}: {tensor.spec.name} has dtype {tensor.dtype}, but {other.spec.name} of the same layer has"
                f" {other.dtype}"
            )


def _some(names: Sequence[str], noun: str) -> str:
    """`3 tensors (a, b, c)`, a few of many."""
    shown = ", ".join(name[:100] for name in names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({shown})"


def _first(problems: Sequence[str]) -> str:
    more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return "; ".join(problems[:_NAMED]) + more


def _identity(config: bytes, shards: Iterable[SafetensorsFile]) -> str:
    """Digest that identifies the weights without reading them all: 64 KiB at both ends of each shard's data represent the rest."""
    digest = xxhash.xxh3_128(config)
    for shard in shards:
        digest.update(f"{shard.path.name} {shard.size} {shard.header_digest}\n".encode())
        data_start = min((entry.offset for entry in shard.tensors.values()), default=shard.size)
        n = min(_SAMPLE_BYTES, shard.size - data_start)
        for offset in (data_start, shard.size - n):
            sample = np.empty(n, np.uint8)
            shard.read_at(offset, sample)
            digest.update(sample.data)
    return digest.hexdigest()


def is_checkpoint(path: Path) -> bool:
    """Whether a directory looks like an official checkpoint (which may still be invalid)."""
    return (path / CONFIG_NAME).is_file() and ((path / INDEX_NAME).is_file() or (path / SINGLE_NAME).is_file())

"""llama.cpp's importance files: its GGUF form, read and written, and the older `.dat` form, read.

GGUF (llama.cpp tools/imatrix/imatrix.cpp, save_imatrix): `general.type` is "imatrix"; keys `imatrix.datasets`,
`imatrix.chunk_count`, `imatrix.chunk_size`; per weight two F32 tensors, `<name>.in_sum2` (n_in, n_experts) with raw sums of squares
and `<name>.counts` (1, n_experts). We add keys `localrun.calibration.*` and tensors `localrun.blk.N.route_power`, which
llama.cpp ignores.

`.dat` (save_imatrix_legacy), little-endian: i32 entries; each i32 length, name, i32 calls, i32 values, f32 values = mean square *
calls; then i32 chunks, i32 length, name of the text. It has no counts per expert: all experts then count equally, and a value
of 1 in all channels marks an expert without data.

Entries of dense matrices are read from the GGUF form, which has them as (n_in, 1) and (1, 1), and ignored in the older one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from localrun.alignment import align_up
from localrun.atomic import replacing
from localrun.errors import FormatError, StoreError
from localrun.quant.gguf.file import GgufFile, GgufTensor, build_header, read_gguf
from localrun.quant.gguf.value import GgufValue
from localrun.quant.model.source import PROJECTIONS, MoeLayer, TensorInfo
from localrun.quant.precision.importance import F32, F64, DenseImportance, Importance, LayerImportance

_ALIGNMENT = 32
_MAX_DAT_BYTES = 64 << 30
_HINT = "the file is damaged or not an importance matrix: recreate it, or leave out --imatrix to calibrate"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_DIGEST_KEY, _TOKENS_KEY = "localrun.calibration.digest", "localrun.calibration.tokens"


def _name(layer: int, projection: str) -> str:
    return f"blk.{layer}.ffn_{projection}_exps.weight"


def _route_name(layer: int) -> str:
    return f"localrun.blk.{layer}.route_power"


# --- writing ----------------------------------------------------------------------------------------------------------


def write_imatrix(importance: Importance, path: Path) -> None:
    """Writes llama.cpp's GGUF form, atomically.

    Raises:
        StoreError: it can't be written.
    """
    metadata = {
        "general.type": GgufValue.string("imatrix"),
        "imatrix.datasets": GgufValue.strings(importance.datasets),
        "imatrix.chunk_count": GgufValue.uint32(max(1, importance.n_tokens // importance.chunk_tokens)),
        "imatrix.chunk_size": GgufValue.uint32(importance.chunk_tokens),
        _DIGEST_KEY: GgufValue.string(importance.text_digest),
        _TOKENS_KEY: GgufValue.scalar(GGUFValueType.UINT64, importance.n_tokens),
    }
    tensors = list(_tensors(importance))
    with replacing(path) as file:
        file.write(build_header(metadata, [_info(name, array) for name, array in tensors], _ALIGNMENT))
        for _, array in tensors:
            for row in array:
                file.write(row.astype("<f4").tobytes())
            file.write(bytes(align_up(array.size * 4, _ALIGNMENT) - array.size * 4))


def _tensors(importance: Importance) -> Iterator[tuple[str, npt.NDArray[np.floating]]]:
    for number, layer in importance.layers.items():
        for projection, sums in zip(PROJECTIONS, (layer.x, layer.x, layer.activated), strict=True):
            yield f"{_name(number, projection)}.in_sum2", sums
            yield f"{_name(number, projection)}.counts", layer.counts[:, None]
        if layer.route_power is not None:
            yield _route_name(number), layer.route_power[None, :]
    for name, matrix in importance.dense.items():
        yield name + _SUMS, matrix.sums[None, :]
        yield name + _COUNTS, np.full((1, 1), matrix.count)


def _info(name: str, array: npt.NDArray[np.floating]) -> TensorInfo:
    return TensorInfo(name, (array.shape[1], array.shape[0]), GGMLQuantizationType.F32, array.size * 4)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_imatrix(path: Path, moe_layers: Mapping[int, MoeLayer]) -> Importance:
    """Reads either form and checks it against a model. Sums are memory-mapped.

    Raises:
        FormatError: damaged, not an importance matrix, or one of another model.
        StoreError: can't be read.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise StoreError(f"{path}: can't be read: {error.strerror}") from error
    importance = _read_gguf(path, moe_layers) if magic == b"GGUF" else _read_dat(path, moe_layers)
    importance.check_fits(moe_layers, str(path))
    return importance


def _read_gguf(path: Path, moe_layers: Mapping[int, MoeLayer]) -> Importance:
    header = read_gguf(path)
    kind = header.metadata.get("general.type")
    if kind is None or kind.value != "imatrix":
        raise FormatError(
            f"{path}: not an importance matrix (general.type is {kind.value if kind else 'missing'})",
            hint="pass a file written by llama-imatrix or `localrun convert --calibrate`",
        )
    layers = {}
    for number, moe in moe_layers.items():
        counts = {
            p: _counts(path, header, f"{_name(number, p)}.counts", moe.n_experts) for p in ("gate", "down")
        }  # up's are gate's
        if not np.array_equal(counts["gate"], counts["down"]):
            raise FormatError(f"{path}: layer {number}: gate and down have different counts", hint=_HINT)
        layers[number] = LayerImportance(
            counts["gate"],
            _sums(path, header, _name(number, "gate"), moe.n_experts, moe.n_embd),
            _sums(path, header, _name(number, "down"), moe.n_experts, moe.n_ff),
            _route_power(path, header, number, moe.n_experts),
        )
    _refuse_others(path, header.tensors, moe_layers)
    dense = dict(_dense(path, header))
    datasets = header.metadata.get("imatrix.datasets")
    digest = header.metadata.get(_DIGEST_KEY)
    return Importance(
        layers,
        n_tokens=_n_tokens(header, layers),
        datasets=tuple(datasets.value) if datasets is not None and isinstance(datasets.value, list) else (),
        chunk_tokens=max(1, _integer(header, "imatrix.chunk_size", 512)),
        text_digest=str(digest.value) if digest is not None else "",
        dense=dense,
    )


def _dense(path: Path, header: GgufFile) -> Iterator[tuple[str, DenseImportance]]:
    """Matrices of which there is one sum per channel; llama.cpp's files have a count in calls of rows."""
    for name, tensor in header.tensors.items():
        weight = name.removesuffix(_SUMS)
        n_in = tensor.info.shape[0]
        if not name.endswith(_SUMS) or "_exps." in name or tensor.info.n_bytes != 4 * n_in:
            continue
        counts = _checked(path, weight + _COUNTS, _array(path, _tensor(path, header, weight + _COUNTS)))
        sums = np.array(_checked(path, name, _array(path, _tensor(path, header, name))), np.float32)
        yield weight, DenseImportance(sums, float(counts.sum()))


def _integer(header: GgufFile, key: str, default: int) -> int:
    value = header.metadata.get(key)
    return value.value if value is not None and type(value.value) is int else default


def _n_tokens(header: GgufFile, layers: Mapping[int, LayerImportance]) -> int:
    """Ours records it; llama.cpp's has chunks, the last of which may be partial."""
    n_chunks, n_chunk = _integer(header, "imatrix.chunk_count", 0), _integer(header, "imatrix.chunk_size", 0)
    return _integer(header, _TOKENS_KEY, n_chunks * n_chunk)


def _refuse_others(path: Path, tensors: Mapping[str, object], moe_layers: Mapping[int, MoeLayer]) -> None:
    """A model of more layers than this one is another model."""
    for name in tensors:
        parts = name.split(".")
        if name.endswith("_exps.weight.in_sum2") and parts[1].isdigit() and int(parts[1]) not in moe_layers:
            raise FormatError(
                f"{path}: importance of another model: it has layer {parts[1]}, which the model lacks",
                hint="use an imatrix made from this model, or calibrate again",
            )


def _tensor(path: Path, header: GgufFile, name: str) -> GgufTensor:
    tensor = header.tensors.get(name)
    if tensor is None:
        raise FormatError(
            f"{path}: importance of another model: no tensor '{name}'",
            hint="use an imatrix made from this model, or calibrate again",
        )
    if tensor.info.type != GGMLQuantizationType.F32:
        raise FormatError(f"{path}: {name}: expected F32, got {tensor.info.type.name}", hint=_HINT)
    return tensor


def _counts(path: Path, header: GgufFile, name: str, n_experts: int) -> F64:
    tensor = _tensor(path, header, name)
    values = _checked(path, name, _array(path, tensor)).astype(np.float64).reshape(-1)
    if values.size == 1:  # merged from files without counts per expert
        values = np.full(n_experts, values[0])
    if values.size != n_experts:
        raise FormatError(
            f"{path}: importance of another model: {name} has {values.size} experts, the model {n_experts}",
            hint="use an imatrix made from this model, or calibrate again",
        )
    return values


def _sums(path: Path, header: GgufFile, weight: str, n_experts: int, n_in: int) -> F32:
    name = f"{weight}.in_sum2"
    tensor = _tensor(path, header, name)
    shape = (*tensor.info.shape, 1)
    if tensor.info.n_bytes != n_experts * n_in * 4 or shape[0] != n_in:
        raise FormatError(
            f"{path}: importance of another model: {name} is {shape[0]} x {shape[1]}, the model's experts {n_in} x {n_experts}",
            hint="use an imatrix made from this model, or calibrate again",
        )
    return _checked(path, name, _array(path, tensor).reshape(n_experts, n_in))


def _route_power(path: Path, header: GgufFile, layer: int, n_experts: int) -> F64 | None:
    name = _route_name(layer)
    if name not in header.tensors:
        return None
    values = _checked(path, name, _array(path, _tensor(path, header, name))).reshape(-1)
    if values.size != n_experts:
        raise FormatError(f"{path}: {name} has {values.size} entries, expected {n_experts}", hint=_HINT)
    return values.astype(np.float64)


def _array(path: Path, tensor: GgufTensor) -> F32:
    n = tensor.info.n_bytes // 4
    if tensor.offset % 4 == 0:
        return np.memmap(path, "<f4", "r", tensor.offset, (n,))
    return np.fromfile(path, "<f4", n, offset=tensor.offset)


def _checked(path: Path, name: str, values: F32) -> F32:
    rows = values if values.ndim == 2 else values[None, :]
    for i, row in enumerate(rows):
        if not (np.isfinite(row).all() and (row >= 0).all()):
            raise FormatError(f"{path}: {name}: row {i} holds negative or infinite values or NaN", hint=_HINT)
    return values


# --- the older form ---------------------------------------------------------------------------------------------------


def _read_dat(path: Path, moe_layers: Mapping[int, MoeLayer]) -> Importance:
    with path.open("rb") as file:
        size = min(os.fstat(file.fileno()).st_size, _MAX_DAT_BYTES)

        def take(n_bytes: int, what: str) -> bytes:
            if n_bytes < 0 or file.tell() + n_bytes > size:
                raise FormatError(f"{path}: truncated at {what}, or not an importance matrix", hint=_HINT)
            return file.read(n_bytes)

        def integer(what: str) -> int:
            return int(struct.unpack("<i", take(4, what))[0])

        wanted = {_name(n, p): (moe.n_embd if p == "gate" else moe.n_ff) * moe.n_experts
                  for n, moe in moe_layers.items() for p in ("gate", "down")}  # fmt: skip
        found = dict(_dat_entries(path, file, take, integer, wanted))
        n_chunks = 0
        datasets: tuple[str, ...] = ()
        if file.tell() < size:
            n_chunks = integer("the number of chunks")
            name = take(integer("the text's name"), "the text's name").decode("utf-8", "replace")
            datasets = (name,) if name else ()
    layers = {number: _dat_layer(path, found, moe) for number, moe in moe_layers.items()}
    _refuse_others(path, {f"{name}.in_sum2": None for name in found}, moe_layers)
    return Importance(layers, n_tokens=max(0, n_chunks) * 512, datasets=datasets)


def _dat_entries(
    path: Path,
    file: BinaryIO,
    take: Callable[[int, str], bytes],
    integer: Callable[[str], int],
    wanted: Mapping[str, int],
) -> Iterator[tuple[str, F32]]:
    """Mean squares of wanted entries, flat; names alone of other experts' entries (to be refused), nothing of dense ones."""
    n_entries = integer("the number of entries")
    if not 0 < n_entries <= 1 << 20:
        raise FormatError(f"{path}: claims {n_entries} entries: not an importance matrix", hint=_HINT)
    for i in range(n_entries):
        name = take(integer(f"entry {i}"), f"entry {i}").decode("utf-8", "replace")
        n_calls, n_values = integer(name), integer(name)
        if name not in wanted:
            take(n_values * 4, name) if n_values < 1 << 28 else take(-1, name)
            if "_exps." in name:
                yield name, np.empty(0, np.float32)
            continue
        if n_values != wanted[name]:
            raise FormatError(
                f"{path}: importance of another model: {name} has {n_values} values, the model {wanted[name]}",
                hint="use an imatrix made from this model, or calibrate again",
            )
        values = np.frombuffer(take(n_values * 4, name), "<f4")
        yield name, _checked(path, name, (values / np.float32(max(1, n_calls))).astype(np.float32))


def _dat_layer(path: Path, found: Mapping[str, F32], moe: MoeLayer) -> LayerImportance:
    arrays = []
    for projection in ("gate", "down"):
        name = _name(moe.layer, projection)
        if name not in found:
            raise FormatError(
                f"{path}: importance of another model: no entry '{name}'",
                hint="use an imatrix made from this model, or calibrate again",
            )
        arrays.append(found[name].reshape(moe.n_experts, -1))
    seen = ~((arrays[0] == 1).all(1) & (arrays[1] == 1).all(1))
    for array in arrays:
        array[~seen] = 0
    # As many rows as to make the mixture with the layer's average negligible.
    counts = np.where(seen, 1024.0, 0.0)
    return LayerImportance(counts, arrays[0] * np.float32(1024), arrays[1] * np.float32(1024))

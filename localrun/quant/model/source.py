"""The source of a model's bytes: presents every kind of model as a llama.cpp GGUF.

Three kinds exist: a directory written by `localrun convert`, any llama.cpp GGUF (split or not), and an official checkpoint
directory as downloaded. All present the same things: GGUF metadata, tensor descriptions under GGUF names, dense tensors as ggml
bytes, and for each expert a recipe: which byte ranges of which file form each projection.

Knows nothing about caches, threads or inference; `localrun.offload.cache.store` reads expert bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import gcd, lcm
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.alignment import PAGE_BYTES

Bytes = npt.NDArray[np.uint8]

PROJECTIONS = ("gate", "up", "down")
"""Order of an expert's matrices everywhere in localrun; the official names are w1, w3, w2."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as llama.cpp sees it.

    Attributes:
        name: GGUF name, e.g. `blk.3.ffn_gate_exps.weight`.
        shape: ggml order, innermost dimension first (`ne`).
        type: ggml type of the bytes that the source presents.
        n_bytes: size of all rows.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    n_bytes: int


class Encoding(Enum):
    """How a projection is stored in the file.

    GGML: rows of the ggml type, ready to use (1 extent).
    FP4: official FP4, `uint8 (n_out, n_in/2)` low nibble first, then E8M0 scales `uint8 (n_out, n_in/32)` (2 extents): MXFP4.
    FP8: official FP8 E4M3 `(n_out, n_in)`, then E8M0 scales `(ceil(n_out/128), ceil(n_in/128))` (2 extents); becomes Q8_0 or BF16.
    """

    GGML = "ggml"
    FP4 = "fp4"
    FP8 = "fp8"


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range: `files[file]` from `offset` on, `n_bytes` long."""

    file: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Projection:
    """One matrix of one expert: its location and its decoded form.

    Attributes:
        type: ggml type after decoding.
        n_out, n_in: rows and row length in elements.
        encoding: how to turn the extents' bytes into `n_bytes` of ggml rows.
        extents: byte ranges, in the order that the encoding names.
        n_bytes: size as ggml rows.
        checksum: xxh3_64 hex digest of the ggml rows, if the source has one.
    """

    type: GGMLQuantizationType
    n_out: int
    n_in: int
    encoding: Encoding
    extents: tuple[Extent, ...]
    n_bytes: int
    checksum: str | None = None


@dataclass(frozen=True, slots=True)
class DenseSlice:
    """Some rows of a dense tensor.

    Attributes:
        extents: what to read, in files of the `DenseReading`.
        begin, n_bytes: their place among the tensor's ggml bytes.
        n_rows: number of rows.
        is_last: the tensor ends with them.
    """

    extents: tuple[Extent, ...]
    begin: int
    n_bytes: int
    n_rows: int
    is_last: bool


class DenseReading(Protocol):
    """How a dense tensor is read in slices, by anyone who reads faster than one range after the other. Any thread."""

    @property
    def files(self) -> Sequence[Path]:
        """Files that extents point into."""
        ...

    @property
    def slices(self) -> Sequence[DenseSlice]:
        """In order, without gaps; each but the last begins and ends at a multiple of `SLICE_GRAIN_ROWS` rows."""
        ...

    def rows(self, slice_: DenseSlice, raw: Sequence[Bytes], room: Callable[[int], Bytes]) -> Bytes:
        """The slice's ggml bytes, looked at for damage.

        Args:
            raw: bytes of its extents.
            room: a buffer of at least so many bytes, for those that need one.

        Raises:
            FormatError: a value that the type can't hold, or zeros in place of weights.
        """
        ...

    def check(self, digest: Callable[[], str]) -> None:
        """Compares the whole tensor with its checksum, if it has one.

        Args:
            digest: xxh3_64 of its bytes in the file, in hex.

        Raises:
            ChecksumError: it differs.
        """
        ...


SLICE_GRAIN_ROWS = 128
"""Blocks of FP8 scales have so many rows; interleaved kernels take 16."""


def slice_rows(row_bytes: int, most_bytes: int) -> int:
    """Rows per slice of at most `most_bytes`, if possible: a multiple of `SLICE_GRAIN_ROWS`, and whole pages of the result."""
    unit = lcm(PAGE_BYTES // gcd(row_bytes, PAGE_BYTES), SLICE_GRAIN_ROWS)
    return max(1, most_bytes // (row_bytes * unit)) * unit


ExpertTypes = tuple[GGMLQuantizationType, GGMLQuantizationType, GGMLQuantizationType]
"""ggml types of an expert's gate, up and down."""


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """Shape of one layer's routed experts.

    Attributes:
        layer: block number.
        n_experts: number of experts in the layer.
        n_embd: hidden size D (input of gate and up, output of down).
        n_ff: expert width F.
        types: types of the stacked tensors, which every expert has; what llama.cpp sees.
        expert_bytes: size of one expert in these types, the three projections as ggml rows.
        better: additional types of an overlay's copies, in ascending order; empty without an overlay.
    """

    layer: int
    n_experts: int
    n_embd: int
    n_ff: int
    types: ExpertTypes
    expert_bytes: int
    better: tuple[ExpertTypes, ...] = ()

    @property
    def variants(self) -> tuple[ExpertTypes, ...]:
        """All types that experts of this layer may be read in, the base's first."""
        return (self.types, *self.better)


class ModelSource(Protocol):
    """A model's bytes. Immutable after opening; safe to read from several threads."""

    @property
    def path(self) -> Path:
        """What the user named."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """Files that extents point into."""
        ...

    @property
    def metadata(self) -> Mapping[str, object]:
        """GGUF keys and values (strings, ints, floats, bools, lists)."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by GGUF name, stacked experts included."""
        ...

    @property
    def moe_layers(self) -> Mapping[int, MoeLayer]:
        """Layers with routed experts by block number."""
        ...

    @property
    def identity(self) -> str:
        """Hex digest that names these weights: same for the same bytes layout, used as key for caches and profiles."""
        ...

    def gguf_header(self) -> bytes:
        """A valid GGUF of metadata and tensor descriptions only, for `gguf_init_from_buffer` with `no_alloc`."""
        ...

    def read_tensor(self, name: str) -> npt.NDArray[np.uint8]:
        """All bytes of a dense (non-expert) tensor in its ggml type, flat.

        Raises:
            StoreError: the file can't be read or is shorter than its header says.
        """
        ...

    def dense_reading(self, name: str, slice_bytes: int) -> DenseReading | None:
        """How to read the same bytes in slices of about `slice_bytes`; None: only `read_tensor` has them."""
        ...

    def expert(self, layer: int, expert: int) -> tuple[Projection, Projection, Projection]:
        """Recipes of one expert's gate, up and down: the overlay's copy where there is one, else the base's."""
        ...

    def base_expert(self, layer: int, expert: int) -> tuple[Projection, Projection, Projection]:
        """The copy that every expert has, in the layer's `types`."""
        ...

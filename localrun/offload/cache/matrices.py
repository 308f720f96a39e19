"""Puts an expert's matrices into its slot as they arrive: decodes them (official formats to ggml rows), looks for damage, packs
them in the kernel's layout.

A matrix is done while the next one is still being read, so that whoever waits for an expert waits for its last matrix only.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import xxhash

from localrun.errors import ChecksumError
from localrun.offload.cache.slots import Slot
from localrun.offload.cache.tickets import Bytes
from localrun.quant.formats.transcode import decode_projection
from localrun.quant.model.source import PROJECTIONS, Encoding, ModelSource, Projection
from localrun.quant.zeros import LostWeights


class Packer(Protocol):
    """What is needed of a kernel: the slot's layout; see `FfnKernel`."""

    slot_bytes: int
    raw_is_packed: bool

    def pack_matrix(self, which: int, raw: Bytes, slot: int) -> None:
        """See `FfnKernel`."""
        ...


class MatrixWriter:
    """See above. Any thread.

    Args:
        copies: of the model.
        packers: by layer, one kernel per variant.
        verify: check checksums, if the source has them. Without checksums, look for lost weights (`localrun.quant.zeros`).
    """

    def __init__(
        self, copies: Sequence[ModelSource], packers: Mapping[int, Sequence[Packer]], *, verify: bool = True
    ) -> None:
        self._copies, self._packers, self._verify = copies, packers, verify
        self._lost = [LostWeights(copy) for copy in copies]

    def write(
        self,
        slot: Slot,
        projections: Sequence[Projection],
        which: int,
        pieces: Sequence[Bytes],
        *,
        copy: int = 0,
        as_rows: bool = False,
    ) -> None:
        """Puts one matrix into the slot.

        Args:
            which: 0 gate, 1 up, 2 down.
            pieces: the bytes of its extents.
            copy: of the model, named if something is wrong.
            as_rows: as ggml rows, after those of the matrices before it.

        Raises:
            ChecksumError, FormatError: bytes are damaged.
        """
        rows = self._rows(slot, projections[which], which, pieces, copy)
        packer = self._packers[slot.layer][slot.variant]
        if not packer.raw_is_packed and not as_rows:
            packer.pack_matrix(which, rows, slot.address)
            return
        memory: Any = (C.c_uint8 * slot.size_bytes).from_address(slot.address)
        at = sum(projection.n_bytes for projection in projections[:which])
        np.frombuffer(memory, np.uint8)[at : at + rows.size] = rows

    def _rows(self, slot: Slot, projection: Projection, which: int, pieces: Sequence[Bytes], copy: int) -> Bytes:
        name = PROJECTIONS[which]
        if self._verify:
            self._lost[copy].refuse_one(slot.layer, slot.expert, name, projection, pieces)
        is_ggml = projection.encoding is Encoding.GGML
        rows = pieces[0] if is_ggml else decode_projection(projection, pieces[0], pieces[1])
        if not self._verify or projection.checksum is None:
            return rows
        if xxhash.xxh3_64_hexdigest(rows.data) == projection.checksum:
            return rows
        path = self._copies[copy].files[projection.extents[0].file]
        raise ChecksumError(
            f"{path}: blk.{slot.layer}.ffn_{name}_exps.weight: expert {slot.expert} does not match its checksum",
            hint="the file is damaged; run `localrun verify` for the extent, then copy or convert it again",
        )

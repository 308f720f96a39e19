from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from localrun.offload.kernels.interleaved.formats import FORMATS, runnable
from localrun.offload.kernels.interleaved.layout import COPY, Format
from localrun.offload.kernels.kernel import PackedMatrix

TYPES = [kind for kind, format_ in FORMATS.items() if all(f.change == COPY for f in format_.fields)]


def expected(format_: Format, raw: np.ndarray, n_in: int) -> np.ndarray:
    """One group of 16 rows as the fields say: item i of row r at i * 16 + r."""
    n_units = n_in // format_.unit
    blocks = raw.reshape(16, n_units, format_.block_bytes)
    metas = np.zeros((n_units, format_.meta_bytes), np.uint8)
    bodies = np.zeros((n_units, format_.body_bytes), np.uint8)
    for field in format_.fields:
        items = blocks[:, :, field.source : field.source + field.width * field.count]
        items = items.reshape(16, n_units, field.count, field.width).transpose(1, 2, 0, 3).reshape(n_units, -1)
        (metas if field.in_meta else bodies)[:, field.target : field.target + items.shape[1]] = items
    padding = np.zeros(format_.group_bytes(n_in) - metas.size - bodies.size, np.uint8)
    return np.concatenate([metas.reshape(-1), padding, bodies.reshape(-1)])


@pytest.mark.parametrize("misplaced_by", [0, 8])
@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_items_lie_where_the_format_says_wherever_the_slot_begins(type_: T, misplaced_by: int) -> None:
    """A slot at a cache line is written past the caches, any other one is not."""
    if not runnable(type_):
        pytest.skip("this processor multiplies the type as plain rows")
    n_in = 768
    matrix = PackedMatrix.choose(type_, 32, n_in, math="int8")
    raw = np.random.default_rng(2).integers(0, 256, matrix.raw_bytes, np.uint8)
    memory = np.zeros(matrix.packed_bytes + 192, np.uint8)
    at = -memory.ctypes.data % 64 + 64 + misplaced_by
    matrix.pack(raw.ctypes.data, memory.ctypes.data + at)
    groups = [expected(FORMATS[type_], half, n_in) for half in np.split(raw, 2)]
    np.testing.assert_array_equal(memory[at : at + matrix.packed_bytes], np.concatenate(groups))
    assert not memory[:at].any()
    assert not memory[at + matrix.packed_bytes :].any()

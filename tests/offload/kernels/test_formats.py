"""Interleaved formats keep ggml's size per weight, and every byte of a block has its place."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QT

from localrun.alignment import LINE_BYTES
from localrun.offload.kernels.interleaved import blocks, floats, grids, kquants, parts
from localrun.offload.kernels.interleaved.layout import ODD_SIGNS, SIGNS, Format

FORMATS = {f.type: f for f in (*blocks.FORMATS, *floats.FORMATS, *grids.FORMATS, *kquants.FORMATS, *parts.FORMATS)}


@pytest.mark.parametrize("made", FORMATS.values(), ids=lambda made: made.type.name)
def test_a_unit_is_a_block_of_ggml_and_sixteen_of_them_take_no_more(made: Format) -> None:
    elements, n_bytes = GGML_QUANT_SIZES[made.type]
    if elements == 1:  # floats: 32 of them
        elements, n_bytes = 32, 32 * n_bytes
    assert (made.unit, made.block_bytes) == (elements, n_bytes)
    assert made.meta_bytes + made.body_bytes == 16 * n_bytes


@pytest.mark.parametrize("made", FORMATS.values(), ids=lambda made: made.type.name)
def test_each_byte_of_a_block_is_taken_once_and_lands_in_a_place_of_its_own(made: Format) -> None:
    taken = np.zeros(made.block_bytes, int)
    placed = {True: np.zeros(made.meta_bytes // 16, int), False: np.zeros(made.body_bytes // 16, int)}
    for field in made.fields:
        n_bytes = field.width * field.count
        taken[field.source : field.source + n_bytes] += 1
        at = field.target // 16
        placed[field.in_meta][at : at + n_bytes] += 1
    assert (taken == 1).all()
    assert all((place == 1).all() for place in placed.values())


def test_groups_of_sixteen_rows_begin_their_bodies_at_cache_lines() -> None:
    mxfp4 = FORMATS[QT.MXFP4]
    assert mxfp4.group_bytes(64) == LINE_BYTES + 2 * 256  # 2 units: 32 bytes of scales, padded to 64
    assert mxfp4.group_bytes(33) == mxfp4.group_bytes(64)
    assert mxfp4.matrix_bytes(17, 64) == 2 * mxfp4.group_bytes(64)
    assert FORMATS[QT.F32].matrix_bytes(16, 32) == 16 * 32 * 4


def test_only_grids_change_how_signs_lie() -> None:
    changed = {t.name for t, made in FORMATS.items() if any(f.change in (SIGNS, ODD_SIGNS) for f in made.fields)}
    assert changed == {"IQ2_XXS", "IQ3_XXS"}

"""Where the fields of a ggml tensor are, for compiled code: byte offsets into the structure that `library()` has checked."""

from __future__ import annotations

from typing import Final

import numba as nb

from localrun.ggml.structures import OP_NONE, OP_RESHAPE, OP_TRANSPOSE, Tensor
from localrun.offload.kernels.lowlevel import load_i32

TYPE: Final = Tensor.type.offset
BUFFER: Final = Tensor.buffer.offset
NE: Final = Tensor.ne.offset
NB: Final = Tensor.nb.offset
OP: Final = Tensor.op.offset
PARAMS: Final = Tensor.op_params.offset
SRC: Final = Tensor.src.offset
VIEW_SRC: Final = Tensor.view_src.offset
VIEW_OFFS: Final = Tensor.view_offs.offset
DATA: Final = Tensor.data.offset
EXTRA: Final = Tensor.extra.offset
NAME: Final = Tensor.name.offset

_FIRST_VIEW, _LAST_VIEW = OP_RESHAPE, OP_TRANSPOSE


@nb.njit(inline="always")
def is_view(tensor: int) -> bool:
    """RESHAPE, VIEW, PERMUTE or TRANSPOSE: another name for bytes that are there."""
    return _FIRST_VIEW <= load_i32(tensor + OP) <= _LAST_VIEW


@nb.njit(inline="always")
def is_name(tensor: int) -> bool:
    """Nothing is computed for it: a view, or bytes that were there before."""
    return load_i32(tensor + OP) == OP_NONE or is_view(tensor)

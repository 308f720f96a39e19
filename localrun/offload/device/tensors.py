"""Where the fields of a ggml tensor are, for compiled code: byte offsets into the structure that `library()` has checked."""

from __future__ import annotations

from typing import Final

from localrun.ggml.structures import Tensor

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

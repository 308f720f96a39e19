"""Places of a tensor's fields, looked up in one that ggml itself has made."""

from __future__ import annotations

import ctypes

from localrun.ggml.library import library
from localrun.ggml.structures import Tensor
from localrun.offload.device import tensors


def word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def test_fields_are_where_ggml_puts_them() -> None:
    tensor = Tensor()
    at = ctypes.addressof(tensor)
    library()  # checks the structure against the loaded library
    tensor.ne[:] = [3, 5, 7, 11]
    tensor.nb[:] = [4, 12, 60, 420]
    tensor.data, tensor.buffer, tensor.extra, tensor.view_offs = 101, 102, 103, 104
    tensor.type, tensor.op = 8, 29
    tensor.op_params[0] = -5
    tensor.name = b"blk.3"
    assert [word(at + tensors.NE + 8 * i) for i in range(4)] == [3, 5, 7, 11]
    assert [word(at + tensors.NB + 8 * i) for i in range(4)] == [4, 12, 60, 420]
    assert [word(at + place) for place in (tensors.DATA, tensors.BUFFER, tensors.EXTRA, tensors.VIEW_OFFS)] == [
        101,
        102,
        103,
        104,
    ]
    ints = [ctypes.c_int32.from_address(at + place).value for place in (tensors.TYPE, tensors.OP, tensors.PARAMS)]
    assert ints == [8, 29, -5]
    assert ctypes.string_at(at + tensors.NAME) == b"blk.3"
    assert tensors.SRC % 8 == tensors.VIEW_SRC % 8 == 0

"""All C structures and enum values of ggml and llama.cpp that localrun relies on and llama-cpp-python does not bind.

Tensors, type traits, and the *internal* backend interface (`ggml/src/ggml-backend-impl.h`), which has no stability guarantee.
So the library's version is pinned, and `library.library()` fails unless objects created by the C code have their fields where
this module expects them. Field order and sizes are those of the llama.cpp that llama-cpp-python 0.3.36 bundles (0c1e57098, ggml
0.25.3). This module loads nothing.

To pin a new version, change this module and `library`:

* the three versions below; `GGML_BACKEND_API_VERSION` 3 (llama.cpp b11480 and later) is `BACKEND_API_VERSION`;
* `BufferTypeInterface`: version 3 adds `alloc_buffer_n` and `get_alloc_size_n`, which go where the header has them. A null
  pointer means ggml's default for the first; the second needs a callback beside `get_alloc_size` in
  `offload/device/device.py:_build_buffer_type`;
* operations: their numbers, which `library` compares with the names that the library gives them;
* functions: `library._BASE` (libggml-base) and `library._ALL`, where a missing one is reported by name;
* the format of saved states changes too, but needs no work: `Engine.state_key` contains the pinned version, so other versions'
  states are not found.
"""

from __future__ import annotations

import ctypes as C
from typing import Final

LLAMA_CPP_PYTHON_VERSION: Final = "0.3.36"
GGML_VERSION: Final = "0.25.3"
BACKEND_API_VERSION: Final = 2  # ggml-backend-impl.h, GGML_BACKEND_API_VERSION

# ggml.h, enum ggml_op (position in the enum) and enum ggml_glu_op
OP_NONE: Final = 0
OP_ADD: Final = 2
OP_MUL: Final = 7
OP_DIV: Final = 8
OP_SQRT: Final = 10
OP_SUM_ROWS: Final = 15
OP_REPEAT: Final = 20
OP_CONCAT: Final = 22
OP_RMS_NORM: Final = 25
OP_MUL_MAT: Final = 29
OP_MUL_MAT_ID: Final = 30
OP_SCALE: Final = 32
OP_CONT: Final = 35
OP_RESHAPE: Final = 36
OP_VIEW: Final = 37
OP_PERMUTE: Final = 38
OP_TRANSPOSE: Final = 39
OP_GET_ROWS: Final = 40
OP_SET_ROWS: Final = 42
OP_SOFT_MAX: Final = 46
OP_ROPE: Final = 48
OP_ROPE_BACK: Final = 49
OP_CLAMP: Final = 50
OP_ARGSORT: Final = 69
OP_TOP_K: Final = 70
OP_FILL: Final = 73
OP_FLASH_ATTN_EXT: Final = 74
OP_LIGHTNING_INDEXER: Final = 87
OP_DSV4_HC_COMB: Final = 88
OP_DSV4_HC_PRE: Final = 89
OP_DSV4_HC_POST: Final = 90
OP_UNARY: Final = 91
OP_GLU: Final = 100
GLU_SWIGLU: Final = 2
GLU_SWIGLU_CLAMP: Final = 6
UNARY_SIGMOID: Final = 7  # ggml.h, enum ggml_unary_op
UNARY_SOFTPLUS: Final = 15

TYPE_F32: Final = 0  # ggml.h, enum ggml_type
TYPE_F16: Final = 1
TYPE_Q8_0: Final = 8
TYPE_I32: Final = 26
TYPE_I64: Final = 27
TYPE_BF16: Final = 30

STATUS_FAILED: Final = -1  # ggml.h, enum ggml_status
STATUS_ABORTED: Final = 1

DEVICE_TYPE_CPU: Final = 0  # ggml-backend.h, enum ggml_backend_dev_type
DEVICE_TYPE_GPU: Final = 1
DEVICE_TYPE_IGPU: Final = 2
DEVICE_TYPE_ACCEL: Final = 3

PREC_Q8: Final = 30  # ggml.h, enum ggml_prec

_P = C.c_void_p
_F = C.CFUNCTYPE


class Tensor(C.Structure):
    """struct ggml_tensor (ggml.h): `ne` innermost dimension first, `nb` strides in bytes."""

    _fields_ = [
        ("type", C.c_int),
        ("buffer", _P),
        ("ne", C.c_int64 * 4),
        ("nb", C.c_size_t * 4),
        ("op", C.c_int),
        ("op_params", C.c_int32 * 16),
        ("flags", C.c_int32),
        ("src", _P * 10),
        ("view_src", _P),
        ("view_offs", C.c_size_t),
        ("data", _P),
        ("name", C.c_char * 64),
        ("extra", _P),
        ("padding", C.c_char * 8),
    ]


class TypeTraits(C.Structure):
    """struct ggml_type_traits (ggml.h)."""

    _fields_ = [
        ("type_name", C.c_char_p),
        ("block_elements", C.c_int64),
        ("block_interleave", C.c_int64),
        ("block_bytes", C.c_size_t),
        ("is_quantized", C.c_bool),
        ("to_float", _P),  # void (const void *row, float *out, int64_t n_elements)
        ("from_float_ref", _P),
    ]


class BufferTypeInterface(C.Structure):
    """struct ggml_backend_buffer_type_i. Here and below names are returned as addresses: ctypes can't own a string for C."""

    _fields_ = [
        ("get_name", _F(_P, _P)),
        ("alloc_buffer", _F(_P, _P, C.c_size_t)),
        ("get_alignment", _F(C.c_size_t, _P)),
        ("get_max_size", _F(C.c_size_t, _P)),
        ("get_alloc_size", _F(C.c_size_t, _P, _P)),
        ("is_host", _F(C.c_bool, _P)),
    ]


class BufferType(C.Structure):
    """struct ggml_backend_buffer_type."""

    _fields_ = [("iface", BufferTypeInterface), ("device", _P), ("context", _P)]


class BufferInterface(C.Structure):
    """struct ggml_backend_buffer_i."""

    _fields_ = [
        ("free_buffer", _F(None, _P)),
        ("get_base", _F(_P, _P)),
        ("init_tensor", _F(C.c_int, _P, _P)),
        ("memset_tensor", _F(None, _P, _P, C.c_uint8, C.c_size_t, C.c_size_t)),
        ("set_tensor", _F(None, _P, _P, _P, C.c_size_t, C.c_size_t)),
        ("get_tensor", _F(None, _P, _P, _P, C.c_size_t, C.c_size_t)),
        ("set_tensor_2d", _P),
        ("get_tensor_2d", _P),
        ("cpy_tensor", _F(C.c_bool, _P, _P, _P)),
        ("clear", _F(None, _P, C.c_uint8)),
        ("reset", _P),
    ]


class Buffer(C.Structure):
    """The beginning of struct ggml_backend_buffer."""

    _fields_ = [("iface", BufferInterface), ("buft", _P)]


class BackendInterface(C.Structure):
    """struct ggml_backend_i."""

    _fields_ = [
        ("get_name", _F(_P, _P)),
        ("free", _F(None, _P)),
        ("set_tensor_async", _P),
        ("get_tensor_async", _P),
        ("set_tensor_2d_async", _P),
        ("get_tensor_2d_async", _P),
        ("cpy_tensor_async", _P),
        ("synchronize", _P),
        ("graph_plan_create", _P),
        ("graph_plan_free", _P),
        ("graph_plan_update", _P),
        ("graph_plan_compute", _P),
        ("graph_compute", _F(C.c_int, _P, _P)),
        ("event_record", _P),
        ("event_wait", _P),
        ("graph_optimize", _P),
    ]


class Backend(C.Structure):
    """struct ggml_backend."""

    _fields_ = [("guid", _P), ("iface", BackendInterface), ("device", _P), ("context", _P)]


class DeviceCaps(C.Structure):
    """struct ggml_backend_dev_caps."""

    _fields_ = [
        ("async_", C.c_bool),
        ("host_buffer", C.c_bool),
        ("buffer_from_host_ptr", C.c_bool),
        ("events", C.c_bool),
        ("mmap_support", C.c_bool),
    ]


class DeviceProps(C.Structure):
    """struct ggml_backend_dev_props."""

    _fields_ = [
        ("name", C.c_char_p),
        ("description", C.c_char_p),
        ("memory_free", C.c_size_t),
        ("memory_total", C.c_size_t),
        ("type", C.c_int),
        ("device_id", C.c_char_p),
        ("caps", DeviceCaps),
    ]


class DeviceInterface(C.Structure):
    """struct ggml_backend_device_i."""

    _fields_ = [
        ("get_name", _F(_P, _P)),
        ("get_description", _F(_P, _P)),
        ("get_memory", _F(None, _P, C.POINTER(C.c_size_t), C.POINTER(C.c_size_t))),
        ("get_type", _F(C.c_int, _P)),
        ("get_props", _F(None, _P, C.POINTER(DeviceProps))),
        ("init_backend", _F(_P, _P, C.c_char_p)),
        ("get_buffer_type", _F(_P, _P)),
        ("get_host_buffer_type", _P),
        ("buffer_from_host_ptr", _P),
        ("supports_op", _F(C.c_bool, _P, _P)),
        ("supports_buft", _F(C.c_bool, _P, _P)),
        ("offload_op", _P),
        ("event_new", _P),
        ("event_free", _P),
        ("event_synchronize", _P),
    ]


class Device(C.Structure):
    """struct ggml_backend_device."""

    _fields_ = [("iface", DeviceInterface), ("reg", _P), ("context", _P)]


class RegInterface(C.Structure):
    """struct ggml_backend_reg_i."""

    _fields_ = [
        ("get_name", _F(_P, _P)),
        ("get_device_count", _F(C.c_size_t, _P)),
        ("get_device", _F(_P, _P, C.c_size_t)),
        ("get_proc_address", _F(_P, _P, C.c_char_p)),
    ]


class Reg(C.Structure):
    """struct ggml_backend_reg."""

    _fields_ = [("api_version", C.c_int), ("iface", RegInterface), ("context", _P)]


class InitParams(C.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", C.c_size_t), ("mem_buffer", _P), ("no_alloc", C.c_bool)]


class GgufInitParams(C.Structure):
    """struct gguf_init_params (gguf.h)."""

    _fields_ = [("no_alloc", C.c_bool), ("ctx", _P)]


class TensorBuftOverride(C.Structure):
    """struct llama_model_tensor_buft_override (llama.h): regex over tensor names -> buffer type."""

    _fields_ = [("pattern", C.c_char_p), ("buft", _P)]

"""All of ggml's and llama.cpp's C structures that localrun touches, in one place, checked against the library at first use.

llama-cpp-python binds llama.cpp's public API; what is here are the parts of ggml below it: tensors, graphs, and the *internal*
backend interface (`ggml/src/ggml-backend-impl.h`), which has no stability promise. So the library version is pinned and
`library()` refuses to hand out anything unless real objects made by the C code have the fields where we expect them.
Field order and sizes are those of the llama.cpp bundled with llama-cpp-python 0.3.36 (ggml 0.25.3).
"""

from __future__ import annotations

import ctypes as C
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from localrun.errors import IncompatibleLibraryError
from localrun.paths import how_to_reinstall

LLAMA_CPP_PYTHON_VERSION: Final = "0.3.36"
GGML_VERSION: Final = "0.25.3"
BACKEND_API_VERSION: Final = 2  # ggml-backend-impl.h, GGML_BACKEND_API_VERSION

# ggml.h, enum ggml_op (position in the enum) and enum ggml_glu_op
OP_NONE: Final = 0
OP_MUL_MAT: Final = 29
OP_MUL_MAT_ID: Final = 30
OP_RESHAPE: Final = 36
OP_VIEW: Final = 37
OP_PERMUTE: Final = 38
OP_TRANSPOSE: Final = 39
OP_GLU: Final = 100
GLU_SWIGLU: Final = 2
GLU_SWIGLU_CLAMP: Final = 6

TYPE_F32: Final = 0  # ggml.h, enum ggml_type
TYPE_I32: Final = 26

STATUS_FAILED: Final = -1  # ggml.h, enum ggml_status
STATUS_SUCCESS: Final = 0
STATUS_ABORTED: Final = 1

DEVICE_TYPE_CPU: Final = 0  # ggml-backend.h, enum ggml_backend_dev_type
DEVICE_TYPE_GPU: Final = 1
DEVICE_TYPE_IGPU: Final = 2
DEVICE_TYPE_ACCEL: Final = 3

BUFFER_USAGE_WEIGHTS: Final = 1  # ggml-backend.h, enum ggml_backend_buffer_usage

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


_PROTOTYPES: Final[dict[str, tuple[Any, ...]]] = {
    # function -> (result, *arguments)
    "ggml_version": (C.c_char_p,),
    "ggml_init": (_P, InitParams),
    "ggml_free": (None, _P),
    "ggml_tensor_overhead": (C.c_size_t,),
    "ggml_graph_overhead": (C.c_size_t,),
    "ggml_new_tensor_1d": (_P, _P, C.c_int, C.c_int64),
    "ggml_new_tensor_2d": (_P, _P, C.c_int, C.c_int64, C.c_int64),
    "ggml_new_tensor_3d": (_P, _P, C.c_int, C.c_int64, C.c_int64, C.c_int64),
    "ggml_set_name": (_P, _P, C.c_char_p),
    "ggml_nbytes": (C.c_size_t, _P),
    "ggml_op_name": (C.c_char_p, C.c_int),
    "ggml_glu_op_name": (C.c_char_p, C.c_int),
    "ggml_type_name": (C.c_char_p, C.c_int),
    "ggml_graph_n_nodes": (C.c_int, _P),
    "ggml_graph_node": (_P, _P, C.c_int),
    "ggml_backend_buffer_init": (_P, _P, BufferInterface, _P, C.c_size_t),
    "ggml_backend_buffer_get_type": (_P, _P),
    "ggml_backend_buft_name": (_P, _P),
    "ggml_backend_buft_is_host": (C.c_bool, _P),
    "ggml_backend_dev_name": (C.c_char_p, _P),
    "ggml_backend_dev_type": (C.c_int, _P),
    "ggml_backend_dev_get_props": (None, _P, C.POINTER(DeviceProps)),
    "ggml_backend_dev_backend_reg": (_P, _P),
    "ggml_backend_tensor_set": (None, _P, _P, C.c_size_t, C.c_size_t),
    "ggml_backend_tensor_get": (None, _P, _P, C.c_size_t, C.c_size_t),
    "gguf_init_from_buffer": (_P, _P, C.c_size_t, GgufInitParams),
    "gguf_free": (None, _P),
    "ggml_backend_cpu_buffer_type": (_P,),
    "ggml_backend_register": (None, _P),
    "ggml_backend_reg_count": (C.c_size_t,),
    "ggml_backend_reg_get": (_P, C.c_size_t),
    "ggml_backend_reg_name": (C.c_char_p, _P),
    "ggml_backend_load_all_from_path": (None, C.c_char_p),
    "ggml_backend_dev_count": (C.c_size_t,),
    "ggml_backend_dev_get": (_P, C.c_size_t),
    "ggml_backend_dev_by_type": (_P, C.c_int),
    # graphs of our own on GPU devices
    "ggml_mul_mat": (_P, _P, _P, _P),
    "ggml_mul_mat_id": (_P, _P, _P, _P, _P),
    "ggml_rms_norm": (_P, _P, _P, C.c_float),
    "ggml_swiglu_clamp": (_P, _P, _P, _P, C.c_float),
    "ggml_swiglu_split": (_P, _P, _P, _P),
    "ggml_set_input": (None, _P),
    "ggml_set_output": (None, _P),
    "ggml_new_graph_custom": (_P, _P, C.c_size_t, C.c_bool),
    "ggml_graph_overhead_custom": (C.c_size_t, C.c_size_t, C.c_bool),
    "ggml_build_forward_expand": (None, _P, _P),
    "ggml_gallocr_new": (_P, _P),
    "ggml_gallocr_free": (None, _P),
    "ggml_gallocr_reserve": (C.c_bool, _P, _P),
    "ggml_gallocr_alloc_graph": (C.c_bool, _P, _P),
    "ggml_gallocr_get_buffer_size": (C.c_size_t, _P, C.c_int),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, _P, _P),
    "ggml_backend_buffer_free": (None, _P),
    "ggml_backend_buffer_clear": (None, _P, C.c_uint8),
    "ggml_backend_buffer_get_size": (C.c_size_t, _P),
    "ggml_backend_buft_get_alloc_size": (C.c_size_t, _P, _P),
    "ggml_backend_dev_description": (C.c_char_p, _P),
    "ggml_backend_dev_memory": (None, _P, C.POINTER(C.c_size_t), C.POINTER(C.c_size_t)),
    "ggml_backend_dev_supports_op": (C.c_bool, _P, _P),
    "ggml_backend_dev_buffer_type": (_P, _P),
    "ggml_backend_dev_host_buffer_type": (_P, _P),
    "ggml_backend_buft_alloc_buffer": (_P, _P, C.c_size_t),
    "ggml_backend_buffer_get_base": (_P, _P),
    "ggml_backend_dev_init": (_P, _P, C.c_char_p),
    "ggml_backend_free": (None, _P),
    "ggml_backend_tensor_set_async": (None, _P, _P, _P, C.c_size_t, C.c_size_t),
    "ggml_backend_tensor_get_async": (None, _P, _P, _P, C.c_size_t, C.c_size_t),
    "ggml_backend_graph_compute_async": (C.c_int, _P, _P),
    "ggml_backend_synchronize": (None, _P),
    "ggml_backend_reg_by_name": (_P, C.c_char_p),
    "ggml_backend_reg_get_proc_address": (_P, _P, C.c_char_p),
}


class Library:
    """ggml's functions with their prototypes as attributes; made once by `library()`.

    They are looked up through the handle of libllama that llama_cpp holds: opening libggml by a path of our own could load a
    second copy of it (the wheel has several names for one library), with a registry of devices that llama.cpp never sees.
    """

    def __init__(self, handle: C.CDLL) -> None:
        self.handle = handle
        for name, (result, *arguments) in _PROTOTYPES.items():
            function = getattr(handle, name, None)
            if function is None:
                raise _misfit(f"{name} is missing")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"no prototype for {name} in localrun.ggml.library")


@functools.cache
def library() -> Library:
    """Loads ggml and checks that our structures fit it.

    Raises:
        IncompatibleLibraryError: another version, or a field is not where we expect it.
    """
    import llama_cpp

    if llama_cpp.__version__ != LLAMA_CPP_PYTHON_VERSION:
        raise _misfit(f"llama-cpp-python is {llama_cpp.__version__}, not {LLAMA_CPP_PYTHON_VERSION}")
    lib = Library(llama_cpp.llama_cpp._lib)
    _load_backends(lib, Path(llama_cpp.__file__).parent / "lib")
    _check_fit(lib)
    return lib


def _load_backends(lib: Library, folder: Path) -> None:
    """Loads the modules of a portable build: RPC, and the variant of the CPU backend that fits this processor best.

    Has to come before `llama_backend_init`, which otherwise looks for modules in the *current folder*: a program would come from
    wherever the user happens to stand, a USB stick with models for instance. A native build has its backends linked in.
    """
    if lib.ggml_backend_reg_count():
        return
    from localrun.ggml import log as llama_log

    llama_log.install()
    lib.ggml_backend_load_all_from_path(os.fsencode(folder))
    if not lib.ggml_backend_dev_by_type(DEVICE_TYPE_CPU):
        raise _misfit(f"{folder}: no CPU backend that this processor can run")


def _misfit(what: str) -> IncompatibleLibraryError:
    return IncompatibleLibraryError(
        f"the installed llama.cpp does not fit localrun: {what}",
        hint=f"install exactly llama-cpp-python=={LLAMA_CPP_PYTHON_VERSION}: {how_to_reinstall()}",
    )


def _check_fit(lib: Library) -> None:
    version = lib.ggml_version().decode()
    if version != GGML_VERSION:
        raise _misfit(f"ggml is {version}, not {GGML_VERSION}")
    operations = {
        OP_MUL_MAT: b"MUL_MAT",
        OP_MUL_MAT_ID: b"MUL_MAT_ID",
        OP_RESHAPE: b"RESHAPE",
        OP_VIEW: b"VIEW",
        OP_PERMUTE: b"PERMUTE",
        OP_TRANSPOSE: b"TRANSPOSE",
        OP_GLU: b"GLU",
    }
    for op, expected in operations.items():
        if lib.ggml_op_name(op) != expected:
            raise _misfit(f"operation {op} is {lib.ggml_op_name(op)!r}, not {expected!r}")
    if lib.ggml_glu_op_name(GLU_SWIGLU) != b"SWIGLU" or lib.ggml_glu_op_name(GLU_SWIGLU_CLAMP) != b"SWIGLU_CLAMP":
        raise _misfit("the numbers of the gated activations differ")
    _check_tensor(lib)
    _check_backend(lib)


def _check_tensor(lib: Library) -> None:
    object_bytes = 32  # sizeof(struct ggml_object), ggml.c
    if lib.ggml_tensor_overhead() != C.sizeof(Tensor) + object_bytes:
        raise _misfit(f"a tensor has {lib.ggml_tensor_overhead() - object_bytes} bytes, not {C.sizeof(Tensor)}")
    ctx = lib.ggml_init(InitParams(4096, None, True))
    try:
        address = lib.ggml_new_tensor_3d(ctx, TYPE_I32, 3, 5, 7)
        lib.ggml_set_name(address, b"fit")
        tensor = Tensor.from_address(address)
        found = (tensor.type, tuple(tensor.ne), tuple(tensor.nb), tensor.op, tensor.data, tensor.name)
        expected = (TYPE_I32, (3, 5, 7, 1), (4, 12, 60, 420), OP_NONE, None, b"fit")
        if found != expected:
            raise _misfit(f"a fresh tensor reads {found}, not {expected}")
    finally:
        lib.ggml_free(ctx)


def _check_backend(lib: Library) -> None:
    device_address = lib.ggml_backend_dev_by_type(DEVICE_TYPE_CPU)
    reg_address = lib.ggml_backend_dev_backend_reg(device_address)
    reg = Reg.from_address(reg_address)
    if reg.api_version != BACKEND_API_VERSION:
        raise _misfit(f"backend interface version {reg.api_version}, not {BACKEND_API_VERSION}")
    device = Device.from_address(device_address)
    if reg.iface.get_device(reg_address, 0) != device_address or device.reg != reg_address:
        raise _misfit("the CPU device is not where its backend says")
    if device.iface.get_type(device_address) != DEVICE_TYPE_CPU:
        raise _misfit("the CPU device's structure differs")
    buft_address = lib.ggml_backend_cpu_buffer_type()
    buft = BufferType.from_address(buft_address)
    # The CPU buffer type's device is null (a FIXME in ggml-backend.cpp); the name shows that the interface lies where we think.
    if buft.device not in (None, device_address) or buft.iface.get_name(buft_address) != lib.ggml_backend_buft_name(
        buft_address
    ):
        raise _misfit("the CPU buffer type's structure differs")
    if not device.iface.supports_buft(device_address, buft_address) or not buft.iface.is_host(buft_address):
        raise _misfit("the CPU device answers wrongly through our structures")

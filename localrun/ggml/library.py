"""ggml's functions with their prototypes, looked up once per process after checking the library's version.

Two views of one library: `base()` is libggml-base alone: number formats and arithmetic on them, loaded in milliseconds.
`library()` is the whole library, through the libllama handle of llama-cpp-python. Before it returns anything, it checks three
things: the version, that `structures` matches objects created by the C code, and that `base()` and libllama share one copy of
ggml. Opening libggml by path could load a second copy (the wheel has several names for each library), with tables
and a registry of devices that llama.cpp never sees.
"""

from __future__ import annotations

import ctypes as C
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from localrun.errors import IncompatibleLibraryError
from localrun.ggml.structures import (
    BACKEND_API_VERSION,
    DEVICE_TYPE_CPU,
    GGML_VERSION,
    GLU_SWIGLU,
    GLU_SWIGLU_CLAMP,
    LLAMA_CPP_PYTHON_VERSION,
    OP_ADD,
    OP_ARGSORT,
    OP_CLAMP,
    OP_CONCAT,
    OP_CONT,
    OP_DIV,
    OP_DSV4_HC_COMB,
    OP_DSV4_HC_POST,
    OP_DSV4_HC_PRE,
    OP_FILL,
    OP_FLASH_ATTN_EXT,
    OP_GET_ROWS,
    OP_GLU,
    OP_LIGHTNING_INDEXER,
    OP_MUL,
    OP_MUL_MAT,
    OP_MUL_MAT_ID,
    OP_NONE,
    OP_PERMUTE,
    OP_REPEAT,
    OP_RESHAPE,
    OP_RMS_NORM,
    OP_ROPE,
    OP_ROPE_BACK,
    OP_SCALE,
    OP_SET_ROWS,
    OP_SOFT_MAX,
    OP_SQRT,
    OP_SUM_ROWS,
    OP_TOP_K,
    OP_TRANSPOSE,
    OP_UNARY,
    OP_VIEW,
    TYPE_I32,
    UNARY_SIGMOID,
    UNARY_SOFTPLUS,
    BufferInterface,
    BufferType,
    Device,
    DeviceProps,
    GgufInitParams,
    InitParams,
    Reg,
    Tensor,
    TypeTraits,
)
from localrun.paths import how_to_reinstall

_P = C.c_void_p
_Prototypes = Mapping[str, tuple[Any, ...]]
"""function -> (result, *arguments)."""

_BASE: Final[_Prototypes] = {
    "ggml_version": (C.c_char_p,),
    "ggml_get_type_traits": (C.POINTER(TypeTraits), C.c_int),
    "ggml_quantize_init": (None, C.c_int),
    "ggml_quantize_requires_imatrix": (C.c_bool, C.c_int),
    "ggml_quantize_chunk": (C.c_size_t, C.c_int, _P, _P, C.c_int64, C.c_int64, C.c_int64, _P),
}

_ALL: Final[_Prototypes] = {
    **_BASE,
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
    "ggml_unary_op_name": (C.c_char_p, C.c_int),
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
    "ggml_add": (_P, _P, _P, _P),
    "ggml_mul": (_P, _P, _P, _P),
    "ggml_get_rows": (_P, _P, _P, _P),
    "ggml_reshape_3d": (_P, _P, _P, C.c_int64, C.c_int64, C.c_int64),
    "ggml_view_2d": (_P, _P, _P, C.c_int64, C.c_int64, C.c_size_t, C.c_size_t),
    "ggml_backend_tensor_alloc": (C.c_int, _P, _P, _P),
    "ggml_mul_mat": (_P, _P, _P, _P),
    "ggml_mul_mat_id": (_P, _P, _P, _P, _P),
    "ggml_prec_set_src": (C.c_bool, _P, C.c_int, C.c_int),
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
    """ggml's functions as attributes; made once by `base()` and once by `library()`."""

    def __init__(self, handle: C.CDLL, prototypes: _Prototypes) -> None:
        self.handle = handle
        for name, (result, *arguments) in prototypes.items():
            # An object of our own for each function: those of the handle belong to llama-cpp-python, with its prototypes.
            try:
                function = handle[name]
            except AttributeError:
                raise _misfit(f"{name} is missing") from None
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        version = self.ggml_version().decode()
        if version != GGML_VERSION:
            raise _misfit(f"ggml is {version}, not {GGML_VERSION}")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"no prototype for {name} in localrun.ggml.library")


@functools.cache
def base() -> Library:
    """libggml-base alone: enough for `types`, without llama.cpp's model library and without its Python package.

    Raises:
        IncompatibleLibraryError: not installed, or another version.
    """
    folder = _folder()
    names = sorted(name for name in os.listdir(folder) if name.startswith("libggml-base.")) if folder.is_dir() else []
    if not names:
        raise _misfit(f"{folder}: no libggml-base")
    # libllama requests one of several versioned names; the loader then finds that this one is already loaded.
    numbered = [name for name in names if name.rpartition(".so.")[2].isdecimal()]
    return Library(C.CDLL(str(folder / (numbered or names)[0])), _BASE)


@functools.cache
def library() -> Library:
    """Loads ggml and llama.cpp and checks that our structures match them.

    Raises:
        IncompatibleLibraryError: another version, two copies of ggml, or a field is not where we expect it.
    """
    import llama_cpp

    if llama_cpp.__version__ != LLAMA_CPP_PYTHON_VERSION:
        raise _misfit(f"llama-cpp-python is {llama_cpp.__version__}, not {LLAMA_CPP_PYTHON_VERSION}")
    lib = Library(llama_cpp.llama_cpp._lib, _ALL)
    if _address(lib.ggml_quantize_chunk) != _address(base().ggml_quantize_chunk):
        raise _misfit("libllama uses another copy of ggml than the one beside it")
    _load_backends(lib, _folder())
    _check_fit(lib)
    return lib


def _folder() -> Path:
    """Where llama-cpp-python keeps its libraries; found without importing it, which would load libllama."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise _misfit("llama-cpp-python is not installed")
    return Path(spec.origin).parent / "lib"


def _address(function: Callable[..., Any]) -> int | None:
    return C.cast(function, _P).value  # type: ignore[arg-type]


def _load_backends(lib: Library, folder: Path) -> None:
    """Loads the modules of a portable build: RPC, and the variant of the CPU backend that fits this processor best.

    Must be called before `llama_backend_init`, which would otherwise search the *current folder* for modules and so execute
    code from, say, a USB stick with models. A native build has its backends linked in.
    """
    if lib.ggml_backend_reg_count():
        return
    from localrun.ggml import log as llama_log

    llama_log.install()
    lib.ggml_backend_load_all_from_path(os.fsencode(folder))
    if not lib.ggml_backend_dev_by_type(DEVICE_TYPE_CPU):
        raise _misfit(f"{folder}: no CPU backend for this processor")


def _misfit(what: str) -> IncompatibleLibraryError:
    return IncompatibleLibraryError(
        f"the installed llama.cpp does not match localrun: {what}",
        hint=f"install exactly llama-cpp-python=={LLAMA_CPP_PYTHON_VERSION}: {how_to_reinstall()}",
    )


def _check_fit(lib: Library) -> None:
    operations = {
        OP_ADD: b"ADD",
        OP_MUL: b"MUL",
        OP_DIV: b"DIV",
        OP_SQRT: b"SQRT",
        OP_SUM_ROWS: b"SUM_ROWS",
        OP_REPEAT: b"REPEAT",
        OP_CONCAT: b"CONCAT",
        OP_RMS_NORM: b"RMS_NORM",
        OP_MUL_MAT: b"MUL_MAT",
        OP_MUL_MAT_ID: b"MUL_MAT_ID",
        OP_SCALE: b"SCALE",
        OP_CONT: b"CONT",
        OP_RESHAPE: b"RESHAPE",
        OP_VIEW: b"VIEW",
        OP_PERMUTE: b"PERMUTE",
        OP_TRANSPOSE: b"TRANSPOSE",
        OP_GET_ROWS: b"GET_ROWS",
        OP_SET_ROWS: b"SET_ROWS",
        OP_SOFT_MAX: b"SOFT_MAX",
        OP_ROPE: b"ROPE",
        OP_ROPE_BACK: b"ROPE_BACK",
        OP_CLAMP: b"CLAMP",
        OP_ARGSORT: b"ARGSORT",
        OP_TOP_K: b"TOP_K",
        OP_FILL: b"FILL",
        OP_FLASH_ATTN_EXT: b"FLASH_ATTN_EXT",
        OP_LIGHTNING_INDEXER: b"LIGHTNING_INDEXER",
        OP_DSV4_HC_COMB: b"DSV4_HC_COMB",
        OP_DSV4_HC_PRE: b"DSV4_HC_PRE",
        OP_DSV4_HC_POST: b"DSV4_HC_POST",
        OP_UNARY: b"UNARY",
        OP_GLU: b"GLU",
    }
    for op, expected in operations.items():
        if lib.ggml_op_name(op) != expected:
            raise _misfit(f"operation {op} is {lib.ggml_op_name(op)!r}, not {expected!r}")
    if lib.ggml_glu_op_name(GLU_SWIGLU) != b"SWIGLU" or lib.ggml_glu_op_name(GLU_SWIGLU_CLAMP) != b"SWIGLU_CLAMP":
        raise _misfit("the numbers of the gated activations differ")
    if lib.ggml_unary_op_name(UNARY_SIGMOID) != b"SIGMOID" or lib.ggml_unary_op_name(UNARY_SOFTPLUS) != b"SOFTPLUS":
        raise _misfit("the numbers of the activations differ")
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
    # The CPU buffer type's device is null (a FIXME in ggml-backend.cpp); the name shows that the interface is where we expect it.
    if buft.device not in (None, device_address) or buft.iface.get_name(buft_address) != lib.ggml_backend_buft_name(
        buft_address
    ):
        raise _misfit("the CPU buffer type's structure differs")
    if not device.iface.supports_buft(device_address, buft_address) or not buft.iface.is_host(buft_address):
        raise _misfit("the CPU device answers wrongly through our structures")

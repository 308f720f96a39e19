"""Stock llama.cpp as a witness: does it take our bytes?"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from localrun.engine.measure.stock import without_gpus
from localrun.ggml import log as llama_log


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def ggml_base() -> Any:
    """libggml-base of the installed llama-cpp-python with the GGUF functions that tests call."""
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    key = [ctypes.c_void_p, ctypes.c_int64]
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "gguf_init_from_buffer": (ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_size_t, _InitParams]),
        "gguf_free": (None, [ctypes.c_void_p]),
        "gguf_get_n_kv": (ctypes.c_int64, [ctypes.c_void_p]),
        "gguf_get_key": (ctypes.c_char_p, key),
        "gguf_get_kv_type": (ctypes.c_int, key),
        "gguf_get_arr_type": (ctypes.c_int, key),
        "gguf_get_arr_n": (ctypes.c_size_t, key),
        "gguf_get_n_tensors": (ctypes.c_int64, [ctypes.c_void_p]),
        "gguf_get_tensor_name": (ctypes.c_char_p, key),
        "gguf_get_tensor_type": (ctypes.c_int, key),
        "gguf_get_tensor_offset": (ctypes.c_size_t, key),
        "gguf_get_alignment": (ctypes.c_size_t, [ctypes.c_void_p]),
        "gguf_get_data_offset": (ctypes.c_size_t, [ctypes.c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@contextmanager
def gguf_context(header: bytes) -> Iterator[tuple[Any, Any]]:
    """llama.cpp's own view of a header: (library, context); fails if it refuses."""
    library = ggml_base()
    context = library.gguf_init_from_buffer(header, len(header), _InitParams(True, None))
    assert context, "llama.cpp refuses the header"
    try:
        yield library, context
    finally:
        library.gguf_free(context)


@contextmanager
def stock_model(path: Path) -> Iterator[Any]:
    """A GGUF loaded by llama.cpp alone, in its plain buffers: repacked and AMX ones exist on some processors only, round otherwise,
    can't hold a three-dimensional attn_output_a, and need rights that containers may lack."""
    llama_log.install()  # one log callback for the whole process: llama.cpp keeps the pointer
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    without_gpus(params)  # tests of GPUs leave dead ones behind
    params.use_mmap = False
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp refuses {path}"
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def decode_whole(model: Any, tokens: Sequence[int], *, kv_type: str = "f32") -> npt.NDArray[np.float32]:
    """Logits (T, n_vocab) of a fresh context, all tokens in one batch, on one thread."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = -(-len(tokens) // 256) * 256
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = {"f32": 0, "f16": 1, "q8_0": 8}[kv_type]
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, "llama.cpp makes no context"
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        code = llama_cpp.llama_decode(context, batch)
        assert code == 0, f"llama_decode: {code}"
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        rows = llama_cpp.llama_get_logits(context)
        return np.ctypeslib.as_array(rows, (len(tokens), n_vocab)).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)


def stock_logits(path: Path, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits after `tokens`, by llama.cpp alone: (n_vocab,)."""
    with stock_model(path) as model:
        return decode_whole(model, tokens, kv_type="f16")[-1]

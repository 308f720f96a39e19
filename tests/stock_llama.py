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

from localrun.ggml import log as llama_log
from localrun.ggml.devices import without_gpus


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


def stock_logits(path: Path, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits after `tokens`, by llama.cpp alone: (n_vocab,)."""
    llama_log.install()
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    without_gpus(params)  # tests of GPUs leave dead ones behind
    # Repacked and AMX buffers can't hold a three-dimensional attn_output_a and need rights that containers may lack.
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, "llama.cpp can't load the model"
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_threads = 256, 64, 1
    context = llama_cpp.llama_init_from_model(model, options)
    try:
        batch = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(batch, len(tokens))) == 0
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (n_vocab,))
        return np.array(logits, dtype=np.float32)
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)

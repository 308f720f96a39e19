"""A GGUF loaded by stock llama.cpp, experts in its memory: the reference for comparisons."""

from __future__ import annotations

import ctypes as C
from pathlib import Path
from typing import Any

import llama_cpp as L
import xxhash

from localrun.engine.engine import Engine
from localrun.engine.options import EngineOptions
from localrun.errors import FormatError, LocalrunError
from localrun.ggml import log as llama_log
from localrun.ggml.library import library
from localrun.ggml.structures import DEVICE_TYPE_CPU, TensorBuftOverride

ALL_LAYERS = 999

_NO_DEVICES = (C.c_void_p * 1)(None)


def without_gpus(params: Any) -> None:
    """Makes `llama_model_params` use no GPU, regardless of the build and any added servers."""
    params.n_gpu_layers = 0
    params.devices = C.cast(_NO_DEVICES, C.c_void_p)


class StockModel:
    """Owns the model until `close`. A `LoadedModel` for `Engine`.

    Args:
        repacking: `none`, weights as the file has them; `default`, llama.cpp's own choice (AMX included); `experts`, only
            those.
        gpu: ggml's device that gets everything but the experts; None: all is on the CPU.
        n_gpu_layers: how many of llama.cpp's layers it gets.

    Raises:
        FormatError: llama.cpp can't load the file.
    """

    def __init__(
        self, path: Path, repacking: str = "none", *, gpu: int | None = None, n_gpu_layers: int = ALL_LAYERS
    ) -> None:
        llama_log.install()
        library()  # loads the backends of a portable build
        L.llama_backend_init()
        params = L.llama_model_default_params()
        without_gpus(params)
        params.use_extra_bufts = repacking == "default"
        overrides = (TensorBuftOverride * 2)()  # the last one, empty, ends the list
        devices = (C.c_void_p * 2)(gpu, None)
        if gpu is not None:
            params.n_gpu_layers, params.devices = n_gpu_layers, C.cast(devices, C.c_void_p)
        if repacking == "experts" or gpu is not None:
            overrides[0].pattern = rb"blk\.\d+\.ffn_(gate|up|down)_exps"
            overrides[0].buft = _repack_buffer_type() if repacking == "experts" else _cpu_buffer_type()
            params.tensor_buft_overrides = C.cast(overrides, C.c_void_p)
        llama_log.clear()
        self.model: Any = L.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise FormatError(f"{path}: llama.cpp can't load it: {llama_log.recent_errors()}")

    def take_error(self) -> BaseException | None:
        """None: our device was not involved."""
        return None

    def request_stop(self) -> None:
        """Nothing to do: the context's own flag is enough."""

    def clear_stop(self) -> None:
        """See `request_stop`."""

    def close(self) -> None:
        """Frees the model; contexts are freed before."""
        if self.model:
            L.llama_model_free(self.model)
            self.model = None


def open_stock(
    path: Path,
    options: EngineOptions,
    repacking: str = "none",
    *,
    gpu: int | None = None,
    n_gpu_layers: int = ALL_LAYERS,
) -> Engine:
    """An engine on `StockModel`."""
    size = path.stat().st_size
    identity = xxhash.xxh3_128_hexdigest(f"stock {path.resolve()} {size}".encode())
    stock = StockModel(path, repacking, gpu=gpu, n_gpu_layers=n_gpu_layers)
    try:
        return Engine(stock, options, path=path, identity=identity, file_bytes=size)
    except BaseException:
        stock.close()
        raise


def best_repacking(file_bytes: int, available_bytes: int | None) -> str:
    """llama.cpp's fastest setup: experts repacked if file (in the page cache) and copy fit in RAM, else mapped.

    llama.cpp's default crashes when an AMX build runs on a machine that does not permit AMX.
    """
    return "experts" if available_bytes is not None and 2 * file_bytes < available_bytes else "none"


def _cpu_buffer_type() -> int:
    lib = library()
    return int(lib.ggml_backend_dev_buffer_type(lib.ggml_backend_dev_by_type(DEVICE_TYPE_CPU)))


def _repack_buffer_type() -> int:
    """llama.cpp's CPU_REPACK, by the public way: the CPU backend's list of extra buffer types (ggml-backend.h)."""
    lib = library()
    device = lib.ggml_backend_dev_by_type(DEVICE_TYPE_CPU)
    registry = lib.ggml_backend_dev_backend_reg(device)
    entry = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if entry:
        for buffer_type in C.CFUNCTYPE(C.POINTER(C.c_void_p), C.c_void_p)(entry)(device):
            if not buffer_type:
                break
            if C.string_at(lib.ggml_backend_buft_name(buffer_type)) == b"CPU_REPACK":
                return int(buffer_type)
    raise LocalrunError("this llama.cpp has no CPU_REPACK buffer type")

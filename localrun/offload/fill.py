"""Loads a model's dense part into llama.cpp; our device takes the expert tensors, without data.

llama.cpp gets metadata and a callback that takes note of its tensors one by one (`llama_model_init_from_user`); dense ones are
read afterwards, several at a time (`dense_reads.py`). Expert tensors are placed in our device's weights buffer, which holds no
data. This entry point does not check shapes against the file and creates optional tensors that the model lacks, so both are
handled here.
"""

from __future__ import annotations

import ctypes as C
import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from localrun.errors import BudgetError, FormatError, GpuMemoryError, LocalrunError, UnsupportedModelError
from localrun.ggml import log as llama_log
from localrun.ggml import structures as ggml
from localrun.ggml.library import library
from localrun.ggml.structures import Tensor
from localrun.offload.dense import DenseMatrices, dense_pattern, dense_tensors
from localrun.offload.dense_reads import Bytes, Keeper, WantedTensor, read_dense
from localrun.offload.device.device import EXPERT_TENSORS, Weight, expert_device
from localrun.offload.setup import OffloadOptions
from localrun.pages import ask_for_huge_pages
from localrun.quant.checkpoint.source import CheckpointSource
from localrun.quant.model.shape import shape_of
from localrun.quant.model.source import PROJECTIONS, ModelSource
from localrun.units import format_size

_CHECKED_BYTES = 1 << 20
"""Tensors from this size on are looked at before they are read."""

Adopt = Callable[[int, Weight], None]
"""Called with the address of each stacked expert tensor created by llama.cpp, and its description."""

InMemory = Callable[[str, int], None]
"""Called with a filled tensor's name and the address of its bytes, which stay there until the model is freed."""


def fill_model(
    source: ModelSource, options: OffloadOptions, adopt: Adopt, dense: DenseMatrices, in_memory: InMemory
) -> Any:
    """llama.cpp's `llama_model *` with all dense tensors read; the caller frees it.

    Args:
        adopt: receives the expert tensors.
        dense: receives the matrices that our device multiplies.
        in_memory: receives name and address of tensors that llama.cpp keeps in CPU memory.

    Raises:
        FormatError, UnsupportedModelError: llama.cpp does not accept the model.
        GpuMemoryError: it does not accept it with the dense model on a GPU, as `options.n_gpu_layers` asks.
        BudgetError: other programs take the memory meanwhile.
        StoreError: a file can't be read.
    """
    import llama_cpp

    lib = library()
    llama_cpp.llama_backend_init()
    header = source.gguf_header()
    metadata = lib.gguf_init_from_buffer(header, len(header), ggml.GgufInitParams(True, None))
    if not metadata:
        raise FormatError(f"{source.path}: llama.cpp does not accept the metadata: {llama_log.recent_errors()}")
    filler = _Filler(source, options, adopt, dense, in_memory)
    overrides = _overrides(source, options)
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = options.n_gpu_layers
    params.use_extra_bufts = False
    # The dense model goes to one device: the first one chosen. An empty list means none, whatever llama.cpp was built for.
    devices = (C.c_void_p * 2)(options.gpus[0][0].address if options.n_gpu_layers else None, None)
    params.devices = C.cast(devices, C.c_void_p)
    params.tensor_buft_overrides = C.cast(overrides, C.c_void_p)
    callback = llama_cpp.llama_model_set_tensor_data_t(filler)
    llama_log.clear()
    expert_device().take_error()  # of something else
    try:
        model = llama_cpp.llama_model_init_from_user(metadata, callback, None, params)
    finally:
        lib.gguf_free(metadata)
    error = filler.error or expert_device().take_error()
    if error is not None:
        if model:
            llama_cpp.llama_model_free(model)
        raise error
    if not model:
        raise _refusal(source, options)
    try:
        if unused := filler.unused():
            raise UnsupportedModelError(
                f"{source.path}: llama.cpp has no use for {len(unused)} of its tensors, such as {unused[0]}; ignoring"
                " them would make its answers wrong",
                hint="the file has a different architecture than it says, or is newer than this program",
            )
        filler.read()
    except BaseException:
        llama_cpp.llama_model_free(model)
        raise
    return model


def free_model(model: Any) -> None:
    """The inverse of `fill_model`; contexts of the model must be gone."""
    import llama_cpp

    llama_cpp.llama_model_free(model)


def _overrides(source: ModelSource, options: OffloadOptions) -> C.Array[Any]:
    """Which tensors go to our buffer type: experts, and dense matrices where no GPU takes them."""
    patterns = [EXPERT_TENSORS]
    first = first_gpu_layer(options.n_gpu_layers, shape_of(source).n_layers)
    if options.dense_on_device and options.math == "int8" and first > 0:
        tensors = dense_tensors(source)
        if options.n_gpu_layers:
            tensors = {name: info for name, info in tensors.items() if 0 <= _layer_of(name) < first}
        patterns += filter(None, [dense_pattern(tensors)])
    overrides = (ggml.TensorBuftOverride * (len(patterns) + 1))()  # the last one, empty, ends the list
    for override, pattern in zip(overrides, patterns, strict=False):
        override.pattern, override.buft = pattern.encode(), expert_device().weights_buffer_type
    return overrides


def first_gpu_layer(n_gpu_layers: int, n_layers: int) -> int:
    """Of llama.cpp's layers, which one is the first on the GPU; `n_layers`: none. The output head counts as the last one, and goes
    there first (llama-model.cpp, `i_gpu_start`)."""
    return min(n_layers, max(0, n_layers + 1 - n_gpu_layers))


def _layer_of(name: str) -> int:
    """`blk.3.attn_q_a.weight` -> 3; -1 for what belongs to no layer."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else -1


def _refusal(source: ModelSource, options: OffloadOptions) -> LocalrunError:
    if options.n_gpu_layers:
        return GpuMemoryError(
            f"{options.gpus[0][0].name} can't hold the dense model: {llama_log.recent_errors()}", hint="--gpu none"
        )
    return UnsupportedModelError(f"{source.path}: llama.cpp can't load this model: {llama_log.recent_errors()}")


class _Filler:
    """llama.cpp's callback: notes where each tensor that it created goes; `read` then fills them, in an order that suits the drive.

    Errors of the callback are kept; after the first one nothing more is looked at.
    """

    def __init__(
        self,
        source: ModelSource,
        options: OffloadOptions,
        adopt: Adopt,
        dense: DenseMatrices,
        in_memory: InMemory,
    ) -> None:
        self._source, self._options, self._adopt, self._dense = source, options, adopt, dense
        self._in_memory = in_memory
        self._lib = library()
        self._n_dense = sum("_exps" not in name for name in source.tensors)
        self._n_admitted = 0
        self._wanted: list[WantedTensor] = []
        self._one_at_a_time = threading.Lock()
        self._asked: set[str] = set()
        self._seen: set[int] = set()
        self.error: BaseException | None = None

    def __call__(self, address: int, user_data: Any) -> None:
        if self.error is not None:
            return
        try:
            self._fill(address)
        except BaseException as error:  # a callback from C: ctypes would swallow it
            self.error = error

    def _fill(self, address: int) -> None:
        tensor = Tensor.from_address(address)
        name = tensor.name.decode()
        self._asked.add(name)
        info = self._source.tensors.get(name)
        if info is None:
            self._fill_optional(address, name)
            return
        shape = tuple(tensor.ne)
        # wo_a is stored as two dimensions and created as three (deepseek4.cpp): rows and elements must agree.
        if shape[0] != info.shape[0] or math.prod(shape) != math.prod(info.shape) or tensor.type != info.type:
            raise FormatError(
                f"{self._source.path}: {name} is {info.type.name} {list(info.shape)}, llama.cpp expects "
                f"{GGMLQuantizationType(tensor.type).name} {list(shape)}",
                hint="the file contradicts its own metadata; convert it again",
            )
        weight = expert_weight(name)
        if weight is not None and expert_device().is_ours(address):
            self._adopt(address, weight)
            return
        if expert_device().is_ours(address):
            placed = self._dense.place(info.type, shape, name)
            expert_device().attach(address, placed.record)
            self._wanted.append(WantedTensor(name, info.n_bytes, placed.put, placed.takes_slices))
            return
        self._check_size(address, name, info.n_bytes)
        is_host = bool(tensor.data) and self._lib.ggml_backend_buft_is_host(
            self._lib.ggml_backend_buffer_get_type(tensor.buffer)
        )
        put = partial(self._put_in_memory if is_host else self._put_on_device, address)
        self._wanted.append(WantedTensor(name, info.n_bytes, put))
        if is_host:
            self._see(tensor.buffer)
            self._in_memory(name, tensor.data)

    def _see(self, buffer: int) -> None:
        """llama.cpp's memory, before its first tensor is filled: in small pages, a seventh of DeepSeek-V4-Flash's dense bytes would
        take one fault each 4 KiB."""
        if buffer not in self._seen:
            self._seen.add(buffer)
            base, size = self._lib.ggml_backend_buffer_get_base(buffer), self._lib.ggml_backend_buffer_get_size(buffer)
            ask_for_huge_pages(base, size)

    def read(self) -> None:
        """Fills what the callback noted.

        Raises:
            As `fill_model`.
        """
        source, cache, note = self._source, self._options.dense_cache, self._options.note
        if cache is None or not isinstance(source, CheckpointSource):
            self._read()
            return
        copy = cache.find(source)
        if copy is not None:
            with copy:
                is_whole = self._read(copy=copy.source)
            if not is_whole:
                copy.discard()
            return
        keeper = cache.keep(source)
        if keeper is None:
            self._read()
            return
        if note is not None:
            note(keeper.text)
        try:
            self._read(keeper=keeper)
        finally:
            keeper.close()

    def _read(self, copy: ModelSource | None = None, keeper: Keeper | None = None) -> bool:
        progress = self._options.progress
        return read_dense(
            self._source,
            self._wanted,
            admit=self._admit,
            progress=lambda done: progress(done, self._n_dense) if progress is not None else None,
            copy=copy,
            keeper=keeper,
        )

    def _put_in_memory(self, address: int, begin: int, data: Bytes) -> None:
        self._lib.ggml_backend_tensor_set(address, data.ctypes.data, begin, data.nbytes)

    def _put_on_device(self, address: int, begin: int, data: Bytes) -> None:
        with self._one_at_a_time:  # backends need not allow several threads
            self._lib.ggml_backend_tensor_set(address, data.ctypes.data, begin, data.nbytes)

    def _admit(self, wanted: WantedTensor) -> None:
        self._check_memory(wanted.n_bytes)
        self._n_admitted += 1

    def _check_memory(self, n_bytes: int) -> None:
        """Refuses to read a tensor for which there is no RAM any more: the kernel would kill this process, or another one."""
        if self._options.available is None or n_bytes < _CHECKED_BYTES:
            return
        available = self._options.available()
        # Others are being read: room for one more.
        if available is not None and available < 2 * n_bytes + self._options.reserve_bytes // 4:
            raise BudgetError(
                f"other programs have taken memory while {self._source.path.name} was loading: {self._n_admitted} of "
                f"{self._n_dense} dense tensors were read, {format_size(available)} of RAM are left",
                hint="close other programs, then try again",
            )

    def unused(self) -> list[str]:
        """Tensors of the model that llama.cpp did not create. A tied output matrix is shown to all, and some need none."""
        return sorted(self._source.tensors.keys() - self._asked - {"output.weight"})

    def _set(self, address: int, name: str, data: np.ndarray[Any, Any]) -> None:
        self._check_size(address, name, data.nbytes)
        self._lib.ggml_backend_tensor_set(address, data.ctypes.data, 0, data.nbytes)

    def _check_size(self, address: int, name: str, n_bytes: int) -> None:
        expected = self._lib.ggml_nbytes(address)
        if n_bytes != expected:
            raise FormatError(f"{self._source.path}: {name} has {n_bytes} bytes, llama.cpp expects {expected}")

    def _fill_optional(self, address: int, name: str) -> None:
        """Tensors that `llama_model_init_from_user` creates although the model has none: neutral values."""
        tensor = Tensor.from_address(address)
        n = math.prod(tensor.ne)
        if name == "output.weight" and "token_embd.weight" in self._source.tensors:
            self._set(address, name, self._tied_output(tensor))
        elif tensor.type == ggml.TYPE_F32 and name.endswith(("scale", "bias")):
            self._set(address, name, np.full(n, 1.0 if name.endswith("scale") else 0.0, np.float32))
        else:
            raise FormatError(
                f"{self._source.path}: tensor {name} {list(tensor.ne)} is missing", hint="convert or download it again"
            )

    def _tied_output(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        """A model without output.weight uses its token embeddings; llama.cpp created the tensor as F32."""
        import gguf

        info = self._source.tensors["token_embd.weight"]
        raw = self._source.read_tensor("token_embd.weight")
        rows = gguf.dequantize(raw.reshape(info.shape[1], -1), info.type)
        if tensor.type != ggml.TYPE_F32 or rows.shape != (tensor.ne[1], tensor.ne[0]):
            raise LocalrunError(
                f"{self._source.path}: output.weight is missing and can't be derived from token_embd.weight"
            )
        return np.ascontiguousarray(rows, np.float32)


def expert_weight(name: str) -> Weight | None:
    """`blk.3.ffn_up_exps.weight` -> Weight(3, 1); None for other tensors."""
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[3] != "weight" or not parts[2].endswith("_exps"):
        return None
    projection = parts[2].removeprefix("ffn_").removesuffix("_exps")
    return Weight(int(parts[1]), PROJECTIONS.index(projection)) if projection in PROJECTIONS else None

"""A ggml backend device, in Python, that owns the routed experts.

llama.cpp places tensors whose names match `EXPERT_TENSORS` into our weights buffer type and its scheduler then hands us the
operations on them: per layer one split of MUL_MAT_ID gate, MUL_MAT_ID up, GLU, MUL_MAT_ID down and, of few tokens, the weighted sum
over a token's experts (`claims.py`). The tensors hold no data: a
weights buffer is a few bytes of address space per tensor, so expert bytes never enter llama.cpp. Activations stay in the CPU's
own buffers, which we read and write in place.

The device is registered once per process and stays (ggml can't unregister a running one). *Owners*, one per loaded model, come
and go; they are found through the buffer that holds a weight. This module only knows how ggml calls us; owners know what
experts are and where their bytes are.

ggml calls `graph_compute` on the thread that called `llama_decode`. It is a compiled function (`compiled.py`), which enters
Python only for what it can't do. Exceptions must not reach C (ctypes would print and swallow them): they are passed to the
owner and ggml gets a failure status, so `llama_decode` returns an error.
"""

from __future__ import annotations

import ctypes as C
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from localrun.alignment import align_up
from localrun.errors import DecodeError, LocalrunError, StoppedError
from localrun.ggml import log as llama_log
from localrun.ggml import structures as ggml
from localrun.ggml.devices import GpuDevice
from localrun.ggml.library import library
from localrun.ggml.structures import Tensor
from localrun.offload.device.claims import supports_op
from localrun.offload.device.compiled import copy_in, graph_compute
from localrun.offload.device.layouts import PROCESS
from localrun.offload.device.process import ABORTED_ANSWER, FAILED_ANSWER, Process
from localrun.offload.device.shadow import Activations
from localrun.offload.device.view import View, rows_at, view
from localrun.offload.kernels import attention
from localrun.quant.model.activation import swiglu

log = logging.getLogger(__name__)

EXPERT_TENSORS: Final = r"blk\.\d+\.ffn_(gate|up|down)_exps\.weight"
"""Regex (C++ std::regex, searched) of the tensors that our device owns."""

_ALIGNMENT = 64
_NAME = C.create_string_buffer(b"LOCALRUN")
_DEVICE_NAME = C.create_string_buffer(b"LOCALRUN0")
_DESCRIPTION = C.create_string_buffer(b"localrun experts")


@dataclass(frozen=True, slots=True)
class Weight:
    """One stacked expert tensor: which layer and which of `PROJECTIONS`."""

    layer: int
    projection: int


class Owner(Protocol):
    """A loaded model's experts. All calls come from the thread that runs `llama_decode`."""

    def weight(self, tensor: int) -> Weight | None:
        """The stacked tensor at that address, or None if this owner has none there."""
        ...

    def ffn(self, layer: int, x: View, ids: View, out: View, limit: float, total: View | None) -> None:
        """out[:, k, t] = expert ids[k, t] applied to x[:, 0, t]; x `(D, 1, T)` f32, ids `(K, T)` i32, out `(D, K, T)` f32.

        With `total` `(D, T)` f32 the sums over k, weighted by the router, go there, and `out` is scratch.
        """
        ...

    def project(self, weight: Weight, x: View, ids: View, out: View) -> None:
        """out[:, k, t] = W[ids[k, t]] @ x[:, k or 0, t] for one projection."""
        ...

    def check_stop(self) -> None:
        """Raises StoppedError if a stop was requested."""
        ...

    def failed(self, error: BaseException) -> None:
        """Keeps the cause of a failed decode."""
        ...


Multiply = Callable[[View, View], None]
"""out[:, t, g] = W[g] @ x[:, t, g] with one dense matrix."""


class ExpertDevice:
    """The process-wide device. Use `expert_device()`; attributes are for this package only.

    Owns the C structures for the life of the process, and the map from weights buffers to owners.
    """

    def __init__(self) -> None:
        self._lib = library()
        self._keep: list[Any] = []  # callbacks and structures that C points to
        self._owners: dict[int, Owner] = {}  # weights buffer address -> owner
        self._memory: dict[int, C.Array[C.c_char]] = {}  # weights buffer address -> its address space
        self._loading: Owner | None = None
        self._load_lock = threading.Lock()
        self._reg, self._device, self._backend = ggml.Reg(), ggml.Device(), ggml.Backend()
        self._weights_type = ggml.BufferType()
        self._buffer_interface = ggml.BufferInterface()
        self._cpu_buffer_type = self._lib.ggml_backend_cpu_buffer_type()
        self._error: BaseException | None = None
        self._activations: Activations | None = None
        self._former: list[Activations] = []  # contexts may still point to them
        self._activations_type: int | None = None
        self._records: dict[int, list[Any]] = {}  # weights buffer address -> what tensors' `extra` point to
        self._shown: dict[
            int, Multiply
        ] = {}  # record address -> who multiplies with that matrix in place of compiled code
        python = C.CFUNCTYPE(C.c_int64, C.c_int64, C.c_int64)(self._compute_in_python)
        self._keep.append(python)
        self.process = Process(self._lib, C.cast(python, C.c_void_p).value or 0, self.weights_buffer_type)
        self._build_buffer_type()
        self._build_device()
        self._build_backend()
        self._build_reg()
        self._lib.ggml_backend_register(C.addressof(self._reg))

    @property
    def weights_buffer_type(self) -> int:
        """Address of the buffer type for `tensor_buft_overrides`."""
        return C.addressof(self._weights_type)

    def attach(self, tensor: int, record: npt.NDArray[np.int64]) -> None:
        """Hangs a weight's record (see `weight_records.py`) on its tensor; kept until the tensor's buffer is freed."""
        tensor_view = Tensor.from_address(tensor)
        tensor_view.extra = record.ctypes.data
        self._records.setdefault(tensor_view.buffer, []).append(record)

    def exchange_with(self, gpu: GpuDevice | None, *, all_layers: bool = True) -> None:
        """Where contexts that are made from now on have our activations.

        Args:
            gpu: the device on which the dense model is; None: it is on the CPU, and so are our activations.
            all_layers: all of the model is there, so our results are wanted there. Otherwise our activations are in memory of the
                CPU, from and to which that device copies without waiting.
        """
        if self._activations is not None:
            self._former.append(self._activations)
        self._activations = (
            Activations(gpu, self.process.fields, self.failed) if gpu is not None and all_layers else None
        )
        if self._activations is not None:
            self._activations_type = self._activations.address
        else:
            self._activations_type = self._lib.ggml_backend_dev_host_buffer_type(gpu.address) if gpu else None

    def failed(self, error: BaseException) -> None:
        """Keeps the first error of a function that ggml calls, where no model is known as its owner."""
        log.error("expert device: %s", error, exc_info=error)
        if self._error is None:
            self._error = error

    def take_error(self) -> BaseException | None:
        """What `failed` has kept, or the receiver of llama.cpp's log, once."""
        error, self._error = self._error, None
        in_log = llama_log.take_error()
        return error or in_log

    def forget_exchange(self) -> None:
        """After a model was freed, with all of its contexts."""
        self.exchange_with(None)
        if not self._memory:
            for activations in self._former:
                activations.close()
            self._former.clear()

    def show(self, record: int, multiply: Multiply | None) -> None:
        """Calls `multiply` for the matrix of that record, which compiled code must not know (None: no more)."""
        if multiply is None:
            self._shown.pop(record, None)
        else:
            self._shown[record] = multiply

    @contextmanager
    def loading(self, owner: Owner) -> Iterator[None]:
        """While open, weights buffers that llama.cpp allocates belong to `owner`. One load at a time per process."""
        with self._load_lock:
            self._loading = owner
            try:
                yield
            finally:
                self._loading = None

    @contextmanager
    def attention(self) -> Iterator[None]:
        """While open, graphs are made with attention on this device, where the cache is in the CPU's memory, and with what stands
        between matrices, where activations are; for decoding with a model whose dense matrices are ours. Not while a context is
        made: it looks where attention runs, and does without its fused form if that is not the device that the layer is on
        (llama-context.cpp, `resolve_fused_ops`)."""
        fields, is_supported = self.process.fields, attention.is_supported()
        fields[PROCESS.takes_attention] = is_supported
        fields[PROCESS.takes_between] = is_supported and self._activations_type is None
        try:
            yield
        finally:
            fields[PROCESS.takes_attention] = fields[PROCESS.takes_between] = 0

    def is_ours(self, tensor: int | None) -> bool:
        """Whether the tensor at that address is in one of our weights buffers."""
        if not tensor:
            return False
        buffer = Tensor.from_address(tensor).buffer
        return bool(buffer) and self._lib.ggml_backend_buffer_get_type(buffer) == self.weights_buffer_type

    # -- building the C structures -------------------------------------------------------------------------------------

    def _set(self, structure: Any, field: str, function: Callable[..., Any], failing: Any = None) -> None:
        """Lets ggml call a function through which nothing passes: what it raises is kept.

        Args:
            failing: what ggml gets if it raises; None: nothing, null.
        """

        def guarded(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except BaseException as error:  # also Ctrl-C, which lands in whatever Python is running
                self.failed(error)
                return failing

        callback = dict(structure._fields_)[field](guarded)
        self._keep.append(callback)
        setattr(structure, field, callback)

    def _set_constant(self, structure: Any, field: str, value: Any) -> None:
        self._set(structure, field, lambda *_: value, value)

    def _build_buffer_type(self) -> None:
        iface = self._weights_type.iface
        self._set_constant(iface, "get_name", C.addressof(_NAME))
        self._set(iface, "alloc_buffer", self._alloc_buffer)
        self._set_constant(iface, "get_alignment", _ALIGNMENT)
        # The experts' bytes are elsewhere: a tensor only needs a unique address.
        self._set_constant(iface, "get_alloc_size", _ALIGNMENT)
        # Not host memory, so no other backend tries to read the weights.
        self._set_constant(iface, "is_host", False)
        self._weights_type.device = C.addressof(self._device)
        buffer = self._buffer_interface
        self._set(buffer, "free_buffer", self._free_buffer)
        # Nothing is ever read there, but ggml ends the process at a null.
        self._set(buffer, "get_base", lambda buf: align_up(C.addressof(self._memory[buf]), _ALIGNMENT), _ALIGNMENT)
        self._set_constant(buffer, "memset_tensor", None)
        self._set(buffer, "set_tensor", self._refuse_access)
        self._set(buffer, "get_tensor", self._refuse_access)
        self._set_constant(buffer, "cpy_tensor", False)
        self._set_constant(buffer, "clear", None)

    def _alloc_buffer(self, buft: int, size: int) -> int:
        memory = C.create_string_buffer(size + _ALIGNMENT)
        address: int = self._lib.ggml_backend_buffer_init(buft, self._buffer_interface, None, size)
        self._memory[address] = memory
        if self._loading is not None:
            self._owners[address] = self._loading
        return address

    def _free_buffer(self, buffer: int) -> None:
        self._owners.pop(buffer, None)
        self._records.pop(buffer, None)
        self._memory.pop(buffer, None)

    def _refuse_access(self, buffer: int, tensor: int, data: int, offset: int, size: int) -> None:
        owner = self._owners.get(buffer)
        error = LocalrunError(
            f"{Tensor.from_address(tensor).name.decode()}: llama.cpp tried to touch expert weights directly"
        )
        log.error("%s", error)
        if owner is not None:
            owner.failed(error)

    def _build_device(self) -> None:
        iface = self._device.iface
        self._set_constant(iface, "get_name", C.addressof(_DEVICE_NAME))
        self._set_constant(iface, "get_description", C.addressof(_DESCRIPTION))
        self._set(iface, "get_memory", self._no_memory)
        self._set_constant(iface, "get_type", ggml.DEVICE_TYPE_ACCEL)
        self._set(iface, "get_props", self._props)
        self._set_constant(iface, "init_backend", C.addressof(self._backend))
        # Activations that we produce live where the CPU backend's live: no copies between the two.
        self._set(
            iface,
            "get_buffer_type",
            lambda dev: self._activations_type or self._cpu_buffer_type,
            self._cpu_buffer_type,
        )
        iface.supports_op = dict(iface._fields_)["supports_op"](supports_op.address)
        self._set(
            iface,
            "supports_buft",
            lambda dev, buft: (
                buft in (self.weights_buffer_type, self._activations_type) or self._lib.ggml_backend_buft_is_host(buft)
            ),
            False,
        )
        self._device.reg = C.addressof(self._reg)
        self._device.context = self.process.address

    def _no_memory(self, device: int, free: Any, total: Any) -> None:
        free[0] = total[0] = 0

    def _props(self, device: int, props: Any) -> None:
        result = props[0]
        result.name, result.description = _DEVICE_NAME.value, _DESCRIPTION.value
        result.memory_free = result.memory_total = 0
        result.type, result.device_id = ggml.DEVICE_TYPE_ACCEL, None
        result.caps = ggml.DeviceCaps()

    def _build_backend(self) -> None:
        guid = (C.c_uint8 * 16)(*b"localrun-experts")
        self._keep.append(guid)
        self._backend.guid = C.addressof(guid)
        self._backend.device = C.addressof(self._device)
        iface = self._backend.iface
        self._set_constant(iface, "get_name", C.addressof(_NAME))
        self._set_constant(iface, "free", None)
        iface.graph_compute = dict(iface._fields_)["graph_compute"](graph_compute.address)
        iface.cpy_tensor_async = copy_in.address
        self._backend.context = self.process.address

    def _build_reg(self) -> None:
        iface = self._reg.iface
        self._reg.api_version = ggml.BACKEND_API_VERSION
        self._set_constant(iface, "get_name", C.addressof(_NAME))
        self._set_constant(iface, "get_device_count", 1)
        self._set_constant(iface, "get_device", C.addressof(self._device))
        self._set_constant(iface, "get_proc_address", None)

    # -- scheduling and computing --------------------------------------------------------------------------------------

    def _compute_in_python(self, graph: int, index: int) -> int:
        """Computes node `index` or the chain that begins there; the number of nodes done, or an answer that means failure."""
        owner: Owner | None = None
        try:
            n_nodes = min(4, self._lib.ggml_graph_n_nodes(graph) - index)
            addresses = [self._lib.ggml_graph_node(graph, index + i) for i in range(n_nodes)]
            nodes = [Tensor.from_address(address) for address in addresses]
            owner = self._owner_of(nodes[0])
            if nodes[0].op == ggml.OP_MUL_MAT and (multiply := self._multiply(nodes[0])) is not None:
                owner.check_stop()
                multiply(_view(nodes[0].src[1], self.process), _view(addresses[0], self.process))
                return 1
            return _compute(owner, addresses, nodes, index, self.process)
        except StoppedError as error:
            if owner is not None:
                owner.failed(error)
            return ABORTED_ANSWER
        except BaseException as error:  # a callback from C: nothing may pass
            if owner is None:
                log.exception("expert device failed without an owner")
            else:
                owner.failed(error)
            return FAILED_ANSWER

    def _multiply(self, node: Tensor) -> Multiply | None:
        extra = Tensor.from_address(node.src[0]).extra
        return self._shown.get(extra) if extra else None

    def _owner_of(self, node: Tensor) -> Owner:
        weight = node.src[0]
        if node.op == ggml.OP_GLU:
            weight = Tensor.from_address(weight).src[0]
        return self._owners[Tensor.from_address(weight).buffer]


def _compute(owner: Owner, addresses: list[int], nodes: list[Tensor], index: int, process: Process) -> int:
    """The fused chain where it stands, and the weighted sum behind it, else the first node alone; the number of nodes done."""
    owner.check_stop()
    if nodes[0].op == ggml.OP_MUL_MAT_ID:
        end, total = process.tail()
        if _compute_fused(owner, list(zip(addresses, nodes, strict=True)), total if end else 0, process):
            return end - index if end else 4
    node, out = nodes[0], _view(addresses[0], process)
    sources = [_view(source, process) for source in (node.src[0], node.src[1])]
    if node.op == ggml.OP_MUL_MAT_ID:
        owner.project(_weight(owner, node), sources[1], _view(node.src[2], process), out)
    elif node.op == ggml.OP_GLU:
        gate, up = (rows_at(source, np.float32) for source in sources[:2])
        rows_at(out, np.float32)[...] = swiglu(gate, up, _limit(node))
    else:
        raise DecodeError(
            f"{node.name.decode()}: our device can't run operation {node.op} on an input of shape {sources[1].ne} and strides "
            f"{sources[1].nb}"
        )
    return 1


def _view(tensor: int, process: Process) -> View:
    """A tensor's placement in RAM."""
    return view(Tensor.from_address(tensor), process.in_ram(tensor))


def _compute_fused(owner: Owner, chain: list[tuple[int, Tensor]], total: int, process: Process) -> bool:
    """Recognises MUL_MAT_ID gate, MUL_MAT_ID up, GLU, MUL_MAT_ID down of one layer, in either order of gate and up.

    Args:
        total: the tensor of the sum behind them, 0: there is none.
    """
    if [node.op for _, node in chain] != [ggml.OP_MUL_MAT_ID, ggml.OP_MUL_MAT_ID, ggml.OP_GLU, ggml.OP_MUL_MAT_ID]:
        return False
    (a_first, first), (a_second, second), (a_glu, glu), (a_down, down) = chain
    same_input = first.src[1] == second.src[1] and first.src[2] == second.src[2] == down.src[2]
    if not same_input or {glu.src[0], glu.src[1]} != {a_first, a_second} or down.src[1] != a_glu:
        return False
    gate_weight = _weight(owner, Tensor.from_address(glu.src[0]))
    up_weight = _weight(owner, Tensor.from_address(glu.src[1]))
    down_weight = _weight(owner, down)
    if (gate_weight.projection, up_weight.projection, down_weight.projection) != (0, 1, 2):
        return False
    if not gate_weight.layer == up_weight.layer == down_weight.layer:
        return False
    x, ids = _view(first.src[1], process), _view(first.src[2], process)
    if x.ne[1] != 1:
        return False
    sums = _view(total, process) if total else None
    owner.ffn(down_weight.layer, x, ids, _view(a_down, process), _limit(glu), sums)
    return True


def _weight(owner: Owner, node: Tensor) -> Weight:
    weight = owner.weight(node.src[0])
    if weight is None:
        raise DecodeError(f"{Tensor.from_address(node.src[0]).name.decode()}: not an expert tensor of this model")
    return weight


def _limit(glu: Tensor) -> float:
    """Clamp limit of a gated activation: op_params[3] as float for SWIGLU_CLAMP (ggml.c, ggml_swiglu_clamp), else infinity."""
    if glu.op_params[0] != ggml.GLU_SWIGLU_CLAMP:
        return float("inf")
    return C.c_float.from_buffer_copy(C.c_int32(glu.op_params[3])).value


_device: ExpertDevice | None = None
_device_lock = threading.Lock()


def expert_device() -> ExpertDevice:
    """The process's device, registered with ggml on first use.

    Raises:
        IncompatibleLibraryError: our structures don't match the installed llama.cpp.
    """
    global _device
    with _device_lock:
        if _device is None:
            _device = ExpertDevice()
        return _device

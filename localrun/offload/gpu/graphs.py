"""The graphs that multiply experts on a GPU, and what a device can hold and multiply: for `slots.py`, which fills and runs them.

A graph is one `mul_mat_id` chain over (token, slot) pairs. Nothing here owns memory.
"""

from __future__ import annotations

import bisect
import logging
import math
from dataclasses import dataclass
from enum import Enum

from localrun.alignment import align_up
from localrun.ggml import structures as ggml
from localrun.ggml.devices import GpuDevice
from localrun.ggml.library import library
from localrun.offload.device.layouts import MOST_PAIRS
from localrun.offload.kernels import FfnSpec

log = logging.getLogger(__name__)

MAX_PAIRS = 512
"""(token, expert) pairs of one graph; longer calls take several. Bounds the memory of intermediate results."""

SIZES = (1, 2, 4, 6, 8, 16, 32, 64, 128, 256, MAX_PAIRS)
"""Graph sizes, in pairs of several tokens; calls are padded with pairs of slot 0, whose results are ignored."""

MAX_SLOTS = 1024
"""Of a bank: more than any model has experts in a layer."""

_ALIGNMENT = 1024
"""More than any backend aligns tensors to; a bank has three."""


class Form(Enum):
    """What a graph gets and gives."""

    ROWS = "a row of inputs and a row of outputs for each pair"
    SUM = "one token's row and weights; the weighted sum"
    GATHERED = "numbers of rows that were loaded; a row of outputs for each pair"


@dataclass(slots=True)
class Graph:
    """Tensors of one graph; 0: it has none.

    Attributes:
        x: rows of inputs; of `Form.GATHERED` the rows' numbers.
        weights: of `Form.SUM`.
    """

    graph: int
    x: int
    ids: int
    weights: int
    out: int


def is_small(n_pairs: int, form: Form) -> bool:
    """Compiled calls use such graphs, with inputs and outputs in memory of theirs."""
    return n_pairs <= MOST_PAIRS and form is not Form.GATHERED


def n_nodes_for(n_pairs: int, form: Form) -> int:
    """Room for a graph: the products and the activation, one product with the weights, views and sums; or its inputs."""
    return 10 + (2 * n_pairs if form is Form.SUM else 0)


def build(
    context: int, spec: FfnSpec, tensors: tuple[int, int, int], n_pairs: int, form: Form, loaded: int = 0
) -> Graph:
    """Experts of one token are one column of `mul_mat_id`, as llama.cpp has it: its input is sent once, backends have their fastest
    kernels for one column, and CUDA does all additions in one kernel. Of several tokens each pair is a column: how many experts
    of a token are here varies.

    Args:
        loaded: of `Form.GATHERED`, the tensor that rows are taken from.
    """
    lib = library()
    n_rows, n_columns = (n_pairs, 1) if form is Form.SUM else (1, n_pairs)
    if form is Form.GATHERED:
        given = lib.ggml_new_tensor_1d(context, ggml.TYPE_I32, n_pairs)
        x = lib.ggml_reshape_3d(context, lib.ggml_get_rows(context, loaded, given), spec.n_embd, 1, n_pairs)
    else:
        given = x = lib.ggml_new_tensor_3d(context, ggml.TYPE_F32, spec.n_embd, 1, n_columns)
    ids = lib.ggml_new_tensor_2d(context, ggml.TYPE_I32, n_rows, n_columns)
    gate, up = (lib.ggml_mul_mat_id(context, weights, x, ids) for weights in tensors[:2])
    if math.isinf(spec.limit):
        active = lib.ggml_swiglu_split(context, gate, up)
    else:
        active = lib.ggml_swiglu_clamp(context, gate, up, spec.limit)
    out = lib.ggml_mul_mat_id(context, tensors[2], active, ids)
    for product in (gate, up, out):
        # Activations in 8 bits, as everywhere else: for MXFP4 weights CUDA defaults to 4 bits on RTX 50 (mmq.cu).
        lib.ggml_prec_set_src(product, ggml.PREC_Q8, 1)
    weights = 0
    if form is Form.SUM:
        weights = lib.ggml_new_tensor_3d(context, ggml.TYPE_F32, 1, n_pairs, 1)
        lib.ggml_set_input(weights)
        out = _weighted_sum(context, out, weights, spec.n_embd, n_pairs)
    lib.ggml_set_input(given)
    lib.ggml_set_input(ids)
    lib.ggml_set_output(out)
    graph = lib.ggml_new_graph_custom(context, n_nodes_for(n_pairs, form), False)
    lib.ggml_build_forward_expand(graph, out)
    return Graph(graph, given, ids, weights, out)


def _weighted_sum(context: int, rows: int, weights: int, n_embd: int, n_pairs: int) -> int:
    """The sum of weight * row, (n_embd, 1)."""
    lib, row_bytes = library(), n_embd * 4
    product = lib.ggml_mul(context, rows, weights)
    views = [lib.ggml_view_2d(context, product, n_embd, 1, row_bytes, i * row_bytes) for i in range(n_pairs)]
    total = views[0] if n_pairs > 1 else product
    for view in views[1:]:
        total = lib.ggml_add(context, total, view)
    return int(total)


def size_for(n_pairs: int) -> int:
    """Pairs of the smallest graph that holds so many."""
    return next(size for size in SIZES if size >= n_pairs)


def supports(device: GpuDevice, graph: int) -> bool:
    """Whether the device has all of the graph's operations."""
    lib = library()
    nodes = (lib.ggml_graph_node(graph, index) for index in range(lib.ggml_graph_n_nodes(graph)))
    return all(lib.ggml_backend_dev_supports_op(device.address, node) for node in nodes)


def kinds(spec: FfnSpec) -> str:
    """The formats' names, for messages."""
    return "/".join(dict.fromkeys(kind.name for kind in spec.types))


def stacked(context: int, spec: FfnSpec, n_slots: int) -> tuple[int, int, int]:
    """Gate, up and down of a bank; nothing is allocated."""
    lib = library()
    shapes = ((spec.n_embd, spec.n_ff), (spec.n_embd, spec.n_ff), (spec.n_ff, spec.n_embd))
    gate, up, down = (
        int(lib.ggml_new_tensor_3d(context, int(kind), *shape, n_slots))
        for kind, shape in zip(spec.types, shapes, strict=True)
    )
    return gate, up, down


def most_slots(spec: FfnSpec, device: GpuDevice) -> int:
    """Maximum experts per bank: Vulkan devices can't address tensors beyond a few GiB, some not beyond 128 MiB.

    Returns:
        0 if the device can't multiply with such experts at all, with a warning; `MAX_SLOTS` without a limit.
    """
    lib = library()

    def fits(n_slots: int) -> bool:
        size = 16 * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(n_nodes_for(2, Form.ROWS), False)
        context = lib.ggml_init(ggml.InitParams(size + 1024, None, True))
        try:
            return supports(device, build(context, spec, stacked(context, spec, n_slots), 2, Form.ROWS).graph)
        finally:
            lib.ggml_free(context)

    if fits(MAX_SLOTS):
        return MAX_SLOTS
    if not fits(1):
        log.warning("%s can't multiply experts in %s: they stay in RAM and on the drive", device.name, kinds(spec))
        return 0
    return bisect.bisect_left(range(1, MAX_SLOTS), True, key=lambda n_slots: not fits(n_slots))


def slot_bytes(spec: FfnSpec, n_slots: int, device: GpuDevice) -> int:
    """What `n_slots` experts take on the device, its padding included; nothing is allocated."""
    lib = library()
    context = lib.ggml_init(ggml.InitParams(3 * lib.ggml_tensor_overhead() + 1024, None, True))
    try:
        buffer_type = lib.ggml_backend_dev_buffer_type(device.address)
        sizes = [
            lib.ggml_backend_buft_get_alloc_size(buffer_type, tensor) for tensor in stacked(context, spec, n_slots)
        ]
        return int(sum(align_up(size, _ALIGNMENT) for size in sizes))
    finally:
        lib.ggml_free(context)

"""Compressors as one operation: what llama.cpp's chain of them gives, and that a model's are recognized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from localrun.ggml import structures as ggml
from localrun.ggml.library import library
from localrun.ggml.structures import TYPE_I32, Tensor
from localrun.kernel_cache import cached_jit
from localrun.offload.device import compressor
from localrun.offload.device.device import expert_device
from localrun.offload.kernels import attention
from localrun.offload.kernels.float_rows import POOLED
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.open import open_model
from tests.ggml_graph import Graph, values_of
from tests.offload.models import MODEL, TOKENS, logits

pytestmark = pytest.mark.skipif(not attention.is_supported(), reason="all of this stays llama.cpp's")

F32 = npt.NDArray[np.float32]
D = POOLED
ROWS = np.random.default_rng(5)


@cached_jit()
def _find(process: int, graph: int, index: int, n_nodes: int) -> bool:
    return bool(compressor.find(process, graph, index, n_nodes))


@cached_jit()
def _left_out(process: int, node: int) -> bool:
    return bool(compressor.is_left_out(process, node))


@cached_jit()
def _compute(process: int, node: int) -> bool:
    if not compressor.is_end(process, node):
        return False
    compressor.compute(process)
    return True


def normal(*shape: int) -> F32:
    return ROWS.standard_normal(shape, dtype=np.float32)


def columns(g: Graph, rows: int) -> int:
    return g.call("ggml_cont", g.call("ggml_permute", rows, 1, 0, 2, 3))


def pooled(g: Graph, values: int, scores: int) -> int:
    return g.call("ggml_sum_rows", g.call("ggml_mul", columns(g, values), g.call("ggml_soft_max", columns(g, scores))))


def plain(g: Graph, n_blocks: int, n_rows: int = 16) -> int:
    """HCA: as many rows as become one, in any order."""
    numbers = g.input(ROWS.permutation(40)[: n_rows * n_blocks].astype(np.int32), TYPE_I32)

    def chosen() -> int:
        joined = g.call("ggml_concat", g.input(normal(37, D)), g.input(normal(3, D)), 1)
        return g.call("ggml_reshape_3d", g.call("ggml_get_rows", joined, numbers), D, n_rows, n_blocks)

    return pooled(g, chosen(), chosen())


def overlapping(g: Graph, n_blocks: int) -> int:
    """CSA: half of the rows from the block before, which may be missing, with other columns."""
    ratio, n_state = 4, 8
    picks = ROWS.permutation(np.arange(n_state + 4))[: 8 * 1].tolist() * n_blocks
    picks[1] = n_state + 4  # the row that is not there
    numbers = g.input(np.array(picks, np.int32), TYPE_I32)

    def half(rows: int, later: bool) -> int:
        n = ratio * n_blocks
        view = g.call("ggml_view_2d", rows, D, n, 8 * D, later * (n * 8 * D + 4 * D))
        return g.call("ggml_reshape_3d", g.call("ggml_cont", view), D, ratio, n_blocks)

    def chosen(bias: float) -> int:
        joined = g.call("ggml_concat", g.input(normal(n_state, 2 * D)), g.input(normal(4, 2 * D)), 1)
        made = g.call("ggml_scale_bias", g.call("ggml_view_1d", joined, 2 * D, 0), 0.0, bias)
        joined = g.call("ggml_concat", joined, g.call("ggml_reshape_2d", made, 2 * D, 1), 1)
        rows = g.call("ggml_get_rows", joined, numbers)
        return g.call("ggml_concat", half(rows, later=False), half(rows, later=True), 1)

    return pooled(g, chosen(0.0), chosen(float("-inf")))


def nodes_of(g: Graph) -> list[int]:
    lib = library()
    return [int(lib.ggml_graph_node(g.graph, i)) for i in range(lib.ggml_graph_n_nodes(g.graph))]


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("n_blocks", [1, 2])
@pytest.mark.parametrize("kind", [plain, overlapping])
def test_the_chain_is_one_operation_with_the_same_result(kind: object, n_blocks: int, n_threads: int) -> None:
    process = expert_device().process
    process.prepare_attention(n_threads)
    with Graph() as graph:
        node = kind(graph, n_blocks)  # type: ignore[operator]
        expected = graph.run(node)
        found, nodes = values_of(node), nodes_of(graph)
        first = next(i for i, at in enumerate(nodes) if Tensor.from_address(at).op == ggml.OP_CONCAT)
        assert _find(process.address, graph.graph, first, len(nodes))
        views = {ggml.OP_RESHAPE, ggml.OP_VIEW, ggml.OP_PERMUTE}
        others = {at for at in nodes if Tensor.from_address(at).op not in views} - {node}
        assert {at for at in others if _left_out(process.address, at)} == others
        found[...] = np.nan
        before = process.n_compressed
        assert _compute(process.address, node)
        assert process.n_compressed == before + 1
        assert not any(_left_out(process.address, at) for at in nodes)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_what_ends_elsewhere_is_no_compressor() -> None:
    process = expert_device().process
    with Graph() as graph:
        graph.run(plain(graph, 1))
        nodes = nodes_of(graph)
        first = next(i for i, at in enumerate(nodes) if Tensor.from_address(at).op == ggml.OP_CONCAT)
        assert not _find(process.address, graph.graph, first, len(nodes) - 1)
        assert not _find(process.address, graph.graph, len(nodes) - 1, len(nodes))
        assert not any(_left_out(process.address, at) for at in nodes)


def test_rows_that_are_computed_may_be_overwritten_before_the_sum() -> None:
    """So only state, which has a place of its own, is read late."""
    process = expert_device().process
    with Graph() as graph:
        numbers = graph.input(np.arange(16, dtype=np.int32), TYPE_I32)
        sides = []
        for _ in range(2):
            kept = graph.call("ggml_sqrt", graph.input(np.abs(normal(20, D))))
            joined = graph.call("ggml_concat", kept, graph.input(normal(3, D)), 1)
            sides.append(graph.call("ggml_get_rows", joined, numbers))
        graph.run(pooled(graph, *sides))
        nodes = nodes_of(graph)
        first = next(i for i, at in enumerate(nodes) if Tensor.from_address(at).op == ggml.OP_CONCAT)
        assert not _find(process.address, graph.graph, first, len(nodes))


def test_a_models_compressors_are_recognized(model_path: Path) -> None:
    """One for each layer that has any, and one for its indexer; whatever the batch."""
    process = expert_device().process
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        for batch in (1, 8):
            before = process.n_compressed
            logits(model, TOKENS[:16], batch=batch)
            per_token = sum({0: 0, 4: 2, 128: 1}[ratio] for ratio in MODEL.ratios)
            assert process.n_compressed - before == per_token * 16 // batch

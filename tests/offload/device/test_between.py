"""Operations between matrices: each one beside llama.cpp's on the same tensors, and all of them in a model's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from localrun.ggml.structures import TYPE_BF16, TYPE_F16, TYPE_F32, TYPE_I32, TYPE_I64
from localrun.kernel_cache import cached_jit
from localrun.offload.device import between
from localrun.offload.device.device import expert_device
from localrun.offload.device.layouts import PROCESS
from localrun.offload.kernels import attention
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.quant.open import open_model
from tests.ggml_graph import Graph, values_of
from tests.offload.models import MODEL, TEXTS, TOKENS, logits
from tests.reference import kl

pytestmark = pytest.mark.skipif(not attention.is_supported(), reason="all of this stays llama.cpp's")

F32 = npt.NDArray[np.float32]
D, S = 96, 4
ROWS = np.random.default_rng(5)


@cached_jit()
def _takes(process: int, node: int) -> bool:
    return bool(between.takes(process, node))


@cached_jit()
def _compute(process: int, node: int) -> None:
    between.compute(process, node)


def takes(node: int) -> bool:
    """As ggml's scheduler asks, while attention is ours."""
    return bool(_takes(expert_device().process.address, node))


def normal(*shape: int) -> F32:
    return ROWS.standard_normal(shape, dtype=np.float32)


def bf16(*shape: int) -> npt.NDArray[np.uint16]:
    return (normal(*shape).view(np.uint32) >> 16).astype(np.uint16)


def post(g: Graph, t: int) -> int:
    return g.call(
        "ggml_dsv4_hc_post",
        g.input(normal(t, D)),
        g.input(normal(t, S, D)),
        g.input(normal(t, S)),
        g.input(normal(t, S, S)),
    )


def pre(g: Graph, t: int) -> int:
    return g.call("ggml_dsv4_hc_pre", g.input(normal(t, S, D)), g.input(normal(t, S)))


def comb(g: Graph, t: int) -> int:
    mixes, scale, base = g.input(normal(t, 6 * S)), g.input(normal(3)), g.input(normal(6 * S))
    return g.call("ggml_dsv4_hc_comb", mixes, scale, base, 1e-6, 20)


def affine(g: Graph, t: int) -> int:
    """A view of some columns times a number."""
    mixes, scale = g.input(normal(t, 6 * S)), g.input(normal(1))
    return g.call("ggml_mul", g.call("ggml_view_2d", mixes, S, t, 24 * S, 4 * S), scale)


def router(g: Graph, t: int) -> int:
    return g.call("ggml_mul_mat", g.input(bf16(40, D), TYPE_BF16), g.input(normal(t, D)))


def ints(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


def turned(g: Graph, t: int, width: int) -> int:
    """Columns of a matrix as rows, for each of t matrices."""
    return g.call("ggml_cont", g.call("ggml_permute", g.input(normal(t, 24, width)), 1, 0, 2, 3))


def rope(g: Graph, t: int, name: str, *, yarn: bool, position: int = 70_000) -> int:
    positions = g.input(np.arange(position, position + t, dtype=np.int32), TYPE_I32)
    mix, trained = (1.0, 65536) if yarn else (0.0, 0)
    numbers = (160000.0, 1 / 16, mix, 0.9, 32.0, 1.0)
    node = g.call(name, g.input(normal(t, 3, D)), positions, None, 64, 0, trained, *numbers)
    return g.call("ggml_rope_set_offset", node, 32, first=False)


def written(g: Graph, t: int, kind: int) -> int:
    """Rows into a cache."""
    cache = g.input(np.zeros((9, D), np.float16 if kind == TYPE_F16 else np.float32), kind)
    numbers = np.random.default_rng(3).permutation(9)[:t].astype(np.int64)
    return g.call("ggml_set_rows", cache, g.input(normal(t, D)), g.input(numbers, TYPE_I64))


def masks(g: Graph, t: int) -> int:
    """The sum of two masks."""
    a, b = (np.where(normal(t, D) > 0, 0, -np.inf).astype(np.float16) for _ in range(2))
    return g.call("ggml_add", g.input(a, TYPE_F16), g.input(b, TYPE_F16))


OPERATIONS: dict[str, Callable[[Graph, int], int]] = {
    "post": post,
    "pre": pre,
    "comb": comb,
    "affine": affine,
    "norm": lambda g, t: g.call("ggml_rms_norm", g.input(normal(t, 3, D)), 1e-6),
    "mul by a row": lambda g, t: g.call("ggml_mul", g.input(normal(t, D)), g.input(normal(D))),
    "add a row": lambda g, t: g.call("ggml_add", g.input(normal(t, S)), g.input(normal(S))),
    "sigmoid": lambda g, t: g.call("ggml_sigmoid", g.input(normal(t, S))),
    "scale": lambda g, t: g.call("ggml_scale_bias", g.input(normal(t, S)), 2.0, 0.5),
    "mixes": lambda g, t: g.call("ggml_mul_mat", g.input(normal(6 * S, S * D)), g.input(normal(t, S * D))),
    "router": router,
    "add rows": lambda g, t: g.call("ggml_add", g.input(normal(t, D)), g.input(normal(t, D))),
    "weigh": lambda g, t: g.call("ggml_mul", g.input(normal(t, 3, D)), g.input(normal(t, 3, 1))),
    "divide": lambda g, t: g.call("ggml_div", g.input(normal(t, 6)), g.input(normal(t, 1))),
    "masks": masks,
    "softplus": lambda g, t: g.call("ggml_softplus", g.input(10 * normal(t, 40))),
    "sqrt": lambda g, t: g.call("ggml_sqrt", g.input(np.abs(normal(t, 40)))),
    "clamp": lambda g, t: g.call("ggml_clamp", g.input(normal(t, 5)), -0.5, 0.5),
    "sum of few": lambda g, t: g.call("ggml_sum_rows", g.input(normal(t, 6))),
    "sum of many": lambda g, t: g.call("ggml_sum_rows", g.input(normal(t, 128))),
    "softmax of few": lambda g, t: g.call("ggml_soft_max", g.input(5 * normal(t, 32, 8))),
    "softmax of many": lambda g, t: g.call("ggml_soft_max", g.input(5 * normal(t, 16, 128))),
    "rows turned": lambda g, t: turned(g, t, 48),
    "rows turned, not in whole vectors": lambda g, t: turned(g, t, 21),
    "rows in another order": lambda g, t: g.call(
        "ggml_cont", g.call("ggml_permute", g.input(normal(3, t, D)), 0, 2, 1, 3)
    ),
    "joined rows": lambda g, t: g.call("ggml_concat", g.input(normal(7, D)), g.input(normal(t, D)), 1),
    "longer rows": lambda g, t: g.call("ggml_concat", g.input(normal(t, D)), g.input(normal(t, 5)), 0),
    "chosen rows": lambda g, t: g.call(
        "ggml_get_rows", g.input(normal(9, D)), g.input(ints(*range(8, 8 - t, -1)), TYPE_I32)
    ),
    "chosen values": lambda g, t: g.call(
        "ggml_get_rows", g.input(normal(t, 9, 1)), g.input(np.tile(ints(4, 0, 8), (t, 1)), TYPE_I32)
    ),
    "repeated": lambda g, t: g.call("ggml_repeat_4d", g.input(normal(t, 1, D)), D, S, t, 1),
    "filled": lambda g, t: g.call("ggml_fill", g.input(normal(t, D)), -2.5),
    "written": lambda g, t: written(g, t, TYPE_F32),
    "written as F16": lambda g, t: written(g, t, TYPE_F16),
    "rope": lambda g, t: rope(g, t, "ggml_rope_ext", yarn=False),
    "rope with yarn": lambda g, t: rope(g, t, "ggml_rope_ext", yarn=True),
    "rope back": lambda g, t: rope(g, t, "ggml_rope_ext_back", yarn=True),
}


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("shared", [False, True], ids=["one thread", "two"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_what_ggml_gives(name: str, n_tokens: int, shared: bool) -> None:
    process = expert_device().process
    process.prepare_attention(2)
    if shared:  # whatever its size
        process.fields[PROCESS.shared_bytes] = 1
    with Graph() as graph:
        node = OPERATIONS[name](graph, n_tokens)
        expected = graph.run(node)
        assert takes(node)
        found = values_of(node)
        found[...] = 0 if name.startswith("written") else np.nan  # other rows of a cache stay as they are
        _compute(process.address, node)
        # ggml rounds inputs to BF16 (2**-9) where the matrix is BF16; its sums of 96 terms have about 10 such errors.
        tolerance = 0.05 if name == "router" else 2e-5
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


OTHERS: dict[str, Callable[[Graph], int]] = {
    "another activation": lambda g: g.call("ggml_relu", g.input(normal(3, S))),
    "rows that are no whole vectors": lambda g: g.call("ggml_rms_norm", g.input(normal(3, 40)), 1e-6),
    "a softmax of a few rows": lambda g: g.call("ggml_soft_max", g.input(normal(3, 8))),
    "pairs that are apart": lambda g: g.call(
        "ggml_rope", g.input(normal(2, 3, D)), g.input(ints(0, 1), TYPE_I32), 64, 2
    ),
    "joined matrices": lambda g: g.call("ggml_concat", g.input(normal(2, 3, D)), g.input(normal(1, 3, D)), 2),
    "rows of another type": lambda g: g.call(
        "ggml_get_rows", g.input(bf16(9, D), TYPE_BF16), g.input(ints(1), TYPE_I32)
    ),
    "gated streams": lambda g: g.call(
        "ggml_dsv4_hc_pre_gated", g.input(normal(2, S, D)), g.input(normal(2, S, D)), 1.0
    ),
    "streams kept apart": lambda g: g.call(
        "ggml_dsv4_hc_post", g.input(normal(2, D)), g.input(normal(2, S, D)), g.input(normal(2, S)), None
    ),
    "many tokens": lambda g: g.call("ggml_mul_mat", g.input(normal(S, D)), g.input(normal(17, D))),
    "a matrix of another type": lambda g: g.call(
        "ggml_mul_mat", g.input(normal(S, D).astype(np.float16).view(np.uint16), TYPE_F16), g.input(normal(2, D))
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_known_stays_llamacpps(name: str) -> None:
    with Graph() as graph:
        node = OTHERS[name](graph)
        graph.run(node)
        assert not takes(node)


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[OffloadedModel]:
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        yield model


@pytest.mark.parametrize("batch", [1, 64])
def test_answers_agree_with_those_of_llamacpps_operations(model: OffloadedModel, batch: int) -> None:
    ours = np.concatenate([logits(model, text, batch=batch) for text in TEXTS[:3]])
    assert model.take_error() is None
    ggmls = np.concatenate([logits(model, text, batch=batch, attention=False) for text in TEXTS[:3]])
    assert np.median(kl(ggmls, ours)) < 1e-3


@pytest.mark.parametrize("batch", [1, 40])
def test_any_number_of_threads_gives_the_same_bits(model: OffloadedModel, batch: int) -> None:
    process = expert_device().process
    found = []
    for n_threads in (1, 2):
        process.prepare_attention(n_threads)
        found.append(logits(model, TOKENS[:40], batch=batch))
    assert np.array_equal(*found)


def n_parts(model: OffloadedModel, *, attention: bool) -> int:
    """Parts of the graph of one token that are ours."""
    process = expert_device().process
    before = process.n_parts
    logits(model, TOKENS[:16], batch=1, attention=attention)
    return (process.n_parts - before) // 16


def test_llamacpp_interrupts_us_for_a_few_operations_only(model: OffloadedModel) -> None:
    """Embeddings, the router's sort, rotations, and the choice of rows by the indexer's scores: seven a layer at most."""
    assert n_parts(model, attention=True) <= 1 + 7 * len(MODEL.ratios) < n_parts(model, attention=False)

"""An overlay's header against the manifest and the base: what fits becomes an index, whatever contradicts is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGMLQuantizationType as QT
from gguf import GGUFValueType

from localrun.errors import FormatError
from localrun.quant.gguf.file import GgufValue
from localrun.quant.gguf.overlay_index import ARCHITECTURE, BASE_KEY, OverlayIndex, ids_key, stack_name
from localrun.quant.model.source import MoeLayer

D, F, E = 256, 512, 8
LAYERS = {layer: MoeLayer(layer, E, D, F, (QT.Q2_K,) * 3, 1) for layer in (1, 2)}


class Overlay:
    """A sound overlay: of layer 1 experts 2 and 5 in MXFP4 and 3 in Q8_0, of layer 2 expert 0 in Q2_K, the base's own type."""

    def __init__(self) -> None:
        self.named: dict[int, dict[str, tuple[int, ...]]] = {1: {"mxfp4": (2, 5), "q8_0": (3,)}, 2: {"q2_k": (0,)}}
        self.metadata: dict[str, GgufValue] = {
            "general.architecture": GgufValue.string(ARCHITECTURE),
            BASE_KEY: GgufValue.string("digest"),
        }
        self.shapes: dict[str, tuple[tuple[int, ...], QT]] = {}
        for layer, kind, ids in ((1, QT.MXFP4, (2, 5)), (1, QT.Q8_0, (3,)), (2, QT.Q2_K, (0,))):
            self.metadata[ids_key(layer, kind)] = GgufValue.array(GGUFValueType.INT32, ids)
            for projection, size in enumerate(((D, F), (D, F), (F, D))):
                self.shapes[stack_name(layer, projection, kind)] = (*size, len(ids)), kind

    def index(self) -> OverlayIndex:
        tensors = {n: SimpleNamespace(info=SimpleNamespace(shape=s, type=k)) for n, (s, k) in self.shapes.items()}
        part: Any = SimpleNamespace(path=Path("o.gguf"), metadata=self.metadata, tensors=tensors)
        experts = {
            layer: {name: SimpleNamespace(ids=ids) for name, ids in by_type.items()}
            for layer, by_type in self.named.items()
        }
        manifest: Any = SimpleNamespace(
            overlay=SimpleNamespace(experts=experts), base_digest="digest", files=[SimpleNamespace(name="base.gguf")]
        )
        return OverlayIndex(part, manifest, LAYERS)


def test_names_are_those_of_the_layout() -> None:
    assert ids_key(3, QT.MXFP4) == "localrun.overlay.blk.3.mxfp4"
    assert [stack_name(3, p, QT.Q4_K) for p in range(3)] == [
        f"blk.3.ffn_{name}_exps.q4_k.weight" for name in ("gate", "up", "down")
    ]


def test_each_copy_has_its_type_and_its_place_in_the_stack() -> None:
    index = Overlay().index()
    assert index.copies == {1: {2: (QT.MXFP4, 0), 5: (QT.MXFP4, 1), 3: (QT.Q8_0, 0)}, 2: {0: (QT.Q2_K, 0)}}


def test_layers_are_described_with_the_types_that_the_base_has_not() -> None:
    index = Overlay().index()
    assert index.describe(LAYERS[1]).better == ((QT.Q8_0,) * 3, (QT.MXFP4,) * 3), "in ascending order"
    assert index.describe(LAYERS[2]).better == ()
    other = MoeLayer(7, E, D, F, (QT.Q2_K,) * 3, 1)
    assert index.describe(other) == other


DAMAGE: dict[str, tuple[Callable[[Overlay], Any], str]] = {
    "a model": (
        lambda o: o.metadata.update({"general.architecture": GgufValue.string("deepseek4")}),
        "not an overlay",
    ),
    "another base": (
        lambda o: o.metadata.update({BASE_KEY: GgufValue.string("other")}),
        "belongs to a base other than base.gguf",
    ),
    "no such layer": (lambda o: o.named.update({9: {"q8_0": (1,)}}), "layer 9 has no experts in the base"),
    "no such type": (lambda o: o.named[1].update(q9=(1,)), "layer 1: unknown type 'q9'"),
    "no such expert": (lambda o: o.named[1].update(q8_0=(8,)), "layer 1: expert 8, the base has 8"),
    "two copies": (lambda o: o.named[1].update(q8_0=(5,)), "layer 1: expert 5 has two better copies"),
    "other experts": (
        lambda o: o.metadata.update({ids_key(1, QT.Q8_0): GgufValue.array(GGUFValueType.INT32, (4,))}),
        r"localrun\.overlay\.blk\.1\.q8_0: differs from the experts that .* names",
    ),
    "experts that nobody names": (
        lambda o: o.metadata.update({ids_key(1, QT.Q6_K): GgufValue.array(GGUFValueType.INT32, (4,))}),
        r"localrun\.overlay\.blk\.1\.q6_k: not in ",
    ),
    "a tensor that is missing": (
        lambda o: o.shapes.pop(stack_name(2, 1, QT.Q2_K)),
        r"blk\.2\.ffn_up_exps\.q2_k\.weight: in .* but not in the file",
    ),
    "a tensor too many": (
        lambda o: o.shapes.update({"extra": ((1,), QT.F32)}),
        "extra: in the file but not in ",
    ),
    "another shape": (
        lambda o: o.shapes.update({stack_name(1, 2, QT.Q8_0): ((D, F, 1), QT.Q8_0)}),
        r"blk\.1\.ffn_down_exps\.q8_0\.weight: Q8_0 \(256, 512, 1\), expected shape \(512, 256, 1\)",
    ),
    "another type": (
        lambda o: o.shapes.update({stack_name(1, 0, QT.Q8_0): ((D, F, 1), QT.Q6_K)}),
        r"blk\.1\.ffn_gate_exps\.q8_0\.weight: Q6_K",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_contradicts_is_named_with_the_file_and_the_way_out(damage: str) -> None:
    change, says = DAMAGE[damage]
    overlay = Overlay()
    change(overlay)
    with pytest.raises(FormatError, match=f"^o.gguf: {says}") as caught:
        overlay.index()
    assert "write the overlay again" in str(caught.value.hint)

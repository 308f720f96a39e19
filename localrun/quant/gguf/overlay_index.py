"""Overlays: a second GGUF next to the base, with better copies of chosen experts. Defines and reads the layout.

Per layer and type, each projection's copies are one stacked tensor, as in the base: `blk.3.ffn_gate_exps.mxfp4.weight` of ggml
shape `(n_in, n_out, n_chosen)`. Metadata:

    general.architecture "localrun-overlay", so no other program mistakes it for a model
    localrun.overlay.base               digest of the base that it belongs to (`Manifest.base_digest`)
    localrun.overlay.blk.3.mxfp4        i32 array: expert numbers in the order of the stacks, ascending
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from gguf import GGMLQuantizationType, GGUFValueType

from localrun.errors import FormatError
from localrun.quant.gguf.file import GgufFile, GgufValue
from localrun.quant.model.manifest import MANIFEST_NAME, Manifest
from localrun.quant.model.source import PROJECTIONS, ExpertTypes, MoeLayer

ARCHITECTURE = "localrun-overlay"
BASE_KEY = "localrun.overlay.base"
_IDS_PREFIX = "localrun.overlay.blk."
_DAMAGED = "the file is damaged or incomplete: write the overlay again"


def ids_key(layer: int, kind: GGMLQuantizationType) -> str:
    """Metadata key of the expert numbers in one layer's stacks of one type."""
    return f"{_IDS_PREFIX}{layer}.{kind.name.lower()}"


def stack_name(layer: int, projection: int, kind: GGMLQuantizationType) -> str:
    """Tensor name of a stack of copies."""
    return f"blk.{layer}.ffn_{PROJECTIONS[projection]}_exps.{kind.name.lower()}.weight"


class OverlayIndex:
    """The experts with better copies and their locations; checked against the manifest and the base. Immutable.

    Attributes:
        copies: layer -> expert -> type and number in the stack.
    """

    def __init__(self, part: GgufFile, manifest: Manifest, layers: Mapping[int, MoeLayer]) -> None:
        """Checks an overlay.

        Args:
            part: the overlay's header.
            manifest: names the copies.
            layers: of the base.

        Raises:
            FormatError: it belongs to another base, or contradicts the manifest.
        """
        assert manifest.overlay is not None
        self._part = part
        self.copies: dict[int, dict[int, tuple[GGMLQuantizationType, int]]] = {}
        self._check_base(manifest)
        keys: dict[str, tuple[int, ...]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, by_type in manifest.overlay.experts.items():
            if layer not in layers:
                raise self._error(f"layer {layer} has no experts in the base")
            shape = layers[layer]
            for name, stack in by_type.items():
                kind = self._kind(layer, name)
                keys[ids_key(layer, kind)] = stack.ids
                self._add(shape, kind, stack.ids)
                sizes = ((shape.n_embd, shape.n_ff), (shape.n_embd, shape.n_ff), (shape.n_ff, shape.n_embd))
                for projection, size in enumerate(sizes):
                    shapes[stack_name(layer, projection, kind)] = (*size, len(stack.ids))
        self._check_ids(keys)
        self._check_tensors(shapes)

    def describe(self, layer: MoeLayer) -> MoeLayer:
        """The base's layer along with the types that its better copies have."""
        kinds = sorted({kind for kind, _ in self.copies.get(layer.layer, {}).values()})
        better: list[ExpertTypes] = [(kind, kind, kind) for kind in kinds]
        return replace(layer, better=tuple(types for types in better if types != layer.types))

    def _error(self, problem: str) -> FormatError:
        return FormatError(f"{self._part.path}: {problem}", hint=_DAMAGED)

    def _check_base(self, manifest: Manifest) -> None:
        values = self._part.metadata
        if values.get("general.architecture") != GgufValue.string(ARCHITECTURE):
            raise self._error("not an overlay")
        if values.get(BASE_KEY) != GgufValue.string(manifest.base_digest):
            raise self._error(f"belongs to a base other than {manifest.files[0].name}")

    def _check_ids(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        values = self._part.metadata
        for key, ids in expected.items():
            if values.get(key) != GgufValue.array(GGUFValueType.INT32, ids):
                raise self._error(f"{key}: differs from the experts that {MANIFEST_NAME} names")
        odd = [key for key in values if key.startswith(_IDS_PREFIX) and key not in expected]
        if odd:
            raise self._error(f"{odd[0]}: not in {MANIFEST_NAME}")

    def _kind(self, layer: int, name: str) -> GGMLQuantizationType:
        kind = next((kind for kind in GGMLQuantizationType if kind.name.lower() == name), None)
        if kind is None:
            raise self._error(f"layer {layer}: unknown type '{name}'")
        return kind

    def _add(self, shape: MoeLayer, kind: GGMLQuantizationType, ids: Iterable[int]) -> None:
        copies = self.copies.setdefault(shape.layer, {})
        for number, expert in enumerate(ids):
            if expert >= shape.n_experts:
                raise self._error(f"layer {shape.layer}: expert {expert}, the base has {shape.n_experts}")
            if expert in copies:
                raise self._error(f"layer {shape.layer}: expert {expert} has two better copies")
            copies[expert] = (kind, number)

    def _check_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        odd = self._part.tensors.keys() ^ expected.keys()
        if odd:
            name = min(odd)
            where = (
                f"in {MANIFEST_NAME} but not in the file"
                if name in expected
                else f"in the file but not in {MANIFEST_NAME}"
            )
            raise self._error(f"{name}: {where}")
        for name, shape in expected.items():
            info = self._part.tensors[name].info
            if info.shape != shape or f".{info.type.name.lower()}.weight" not in name:
                raise self._error(f"{name}: {info.type.name} {info.shape}, expected shape {shape}")

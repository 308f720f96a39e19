"""GGUF models as a source: contents against what was written, all layouts, and models that llama.cpp would crash on."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT
from gguf import GGUFValueType as VT

from localrun.errors import FormatError, LocalrunError, StoreError, UnsupportedModelError
from localrun.quant.gguf.file import GgufValue, build_header, read_gguf, tensor_offsets
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.manifest import MANIFEST_NAME, Manifest, ModelFile, checksum
from localrun.quant.model.source import PROJECTIONS, Encoding, TensorInfo
from localrun.quant.open import open_model
from tests.gguf_models import TinyDeepseek4, deepseek4_tensors, write_deepseek4, write_gguf
from tests.stock_llama import gguf_context, stock_logits
from tools.make_moe_gguf import MoeDims, write_moe_gguf

MODEL = TinyDeepseek4()
WRITTEN = deepseek4_tensors(MODEL)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_deepseek4(path)
    return path


def expert_bytes(source: GgufSource, layer: int, expert: int) -> list[bytes]:
    """The three projections as the extents say."""
    result = []
    for projection in source.expert(layer, expert):
        (extent,) = projection.extents
        with source.files[extent.file].open("rb") as file:
            file.seek(extent.offset)
            result.append(file.read(extent.n_bytes))
    return result


def assert_same_contents(source: GgufSource) -> None:
    for name, (values, kind) in WRITTEN.items():
        assert source.tensors[name].type == kind
        if not name.endswith("_exps.weight"):
            assert source.read_tensor(name).tobytes() == values.tobytes(), name
    for layer in range(len(MODEL.ratios)):
        for expert in range(MODEL.n_experts):
            stacks = [WRITTEN[f"blk.{layer}.ffn_{p}_exps.weight"][0] for p in PROJECTIONS]
            assert expert_bytes(source, layer, expert) == [stack[expert].tobytes() for stack in stacks]


@pytest.mark.parametrize("alignment", [32, 4096])
def test_one_file_of_any_alignment_gives_what_was_written(tmp_path: Path, alignment: int) -> None:
    write_deepseek4(tmp_path / "m.gguf", alignment=alignment)
    assert_same_contents(GgufSource.open(tmp_path / "m.gguf"))


def test_any_part_of_a_split_model_opens_the_whole(tmp_path: Path) -> None:
    parts = write_deepseek4(tmp_path / "m.gguf", split_max_tensors=30)
    assert len(parts) == 4
    for path in (parts[0], parts[2], tmp_path):
        source = GgufSource.open(path)
        assert_same_contents(source)
        assert source.path == path
        assert list(source.files) == parts
        assert not any(key.startswith("split.") for key in source.metadata)


def test_metadata_is_plain_values(tiny: Path) -> None:
    metadata = GgufSource.open(tiny).metadata
    assert metadata["general.architecture"] == "deepseek4"
    assert metadata["deepseek4.attention.compress_ratios"] == [0, 4, 128]
    assert metadata["deepseek4.expert_weights_norm"] is True
    assert metadata["deepseek4.expert_weights_scale"] == 1.5
    with pytest.raises(KeyError):
        metadata["nothing"]


def test_experts_are_described_by_layer(tiny: Path) -> None:
    source = GgufSource.open(tiny)
    assert list(source.moe_layers) == [0, 1, 2]
    layer = source.moe_layers[1]
    assert (layer.n_experts, layer.n_embd, layer.n_ff) == (MODEL.n_experts, MODEL.n_embd, MODEL.n_ff)
    gate, up, down = source.expert(1, 3)
    assert (gate.n_out, gate.n_in) == (up.n_out, up.n_in) == (MODEL.n_ff, MODEL.n_embd)
    assert (down.n_out, down.n_in) == (MODEL.n_embd, MODEL.n_ff)
    assert {p.encoding for p in (gate, up, down)} == {Encoding.GGML}
    assert layer.expert_bytes == gate.n_bytes + up.n_bytes + down.n_bytes
    assert gate.checksum is None
    with pytest.raises(IndexError):
        source.expert(1, MODEL.n_experts)


def test_projections_may_have_types_of_their_own(tmp_path: Path) -> None:
    down = gguf.quants.quantize(np.ones((8, 128, 64), np.float32), QT.Q8_0)
    write_deepseek4(tmp_path / "m.gguf", replace_tensors={"blk.1.ffn_down_exps.weight": (down, QT.Q8_0)})
    layers = GgufSource.open(tmp_path / "m.gguf").moe_layers
    assert layers[1].types == (QT.MXFP4, QT.MXFP4, QT.Q8_0)
    assert layers[2].types == (QT.MXFP4, QT.MXFP4, QT.MXFP4)


def test_llama_cpp_takes_the_header(tiny: Path, tmp_path: Path) -> None:
    for source in (
        GgufSource.open(tiny),
        GgufSource.open(write_deepseek4(tmp_path / "m.gguf", split_max_tensors=30)[1]),
    ):
        with gguf_context(source.gguf_header()) as (lib, context):
            names = [lib.gguf_get_tensor_name(context, i).decode() for i in range(lib.gguf_get_n_tensors(context))]
            assert names == list(source.tensors)


def test_stock_llama_cpp_runs_the_same_file(tiny: Path) -> None:
    GgufSource.open(tiny)
    logits = stock_logits(tiny, range(40))
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01


def test_identity_names_the_weights_not_the_path(tiny: Path, tmp_path: Path) -> None:
    identity = GgufSource.open(tiny).identity
    shutil.copy(tiny, tmp_path / "copy.gguf")
    assert GgufSource.open(tmp_path / "copy.gguf").identity == identity
    write_deepseek4(tmp_path / "other.gguf", seed=1)
    assert GgufSource.open(tmp_path / "other.gguf").identity != identity


def test_reading_a_stack_or_an_unknown_tensor_is_a_callers_mistake(tiny: Path) -> None:
    source = GgufSource.open(tiny)
    with pytest.raises(ValueError, match="stack of experts"):
        source.read_tensor("blk.0.ffn_up_exps.weight")
    with pytest.raises(KeyError):
        source.read_tensor("nothing")


def test_a_file_that_shrinks_after_opening_is_a_store_error(tmp_path: Path) -> None:
    (path,) = write_deepseek4(tmp_path / "m.gguf")
    source = GgufSource.open(path)
    with path.open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(StoreError, match=r"blk.2.ffn_norm.weight: the file ended at byte"):
        source.read_tensor("blk.2.ffn_norm.weight")
    path.unlink()
    with pytest.raises(StoreError, match="can't be opened"):
        source.read_tensor("output.weight")


# Parts and folders


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = write_deepseek4(tmp_path / "m.gguf", split_max_tensors=30)
    parts[2].unlink()
    with pytest.raises(FormatError, match=r"1 of 4 parts are missing, first m-00003-of-00004.gguf"):
        GgufSource.open(parts[0])


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    parts = write_deepseek4(tmp_path / "m.gguf", split_max_tensors=30)
    with pytest.raises(FormatError, match="one of 4 parts, but 1 were found"):
        GgufSource.open(parts[0].rename(tmp_path / "model.gguf"))


def test_exchanged_parts_are_refused(tmp_path: Path) -> None:
    parts = write_deepseek4(tmp_path / "m.gguf", split_max_tensors=30)
    spare = parts[1].rename(tmp_path / "spare")
    parts[2].rename(parts[1])
    spare.rename(parts[2])
    with pytest.raises(FormatError, match="is part 3, its name says 2"):
        GgufSource.open(parts[0])


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    parts = write_deepseek4(tmp_path / "m.gguf", split_max_tensors=30)
    first = read_gguf(parts[0])
    second = read_gguf(parts[1])
    infos = [t.info for t in first.tensors.values()]
    header = build_header(second.metadata, infos, 32)
    parts[1].write_bytes(header + bytes(tensor_offsets(infos, 32)[-1] + infos[-1].n_bytes))
    with pytest.raises(FormatError, match="is in another part too"):
        GgufSource.open(parts[0])


def test_a_folder_must_hold_one_model(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"contains no GGUF model"):
        GgufSource.open(tmp_path)
    write_deepseek4(tmp_path / "a.gguf")
    assert GgufSource.open(tmp_path).files == (tmp_path / "a.gguf",)
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(FormatError, match=r"2 GGUF models: a.gguf \([0-9.]+ MiB\), b.gguf"):
        GgufSource.open(tmp_path)


# Converted directories


def manifest_of(source: GgufSource) -> Manifest:
    stacks = {f"blk.{layer}.ffn_{p}_exps.weight" for layer in source.moe_layers for p in PROJECTIONS}
    files = tuple(
        ModelFile(part.path.name, part.size_bytes, checksum(part.path.read_bytes()[: part.data_offset]))
        for part in source.headers
    )
    experts = {}
    for layer, shape in source.moe_layers.items():
        digests = [[checksum(data) for data in expert_bytes(source, layer, e)] for e in range(shape.n_experts)]
        gate, up, down = ([triple[i] for triple in digests] for i in range(3))
        experts[layer] = (gate, up, down)
    dense = {name: checksum(source.read_tensor(name)) for name in source.tensors if name not in stacks}
    return Manifest(files, dense, experts, tools={"tests": "1"})


def put_manifest(folder: Path, manifest: Manifest) -> None:
    """Without the fsync of `write_manifest`, which takes seconds on a busy disk."""
    (folder / MANIFEST_NAME).write_text(manifest.to_json())


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    folder = tmp_path / "converted"
    folder.mkdir()
    write_deepseek4(folder / "model.gguf", alignment=4096)
    put_manifest(folder, manifest_of(GgufSource.open(folder / "model.gguf")))
    return folder


def test_checksums_come_from_the_manifest(converted: Path) -> None:
    for path in (converted, converted / "model.gguf"):
        source = open_model(path)
        assert isinstance(source, GgufSource)
        for layer, expert in ((0, 0), (2, 7)):
            checksums = [projection.checksum for projection in source.expert(layer, expert)]
            assert checksums == [checksum(data) for data in expert_bytes(source, layer, expert)]


def test_somebody_elses_gguf_beside_a_converted_model_has_no_checksums(converted: Path) -> None:
    write_deepseek4(converted / "other.gguf", seed=3)
    assert GgufSource.open(converted / "other.gguf").manifest is None
    assert GgufSource.open(converted).manifest is not None


def test_a_converted_model_of_another_size_is_refused(converted: Path) -> None:
    with (converted / "model.gguf").open("ab") as file:
        file.write(b"x")
    with pytest.raises(FormatError, match=r"model.gguf: \d+ bytes, localrun.json says"):
        GgufSource.open(converted)
    (converted / "model.gguf").unlink()
    with pytest.raises(FormatError, match=r"model.gguf: missing, but listed in localrun.json"):
        GgufSource.open(converted)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: (m.tensors | {"x": "0" * 16}, m.experts), "checksum of an unknown tensor 'x'"),
        (lambda m: ({k: v for k, v in m.tensors.items() if k != "output.weight"}, m.experts), "'output.weight'"),
        (lambda m: (m.tensors, {k: v for k, v in m.experts.items() if k != 1}), "experts.1: layers differ"),
        (lambda m: (m.tensors, m.experts | {2: tuple(d[:-1] for d in m.experts[2])}), "7 checksums for 8 experts"),
    ],
)
def test_a_manifest_must_fit_its_model(
    converted: Path, change: Callable[[Manifest], tuple[Mapping[str, str], object]], problem: str
) -> None:
    manifest = manifest_of(GgufSource.open(converted))
    tensors, experts = change(manifest)
    put_manifest(converted, Manifest(manifest.files, tensors, experts))  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=problem) as caught:
        GgufSource.open(converted)
    assert MANIFEST_NAME in str(caught.value)


# deepseek4: what would crash llama.cpp

F32 = np.float32


def zeros(*shape: int, dtype: type = F32) -> np.ndarray:
    return np.zeros(shape, dtype)


NAN_BIAS = zeros(8)
NAN_BIAS[3] = np.nan
FAR_TABLE = zeros(64, 2, dtype=np.int32)
FAR_TABLE[5, 1] = 8
NEGATIVE_TABLE = zeros(64, 2, dtype=np.int32)
NEGATIVE_TABLE[0, 0] = -1
BAD_TENSORS = {
    "missing norm": ({"blk.1.attn_norm.weight": None}, "no tensor 'blk.1.attn_norm.weight'"),
    "missing output": ({"output.weight": None}, "no tensor 'output.weight'"),
    "missing indexer": ({"blk.1.indexer.proj.weight": None}, "no tensor 'blk.1.indexer.proj.weight'"),
    "missing table": ({"blk.0.ffn_gate_tid2eid.weight": None}, "no tensor 'blk.0.ffn_gate_tid2eid.weight'"),
    "missing bias": ({"blk.2.exp_probs_b.bias": None}, "no tensor 'blk.2.exp_probs_b.bias'"),
    "short norm": ({"output_norm.weight": (zeros(64), QT.F32)}, "output_norm.weight: shape (64,), expected (128,)"),
    "transposed matrix": ({"blk.0.attn_q_a.weight": (zeros(128, 64), QT.F32)}, "shape (64, 128), expected (128, 64)"),
    "vocabulary": ({"token_embd.weight": (zeros(65, 128), QT.F32)}, "shape (128, 65) for a vocabulary of 64"),
    "fewer experts": (
        {"blk.1.ffn_up_exps.weight": (zeros(7, 64, 128), QT.F32)},
        "blk.1.ffn_up_exps.weight: shape (128, 64, 7), expected (128, 64, 8)",
    ),
    "integer norm": (
        {"output_norm.weight": (zeros(128, dtype=np.int8), QT.I8)},
        "output_norm.weight: type I8 can't be used for a vector",
    ),
    "integer matrix": (
        {"blk.0.attn_kv.weight": (zeros(128, 128, dtype=np.int8), QT.I8)},
        "blk.0.attn_kv.weight: type I8 can't be used for a matrix",
    ),
    "double matrix": (
        {"blk.0.attn_kv.weight": (zeros(128, 128, dtype=np.float64), QT.F64)},
        "type F64 can't be used for a matrix",
    ),
    "integer experts": (
        {"blk.1.ffn_up_exps.weight": (zeros(8, 64, 128, dtype=np.int16), QT.I16)},
        "type I16 is not a weight type",
    ),
    "table of numbers": (
        {"blk.0.ffn_gate_tid2eid.weight": (zeros(64, 2), QT.F32)},
        "blk.0.ffn_gate_tid2eid.weight: type F32 can't be used for a table of ids",
    ),
    "expert out of range": ({"blk.0.ffn_gate_tid2eid.weight": (FAR_TABLE, QT.I32)}, "expert 8 of 8"),
    "negative expert": ({"blk.0.ffn_gate_tid2eid.weight": (NEGATIVE_TABLE, QT.I32)}, "expert -1 of 8"),
    "router bias NaN": ({"blk.1.exp_probs_b.bias": (NAN_BIAS, QT.F32)}, "blk.1.exp_probs_b.bias: not a finite number"),
    "unknown tensor": ({"blk.1.surprise.weight": (zeros(4), QT.F32)}, "unexpected tensor 'blk.1.surprise.weight'"),
    "scale of nothing": (
        {"blk.1.surprise.scale": (np.ones(1, F32), QT.F32)},
        "unexpected tensor 'blk.1.surprise.scale'",
    ),
    "half a scale": (
        {"blk.1.attn_q_a.scale": (np.ones(1, np.float16), QT.F16)},
        "blk.1.attn_q_a.scale: a scale that is not F32",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS, ids=BAD_TENSORS.keys())
def test_wrong_tensors_are_named(tmp_path: Path, case: str) -> None:
    changes, problem = BAD_TENSORS[case]
    (path,) = write_deepseek4(tmp_path / "m.gguf", replace_tensors=changes)  # type: ignore[arg-type]
    with pytest.raises(FormatError) as caught:
        GgufSource.open(path)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)


def test_tensors_that_llama_cpp_takes_too_are_accepted(tmp_path: Path) -> None:
    extras = {
        "blk.1.exp_probs_b_vl.bias": (zeros(8), QT.F32),
        "blk.1.attn_output_a.weight": (zeros(2, 32, 256), QT.F32),
        "blk.1.attn_compressor_ape.weight": (zeros(4, 256, dtype=np.float16), QT.F16),
    }
    (path,) = write_deepseek4(tmp_path / "m.gguf", replace_tensors=extras)  # type: ignore[arg-type]
    assert GgufSource.open(path).tensors.keys() >= extras.keys()


# --- the same values in another form


SCALES = ("blk.1.attn_q_a.scale", "blk.1.ffn_up_shexp.scale", "blk.1.indexer.attn_q_b.scale", "output.scale")


@pytest.mark.parametrize("name", [*SCALES, "blk.1.ffn_up_exps.scale"])
def test_scales_that_nobody_applies_must_be_one(tmp_path: Path, name: str) -> None:
    n = 8 if "_exps" in name else 1
    for value in (1.0, 2.0):
        extra = {name: (np.full(n, value, F32), QT.F32)}
        write_deepseek4(tmp_path / "m.gguf", replace_tensors=extra)  # type: ignore[arg-type]
        if value == 1.0:
            assert name not in GgufSource.open(tmp_path / "m.gguf").tensors
        else:
            with pytest.raises(UnsupportedModelError, match=f"{name}: a scale of 2, which neither localrun nor"):
                GgufSource.open(tmp_path / "m.gguf")


def test_stock_llama_cpp_does_not_apply_scales_of_this_architecture(tiny: Path, tmp_path: Path) -> None:
    extra = {"blk.1.ffn_up_exps.scale": (np.full(8, 100.0, F32), QT.F32)}
    (path,) = write_deepseek4(tmp_path / "m.gguf", replace_tensors=extra)  # type: ignore[arg-type]
    assert np.array_equal(stock_logits(path, range(8)), stock_logits(tiny, range(8)))


def test_scales_of_activations_mean_nothing_here(tmp_path: Path) -> None:
    extra = {"blk.1.ffn_up_exps.input_scale": (np.full(8, 0.25, F32), QT.F32)}
    (path,) = write_deepseek4(tmp_path / "m.gguf", replace_tensors=extra)  # type: ignore[arg-type]
    assert not extra.keys() & GgufSource.open(path).tensors.keys()


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(F32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind", [QT.F16, QT.BF16])
@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.hc_attn_base.weight", "blk.1.exp_probs_b.bias"])
def test_vectors_of_half_precision_are_shown_as_f32(tmp_path: Path, kind: QT, name: str) -> None:
    n = {"output_norm.weight": 128, "blk.1.hc_attn_base.weight": 24}.get(name, 8)
    values = (np.arange(n, dtype=F32) - 3) / 4  # exact in both
    stored = values.astype(np.float16) if kind == QT.F16 else bf16(values)
    (path,) = write_deepseek4(tmp_path / "m.gguf", replace_tensors={name: (stored, kind)})
    source = GgufSource.open(path)
    assert source.tensors[name] == TensorInfo(name, (n,), QT.F32, 4 * n)
    assert np.array_equal(source.read_tensor(name).view(F32), values)
    with gguf_context(source.gguf_header()):
        pass


def test_a_table_of_64_bits_is_shown_with_32(tiny: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_gate_tid2eid.weight"
    table = GgufSource.open(tiny).read_tensor(name).view(np.int32)
    wide = {name: (table.reshape(64, 2).astype(np.int64), QT.I64)}
    (path,) = write_deepseek4(tmp_path / "m.gguf", replace_tensors=wide)  # type: ignore[arg-type]
    source = GgufSource.open(path)
    assert source.tensors[name] == TensorInfo(name, (2, 64), QT.I32, table.nbytes)
    assert np.array_equal(source.read_tensor(name).view(np.int32), table)
    wide[name][0][3, 1] = 1 << 40
    write_deepseek4(tmp_path / "m.gguf", replace_tensors=wide)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=f"{name}: {1 << 40} is not a valid expert number"):
        GgufSource.open(path)


def test_fused_gate_and_up_are_shown_as_two_stacks(tiny: Path, tmp_path: Path) -> None:
    whole, separate = deepseek4_tensors(TinyDeepseek4()), GgufSource.open(tiny)
    changes: dict[str, tuple[np.ndarray, QT] | None] = {}
    for layer in range(3):
        (gate, kind), (up, _) = (whole[f"blk.{layer}.ffn_{p}_exps.weight"] for p in ("gate", "up"))
        changes |= {f"blk.{layer}.ffn_{p}_exps.weight": None for p in ("gate", "up")}
        changes[f"blk.{layer}.ffn_gate_up_exps.weight"] = (np.concatenate([gate, up], axis=1), kind)
    (path,) = write_deepseek4(tmp_path / "m.gguf", replace_tensors=changes)
    source = GgufSource.open(path)
    assert source.tensors.keys() == separate.tensors.keys()
    assert source.moe_layers == separate.moe_layers
    for layer in range(3):
        for expert in range(8):
            assert expert_bytes(source, layer, expert) == expert_bytes(separate, layer, expert)
    with gguf_context(source.gguf_header()):
        pass


def rewrite(path: Path, changes: Mapping[str, GgufValue | None], target: Path) -> Path:
    """The same tensors under changed metadata."""
    file = read_gguf(path)
    metadata = {key: value for key, value in file.metadata.items() if key not in changes}
    metadata |= {key: value for key, value in changes.items() if value is not None}
    infos = [tensor.info for tensor in file.tensors.values()]
    target.write_bytes(build_header(metadata, infos, file.alignment) + path.read_bytes()[file.data_offset :])
    return target


U32, F, S = GgufValue.uint32, GgufValue.float32, GgufValue.string
P = "deepseek4."
BAD_KEYS: dict[str, tuple[dict[str, GgufValue | None], str]] = {
    "no architecture": ({"general.architecture": None}, "no key 'general.architecture'"),
    "architecture a number": ({"general.architecture": U32(4)}, "general.architecture: expected STRING, got UINT32"),
    "no layers": ({P + "block_count": U32(0)}, "block_count: 0 is not between 1 and 512"),
    "too many layers": ({P + "block_count": U32(513)}, "block_count: 513 is not between 1 and 512"),
    "fewer layers": ({P + "block_count": U32(2)}, "blk.2: the model has 2 layers"),
    "block count of another type": (
        {P + "block_count": GgufValue.scalar(VT.UINT64, 3)},
        "block_count: expected UINT32, got UINT64",
    ),
    "2000 experts": ({P + "expert_count": U32(2000)}, "expert_count: 2000 is not between 1 and 1024"),
    "more used than there are": ({P + "expert_used_count": U32(9)}, "expert_used_count: 9 of 8 experts"),
    "none used": ({P + "expert_used_count": U32(0)}, "expert_used_count: 0 of 8 experts"),
    "groups": ({P + "expert_group_count": U32(3)}, "expert_group_count: 3 groups of 8 experts"),
    "no heads": ({P + "attention.head_count": U32(0)}, "attention.head_count: 0 heads"),
    "two key heads": ({P + "attention.head_count_kv": U32(2)}, "head_count_kv: 2, this architecture has 1"),
    "values of another size": ({P + "attention.value_length": U32(64)}, "value_length: differs from key_length 128"),
    "index size": ({P + "attention.indexer.key_length": U32(96)}, "key_length: 96 is not a multiple of 64"),
    "rope larger than the index": ({P + "rope.dimension_count": U32(130)}, "rope.dimension_count: 130"),
    "uneven groups": ({P + "attention.output_group_count": U32(3)}, "3 groups of 4 heads"),
    "unknown ratio": (
        {P + "attention.compress_ratios": GgufValue.array(VT.INT32, [0, 4, 64])},
        "compress_ratios: 64 is not 0, 4 or 128",
    ),
    "ratios as numbers": (
        {P + "attention.compress_ratios": GgufValue.array(VT.FLOAT32, [0.0, 4.0, 128.0])},
        "compress_ratios: expected a list of INT32",
    ),
    "too few ratios": (
        {P + "attention.compress_ratios": GgufValue.array(VT.INT32, [0, 4])},
        "compress_ratios: 2 values for 3 layers",
    ),
    "other scoring": ({P + "expert_gating_func": U32(2)}, "expert_gating_func: this architecture has only 4"),
    "epsilon NaN": ({P + "attention.layer_norm_rms_epsilon": F(float("nan"))}, "epsilon: nan is not between"),
    "endless Sinkhorn": (
        {P + "hyper_connection.sinkhorn_iterations": U32(0xFFFFFFFF)},
        "sinkhorn_iterations: 4294967295 is not between 1 and 1000",
    ),
    "five streams": ({P + "hyper_connection.count": U32(5)}, "hyper_connection.count: 5 is not between 4 and 4"),
    "more hash layers than layers": ({P + "hash_layer_count": U32(4)}, "hash_layer_count: 4 is not between 0 and 3"),
    "rope scaling": ({P + "rope.scaling.type": S("spiral")}, "unknown scaling 'spiral'"),
    "no limits": ({P + "swiglu_clamp_exp": None}, "no key 'deepseek4.swiglu_clamp_exp'"),
    "limits": ({P + "swiglu_clamp_exp": GgufValue.array(VT.FLOAT32, [10.0] * 4)}, "4 values for 3 layers"),
    "no vocabulary": ({P + "vocab_size": None}, "no key 'deepseek4.vocab_size'"),
    "empty vocabulary": ({P + "vocab_size": U32(0)}, "vocab_size: 0 is not between"),
    "tokenizer without tokens": ({"tokenizer.ggml.model": S("gpt2")}, "tokens: expected a list of strings"),
    "tokens of another number": (
        {"tokenizer.ggml.model": S("gpt2"), "tokenizer.ggml.tokens": GgufValue.strings(["a", "b"])},
        "token_embd.weight: shape (128, 64) for a vocabulary of 2",
    ),
    "token twice": (
        {"tokenizer.ggml.model": S("gpt2"), "tokenizer.ggml.tokens": GgufValue.strings(["a"] * 2 + list("bcdefg"))},
        "1 tokens occur twice",
    ),
    "token types": (
        {
            "tokenizer.ggml.model": S("gpt2"),
            "tokenizer.ggml.tokens": GgufValue.strings([str(i) for i in range(64)]),
            "tokenizer.ggml.token_type": GgufValue.array(VT.INT32, [1]),
        },
        "token_type: expected 64 INT32 values",
    ),
}


@pytest.mark.parametrize("case", BAD_KEYS, ids=BAD_KEYS.keys())
def test_wrong_metadata_is_named(tiny: Path, tmp_path: Path, case: str) -> None:
    changes, problem = BAD_KEYS[case]
    path = rewrite(tiny, changes, tmp_path / "m.gguf")
    with pytest.raises(FormatError) as caught:
        GgufSource.open(path)
    assert problem in str(caught.value)


@pytest.mark.parametrize("count", [None, U32(0)])
def test_a_model_that_counts_no_experts_is_unsupported(tiny: Path, tmp_path: Path, count: GgufValue | None) -> None:
    path = rewrite(tiny, {P + "expert_count": count}, tmp_path / "m.gguf")
    with pytest.raises(UnsupportedModelError, match="architecture 'deepseek4' without routed experts"):
        GgufSource.open(path)


@pytest.mark.parametrize("ratios", [(0, 0, 128), (0, 4, 4)])
def test_layer_kinds_that_crash_llama_cpp_are_unsupported(tmp_path: Path, ratios: tuple[int, ...]) -> None:
    (path,) = write_deepseek4(tmp_path / "m.gguf", TinyDeepseek4(ratios=ratios))
    with pytest.raises(UnsupportedModelError, match="no layer of ratio"):
        GgufSource.open(path)


@pytest.mark.parametrize("other", [QT.Q4_0, QT.NVFP4, QT.F16])
def test_a_changed_type_leaves_a_gap_or_an_overlap_and_is_refused_as_llama_cpp_refuses_it(
    tiny: Path, tmp_path: Path, other: QT
) -> None:
    data, name = bytearray(tiny.read_bytes()), b"blk.1.attn_q_a.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert struct.unpack_from("<I", data, at)[0] == QT.Q8_0
    struct.pack_into("<I", data, at, other)
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="tensors must be contiguous"):
        GgufSource.open(path)
    with pytest.raises(AssertionError, match="refuses the header"), gguf_context(bytes(data)):
        pass


# Next-token-prediction blocks


def test_prediction_blocks_are_left_out(tmp_path: Path) -> None:
    model = TinyDeepseek4(ratios=(0, 4, 128, 0))
    extra = {"blk.3.nextn.eh_proj.weight": (zeros(128, 256), QT.F32)}
    (whole,) = write_deepseek4(tmp_path / "whole.gguf", model, replace_tensors=extra)  # type: ignore[arg-type]
    path = rewrite(whole, {P + "nextn_predict_layers": U32(1)}, tmp_path / "m.gguf")
    source = GgufSource.open(path)
    assert list(source.moe_layers) == [0, 1, 2]
    assert source.metadata[P + "block_count"] == 3
    assert source.metadata[P + "swiglu_clamp_exp"] == [10.0] * 3
    assert P + "nextn_predict_layers" not in source.metadata
    assert not any(name.startswith("blk.3.") for name in source.tensors)


def test_a_file_with_only_the_prediction_block_is_unsupported(tmp_path: Path) -> None:
    model = TinyDeepseek4(ratios=(4,))
    extra = {"blk.0.nextn.eh_proj.weight": (zeros(128, 256), QT.F32)}
    (whole,) = write_deepseek4(tmp_path / "whole.gguf", model, replace_tensors=extra)  # type: ignore[arg-type]
    path = rewrite(whole, {P + "nextn_predict_layers": U32(1)}, tmp_path / "m.gguf")
    with pytest.raises(UnsupportedModelError, match="only the next-token-prediction block"):
        GgufSource.open(path)


# Other architectures


@pytest.mark.parametrize("architecture", ["olmoe", "qwen3moe"])
@pytest.mark.parametrize("kind", [QT.F16, QT.Q4_0, QT.MXFP4])
def test_other_architectures_open(tmp_path: Path, architecture: str, kind: QT) -> None:
    path = tmp_path / "m.gguf"
    write_moe_gguf(path, architecture, MoeDims(n_experts=4), expert_type=kind)
    source = GgufSource.open(path)
    assert {layer.types for layer in source.moe_layers.values()} == {(kind, kind, kind)}
    assert np.isfinite(stock_logits(path, range(8))).all()


def test_a_model_without_output_matrix_shows_the_embedding_under_that_name(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_moe_gguf(path, "qwen3moe", tied=True)
    source = GgufSource.open(path)
    embedding = source.read_tensor("token_embd.weight")
    assert np.array_equal(source.read_tensor("output.weight"), embedding)
    assert source.tensors["output.weight"] == TensorInfo("output.weight", (128, 64), QT.F16, embedding.size)


def write_other(path: Path, tensors: dict[str, tuple[np.ndarray, QT]], *, experts: int = 2) -> Path:
    def add_keys(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.add_embedding_length(32)
        writer.add_context_length(64)
        writer.add_head_count(1)
        writer.add_expert_count(experts)
        writer.add_expert_used_count(1)
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(4)

    write_gguf(path, "qwen3moe", tensors, add_keys)
    return path


STACK = (zeros(2, 32, 32), QT.F32)
UNSUPPORTED = {
    "merged with an odd number of rows": (
        {"blk.0.ffn_gate_up_exps.weight": (zeros(2, 31, 32), QT.F32)},
        "gate and up of the experts in one tensor of this form",
    ),
    "merged with biases": (
        {"blk.0.ffn_gate_up_exps.bias": (zeros(2, 32), QT.F32)},
        "gate and up of the experts in one",
    ),
    "one tensor per expert": ({"blk.0.ffn_up.1.weight": STACK}, "one tensor per expert"),
    "no gate": ({"blk.0.ffn_up_exps.weight": STACK, "blk.0.ffn_down_exps.weight": STACK}, "experts without ffn_gate"),
    "dense": ({"blk.0.ffn_up.weight": STACK}, "architecture 'qwen3moe' without routed experts"),
}


@pytest.mark.parametrize("case", UNSUPPORTED, ids=UNSUPPORTED.keys())
def test_other_expert_layouts_are_unsupported(tmp_path: Path, case: str) -> None:
    tensors, problem = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModelError, match=problem):
        GgufSource.open(write_other(tmp_path / "m.gguf", tensors))


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"blk.0.attn_norm.weight": (zeros(32, dtype=np.int8), QT.I8)}, "attn_norm.weight: type I8 can't be used"),
        ({"blk.0.attn_q.weight": (zeros(32, 32, dtype=np.int8), QT.I8)}, "attn_q.weight: type I8 can't be used"),
        ({"blk.1.ffn_up_exps.weight": STACK}, "blk.1: the model has 1 layers"),
        ({"blk.0.ffn_down_exps.weight": (zeros(2, 32, 64), QT.F32)}, "down_exps.weight: shape (64, 32, 2), expected"),
    ],
)
def test_generic_checks_of_other_architectures(
    tmp_path: Path, extra: dict[str, tuple[np.ndarray, QT]], problem: str
) -> None:
    stacks = {f"blk.0.ffn_{p}_exps.weight": STACK for p in PROJECTIONS}
    path = write_other(tmp_path / "m.gguf", stacks | extra)
    with pytest.raises(LocalrunError) as caught:
        GgufSource.open(path)
    assert problem in str(caught.value)

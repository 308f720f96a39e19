"""The plan: names, types, places and metadata of the GGUF that a checkpoint becomes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as QT
from gguf import GGUFValueType

from localrun.errors import UnsupportedModelError, UsageError
from localrun.quant.checkpoint.directory import CONFIG_NAME, Checkpoint
from localrun.quant.checkpoint.mapping import ALIGNMENT, ConversionOptions, ConversionPlan, make_plan
from tests.checkpoints import edit_json, write_small
from tests.reference import unpack, write_f32


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("plan") / "small", single_file=True)


def plan_of(path: Path, options: ConversionOptions | None = None) -> ConversionPlan:
    return make_plan(Checkpoint.open(path), options)


def types_of(plan: ConversionPlan) -> dict[str, QT]:
    return {name: tensor.info.type for name, tensor in plan.tensors.items()}


def test_official_dtypes_become_the_usual_types(small: Path) -> None:
    types = types_of(plan_of(small))
    assert types["blk.1.ffn_up_exps.weight"] == QT.MXFP4
    assert types["blk.1.attn_q_a.weight"] == types["blk.1.ffn_down_shexp.weight"] == QT.Q8_0
    assert types["token_embd.weight"] == types["blk.1.attn_compressor_kv.weight"] == QT.BF16
    assert types["blk.1.attn_norm.weight"] == types["blk.1.hc_attn_fn.weight"] == QT.F32
    assert types["blk.0.ffn_gate_tid2eid.weight"] == QT.I32


def test_options_choose_the_types_of_fp8_and_fp4_only(small: Path) -> None:
    default, exact = types_of(plan_of(small)), types_of(plan_of(small, ConversionOptions(QT.BF16, QT.F32)))
    changed = {name for name in default if default[name] != exact[name]}
    assert {exact[name] for name in changed if "_exps" in name} == {QT.F32}
    assert {exact[name] for name in changed if "_exps" not in name} == {QT.BF16}
    assert {default[name] for name in changed if "_exps" not in name} == {QT.Q8_0}


def test_rows_that_q8_0_can_not_hold_stay_exact(tmp_path: Path) -> None:
    types = types_of(plan_of(unpack("other-1", tmp_path).path))
    assert types["blk.0.attn_q_b.weight"] == QT.BF16  # rows of 48
    assert types["blk.0.attn_q_a.weight"] == QT.Q8_0


def test_f32_checkpoints_stay_f32(tmp_path: Path) -> None:
    write_f32(unpack("flash-1", tmp_path).path, tmp_path / "f32")
    assert set(types_of(plan_of(tmp_path / "f32")).values()) == {QT.F32, QT.I32}


def test_fp8_experts_become_q8_0_or_bf16(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "base", fp8_experts=True)
    assert types_of(plan_of(folder))["blk.0.ffn_gate_exps.weight"] == QT.Q8_0
    assert types_of(plan_of(folder, ConversionOptions(base=QT.BF16)))["blk.0.ffn_gate_exps.weight"] == QT.BF16
    assert types_of(plan_of(folder, ConversionOptions(base=QT.MXFP4)))["blk.0.ffn_gate_exps.weight"] == QT.MXFP4


def test_rows_that_a_type_can_not_hold_are_refused_with_the_tensors_name(small: Path) -> None:
    with pytest.raises(
        UsageError, match=r"layers\.0\.ffn\.experts\.0\.w1\.weight: rows of 64 .* Q2_K's block size 256"
    ) as caught:
        plan_of(small, ConversionOptions(base=QT.Q2_K))
    assert caught.value.hint == "--base mxfp4 or q8_0 or bf16 or f32"


def test_dense_rows_that_a_k_type_can_not_hold_get_a_better_type(tmp_path: Path) -> None:
    types = types_of(plan_of(write_small(tmp_path / "m", hidden_size=256), ConversionOptions(QT.Q4_K)))
    assert types["blk.0.attn_q_a.weight"] == types["blk.0.ffn_gate_shexp.weight"] == QT.Q4_K  # rows of 256
    assert types["blk.0.attn_q_b.weight"] == types["blk.0.ffn_down_shexp.weight"] == QT.Q8_0  # rows of 32


def test_tensors_lie_in_order_on_aligned_places_without_overlap(small: Path) -> None:
    plan = plan_of(small)
    end = len(plan.header)
    for tensor in plan.tensors.values():
        assert tensor.offset % ALIGNMENT == 0
        assert 0 <= tensor.offset - end < ALIGNMENT
        assert [part.offset for part in tensor.parts] == [i * tensor.parts[0].n_bytes for i in range(len(tensor.parts))]
        assert sum(part.n_bytes for part in tensor.parts) == tensor.info.n_bytes
        end = tensor.offset + tensor.info.n_bytes
    assert 0 <= plan.file_size - end < ALIGNMENT


def test_dense_tensors_come_first_then_experts_by_layer(small: Path) -> None:
    tensors = list(plan_of(small).tensors.values())
    first = next(i for i, tensor in enumerate(tensors) if tensor.is_experts)
    assert all(tensor.is_experts for tensor in tensors[first:])
    places = [(tensor.layer, tensor.projection) for tensor in tensors[first:]]
    assert places == [(layer, projection) for layer in range(3) for projection in range(3)]


def test_experts_are_in_order_and_have_both_extents(small: Path) -> None:
    plan = plan_of(small)
    stack = plan.tensors["blk.2.ffn_down_exps.weight"]
    assert [part.source.spec.name for part in stack.parts] == [f"layers.2.ffn.experts.{e}.w2.weight" for e in range(4)]
    assert stack.info.shape == (32, 64, 4)
    weight, scale = stack.parts[1].extents(16, 8)
    source = stack.parts[1].source
    assert source.scale is not None
    assert scale is not None
    assert (weight.offset - source.weight.offset, weight.n_bytes) == (16 * 16, 8 * 16)
    assert (scale.offset - source.scale.offset, scale.n_bytes) == (16, 8)


def test_slices_of_fp8_take_their_rows_of_scales(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "m", q_lora_rank=320, num_attention_heads=4, single_file=True)
    part = plan_of(folder).tensors["blk.0.attn_q_b.weight"].parts[0]  # (256, 320): scales (2, 3)
    assert part.source.scale is not None
    weight, scale = part.extents(128, 128)
    assert scale is not None
    assert (weight.offset - part.source.weight.offset, weight.n_bytes) == (128 * 320, 128 * 320)
    assert (scale.offset - part.source.scale.offset, scale.n_bytes) == (3, 3)


def test_metadata_has_what_llama_cpp_reads_in_the_types_it_wants(small: Path) -> None:
    values = plan_of(small).metadata
    config = json.loads((small / CONFIG_NAME).read_text())
    expected = {
        "deepseek4.block_count": 3,
        "deepseek4.embedding_length": 64,
        "deepseek4.embedding_length_out": 256,
        "deepseek4.attention.head_count_kv": 1,
        "deepseek4.attention.indexer.top_k": 8,
        "deepseek4.expert_gating_func": 4,
        "deepseek4.rope.scaling.original_context_length": 65536,
        "general.file_type": 38,
    }
    for key, value in expected.items():
        assert (values[key].type, values[key].value) == (GGUFValueType.UINT32, value), key
    assert values["deepseek4.rope.freq_base"].type == GGUFValueType.FLOAT32
    assert values["deepseek4.rope.scaling.type"].value == "yarn"
    ratios = values["deepseek4.attention.compress_ratios"]
    assert (ratios.item_type, ratios.value) == (GGUFValueType.INT32, config["compress_ratios"][:3])
    for key in ("deepseek4.swiglu_clamp_exp", "deepseek4.swiglu_clamp_shexp"):
        assert (values[key].item_type, values[key].value) == (GGUFValueType.FLOAT32, [10.0] * 3)


def test_chat_encoder_follows_the_configs_keys(small: Path, tmp_path: Path) -> None:
    assert plan_of(small).metadata["localrun.chat_encoder"].value == "v4"
    later = Path(shutil.copytree(small, tmp_path / "later"))
    edit_json(later / CONFIG_NAME, dspark_target_layer_ids=[0, 1, 2], dspark_markov_rank=8)
    assert plan_of(later).metadata["localrun.chat_encoder"].value == "v4-0731"


def test_same_checkpoint_and_options_give_the_same_plan(small: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "small"))
    assert plan_of(copy).digest == plan_of(small).digest
    assert plan_of(small, ConversionOptions(QT.BF16)).digest != plan_of(small).digest


def test_models_that_would_crash_llama_cpp_are_refused(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "m", compress_ratios=[0, 0, 128, 0])
    with pytest.raises(UnsupportedModelError, match="no layer of ratio 4"):
        plan_of(folder)

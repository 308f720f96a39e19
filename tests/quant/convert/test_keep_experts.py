"""`convert --keep-experts`: a small directory beside a checkpoint, whose experts are read where they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun import cli
from localrun.engine.model_look import look_at
from localrun.engine.planner.sizes import sizes_of
from localrun.errors import FormatError
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.kept import KeptSource
from localrun.quant.convert.converter import DENSE_NAME
from localrun.quant.convert.overlay import write_overlay
from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest
from localrun.quant.open import open_model
from localrun.quant.precision.copies import BetterCopies
from tests.checkpoints import edit_json, write_small
from tests.offload.models import logits
from tests.quant.checkpoint.test_source import same_model
from tests.quant.convert.test_quantized_base import WIDE
from tests.reference import unpack


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and the directory beside it."""
    folder = tmp_path_factory.mktemp("kept")
    source = write_small(folder / "source", **WIDE)
    assert convert(source, folder / "small") == 0
    return source, folder / "small"


@pytest.fixture
def pair(original: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Copies of both; the directory knows where its experts are."""
    source, small = (Path(shutil.copytree(path, tmp_path / path.name)) for path in original)
    assert convert(source, small) == 0
    return source, small


def convert(source: Path, target: Path, *options: str) -> int:
    return cli.main(["convert", str(source), str(target), "--keep-experts", *options])


@pytest.mark.parametrize("name", ["flash-1", "other-1"])
def test_answers_are_those_of_the_checkpoint_to_the_bit(name: str, tmp_path: Path) -> None:
    oracle = unpack(name, tmp_path)
    assert convert(oracle.path, tmp_path / "small") == 0
    rows = []
    for path in (oracle.path, tmp_path / "small"):
        with open_offloaded(open_model(path), OffloadOptions(n_threads=2)) as model:
            rows.append(logits(model, oracle.tokens[:64], batch=64, kv_type="f32"))
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("dense", ["q8_0", "q4_k"])
def test_it_holds_the_dense_part_and_shows_the_whole_model(
    dense: str, original: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = original
    assert convert(source, tmp_path / "small", "--dense", dense) == 0
    assert {path.name for path in (tmp_path / "small").iterdir()} == {DENSE_NAME, MANIFEST_NAME}
    kept, whole = open_model(tmp_path / "small"), open_model(source, dense=QT[dense.upper()])
    assert isinstance(kept, KeptSource)
    assert kept.metadata["general.architecture"] == "deepseek4"
    assert kept.tensors == whole.tensors
    assert kept.moe_layers == whole.moe_layers
    for name in kept.tensors.keys() - {name for name in kept.tensors if "_exps." in name}:
        np.testing.assert_array_equal(kept.read_tensor(name), whole.read_tensor(name), name)
    for layer, moe in kept.moe_layers.items():
        for expert in range(moe.n_experts):
            for ours, theirs in zip(kept.expert(layer, expert), whole.expert(layer, expert), strict=True):
                places = [
                    [(source.files[e.file], e.offset, e.n_bytes) for e in projection.extents]
                    for source, projection in ((kept, ours), (whole, theirs))
                ]
                assert places[0] == places[1]
    assert sizes_of(tmp_path / "small").dense_bytes == sizes_of(source, dense=QT[dense.upper()]).dense_bytes
    assert look_at(tmp_path / "small").n_bytes == (tmp_path / "small" / DENSE_NAME).stat().st_size


def test_chosen_experts_may_have_copies_of_their_own(pair: tuple[Path, Path]) -> None:
    source, small = pair
    write_overlay(Checkpoint.open(source), BetterCopies({0: {1: QT.BF16}, 2: {3: QT.Q2_K}}), small)
    kept, whole = open_model(small), open_model(source)
    assert isinstance(kept, KeptSource)
    assert kept.files[kept.expert(0, 1)[0].extents[0].file].name.startswith("overlay-")
    assert [projection.type for projection in kept.expert(2, 3)] == [QT.Q2_K] * 3
    assert kept.base_expert(0, 1)[1].type == whole.expert(0, 1)[1].type
    assert kept.files[kept.expert(0, 0)[0].extents[0].file].parent == source
    assert kept.moe_layers[0].better == ((QT.BF16,) * 3,)
    assert cli.main(["verify", str(small)]) == 0
    assert cli.main(["convert", str(source), str(small), "--hot", "none"]) == 0
    assert open_model(small).moe_layers == whole.moe_layers


def test_smaller_copies_take_less_memory_and_are_read_at_once_in_adaptive_mode_too(pair: tuple[Path, Path]) -> None:
    source, small = pair
    n_experts = open_model(source).moe_layers[1].n_experts
    write_overlay(Checkpoint.open(source), BetterCopies({1: dict.fromkeys(range(n_experts), QT.Q2_K)}), small)
    rows, sizes, tokens = [], [], list(range(5, 29))
    for path, adaptive in ((source, False), (small, False), (small, True)):
        with open_offloaded(open_model(path), OffloadOptions(n_threads=2, adaptive=adaptive)) as model:
            rows.append(logits(model, tokens, batch=24, kv_type="f32"))
            sizes.append(sizes_of(path).expert_slot_bytes)
    assert sizes[1] < 0.9 * sizes[0]
    assert not np.array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[1], rows[2])


def test_a_moved_source_is_told_with_the_way_out_which_works(pair: tuple[Path, Path]) -> None:
    source, small = pair
    moved = source.rename(source.with_name("elsewhere"))
    with pytest.raises(FormatError, match="which is gone") as caught:
        open_model(small)
    assert caught.value.hint == f"if it was moved: localrun convert NEW_PATH {small} --keep-experts"
    before = (small / DENSE_NAME).stat().st_mtime_ns
    assert convert(moved, small, "--dry-run") == 0
    with pytest.raises(FormatError):
        open_model(small)
    assert convert(moved, small) == 0
    assert (small / DENSE_NAME).stat().st_mtime_ns == before
    kept = open_model(small)
    assert isinstance(kept, KeptSource)
    assert kept.checkpoint == moved


def grow(folder: Path) -> None:
    with next(folder.glob("*.safetensors")).open("ab") as file:
        file.write(b"x")


def lose(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def change_a_weight(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_config(folder: Path) -> None:
    edit_json(folder / "config.json", rope_theta=20000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (grow, "bytes, it had"),
        (lose, "is missing"),
        (change_a_weight, "not the checkpoint"),
        (other_config, "not the checkpoint"),
    ],
)
def test_a_source_that_changed_is_refused(damage: object, message: str, pair: tuple[Path, Path]) -> None:
    source, small = pair
    damage(source)  # type: ignore[operator]
    with pytest.raises(FormatError, match=message) as caught:
        open_model(small)
    assert "--keep-experts" in (caught.value.hint or "")


def test_another_checkpoint_does_not_take_the_place_of_the_first(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, small = pair
    other = write_small(tmp_path / "other", seed=1, **WIDE)
    before = (small / MANIFEST_NAME).read_bytes()
    assert convert(other, small) == 2
    assert (small / MANIFEST_NAME).read_bytes() == before


@pytest.mark.parametrize(
    "options", [("--base", "q2_k"), ("--target", "0-vram,1GiB-ram"), ("--recipe", "ram-64"), ("--split", "1GB")]
)
def test_options_for_experts_are_refused(options: tuple[str, str], original: tuple[Path, Path], tmp_path: Path) -> None:
    assert convert(original[0], tmp_path / "out", *options) == 2
    assert not (tmp_path / "out").exists()


def test_a_finished_one_is_not_made_again_and_its_dense_type_stays(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, small = pair
    capsys.readouterr()
    assert convert(source, small) == 0
    assert "finished; its experts are in" in capsys.readouterr().err
    assert convert(source, small, "--dense", "q4_k") == 2
    assert "dense matrices in q8_0, not q4_k" in capsys.readouterr().err


def test_verify_reads_the_dense_part_and_says_what_it_can_not_check(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, small = pair
    assert cli.main(["verify", str(small)]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"not checked: the experts in {source}, which have no checksums")
    path = small / DENSE_NAME
    data = bytearray(path.read_bytes())
    kept = open_model(small)
    assert isinstance(kept, KeptSource)
    data[kept.tensor_extent("output.weight").offset] ^= 1
    path.write_bytes(data)
    assert cli.main(["verify", str(small)]) == 1
    assert cli.main(["verify", str(small), "--repair", str(source)]) == 0
    path.unlink()
    assert cli.main(["verify", str(small), "--repair", str(source)]) == 0
    same = open_model(small)
    assert same.tensors == open_model(source).tensors


def test_show_names_the_checkpoint(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, small = pair
    capsys.readouterr()
    assert cli.main(["show", str(small), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts_in"] == str(source)
    assert cli.main(["show", str(small)]) == 0
    assert f"read from the checkpoint {source}" in capsys.readouterr().out


def test_the_dense_part_alone_is_no_model(pair: tuple[Path, Path]) -> None:
    _, small = pair
    with pytest.raises(FormatError, match="dense part of a model whose experts") as caught:
        open_model(small / DENSE_NAME)
    assert caught.value.hint == f"pass the folder: {small}"


def test_kept_sections_that_make_no_sense_are_refused(pair: tuple[Path, Path]) -> None:
    _, small = pair
    path = small / MANIFEST_NAME
    whole = json.loads(path.read_text())
    for kept, field in (
        ([], "kept: expected"),
        (whole["kept"] | {"path": "relative"}, "kept.path"),
        (whole["kept"] | {"files": {"../x": 1}}, "kept.files"),
        (whole["kept"] | {"files": {"x": -1}}, "kept.files.x"),
        (whole["kept"] | {"files": {}}, "kept.files"),
        (whole["kept"] | {"identity": 3}, "kept.identity"),
    ):
        path.write_text(json.dumps(whole | {"kept": kept}))
        with pytest.raises(FormatError, match=field.replace(".", r"\.")):
            read_manifest(path)


def test_a_whole_model_is_not_turned_into_a_small_one(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = original
    assert cli.main(["convert", str(source), str(tmp_path / "whole")]) == 0
    assert convert(source, tmp_path / "whole") == 2
    same_model(open_model(source), open_model(tmp_path / "whole"))

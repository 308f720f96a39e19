"""What a path means: folders of quantizations, hub caches, models with companions, and what is refused with a way out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.errors import FormatError, UnsupportedModelError
from localrun.quant.locate import locate, models_at
from localrun.quant.model.manifest import WORK_NAME
from localrun.quant.open import open_model
from tests.gguf_models import TinyDeepseek4, add_deepseek4_keys, deepseek4_tensors, write_deepseek4, write_gguf

F32 = np.float32
DRAFTERS = ["dflash", "deepseek4-dflash-draft", "deepseek_v4_flash_dspark_draft", "deepseek4-dspark", "eagle3"]


def write_relative(path: Path, architecture: str, *, kind: str = "", tensor: str = "a.weight") -> Path:
    def add_keys(writer: gguf.GGUFWriter) -> None:
        if kind:
            writer.add_type(kind)

    write_gguf(path, architecture, {tensor: (np.ones((32, 32), F32), QT.F32)}, add_keys)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = write_deepseek4(tmp_path_factory.mktemp("model") / "m.gguf")
    return path


def put(model: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(model, target))


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_with_one_quantization_opens_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# model")
    file = put(model, tmp_path / "UD-IQ3_XXS" / "M-UD-IQ3_XXS.gguf")
    assert locate(tmp_path).path == file
    assert open_model(tmp_path).moe_layers


def test_a_split_quantization_opens_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "Q4").mkdir()
    parts = write_deepseek4(tmp_path / "Q4" / "m.gguf", split_max_tensors=30)
    assert len(parts) > 1
    assert open_model(tmp_path).files == tuple(parts)


def test_several_quantizations_are_listed_with_their_sizes(model: Path, tmp_path: Path) -> None:
    for name in ("UD-Q2_K_XL", "UD-IQ1_S"):
        put(model, tmp_path / name / f"M-{name}.gguf")
    write_relative((tmp_path / "dspark").with_suffix(".gguf"), "dflash").rename(tmp_path / "d.tmp")
    put(tmp_path / "d.tmp", tmp_path / "dspark" / "drafter.gguf")
    with pytest.raises(FormatError, match=r"2 models: UD-IQ1_S \([0-9.]+ MiB\), UD-Q2_K_XL \([0-9.]+ MiB\)") as caught:
        open_model(tmp_path)
    assert caught.value.hint == "pass one of them"


def test_what_a_conversion_has_not_finished_is_no_model(model: Path, tmp_path: Path) -> None:
    file = put(model, tmp_path / "model.gguf")
    (tmp_path / WORK_NAME).mkdir()
    assert models_at(tmp_path) == ([], tmp_path)
    for path in (tmp_path, file):
        with pytest.raises(FormatError, match="an unfinished conversion"):
            open_model(path)
    whole = put(model, tmp_path / "beside" / "m.gguf")
    assert locate(tmp_path).path == whole


@pytest.mark.parametrize("companion", [*DRAFTERS, "clip", "imatrix"])
def test_companions_beside_a_model_are_passed_over(model: Path, tmp_path: Path, companion: str) -> None:
    file = put(model, tmp_path / "m.gguf")
    if companion == "imatrix":
        write_relative(tmp_path / "a.gguf", "", kind="imatrix", tensor="blk.0.ffn_up_exps.weight.in_sum2")
    else:
        write_relative(tmp_path / "a.gguf", companion)
    assert locate(tmp_path).path == file
    assert open_model(tmp_path).moe_layers


def test_an_encoder_above_quantizations_does_not_hide_them(model: Path, tmp_path: Path) -> None:
    write_relative(tmp_path / "mmproj-F16.gguf", "clip")
    file = put(model, tmp_path / "Q4" / "m.gguf")
    assert locate(tmp_path).path == file


def test_a_config_beside_ggufs_makes_no_checkpoint(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = put(model, tmp_path / "m.gguf")
    assert locate(tmp_path).path == file


# --- hub caches -----------------------------------------------------------------------------------------------------


def hub_repository(hub: Path, model: Path, name: str = "models--owner--name", *, commits: tuple[str, ...]) -> Path:
    repository = hub / name
    blob = put(model, repository / "blobs" / "0123abcd")
    for commit in commits:
        link = repository / "snapshots" / commit / "Q4" / "m.gguf"
        link.parent.mkdir(parents=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repository


def test_a_hub_cache_opens_what_main_refers_to_under_its_own_name(model: Path, tmp_path: Path) -> None:
    repository = hub_repository(tmp_path, model, commits=("aaa", "bbb"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    expected = repository / "snapshots" / "bbb" / "Q4" / "m.gguf"
    for given in (tmp_path, repository, repository / "snapshots" / "bbb", expected):
        found = locate(given)
        assert (found.path, found.name) == (expected, "owner/name")
    assert open_model(repository).tensors


def test_a_hub_cache_without_a_reference_needs_a_single_snapshot(model: Path, tmp_path: Path) -> None:
    assert locate(hub_repository(tmp_path / "one", model, commits=("aaa",))).name == "owner/name"
    with pytest.raises(UnsupportedModelError, match="2 snapshots, and no refs/main"):
        locate(hub_repository(tmp_path / "two", model, commits=("aaa", "bbb")))


def test_several_repositories_of_a_hub_cache_are_listed_by_their_names(model: Path, tmp_path: Path) -> None:
    hub_repository(tmp_path, model, commits=("aaa",))
    hub_repository(tmp_path, model, "models--other--thing", commits=("aaa",))
    with pytest.raises(FormatError, match=r"2 models: other/thing|2 models: owner/name .*, other/thing"):
        locate(tmp_path)


def test_a_snapshot_whose_blob_is_missing_says_so(model: Path, tmp_path: Path) -> None:
    repository = hub_repository(tmp_path, model, commits=("aaa",))
    (repository / "blobs" / "0123abcd").rename(repository / "blobs" / "0123abcd.incomplete")
    with pytest.raises(FormatError, match="a link to a missing file"):
        open_model(repository / "snapshots" / "aaa" / "Q4" / "m.gguf")


# --- what is refused ------------------------------------------------------------------------------------------------


def lfs(path: Path, _: Path) -> Path:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 49400000000\n")
    return path


def page(path: Path, _: Path) -> Path:
    path.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    return path


def renamed(name: str) -> Callable[[Path, Path], Path]:
    return lambda path, model: put(model, path.with_name(name))


def with_sidecar(path: Path, model: Path) -> Path:
    put(model, path.with_name(path.name + ".aria2"))
    return put(model, path)


def never_written(path: Path, model: Path) -> Path:
    data = model.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    os.truncate(path, len(data))
    return path


REFUSED: dict[str, tuple[Callable[[Path, Path], Path], str, str]] = {
    "pointer": (lfs, "a Git LFS pointer", "git lfs pull"),
    "page": (page, "a web page", "download the file itself"),
    "part1of2": (renamed("M.Q4.gguf.part1of2"), "one piece of M.Q4.gguf", "cat M.Q4.gguf.* > M.Q4.gguf"),
    "partaa": (renamed("M.gguf.partaa"), "one piece of M.gguf", "cat M.gguf.* > M.gguf"),
    "part00": (renamed("M.gguf.part00"), "one piece of M.gguf", "cat"),
    "split-a": (renamed("M.gguf-split-a"), "one piece of M.gguf", "cat"),
    "incomplete": (renamed("m.gguf.incomplete"), "an unfinished download", "finish it"),
    "sidecar": (with_sidecar, "an unfinished download (m.gguf.aria2)", "finish"),
    "never written": (never_written, "were never written", "finish it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unfinished_files_are_refused_with_a_way_out(model: Path, tmp_path: Path, case: str) -> None:
    make, problem, hint = REFUSED[case]
    path = make(tmp_path / "m.gguf", model)
    with pytest.raises(FormatError) as caught:
        open_model(path)
    assert problem in str(caught.value)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("case", ["part1of2", "incomplete"])
def test_a_folder_of_unfinished_files_says_what_they_are(model: Path, tmp_path: Path, case: str) -> None:
    make, problem, _ = REFUSED[case]
    make(tmp_path / "m.gguf", model)
    with pytest.raises(FormatError, match=problem):
        open_model(tmp_path)


def test_an_unfinished_hub_download_says_so(tmp_path: Path) -> None:
    left = tmp_path / ".cache" / "huggingface" / "download" / "Q4" / "m.gguf.1a2b.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="an unfinished download"):
        open_model(tmp_path)


@pytest.mark.parametrize("architecture", DRAFTERS)
def test_a_drafter_is_no_chat_model(tmp_path: Path, architecture: str) -> None:
    """Also one with an embedding and everything else that a chat model has."""

    def add_keys(writer: gguf.GGUFWriter) -> None:
        add_deepseek4_keys(writer, TinyDeepseek4())

    write_gguf(tmp_path / "m.gguf", architecture, deepseek4_tensors(TinyDeepseek4()), add_keys)
    with pytest.raises(UnsupportedModelError, match=r"a drafter .*only drafts tokens") as caught:
        open_model(tmp_path / "m.gguf")
    assert caught.value.hint == "pass the main model's file"


@pytest.mark.parametrize("name", ["markov_w1.weight", "mtp.0.e_proj.weight", "enc.output_norm.weight"])
def test_a_drafters_tensors_betray_it_under_any_architecture(tmp_path: Path, name: str) -> None:
    extra = {name: (np.ones((32, 32), F32), QT.F32)}
    (path,) = write_deepseek4(tmp_path / "m.gguf", replace_tensors=extra)
    with pytest.raises(UnsupportedModelError, match="a drafter"):
        open_model(path)


RELATIVES = {
    "V4.1": (("deepseek41", "", "a"), "DeepSeek-V4.1"),
    "V4.1, other spelling": (("deepseek_v41", "", "a"), "DeepSeek-V4.1"),
    "encoder": (("clip", "mmproj", "v.a"), "an image encoder"),
    "importance": (("", "imatrix", "a.in_sum2"), "an importance matrix"),
    "adapter": (("deepseek4", "adapter", "a.lora_a"), "an adapter"),
    "vocabulary": (("deepseek4", "vocab", "a"), "a vocabulary"),
    "dense": (("qwen3", "", "a"), "architecture 'qwen3' is not one"),
    "unheard of": (("deepseek9", "", "a"), "architecture 'deepseek9' is not one"),
}


@pytest.mark.parametrize("case", RELATIVES)
def test_relatives_are_named(tmp_path: Path, case: str) -> None:
    (architecture, kind, tensor), problem = RELATIVES[case]
    path = write_relative(tmp_path / "m.gguf", architecture, kind=kind, tensor=tensor)
    with pytest.raises(UnsupportedModelError, match=problem) as caught:
        open_model(path)
    assert caught.value.hint


def test_a_path_that_can_be_none_is_refused_by_its_name(tmp_path: Path) -> None:
    for name in ("x" * 300, "x\0y"):
        with pytest.raises(FormatError, match="x"):
            open_model(tmp_path / name)

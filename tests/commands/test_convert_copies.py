"""`localrun convert` with better copies: all of it, what it leaves behind, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as QT

from localrun import cli
from localrun.api import precision
from localrun.quant.convert.converter import DENSE_NAME, LEARNED_NAME, MODEL_NAME
from localrun.quant.gguf.file import read_gguf
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest
from localrun.quant.open import open_model
from localrun.quant.precision.dense import KINDS, kind_of
from localrun.quant.precision.dense_solver import types_from_text
from localrun.quant.precision.imatrix import read_imatrix
from localrun.quant.precision.report import REPORT_NAMES
from localrun.units import format_size, parse_size
from tests.checkpoints import SMALL
from tools.make_checkpoint import write_checkpoint
from tools.synthetic_config import CheckpointSpec

DEMO = Path(cli.__file__).parent / "demo"
ONE = 3 * 256 * 256 // 32 * 17
"""Bytes of an expert in MXFP4."""
FORMATS = ("--base", "q2_k", "--hot", f"mxfp4:{5 * ONE}B")
OTHER_TEXT = ("--calibrate", str(DEMO / "evaluation.txt"))
LEARN = ("--calibrate-tokens", "300", "--ram", "64MiB", "--jobs", "2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of eight experts whose rows fit every format, with a tokenizer."""
    return write_source(tmp_path_factory.mktemp("source") / "small", n_experts=8)


def write_source(folder: Path, n_experts: int) -> Path:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": n_experts, "vocab_size": 3840}
    write_checkpoint(folder, CheckpointSpec(SMALL | sizes), tokenizer=DEMO / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out text, short."""
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text((DEMO / "evaluation.txt").read_text("utf-8")[:1500], "utf-8")
    return path


@pytest.fixture(scope="module")
def finished(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("finished") / "out"
    assert convert(source, target, *FORMATS, *LEARN, "--evaluate", text, "--evaluate-types", "q2_k") == 0
    return target


def convert(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def planned_copies(capsys: pytest.CaptureFixture[str]) -> Any:
    """Of a dry run with `--json`."""
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (plan,) = [event for event in events if event["event"] == "plan"]
    return plan["copies"]


def better(folder: Path) -> int:
    """Experts with a better copy."""
    opened = open_model(folder)
    return sum(
        opened.expert(n, e) != opened.base_expert(n, e)
        for n, m in opened.moe_layers.items()
        for e in range(m.n_experts)
    )


def test_base_and_better_copies_make_a_model_that_verifies_and_says_what_it_cost(finished: Path, source: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *(MODEL_NAME, MANIFEST_NAME, "imatrix.gguf", *REPORT_NAMES),
        *(path.name for path in finished.glob("overlay-*.gguf")),
    }
    assert better(finished) == 5
    assert cli.main(["verify", str(finished)]) == 0
    opened = open_model(finished)
    assert isinstance(opened, GgufSource)
    manifest = opened.manifest
    assert manifest is not None
    assert manifest.overlay is not None
    assert set(opened.moe_layers[0].types) == {QT.Q2_K}
    importance = read_imatrix(finished / "imatrix.gguf", opened.moe_layers)
    assert manifest.options == {"dense": "q8_0", "base": "q2_k", "imatrix": importance.digest}
    assert manifest.source["identity"] == read_manifest(finished / MANIFEST_NAME).source["identity"]
    counts = manifest.profile["counts"]
    assert isinstance(counts, dict)
    assert manifest.profile["tokens"] == 300
    assert [sum(counts[layer]) for layer in "012"] == [600] * 3, "two experts a token"
    kept = sum(t.info.n_bytes for t in read_gguf(next(finished.glob("overlay-*"))).tensors.values())
    assert kept == 5 * ONE, "all of the budget, and not more"

    report = json.loads((finished / "report.json").read_text())
    evaluated, uniform = report["evaluation"]["models"]
    assert uniform["name"] == "all q2_k"
    assert uniform["kl_mean"] != evaluated["kl_mean"]
    assert uniform["n_bytes"] == 24 * 3 * 256 * 256 // 256 * 84
    assert 0 < evaluated["kl_mean"] < 1
    assert 0 < evaluated["top1_agreement"] < 1
    assert evaluated["perplexity"] != evaluated["reference_perplexity"]
    errors = [point["error"] for point in report["tiers"]["curve"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-12 * errors[0]), "every expert in the source's own format"
    assert 0 < report["tiers"]["chosen"]["error"] < report["tiers"]["uniform"][0]["error"]
    assert report["errors"]["layers"]["1"]["relative"]["mxfp4"] == [0.0] * 8, "the source's own format"
    assert report["sizes"]["base"] == (finished / MODEL_NAME).stat().st_size
    assert report["importance"]["n_unused"] > 0
    text = (finished / "report.md").read_text()
    assert "were never used" in text
    assert "| this model |" in text
    for name in REPORT_NAMES[2:]:
        assert f"]({name})" in text
        assert (finished / name).read_text().startswith("<svg")


def test_beside_a_checkpoint_the_experts_that_matter_least_get_smaller_copies(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, one = tmp_path / "beside", 3 * 256 * 256 // 256 * 84
    cold = ("--keep-experts", "--cold", f"q2_k:{7 * one}B", *LEARN)
    assert convert(source, target, *cold) == 0
    assert "smaller copies: 7 in q2_k" in capsys.readouterr().err
    assert cli.main(["verify", str(target)]) == 0
    opened = open_model(target)
    assert isinstance(opened, GgufSource)
    assert opened.manifest is not None
    small = {
        (n, e)
        for n, moe in opened.moe_layers.items()
        for e in range(moe.n_experts)
        if opened.expert(n, e)[0].type == QT.Q2_K
    }
    assert len(small) == 7
    assert better(target) == 7
    report = json.loads((target / "report.json").read_text())
    errors = {
        (int(layer), e): error * share
        for layer, values in report["errors"]["layers"].items()
        for e, (error, share) in enumerate(
            zip(values["relative"]["q2_k"], route_shares(target, int(layer)), strict=True)
        )
    }
    assert max(errors[key] for key in small) <= min(error for key, error in errors.items() if key not in small)
    assert report["tiers"]["chosen"]["n_bytes"] == 17 * ONE + 7 * one
    assert 0 < report["tiers"]["chosen"]["error"] < report["tiers"]["uniform"][0]["error"]
    assert "| layer | smaller copies |" in (target / "report.md").read_text()

    assert convert(source, target, "--keep-experts", "--cold", f"q3_k:{ONE}B", *LEARN) == 0
    assert better(target) == 1, "another budget makes another overlay"
    assert convert(source, target, "--hot", "none") == 0
    assert better(target) == 0


def route_shares(folder: Path, layer: int) -> list[float]:
    importance = read_imatrix(folder / "imatrix.gguf", open_model(folder).moe_layers)
    return list(map(float, importance.route_weights(layer)))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--cold", "q8_0:1GiB"), "copies would be no smaller"),
        (("--cold", "q2_k"), "is not TYPE:SIZE"),
        (("--cold", "q2_k:10B"), "one expert takes"),
        (("--cold", "q2_k:1GiB", "--target", "1GiB-ram"), "--target chooses base and copies itself"),
        (("--cold", "q2_k:1GiB", "--hot", "none"), "can't be combined with other copies"),
        (("--hot", "q2_k:1GiB"), "copies would be no better"),
        (("--cold", "q2_k:1GiB", "--no-calibrate"), "--no-calibrate leaves nothing to choose copies by"),
        (("--hot", "mxfp4:1GiB", "--no-calibrate"), "--no-calibrate leaves nothing to choose copies by"),
        (("--target", "1GiB-ram", "--no-calibrate"), "--no-calibrate leaves nothing to choose copies by"),
    ],
)
def test_smaller_copies_that_make_no_sense_are_refused_with_a_reason(
    options: tuple[str, ...], problem: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "out", "--keep-experts", *options) in (1, 2)
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_first_start_has_the_calibration_s_counts_and_the_second_its_own(finished: Path, tmp_path: Path) -> None:
    from localrun.offload.model import OffloadOptions, open_offloaded

    opened = open_model(finished)
    assert isinstance(opened, GgufSource)
    assert opened.manifest is not None
    counts = opened.manifest.profile["counts"]
    assert isinstance(counts, dict)
    options = OffloadOptions(n_threads=1, profile_folder=tmp_path, probe=False)
    for own_tokens in (0, 7):
        with open_offloaded(opened, options) as model:
            profile = model.learner.profile
            assert profile.clock == 300 + own_tokens
            if not own_tokens:
                assert profile.counts(1).tolist() == counts["1"]
            profile._advance(7)


def test_another_overlay_leaves_the_base_as_it_is_and_none_takes_report_and_copies_away(
    finished: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Path(shutil.copytree(finished, tmp_path / "out"))
    assert convert(source, target, "--hot", f"mxfp4:{ONE}B", "--hot", f"q3_k:{3 * ONE}B", *LEARN, *OTHER_TEXT) == 0
    types: Any = read_manifest(target / MANIFEST_NAME).better_copies
    assert sum(len(by_type.get("mxfp4", [])) for by_type in types.values()) == 1
    assert better(target) > 1
    assert len(list(target.glob("overlay-*.gguf"))) == 1
    assert not (target / LEARNED_NAME).exists()
    assert "q3_k:" in (target / "report.md").read_text()
    assert cli.main(["verify", str(target)]) == 0
    state = contents(target)
    for path, kind in ((target / MODEL_NAME, QT.Q2_K), (next(target.glob("overlay-*.gguf")), QT.Q3_K)):
        offset = next(t.offset for t in read_gguf(path).tensors.values() if t.info.type == kind)
        with path.open("r+b") as file:
            file.seek(offset + 1000)
            file.write(b"damaged")
    assert cli.main(["verify", str(target), "--repair", str(source)]) == 0
    assert contents(target) == state, "each rounded with its own importance again"
    capsys.readouterr()
    for arguments, message in (
        ([tmp_path / "gone", "--hot", f"mxfp4:{ONE}B"], "can only be made from the source checkpoint"),
        ([source, "--hot", f"mxfp4:{ONE}B", "--base", "q3_k"], "has a base in q2_k, not q3_k"),
        ([source, "--hot", f"mxfp4:{ONE}B", "--dense", "bf16"], "has dense matrices in q8_0, not bf16"),
        ([source, "--base", "q2_k"], "holds a finished model with a base in q2_k"),
        ([source, "--target", "1GiB-ram"], "holds a finished model with a base in q2_k"),
        ([source, "--hot", "q2_k:1MiB"], "copies would be no better"),
        ([source, "--hot", "none", "--dense", "bf16"], "has dense matrices in q8_0, not bf16"),
        ([source, "--hot", "none", "--base", "q3_k"], "has a base in q2_k, not q3_k"),
        ([source, "--hot", "none", "--split", "4MB"], "--hot none can't be combined with --split"),
        ([source, "--hot", "none", "--evaluate", tmp_path / "gone.txt"], "gone.txt"),
    ):
        assert convert(arguments[0], target, *arguments[1:], *LEARN) == 2
        assert message in capsys.readouterr().err
    assert contents(target) == state
    assert convert(source, target, "--hot", "none") == 0
    assert {path.name for path in target.iterdir()} == {MODEL_NAME, MANIFEST_NAME, "imatrix.gguf"}
    assert better(target) == 0
    assert cli.main(["verify", str(target)]) == 0
    assert (target / MODEL_NAME).read_bytes() == (finished / MODEL_NAME).read_bytes()


@pytest.fixture(scope="module")
def beside(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside its checkpoint, with smaller copies of three experts."""
    target = tmp_path_factory.mktemp("beside") / "out"
    cold = f"q2_k:{3 * 3 * 256 * 256 // 256 * 84}B"
    assert convert(source, target, "--keep-experts", "--cold", cold, *LEARN) == 0
    return target


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of everything below; none where there is no folder."""
    stats = ((path, path.stat()) for path in folder.rglob("*"))
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in stats}


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ("", ""),
        ("", f"--base q2_k --hot mxfp4:{ONE}B --split 4MB"),
        ("", "--keep-experts --target 6MiB-ram"),
        ("finished", "--hot none"),
        ("finished", f"--hot mxfp4:{ONE}B"),
        ("killed", "--base q2_k"),
        ("plain", "--split 4MB"),
        ("plain", f"--split 4MB --hot mxfp4:{ONE}B"),
        ("beside", "--keep-experts"),
        ("beside", "--keep-experts --hot none"),
        ("beside", "--keep-experts --evaluate TEXT --evaluate-types q2_k"),
        ("beside", f"--keep-experts --cold q3_k:{ONE}B"),
        ("moved", "--keep-experts"),
        ("moved", "--keep-experts --hot none"),
    ],
)
def test_a_dry_run_changes_nothing_whatever_is_there(
    start: str, options: str, source: Path, finished: Path, beside: Path, text: Path, tmp_path: Path
) -> None:
    target, checkpoint = tmp_path / "out", source
    if start:
        shutil.copytree(beside if start in ("beside", "moved") else finished, target)
    if start == "plain":
        assert convert(source, target, "--hot", "none") == 0
    elif start == "killed":
        (target / LEARNED_NAME).mkdir()
    elif start == "moved":
        checkpoint = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    before = listing(tmp_path)
    assert convert(checkpoint, target, *options.replace("TEXT", str(text)).split(), "--dry-run", *LEARN) == 0
    assert listing(tmp_path) == before


@pytest.mark.parametrize("options", [("--dry-run",), ()])
@pytest.mark.parametrize("kept", [("--keep-experts", "--cold", f"q2_k:{5 * ONE}B"), FORMATS])
def test_room_for_the_copies_is_checked_with_that_for_the_rest_before_anything_is_learned(
    kept: tuple[str, ...],
    options: tuple[str, ...],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "learn", lambda *_: pytest.fail("learns without room"))
    usage = namedtuple("usage", "total used free")
    free = 1 << 40
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 41, 1 << 40, free))
    assert convert(source, tmp_path / "plain", *kept[: kept.index(kept[-2])], "--dry-run") == 0
    alone = parse_size(re.findall(r"room for ([^\n]+)", capsys.readouterr().err)[0])
    assert convert(source, tmp_path / "out", *kept, "--dry-run") == 0
    both = parse_size(re.findall(r"room for ([^\n]+)", capsys.readouterr().err)[0])
    assert both - alone == pytest.approx(5 * ONE, rel=0.1)
    free = (alone + both) // 2
    assert convert(source, tmp_path / "out", *kept, *options) == 1
    assert "a base with its overlay needs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--dry-run",), ()])
def test_room_for_another_overlay_is_checked_before_anything_is_learned(
    options: tuple[str, ...],
    finished: Path,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = Path(shutil.copytree(finished, tmp_path / "out"))
    state = contents(target)
    monkeypatch.setattr(precision, "learn", lambda *_: pytest.fail("learns without room"))
    copies = ("--hot", f"mxfp4:{5 * ONE}B")
    assert convert(source, target, *copies, "--dry-run") == 0
    said = capsys.readouterr().err
    assert (
        f"better copies in MXFP4 of at most 5 of 24 experts: {format_size(5 * ONE)}, up to {format_size(ONE)} each\n"
        in said
    )
    (room,) = re.findall(r"room for ([^\n]+) of copies", said)
    assert parse_size(room) == pytest.approx(5 * ONE, rel=0.1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 41, 1 << 41, 4 * ONE))
    assert convert(source, target, *copies, *options) == 1
    assert "the overlay needs" in capsys.readouterr().err
    assert contents(target) == state


def test_a_dry_run_says_which_copies_would_be_made_at_most(
    source: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Budgets end in the middle of a copy, and the last one is larger than the model."""
    small, eight = 3 * 256 * 256 // 256 * 84, 3 * 256 * 256 // 32 * 34
    copies = {
        ("q2_k", True): ("--cold", f"q2_k:{3 * small - 1}B", 2, small),
        ("mxfp4", False): ("--hot", f"mxfp4:{6 * ONE - 1}B", 5, ONE),
        ("q8_0", False): ("--hot", "q8_0:1GiB", 24, eight),
    }
    for base, folder, kinds in (("q3_k", tmp_path / "new", list(copies)), ("q2_k", finished, list(copies)[1:])):
        words = [word for kind in kinds for word in copies[kind][:2]]
        capsys.readouterr()
        assert convert(source, folder, "--base", base, *words, "--dry-run", "--json") == 0
        planned = {(copy["type"], copy["smaller"]): copy for copy in planned_copies(capsys)}
        assert planned.keys() == set(kinds)
        for kind, copy in planned.items():
            _, _, n, size = copies[kind]
            assert (copy["most_copies"], copy["experts"]) == (n, 24)
            assert (copy["copy_bytes"], copy["most_bytes"]) == (size, n * size)
    assert convert(source, tmp_path / "plain", "--dry-run", "--json") == 0
    assert planned_copies(capsys) == []


@pytest.mark.parametrize("kept", [(), ("--keep-experts",)])
def test_a_dry_run_for_a_target_asks_for_no_room_that_the_target_may_not_need(
    kept: tuple[str, ...],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 41, 1 << 41, 0))
    assert convert(source, tmp_path / "out", *kept, "--target", "6MiB-ram", "--dry-run") == 0
    assert "known once formats are chosen" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_beside_a_moved_checkpoint_none_takes_the_copies_away(source: Path, beside: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(beside, tmp_path / "out"))
    moved = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    assert convert(moved, target, "--keep-experts", "--hot", "none") == 0
    assert {path.name for path in target.iterdir()} == {DENSE_NAME, MANIFEST_NAME, "imatrix.gguf"}
    kept = read_manifest(target / MANIFEST_NAME).kept
    assert kept is not None
    assert kept.path == str(moved)


def test_a_finished_model_beside_its_checkpoint_takes_no_target_and_can_be_compared(
    source: Path, beside: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, plain = Path(shutil.copytree(beside, tmp_path / "out")), tmp_path / "plain"
    assert convert(source, plain, "--keep-experts") == 0
    imatrix = ("--imatrix", beside / "imatrix.gguf")
    for folder, late in ((target, ("--target", "6MiB-ram")), (plain, imatrix), (plain, OTHER_TEXT)):
        state = contents(folder)
        capsys.readouterr()
        assert convert(source, folder, "--keep-experts", *late, *LEARN) == 2
        assert f"for which {late[0]} comes too late" in capsys.readouterr().err
        assert contents(folder) == state
    report = json.loads((target / "report.json").read_text())
    people = (target / "report.md").read_text()
    assert "evaluation" not in report
    for n, folder in ((1, plain), (1, target), (2, target)):
        types = ("--evaluate-types", "q2_k") if n == 2 else ()
        assert convert(source, folder, "--keep-experts", "--evaluate", text, *types, "--ram", "64MiB") == 0
        assert "this model against the source on held-out.txt: KL" in capsys.readouterr().err
        evaluated = json.loads((folder / "report.json").read_text())
        assert len(evaluated.pop("evaluation")["models"]) == n
        assert (folder / "report.md").read_text().count("## Held-out text") == 1
    assert evaluated == report, "the choice of copies is still in it"
    assert (target / "report.md").read_text().startswith(people)


CHILD = """
import os, signal, sys
from localrun import cli
from localrun.api import precision
from localrun.api import conversion
from localrun.engine.measure.calibrate import ExpertSums
from localrun.quant.convert.journal import Journal
from tests.quant.convert.in_step import in_step

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def die_in_journal(folder):
    in_step()
    append = Journal.append
    def append_and_die(self, results):
        append(self, results)
        if self._folder.name == folder:
            die()
    Journal.append = append_and_die

point, *arguments = sys.argv[1:]
if point == "calibrating":
    ExpertSums.end = die
elif point == "after the base":
    conversion._add_to_manifest = die
else:
    die_in_journal(point)
cli.main(["convert", *arguments])
"""


def kill_at(point: str, *arguments: object) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, point, *map(str, arguments)], capture_output=True, text=True, env=os.environ
    )
    assert child.returncode == -signal.SIGKILL, child.stderr


def test_killed_again_and_again_the_same_command_ends_with_the_same_bytes(
    source: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    command = (source, target, *FORMATS, *LEARN)
    untouched = contents(source)
    kill_at("calibrating", *command)
    assert not target.exists()
    kill_at(".convert", *command)
    state = contents(target / ".convert")
    assert convert(*command, "--dense", "bf16") == 2
    assert "--dense was q8_0 and is now bf16" in capsys.readouterr().err
    assert contents(target / ".convert") == state
    kill_at(".overlay", *command)
    assert (target / MODEL_NAME).is_file()
    assert better(target) == 0, "a reader meanwhile has the base"
    assert convert(source, target, "--hot", f"mxfp4:{ONE}B", *LEARN) == 2
    assert "--hot or --target was 5 experts" in capsys.readouterr().err
    assert convert(*command) == 0
    again, once = contents(target), contents(finished)
    assert {name for name in once if once[name] != again[name]} == {"report.md", "report.json"}, "one was evaluated"
    assert set(again) == set(once)
    assert not any(path.is_dir() for path in target.iterdir())
    assert contents(source) == untouched


def test_what_a_target_chose_is_completed_after_a_kill_though_the_base_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "few", n_experts=3)  # what each costs in every format takes seconds to measure
    # 5.5 MiB for the rest, and 0.8 MiB for experts, which take 0.4 MiB in iq2_xxs and 0.9 in mxfp4.
    command = (source, "--target", f"{6464 << 10}B-ram", "--dense", "q8_0", *LEARN)
    assert convert(command[0], tmp_path / "whole", *command[1:]) == 0
    killed = tmp_path / "killed"
    kill_at("after the base", command[0], killed, *command[1:])
    base = read_manifest(killed / MANIFEST_NAME).options["base"]
    assert base != "mxfp4"
    capsys.readouterr()
    assert convert(source, killed, "--target", "1GiB-ram", "--dense", "q8_0", *LEARN) == 2
    assert f"--base was {base} and is now mxfp4" in capsys.readouterr().err
    assert convert(command[0], killed, *command[1:]) == 0
    assert better(killed) > 0
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_target_chooses_types_of_dense_matrices_and_the_model_keeps_them(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert convert(source, target, "--keep-experts", "--target", "6MiB-ram", *LEARN) == 0
    told = capsys.readouterr().err
    assert "Dense matrices: " in told
    assert "They add " in told
    options = read_manifest(target / MANIFEST_NAME).options
    chosen = types_from_text(options["dense-types"], "test")
    tensors = open_model(target).tensors
    assert {name: tensors[name].type for name in chosen} == chosen
    assert {kind_of(name) for name in chosen} <= set(KINDS)
    assert "blk.0.ffn_gate_inp.weight" not in chosen, "near-ties of the router decide which experts are used"
    default = open_model(source).tensors
    for has in (tensors, default):
        assert format_size(sum(has[name].n_bytes for name in chosen)) in told
    assert "## Precision of the dense matrices" in (target / "report.md").read_text()
    assert json.loads((target / "report.json").read_text())["dense"]["types"].keys() == chosen.keys()
    damaged = target / DENSE_NAME
    with damaged.open("r+b") as file:
        file.seek(-5000, 2)
        file.write(bytes(range(250)) * 8)
    assert cli.main(["verify", str(target)]) == 1
    assert cli.main(["verify", str(target), "--repair", str(source)]) == 0, (
        "made again in the same types, weighed alike"
    )


def test_a_recipe_is_its_options(source: Path, finished: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'base = "q2_k"\nhot = ["mxfp4:{5 * ONE}B"]\ndense = "q8_0"\n')
    imatrix = finished / "imatrix.gguf"
    assert convert(source, tmp_path / "out", "--recipe", recipe, "--imatrix", imatrix, "--jobs", 2) == 0
    # The same sums give the same base; errors were measured on drawn rows, so the copies may be others'.
    assert (tmp_path / "out" / MODEL_NAME).read_bytes() == (finished / MODEL_NAME).read_bytes()
    assert better(tmp_path / "out") == 5
    assert "random rows" in (tmp_path / "out" / "report.md").read_text()


@pytest.fixture(scope="module")
def inputs(source: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are wrong in one way each, and checkpoints that they are wrong for."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("Grüße. ".encode("latin-1") * 300)
    (folder / "short.txt").write_text("Too short.")
    (folder / "noise.gguf").write_bytes(b"GGUF" + bytes(60))
    (folder / "type.toml").write_text('base = "q2_x"\n')
    (folder / "key.toml").write_text('bases = "q2_k"\n')
    os.symlink(finished / "imatrix.gguf", folder / "imatrix.gguf")
    write_checkpoint(folder / "narrow", CheckpointSpec(SMALL | {"vocab_size": 3840}), tokenizer=DEMO / "tokenizer.json")
    config = SMALL | {"hidden_size": 256, "moe_intermediate_size": 256, "vocab_size": 3840}
    write_checkpoint(folder / "mute", CheckpointSpec(config))
    os.symlink(source, folder / "good")
    return folder


@pytest.mark.parametrize(
    ("checkpoint", "arguments", "code", "message"),
    [
        ("good", "--base q2_k --hot mxfp4:1KiB", 2, "one expert takes"),
        ("good", "--base q2_k --hot mxfp4:1MiB --hot mxfp4:1MiB", 2, "given twice"),
        ("good", "--base q2_k --hot iq7:1MiB", 2, "unknown expert format 'iq7'"),
        ("good", "--base q2_k --hot mxfp4", 2, "not TYPE:SIZE"),
        ("good", "--base q4_k --hot q2_k:1MiB", 2, "copies would be no better"),
        ("good", "--base q2_k --hot none --hot mxfp4:1MiB", 2, "can't be combined with other copies"),
        ("good", "--hot none", 2, "is not a converted model"),
        ("good", "--target 1MiB-ram", 2, "less than the dense model"),
        ("good", "--target 1GiB-disk", 2, "is not a target"),
        ("good", "--target 1GiB-ram --base q2_k", 2, "chooses base and copies itself"),
        ("good", "--recipe type.toml", 1, "type.toml: unknown expert format 'q2_x'"),
        ("good", "--recipe key.toml", 1, "unknown key 'bases'"),
        ("good", "--recipe no-such-box", 2, "no recipe 'no-such-box'"),
        ("good", "--base q2_k --calibrate empty.txt", 2, "empty"),
        ("good", "--base q2_k --calibrate latin.txt", 2, "not UTF-8"),
        ("good", "--base q2_k --calibrate gone.txt", 2, "gone.txt"),
        ("good", "--base q2_k --calibrate short.txt", 2, "too few to calibrate on"),
        ("good", "--base q2_k --evaluate empty.txt", 2, "empty"),
        ("good", "--base q2_k --imatrix noise.gguf", 1, "noise.gguf"),
        ("narrow", "--base mxfp4 --imatrix imatrix.gguf", 1, "importance of another model"),
        ("narrow", "--base mxfp4 --hot q6_k:1MiB", 2, "can't hold"),
        ("mute", "--base q2_k --hot mxfp4:1MiB", 2, "no tokenizer.json"),
    ],
)
def test_bad_input_is_a_clear_error_and_leaves_nothing(
    checkpoint: str,
    arguments: str,
    code: int,
    message: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(inputs)
    assert convert(checkpoint, tmp_path / "out", *arguments.split()) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()

"""Overlays: better copies of some experts beside an untouched base, whole or not there, wherever the writer is killed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as QT

from localrun import cli
from localrun.errors import DiskSpaceError, FormatError, StoreError, UsageError
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.mapping import ConversionOptions
from localrun.quant.convert.converter import MODEL_NAME, convert
from localrun.quant.convert.integrity import verify
from localrun.quant.convert.overlay import WORK_NAME, open_overlay_source, plan_overlay, remove_overlay, write_overlay
from localrun.quant.gguf.file import GgufValue, build_header, read_gguf
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.manifest import MANIFEST_NAME, checksum, read_manifest, write_manifest
from localrun.quant.model.source import Projection
from localrun.quant.open import open_model
from localrun.quant.precision.copies import BetterCopies
from tests.checkpoints import write_small
from tests.quant.convert.test_quantized_base import WIDE, Importance

TIERS = BetterCopies({0: {3: QT.MXFP4, 1: QT.MXFP4}, 2: {0: QT.Q4_K, 2: QT.MXFP4, 3: QT.Q4_K}})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("source") / "small", **WIDE)


@pytest.fixture(scope="module")
def base(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("base") / "out"
    convert(source, target, ConversionOptions(base=QT.Q2_K))
    return target


@pytest.fixture(scope="module")
def finished(source: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = Path(shutil.copytree(base, tmp_path_factory.mktemp("finished") / "out"))
    write_overlay(Checkpoint.open(source), TIERS, target, Importance())
    return target


@pytest.fixture
def model(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def overlay_file(folder: Path) -> Path:
    (path,) = folder.glob("overlay-*.gguf")
    return path


def rows(source: GgufSource, projection: Projection) -> bytes:
    (extent,) = projection.extents
    return source.files[extent.file].read_bytes()[extent.offset : extent.offset + extent.n_bytes]


def test_chosen_experts_come_from_the_overlay_and_all_have_the_base(source: Path, base: Path, finished: Path) -> None:
    opened, plain = open_model(finished), open_model(base)
    assert isinstance(opened, GgufSource)
    assert isinstance(plain, GgufSource)
    assert opened.identity != plain.identity
    assert opened.gguf_header() == plain.gguf_header()
    assert [path.name for path in opened.files] == [MODEL_NAME, overlay_file(finished).name]
    assert [layer.better for layer in opened.moe_layers.values()] == [
        ((QT.MXFP4,) * 3,),
        (),
        ((QT.Q4_K,) * 3, (QT.MXFP4,) * 3),
    ]
    assert opened.moe_layers[0].variants == ((QT.Q2_K,) * 3, (QT.MXFP4,) * 3)
    exact = source.parent / "exact"
    convert(source, exact, ConversionOptions(base=QT.MXFP4))
    reference = open_model(exact)
    assert isinstance(reference, GgufSource)
    for layer, expert in itertools.product(range(3), range(4)):
        kind = TIERS.formats.get(layer, {}).get(expert, QT.Q2_K)
        for projection, low, best in zip(
            opened.expert(layer, expert),
            opened.base_expert(layer, expert),
            reference.expert(layer, expert),
            strict=True,
        ):
            assert (projection.type, low.type) == (kind, QT.Q2_K)
            assert checksum(rows(opened, projection)) == projection.checksum
            assert checksum(rows(opened, low)) == low.checksum
            if kind == QT.MXFP4:
                assert rows(opened, projection) == rows(reference, best)
    assert all(t.offset % 4096 == 0 for t in opened.headers[1].tensors.values())


def test_manifest_says_who_has_what_and_verify_reads_all_of_it(
    base: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(model / MANIFEST_NAME)
    assert manifest.overlay is not None
    assert BetterCopies.from_json(dict(manifest.better_copies)) == TIERS
    assert {k: s.ids for k, s in manifest.overlay.experts[2].items()} == {"q4_k": (0, 3), "mxfp4": (2,)}
    assert manifest.overlay.options["imatrix"] == "seed 0"
    assert list(manifest.overlay.rounding) == ["I8 -> Q4_K"]
    assert (base / MODEL_NAME).read_bytes() == (model / MODEL_NAME).read_bytes()
    assert cli.main(["verify", str(model), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checked"] == len(manifest.tensors) + 3 * 4 * 3 + 5 * 3 + 2
    opened = GgufSource.open(model)
    extent = opened.expert(2, 3)[1].extents[0]
    with overlay_file(model).open("r+b") as file:
        file.seek(extent.offset + 5)
        file.write(b"\xa5\x5a")
    (damage,) = verify(opened, manifest)
    assert (damage.check.tensor, damage.check.expert) == ("blk.2.ffn_up_exps.q4_k.weight", 3)


def test_a_new_overlay_replaces_the_old_one_and_removing_it_leaves_the_base(
    source: Path, base: Path, model: Path
) -> None:
    first = overlay_file(model).name
    checkpoint = open_overlay_source(source, model)
    result = write_overlay(checkpoint, TIERS, model, Importance(), sections={"profile": {"tokens": 7}})
    assert result.written_bytes == 0
    assert read_manifest(model / MANIFEST_NAME).profile == {"tokens": 7}
    write_overlay(checkpoint, BetterCopies({1: {2: QT.MXFP4}}), model, jobs=1)
    assert overlay_file(model).name != first
    manifest = read_manifest(model / MANIFEST_NAME)
    assert manifest.overlay is not None
    assert set(manifest.overlay.experts) == {1}
    assert manifest.profile == {"tokens": 7}
    assert {layer for layer, moe in open_model(model).moe_layers.items() if moe.better} == {1}
    write_overlay(checkpoint, TIERS, model, Importance())
    assert overlay_file(model).name == first
    remove_overlay(model)
    assert {name: data for name, data in contents(model).items() if name == MODEL_NAME} == {
        MODEL_NAME: (base / MODEL_NAME).read_bytes()
    }
    assert open_model(model).identity == open_model(base).identity


CHILD = """
import os, signal, sys
from pathlib import Path
from localrun.quant.convert import overlay
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.convert.journal import Journal
from tests.quant.convert.in_step import in_step
from tests.quant.convert.test_overlay import TIERS
from tests.quant.convert.test_quantized_base import Importance

def die_in(owner, name, before):
    original = getattr(owner, name)
    def wrapper(*args, **kwargs):
        if not before:
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, wrapper)

in_step()
{"journal": lambda: die_in(Journal, "append", False), "manifest": lambda: die_in(overlay, "write_manifest", True),
 "clean-up": lambda: die_in(overlay, "write_manifest", False)}[sys.argv[3]]()
overlay.write_overlay(Checkpoint.open(Path(sys.argv[1])), TIERS, Path(sys.argv[2]), Importance(), jobs=2)
"""


@pytest.mark.parametrize("point", ["journal", "manifest", "clean-up"])
def test_after_kill_9_the_model_is_sound_and_the_same_command_ends_with_the_same_bytes(
    point: str, source: Path, base: Path, finished: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(base, tmp_path / "out"))
    checkpoint = Checkpoint.open(source)
    write_overlay(checkpoint, BetterCopies({1: {2: QT.MXFP4}}), target)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, source, target, point], capture_output=True, text=True, env=os.environ
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    in_use = {layer for layer, moe in open_model(target).moe_layers.items() if moe.better}
    assert in_use == ({0, 2} if point == "clean-up" else {1})
    if point == "journal":
        with pytest.raises(UsageError, match=r"--hot or --target was 5 experts \(.*\) and is now 1 experts \(.*\)"):
            write_overlay(checkpoint, BetterCopies({0: {2: QT.MXFP4}}), target, Importance())
    write_overlay(checkpoint, TIERS, target, Importance())
    assert contents(target) == contents(finished)
    assert not (target / WORK_NAME).exists()


def test_what_an_overlay_can_not_be_made_of_is_refused_before_any_work(
    source: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Path(shutil.copytree(base, tmp_path / "out"))
    before = contents(target)
    checkpoint = Checkpoint.open(source)
    for tiers, message in (
        (BetterCopies({9: {0: QT.MXFP4}}), "layer 9, the model has layers 0 to 2"),
        (BetterCopies({0: {4: QT.MXFP4}}), "expert 4, the model has experts 0 to 3"),
        (BetterCopies({}), "no experts"),
    ):
        with pytest.raises(UsageError, match=message):
            write_overlay(checkpoint, tiers, target)
    other = write_small(tmp_path / "other", seed=5, **WIDE)
    with pytest.raises(UsageError, match="not the checkpoint the base was made from"):
        write_overlay(Checkpoint.open(other), TIERS, target)
    with pytest.raises(UsageError, match="can only be made from the source checkpoint"):
        open_overlay_source(tmp_path / "gone", target)
    with pytest.raises(UsageError, match="not a converted model"):
        write_overlay(checkpoint, TIERS, source)
    narrow = write_small(tmp_path / "narrow", hidden_size=256)
    convert(narrow, tmp_path / "narrow.lr")
    manifest = read_manifest(tmp_path / "narrow.lr" / MANIFEST_NAME)
    with pytest.raises(UsageError, match=r"layers\.1\.ffn\.experts\.2\.w2\.weight: rows of 32"):
        plan_overlay(Checkpoint.open(narrow), BetterCopies({1: {2: QT.Q3_K}}), manifest)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(DiskSpaceError, match=r"needs .* the disk has 1000 B free"):
        write_overlay(checkpoint, TIERS, target)
    monkeypatch.undo()
    gone = Path(shutil.copytree(source, tmp_path / "gone"))
    vanishing = Checkpoint.open(gone)
    shutil.rmtree(gone)
    with pytest.raises(StoreError, match="can only be made from the source checkpoint"):
        write_overlay(vanishing, TIERS, target)
    assert contents(target) == before


def edit_overlay(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest's overlay section."""
    path = folder / MANIFEST_NAME
    root = json.loads(path.read_text())
    del root["checksum"]
    change(root["overlay"])
    path.write_text(json.dumps(root))


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no file": (lambda o: o["files"][0].update(name="overlay-0.gguf"), "missing, but listed"),
    "size": (lambda o: o["files"][0].update(size_bytes=4096), "bytes, localrun.json says 4096"),
    "the base as its file": (lambda o: o["files"][0].update(name=MODEL_NAME), "also occurs in files"),
    "two files": (lambda o: o["files"].append(o["files"][0] | {"name": "x.gguf"}), "missing, but listed"),
    "order of experts": (lambda o: o["experts"]["0"]["mxfp4"].update(ids=[3, 1]), "ascending expert numbers"),
    "an expert twice": (lambda o: o["experts"]["0"]["mxfp4"].update(ids=[1, 1]), "ascending expert numbers"),
    "other experts": (lambda o: o["experts"]["0"]["mxfp4"].update(ids=[1, 2]), "differs from the experts"),
    "unknown expert": (lambda o: o["experts"]["0"]["mxfp4"].update(ids=[1, 4]), "expert 4, the base has 4"),
    "two copies": (lambda o: o["experts"]["2"]["mxfp4"].update(ids=[3]), "expert 3 has two better copies"),
    "negative": (lambda o: o["experts"]["0"]["mxfp4"].update(ids=[-1, 1]), "list of expert numbers"),
    "unknown layer": (lambda o: o["experts"].update({"7": o["experts"]["0"]}), "layer 7 has no experts"),
    "unknown type": (lambda o: o["experts"]["0"].update(q9=o["experts"]["0"].pop("mxfp4")), "unknown type 'q9'"),
    "another type": (
        lambda o: o["experts"]["0"].update(q8_0=o["experts"]["0"].pop("mxfp4")),
        "differs from the experts",
    ),
    "fewer checksums": (lambda o: o["experts"]["0"]["mxfp4"].update(up="0" * 16), "2, 1 and 2 checksums"),
    "a layer less": (lambda o: o["experts"].pop("2"), "not in localrun.json"),
    "an unknown field": (lambda o: o.update(extra=1), "expected an object with"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_overlay_sections_are_refused(damage: str, model: Path) -> None:
    change, message = DAMAGES[damage]
    edit_overlay(model, change)
    with pytest.raises(FormatError, match=message):
        GgufSource.open(model)


def test_overlays_of_another_base_or_shape_are_refused(source: Path, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    convert(source, other, ConversionOptions(base=QT.Q3_K))
    shutil.copy(overlay_file(model), other)
    manifest = read_manifest(other / MANIFEST_NAME)
    overlay = read_manifest(model / MANIFEST_NAME).overlay
    write_manifest(dataclasses.replace(manifest, overlay=overlay), other)
    with pytest.raises(FormatError, match=r"overlay-.*: belongs to a base other than model\.gguf"):
        GgufSource.open(other)
    path = overlay_file(model)
    part = read_gguf(path)
    infos = [tensor.info for tensor in part.tensors.values()]
    for metadata, changed, message in (
        (part.metadata | {"general.architecture": GgufValue.string("deepseek4")}, infos, "not an overlay"),
        (
            part.metadata,
            [dataclasses.replace(infos[0], shape=(128, 512, 2)), *infos[1:]],
            r"expected shape \(256, 256, 2\)",
        ),
        (part.metadata, [dataclasses.replace(infos[0], type=QT.Q2_K), *infos[1:]], "a type or a shape is wrong"),
        (part.metadata, [dataclasses.replace(infos[0], name="blk.0.x.weight"), *infos[1:]], "but not in the file"),
    ):
        header = build_header(metadata, changed, 4096)
        path.write_bytes(header + path.read_bytes()[len(header) :])
        with pytest.raises(FormatError, match=message):
            GgufSource.open(model)


def test_tier_plans_survive_json_and_refuse_what_is_none() -> None:
    assert BetterCopies.from_json(json.loads(json.dumps(TIERS.to_json()))) == TIERS
    assert TIERS.to_json() == {"0": {"mxfp4": [1, 3]}, "2": {"q4_k": [0, 3], "mxfp4": [2]}}
    refused: list[Any] = [
        [],
        {"x": {}},
        {"0": {"q9": [1]}},
        {"0": {"mxfp4": [1, 1]}},
        {"0": {"mxfp4": ["1"]}},
        {"0": {"mxfp4": 3}},
    ]
    for value in refused:
        with pytest.raises(FormatError):
            BetterCopies.from_json(value)

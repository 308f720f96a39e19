"""The converter: what it writes runs in stock llama.cpp, survives kills with the same bytes, and harms nothing."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.alignment import PAGE_BYTES
from localrun.errors import DiskSpaceError, FormatError, LocalrunError, StoreError, UsageError
from localrun.quant.checkpoint.directory import CONFIG_NAME, Checkpoint
from localrun.quant.checkpoint.mapping import ConversionOptions, make_plan
from localrun.quant.convert import writing
from localrun.quant.convert.converter import MODEL_NAME, convert, write_plan
from localrun.quant.convert.direct_io import AlignedBuffer, DirectReader, DirectWriter
from localrun.quant.convert.writing import ConversionProgress, slice_rows
from localrun.quant.model.manifest import MANIFEST_NAME, WORK_NAME, checksum, read_manifest
from localrun.quant.open import open_model
from tests.checkpoints import edit_json, write_small
from tests.paired import median
from tests.reference import (
    NAMES,
    agreement,
    kl,
    read_safetensors,
    stock_logits,
    unpack,
    write_f32,
    write_safetensors,
)

# Medians, which near-ties of the router and of the indexer don't decide. [m] llama-cpp-python 0.3.36 on these fixtures: F32 1e-7,
# exact official weights (activations in BF16 and 8 bits) and Q8_0 dense matrices 0.001 to 0.003.
F32_KL, ROUNDED_KL = 1e-6, 0.01


@pytest.mark.parametrize("name", NAMES)
def test_stock_llama_cpp_agrees_with_transformers_in_f32(name: str, tmp_path: Path) -> None:
    oracle = unpack(name, tmp_path)
    write_f32(oracle.path, tmp_path / "f32")
    convert(tmp_path / "f32", tmp_path / "out")
    logits = stock_logits(tmp_path / "out" / MODEL_NAME, oracle.tokens)
    assert agreement(oracle.logits, logits) >= 0.99
    assert median(kl(oracle.logits, logits)) < F32_KL


@pytest.mark.parametrize("name", NAMES)
def test_stock_llama_cpp_runs_official_weights(name: str, tmp_path: Path) -> None:
    oracle = unpack(name, tmp_path)
    for options in (ConversionOptions(QT.BF16), ConversionOptions()):
        target = tmp_path / options.dense.name
        convert(oracle.path, target, options)
        assert median(kl(oracle.logits, stock_logits(target / MODEL_NAME, oracle.tokens))) < ROUNDED_KL


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("source") / "small")


@pytest.fixture(scope="module")
def undisturbed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("undisturbed") / "out"
    convert(small, target)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_output_is_one_gguf_and_a_manifest_and_the_source_is_untouched(small: Path, tmp_path: Path) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in small.iterdir()}
    result = convert(small, tmp_path / "out")
    assert sorted(path.name for path in result.path.iterdir()) == [MANIFEST_NAME, MODEL_NAME]
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in small.iterdir()} == before


def test_number_of_threads_and_size_of_slices_do_not_change_the_bytes(
    small: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(small, tmp_path / "one", jobs=1)
    monkeypatch.setattr(writing, "SLICE_BYTES", 5000)
    convert(small, tmp_path / "many", jobs=16)
    assert contents(tmp_path / "one") == contents(tmp_path / "many") == contents(undisturbed)


def test_manifest_has_every_checksum_and_what_rounding_cost(small: Path, undisturbed: Path) -> None:
    manifest = read_manifest(undisturbed / MANIFEST_NAME)
    source = open_model(undisturbed)
    assert manifest.files[0].header_checksum == checksum(source.gguf_header())
    for name, digest in manifest.tensors.items():
        assert checksum(source.read_tensor(name).data) == digest
    assert set(manifest.experts) == {0, 1, 2}
    for layer, projections in manifest.experts.items():
        for expert in range(4):
            for projection, digests in zip(source.expert(layer, expert), projections, strict=True):
                extent = projection.extents[0]
                data = (undisturbed / MODEL_NAME).read_bytes()[extent.offset : extent.offset + extent.n_bytes]
                assert checksum(data) == digests[expert] == projection.checksum
    assert manifest.options == {"dense": "q8_0", "base": "default"}
    rounding = manifest.source["rounding"]
    assert isinstance(rounding, dict)
    assert 0.001 < rounding["F8_E4M3 -> Q8_0"]["relative_rms"] < 0.02
    assert manifest.source["identity"] == Checkpoint.open(small).identity


def test_exact_conversion_reports_no_loss(small: Path, tmp_path: Path) -> None:
    assert convert(small, tmp_path / "out", ConversionOptions(QT.BF16)).losses == {}


def test_tokenizerless_mtp_checkpoint_converts_and_says_what_it_left_out(tmp_path: Path) -> None:
    convert(write_small(tmp_path / "m", mtp=True), tmp_path / "out")
    left_out = read_manifest(tmp_path / "out" / MANIFEST_NAME).source["left_out"]
    assert isinstance(left_out, dict)
    assert left_out["kind"] == "MTP"
    assert not any("nextn" in name for name in open_model(tmp_path / "out").tensors)


# --- interruption --------------------------------------------------------------------------------------------------------------

CHILD = """
import itertools, os, signal, sys
from pathlib import Path
from localrun.quant.convert import writing
from localrun.quant.convert.converter import convert
from localrun.quant.convert.direct_io import DirectWriter
from localrun.quant.convert.journal import Journal
from tests.quant.convert.in_step import in_step

point, count = sys.argv[3], int(sys.argv[4])
writing.SLICE_BYTES = 4096
in_step()
calls = itertools.count(1)

def die_at(owner, name, before):
    original = getattr(owner, name)
    def wrapper(*args, **kwargs):
        number = next(calls)
        if before and number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapper)

def half_a_line(fd, data):
    real_write(fd, data[: len(data) - 9])
    os.kill(os.getpid(), signal.SIGKILL)

if point == "write":
    die_at(DirectWriter, "write", False)
elif point == "before journal":
    die_at(Journal, "append", True)
elif point == "after journal":
    die_at(Journal, "append", False)
else:
    real_write, os.write = os.write, half_a_line
convert(Path(sys.argv[1]), Path(sys.argv[2]), jobs=2)
"""


def run_and_die(source: Path, target: Path, point: str, count: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, source, target, point, str(count)], capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr


@pytest.fixture(scope="module")
def killed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process leaves that was killed after its second journal entry."""
    target = tmp_path_factory.mktemp("killed") / "out"
    run_and_die(small, target, "after journal", 2)
    return target


@pytest.fixture
def half_done(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "half"))


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("write", 1),
        ("write", 57),
        ("write", 110),
        ("before journal", 1),
        ("after journal", 2),
        ("half a line", 0),
    ],
)
def test_after_kill_9_the_same_command_ends_with_the_same_bytes(
    small: Path, undisturbed: Path, tmp_path: Path, point: str, count: int
) -> None:
    target = tmp_path / "out"
    run_and_die(small, target, point, count)
    assert not (target / MANIFEST_NAME).exists()
    convert(small, target)
    assert contents(target) == contents(undisturbed)


def test_a_second_run_does_only_what_the_first_had_not_recorded(small: Path, half_done: Path) -> None:
    seen: list[ConversionProgress] = []
    result = convert(small, half_done, progress=seen.append)
    assert 0 < result.written_bytes < seen[-1].total_bytes
    assert seen[-1].resumed_bytes == seen[-1].total_bytes - result.written_bytes
    assert seen[-1].done_bytes == seen[-1].total_bytes


def test_killed_twice_and_then_finished(small: Path, undisturbed: Path, half_done: Path) -> None:
    run_and_die(small, half_done, "write", 5)
    convert(small, half_done)
    assert contents(half_done) == contents(undisturbed)


EVERY_STATE = """
import shutil, sys
from pathlib import Path
from localrun.quant.convert.converter import convert

source, target, states = map(Path, sys.argv[1:])
copying = False

def before_names_change(event, arguments):
    global copying
    if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and target.exists() and not copying:
        copying = True
        shutil.copytree(target, states / f"{len(list(states.iterdir())):02}")
        copying = False

sys.addaudithook(before_names_change)
convert(source, target, jobs=1)
"""


def test_only_a_whole_model_opens_whenever_a_conversion_was_killed(
    small: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Each state that the folder is in, from its first file to the last that is removed."""
    states = tmp_path / "states"
    states.mkdir()
    command = [sys.executable, "-c", EVERY_STATE, small, tmp_path / "out", states]
    subprocess.run(command, check=True, capture_output=True, text=True)
    seen = set()
    for state in sorted(states.iterdir()):
        has_model, is_complete = (state / MODEL_NAME).exists(), (state / MANIFEST_NAME).exists()
        seen.add((has_model, is_complete, (state / WORK_NAME).exists()))
        for path in (state, state / MODEL_NAME) if has_model else (state,):
            if is_complete:
                assert open_model(path).identity == open_model(undisturbed).identity
                continue
            with pytest.raises(FormatError, match="an unfinished conversion") as caught:
                open_model(path)
            assert "'localrun convert' again" in str(caught.value.hint)
        if is_complete:
            with pytest.raises(UsageError, match="finished model"):
                convert(small, state)
        else:
            convert(small, state)
        assert contents(state) == contents(undisturbed)
    assert seen == {(False, False, True), (True, False, True), (True, True, True)}


def test_changed_options_are_refused_by_name(small: Path, half_done: Path) -> None:
    with pytest.raises(UsageError, match="--dense was q8_0 and is now bf16"):
        convert(small, half_done, ConversionOptions(QT.BF16))
    with pytest.raises(UsageError, match="--base was default and is now f32"):
        convert(small, half_done, ConversionOptions(base=QT.F32))


def test_another_or_a_changed_source_is_refused_and_a_moved_one_is_not(
    small: Path, undisturbed: Path, half_done: Path, tmp_path: Path
) -> None:
    other = write_small(tmp_path / "other", seed=5)
    with pytest.raises(UsageError, match=r"the source was .*small and is now .*other"):
        convert(other, half_done)
    moved = Path(shutil.copytree(small, tmp_path / "small"))
    convert(moved, Path(shutil.copytree(half_done, tmp_path / "again")))
    assert contents(tmp_path / "again") == contents(undisturbed)
    edit_json(moved / CONFIG_NAME, rms_norm_eps=1e-5)
    with pytest.raises(UsageError, match=r"the source was .* and is now .*"):
        convert(moved, half_done)


def test_damaged_journal_lines_are_done_again(small: Path, undisturbed: Path, half_done: Path) -> None:
    journal = half_done / WORK_NAME / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    middle = len(lines) // 2
    journal.write_bytes(b"".join(lines[:middle]) + b'{"not": "a line"}\n' + b"".join(lines[middle:]))
    convert(small, half_done)
    assert contents(half_done) == contents(undisturbed)


def test_a_vanished_partial_file_is_not_taken_for_done(small: Path, half_done: Path) -> None:
    (half_done / WORK_NAME / f"{MODEL_NAME}.partial").unlink()
    with pytest.raises(StoreError, match="vanished"):
        convert(small, half_done)


def test_a_damaged_state_file_is_named(small: Path, half_done: Path) -> None:
    (half_done / WORK_NAME / "state.json").write_text("{")
    with pytest.raises(FormatError, match=r"state\.json: damaged"):
        convert(small, half_done)


def test_an_interrupt_from_the_keyboard_leaves_a_resumable_state(
    small: Path, undisturbed: Path, tmp_path: Path
) -> None:
    def interrupt(progress: ConversionProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(small, tmp_path / "out", jobs=1, progress=interrupt)
    convert(small, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_two_conversions_into_one_directory_are_refused(small: Path, half_done: Path) -> None:
    with (half_done / WORK_NAME / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LocalrunError, match="another conversion"):
            convert(small, half_done)


# --- refusals ------------------------------------------------------------------------------------------------------------------


def test_targets_that_would_harm_something_are_refused(small: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="inside the source"):
        convert(small, small)
    with pytest.raises(UsageError, match="inside the source"):
        convert(small, small / "deep" / "out")
    with pytest.raises(UsageError, match="finished model"):
        convert(small, undisturbed)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        convert(small, tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        convert(small, tmp_path / "file")
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


def test_sources_that_are_no_checkpoint_are_refused(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        convert(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(UsageError, match="not a checkpoint"):
        convert(undisturbed, tmp_path / "out")
    with pytest.raises(UsageError, match="not a checkpoint"):
        convert(undisturbed / MODEL_NAME, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_noticed_first(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(DiskSpaceError, match=r"needs .* the disk has 1000 B free"):
        convert(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_a_clear_error(small: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from localrun.quant.convert.converter import convert\n"
        "from localrun.errors import DiskSpaceError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try: convert(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "except DiskSpaceError as e: print(e)\n"
    )
    child = subprocess.run([sys.executable, "-c", code, small, tmp_path / "out"], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "File too large" in child.stdout


def test_a_target_that_can_not_be_written_is_a_clear_error(small: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(LocalrunError):
        convert(small, blocked / "out")


def test_nan_scales_of_experts_stop_the_conversion_with_the_tensors_name(tmp_path: Path) -> None:
    source = write_small(tmp_path / "m", single_file=True)
    file = source / "model.safetensors"
    tensors = read_safetensors(file)
    name = "layers.1.ffn.experts.3.w2.scale"
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, b"\xff" + data[1:])
    write_safetensors(file, tensors)
    with pytest.raises(FormatError, match=r"layers\.1\.ffn\.experts\.3\.w2\.weight: scale 0 is NaN"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / MODEL_NAME).exists()


# --- input and output ----------------------------------------------------------------------------------------------------------


def test_slices_hold_whole_scale_blocks_and_pages_and_stay_small() -> None:
    from localrun.quant.checkpoint.directory import SourceTensor
    from localrun.quant.checkpoint.mapping import TensorPart
    from localrun.quant.checkpoint.schema import Role, TensorSpec
    from localrun.quant.model.source import Extent

    def part(dtype: str, target: QT, n_out: int, n_in: int, source_row: int, row: int) -> TensorPart:
        source = SourceTensor(
            TensorSpec("w", (n_out, n_in), Role.WIDE, dtype), dtype, Extent(0, 0, n_out * source_row), None
        )
        return TensorPart(source, target, n_out, n_in, 0, n_out * row, 1)

    for case in (
        part("I8", QT.MXFP4, 7168, 3072, 1536, 1632),
        part("F8_E4M3", QT.Q8_0, 65536, 1536, 1536, 1632),
        part("F8_E4M3", QT.F32, 65536, 7168, 7168, 28672),
        part("BF16", QT.BF16, 129280, 7168, 14336, 14336),
    ):
        rows = slice_rows(case)
        assert rows % 128 == 0
        assert case.output_bytes(rows) % PAGE_BYTES == 0
        assert case.output_bytes(rows) <= writing.SLICE_BYTES


def test_reader_and_writer_agree_at_any_alignment(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 256, 300_000, dtype=np.uint8)
    path = tmp_path / "file"
    writer = DirectWriter(path, expected.size)
    buffer = AlignedBuffer()
    cuts = [
        0,
        PAGE_BYTES,
        3 * PAGE_BYTES,
        3 * PAGE_BYTES + 17,
        100_000,
        25 * PAGE_BYTES + 5,
        40 * PAGE_BYTES,
        60 * PAGE_BYTES,
        expected.size,
    ]
    order = list(itertools.pairwise(cuts))
    rng.shuffle(order)
    for begin, end in order:
        memory = buffer.array(end - begin)[: end - begin]
        memory[:] = expected[begin:end]
        writer.write(begin, memory)
    writer.sync()
    writer.close()
    reader = DirectReader(path, expected.size)
    for offset, n_bytes in [
        (0, 300_000),
        (1, 10),
        (PAGE_BYTES, PAGE_BYTES),
        (PAGE_BYTES - 1, 2),
        (299_999, 1),
        (12345, 200_000),
    ]:
        np.testing.assert_array_equal(reader.read(offset, n_bytes, buffer), expected[offset : offset + n_bytes])
    with pytest.raises(StoreError):
        reader.read(299_000, 5000, buffer)
    reader.close()
    with pytest.raises(StoreError, match="changed"):
        DirectReader(path, 5)


def test_works_where_the_file_system_has_no_direct_io(
    small: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    convert(small, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_progress_counts_to_the_end_and_estimates(small: Path, tmp_path: Path) -> None:
    seen: list[ConversionProgress] = []
    write_plan(make_plan(Checkpoint.open(small)), tmp_path / "out", progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes > 0
    half = ConversionProgress(done_bytes=50, total_bytes=100, resumed_bytes=20, elapsed_s=3.0)
    assert (half.bytes_per_s, half.remaining_s) == (10.0, 5.0)
    assert ConversionProgress(20, 100, 20, 3.0).remaining_s is None


def test_manifest_is_plain_json(undisturbed: Path) -> None:
    assert json.loads((undisturbed / MANIFEST_NAME).read_text())["format"] == "localrun-model"

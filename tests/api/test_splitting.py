"""What is said about a split before hours of conversion, and what can be split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from localrun.api import splitting
from localrun.api.following import Follower
from localrun.errors import UsageError
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.mapping import ConversionOptions, ConversionPlan, make_plan
from localrun.quant.convert.converter import MODEL_NAME, convert
from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest
from localrun.quant.open import open_model
from tests.checkpoints import write_small


class Listener:
    """Keeps what a conversion tells."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.bytes: list[tuple[int, int]] = []
        self.n_cleared = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def clear_status(self) -> None:
        self.n_cleared += 1

    def splitting(self) -> Any:
        return lambda done, total: self.bytes.append((done, total))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("source") / "small")


@pytest.fixture(scope="module")
def plan(checkpoint: Path) -> ConversionPlan:
    return make_plan(Checkpoint.open(checkpoint), ConversionOptions())


@pytest.fixture
def converted(checkpoint: Path, tmp_path: Path) -> Path:
    convert(checkpoint, tmp_path / "out")
    return tmp_path / "out"


def listener() -> tuple[Listener, Follower]:
    made = Listener()
    return made, cast(Follower, made)


def test_a_model_that_fits_is_not_split(plan: ConversionPlan) -> None:
    heard, out = listener()
    splitting.check(plan, plan.file_size, out)
    assert [note.split(",")[0] for note in heard.notes] == ["split:  not needed"]


def test_the_number_of_files_is_told_before(plan: ConversionPlan, converted: Path) -> None:
    size = plan.file_size // 3
    heard, out = listener()
    splitting.check(plan, size, out)
    splitting.split(converted, size, out)
    parts = sorted(path.name for path in converted.glob("*.gguf"))
    assert heard.notes[0].startswith(f"split:  {len(parts)} files of at most ")
    assert heard.notes[1] == f"split into {len(parts)} files: {parts[0]} to {parts[-1]}"
    assert all((converted / part).stat().st_size <= size for part in parts)
    assert heard.n_cleared == 1
    assert heard.bytes[-1][0] == heard.bytes[-1][1] > 0
    assert len(open_model(converted).files) == len(parts)
    assert len(read_manifest(converted / MANIFEST_NAME).files) == len(parts)


def test_a_size_below_the_largest_tensor_is_refused_at_once(plan: ConversionPlan) -> None:
    heard, out = listener()
    with pytest.raises(UsageError):
        splitting.check(plan, 1000, out)
    assert heard.notes == []


def test_only_a_single_file_of_this_checkpoint_waits_to_be_split(
    checkpoint: Path, converted: Path, plan: ConversionPlan, tmp_path: Path
) -> None:
    assert splitting.is_waiting(checkpoint, converted)
    other = write_small(tmp_path / "other", seed=5)
    with pytest.raises(UsageError):
        splitting.is_waiting(other, converted)
    splitting.split(converted, plan.file_size // 3, listener()[1])
    assert not splitting.is_waiting(checkpoint, converted)
    assert not (converted / MODEL_NAME).exists()

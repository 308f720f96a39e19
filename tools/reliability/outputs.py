"""More jobs that write files, for drives that are full or may not be written to:

split       a conversion's one file becomes several
calibrate   a conversion with an importance matrix, which it keeps beside the model
export      conversations are written as Markdown and JSON; their own file is elsewhere
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import localrun
from localrun.engine.conversations.export import write_export
from localrun.engine.conversations.store import ConversationStore
from localrun.quant.convert.converter import convert
from localrun.quant.convert.split import split_model
from localrun.quant.model.manifest import MANIFEST_NAME
from localrun.quant.open import open_model
from tools.make_checkpoint import write_checkpoint
from tools.reliability.kills import Job, contents, in_child, must_be_zero
from tools.synthetic_config import CheckpointSpec

DEMO = Path(localrun.__file__).parent / "demo"
_PART_BYTES = 200_000


class _Split:
    """Until the parts are whole, the one file is there, and opens."""

    def __init__(self, folder: Path) -> None:
        from tests.checkpoints import write_small

        self._whole, self._parts, self._target = folder / "whole", folder / "parts", folder / "model"
        source = write_small(folder / "source", n_routed_experts=8)
        in_child(lambda: convert(source, self._whole, jobs=1))
        shutil.copytree(self._whole, self._parts)
        in_child(lambda: split_model(self._parts, _PART_BYTES))
        shutil.copytree(self._whole, self._target)

    def work(self, rng: random.Random, acknowledge: Callable[[], None]) -> None:
        split_model(self._target, _PART_BYTES)

    def after(self, n_acknowledged: int) -> list[str]:
        if not in_child(lambda: must_be_zero(["verify", str(self._target)])):
            return ["the model is damaged"]
        known = (contents(self._whole), contents(self._parts))
        return [] if contents(self._target) in known else [f"left over: {sorted(contents(self._target))}"]

    def finish(self) -> list[str]:
        problems = []
        if len(list(self._target.glob("*.gguf"))) == 1 and not in_child(lambda: split_model(self._target, _PART_BYTES)):
            problems.append("the next split failed")
        if contents(self._target) != contents(self._parts):
            problems.append("other bytes than those of a split with room")
        shutil.rmtree(self._target)
        shutil.copytree(self._whole, self._target)
        return problems


class _Calibrate:
    """What opens is whole, its importance matrix included."""

    def __init__(self, folder: Path) -> None:
        from tests.checkpoints import SMALL

        self._source, self._target, self._whole = folder / "source", folder / "model", folder / "whole"
        config = SMALL | {"hidden_size": 256, "moe_intermediate_size": 256, "vocab_size": 3840}
        write_checkpoint(self._source, CheckpointSpec(config), tokenizer=DEMO / "tokenizer.json")
        in_child(lambda: must_be_zero(self._arguments(self._whole)))
        self._expected = contents(self._whole)

    def _arguments(self, target: Path) -> list[str]:
        learn = ["--base", "q2_k", "--calibrate-tokens", "300", "--ram", "64MiB", "--jobs", "1"]
        return ["convert", str(self._source), str(target), *learn]

    def work(self, rng: random.Random, acknowledge: Callable[[], None]) -> None:
        must_be_zero(self._arguments(self._target))

    def after(self, n_acknowledged: int) -> list[str]:
        if (self._target / MANIFEST_NAME).exists() and in_child(lambda: open_model(self._target)):
            return self._is_right()
        return []

    def finish(self) -> list[str]:
        if not (self._target / MANIFEST_NAME).exists() and not in_child(
            lambda: must_be_zero(self._arguments(self._target))
        ):
            return ["the next conversion failed"]
        problems = self._is_right()
        shutil.rmtree(self._target, ignore_errors=True)
        return problems

    def _is_right(self) -> list[str]:
        found = contents(self._target)
        names = {name for name in found.keys() | self._expected if name.endswith(".gguf")}
        return [f"{name} differs" for name in sorted(names) if found.get(name) != self._expected.get(name)]


class _Export:
    """A file is whole or not there, and never replaces another one."""

    N = 20

    def __init__(self, folder: Path) -> None:
        self._target = folder / "exports"
        self._target.mkdir()
        self._path = folder.parent.parent / "exported.sqlite3"
        with ConversationStore.open(self._path) as store:
            number = store.create("Talk").id
            parent = None
            for i in range(self.N):
                parent = store.add(number, parent, ("user", "assistant")[i % 2], f"{i} about the sea " * 300).id
        self.work(random.Random(0), lambda: None)
        self._expected = {Path(name).suffix: data for name, data in contents(self._target).items()}
        self._clear()

    def work(self, rng: random.Random, acknowledge: Callable[[], None]) -> None:
        with ConversationStore.open(self._path) as store:
            (talk,) = store.conversations()
            for _ in range(self.N):
                write_export(store, talk.id, "md", self._target)
                acknowledge()
                write_export(store, talk.id, "json", self._target)
                acknowledge()

    def after(self, n_acknowledged: int) -> list[str]:
        found = contents(self._target)
        problems = [f"{name} is not whole" for name, data in found.items() if data != self._expected[Path(name).suffix]]
        if not n_acknowledged <= len(found) <= n_acknowledged + 1:
            problems.append(f"{len(found)} files, {n_acknowledged} acknowledged")
        return problems

    def finish(self) -> list[str]:
        self._clear()
        done = in_child(lambda: self.work(random.Random(0), lambda: None))
        problems = self.after(2 * self.N) if done else ["exporting failed"]
        self._clear()
        return problems

    def _clear(self) -> None:
        for path in self._target.iterdir():
            path.unlink()


JOBS: dict[str, Callable[[Path], Job]] = {"split": _Split, "calibrate": _Calibrate, "export": _Export}

"""Inspects folders and models without loading them, with the code that opens them, in a separate process.

User interfaces start without the libraries that read headers, and a header may be huge or malformed in unforeseen ways. As a
program (`python -m localrun.engine.model_look`) this reads questions from standard input, one per line as JSON: a model's path,
or `{"folder": PATH}`. It answers each with one line of JSON; as a module it starts that program.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import localrun
from localrun.errors import LocalrunError

PATIENCE_S = 60.0
"""For one model; the largest headers take seconds."""


@dataclass(frozen=True, slots=True)
class Look:
    """The result of an inspection.

    Attributes:
        name: from the model; empty if it has none.
        format: number format of most experts.
        n_bytes: of its files, without experts kept in a checkpoint elsewhere.
        problem, hint: why localrun can't run it and what to do; empty if it can.
    """

    path: str
    name: str = ""
    format: str = ""
    n_bytes: int = 0
    dense_bytes: int = 0
    expert_bytes: int = 0
    n_layers: int = 0
    n_experts: int = 0
    problem: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """A model in a folder, as opening finds it.

    Attributes:
        kind: `converted`, `GGUF` or `checkpoint`.
        name: `owner/name` in a hub's cache, else the file's or folder's.
    """

    path: Path
    kind: str
    name: str


class Looker:
    """The program, started with the first question. Use it in one thread; it ends with the block."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Looker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def look(self, path: Path) -> Look:
        """Blocks."""
        try:
            return Look(**self._ask(str(path)))
        except (OSError, ValueError, TypeError):
            self._end()
            return Look(
                str(path),
                problem="its header can't be read: the reader process died",
                hint="run `localrun verify` on it",
            )

    def folder(self, path: Path) -> tuple[list[Place], Path | None]:
        """See `quant.locate.models_at`; nothing if the reader process died. Blocks."""
        try:
            answer = self._ask({"folder": str(path)})
            places = [Place(Path(where), kind, name) for where, kind, name in answer["models"]]
            return places, None if answer["below"] is None else Path(answer["below"])
        except (OSError, ValueError, TypeError, KeyError):
            self._end()
            return [], None

    def _ask(self, question: object) -> Any:
        process = self._process = self._process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None


def check(path: Path) -> LocalrunError | None:
    """What is wrong with a model, as far as its headers tell; blocks for at most `PATIENCE_S`."""
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(_start())
        try:
            out, _ = process.communicate(json.dumps(str(path)) + "\n", PATIENCE_S)
            look = Look(**json.loads(out))
        except subprocess.TimeoutExpired:
            process.kill()
            return LocalrunError(f"{path}: reading its headers takes more than {PATIENCE_S:.0f} s")
        except (OSError, ValueError, TypeError) as error:
            return LocalrunError(f"{path}: its header can't be read: {error}", hint="run `localrun verify` on it")
    return LocalrunError(look.problem, hint=look.hint or None) if look.problem else None


def _start() -> subprocess.Popen[str]:
    path = [str(Path(localrun.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "localrun.engine.model_look"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if p)},
        encoding="utf-8",
        errors="surrogateescape",
        start_new_session=True,
    )


# --- the program ----------------------------------------------------------------------------------------------------


def look_at(path: Path) -> Look:
    """Opens a model as loading does, without reading weights."""
    from localrun.quant.open import open_model, own_files

    try:
        source = open_model(path)
    except Exception as failure:  # each is a model that can't be run, and the next one may be fine
        known = isinstance(failure, LocalrunError)
        problem = str(failure) if known else f"{path}: {type(failure).__name__}: {failure}"
        hint = failure.hint if isinstance(failure, LocalrunError) else None
        return Look(str(path), problem=problem, hint=hint or "", n_bytes=_size(_files(path)))
    stacked = [info for name, info in source.tensors.items() if "_exps." in name]
    experts = sum(info.n_bytes for info in stacked)
    formats: dict[str, int] = {}
    for info in stacked:
        formats[info.type.name] = formats.get(info.type.name, 0) + info.n_bytes
    layers = source.moe_layers
    return Look(
        str(path),
        name=str(source.metadata.get("general.name") or ""),
        format=max(formats, key=lambda name: formats[name], default="").lower(),
        n_bytes=_size(own_files(source)),
        dense_bytes=sum(info.n_bytes for info in source.tensors.values()) - experts,
        expert_bytes=experts,
        n_layers=max(layers, default=-1) + 1,
        n_experts=max((moe.n_experts for moe in layers.values()), default=0),
    )


def _files(path: Path) -> Iterable[Path]:
    return path.iterdir() if path.is_dir() else [path]


def _size(files: Iterable[Path]) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for file in files:
            with contextlib.suppress(OSError):
                total += file.stat().st_size if file.is_file() else 0
    return total


def _read_answers(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        question = json.loads(line)
        yield _places(Path(question["folder"])) if isinstance(question, dict) else asdict(look_at(Path(question)))


def _places(folder: Path) -> dict[str, Any]:
    from localrun.quant.locate import models_at

    here, below = models_at(folder)
    return {
        "models": [(str(found.path), found.kind, found.name) for found in here],
        "below": None if below is None else str(below),
    }


def main() -> int:
    """Until standard input ends."""
    for answer in _read_answers(sys.stdin):
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

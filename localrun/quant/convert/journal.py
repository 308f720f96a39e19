"""The state of an unfinished conversion: the request, and which parts are safely on disk.

Files in the work directory:
    state.json      what the conversion is (options, source, plan); written once, at the start
    journal.jsonl   one line per finished part, appended only after the part's bytes have been synced
    lock            held while a process works here

A process may be killed at any point: an incomplete line is ignored, and its part is redone.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrun.atomic import replacing
from localrun.errors import FormatError, LocalrunError, UsageError
from localrun.quant.convert.direct_io import write_errors
from localrun.quant.formats.transcode import Loss

STATE_VERSION = 1

_TYPED_AS = {"imatrix": "calibrate or --imatrix", "tiers": "hot or --target"}
"""What users type for options that are compared by what follows from them."""


@dataclass(frozen=True, slots=True)
class PartResult:
    """The result for a written part.

    Attributes:
        checksum: xxh3_64 of the output bytes.
        weight, scale: xxh3_64 of the source bytes; scale is empty where there is none.
        loss: for rounding conversions.
    """

    checksum: str
    weight: str
    scale: str
    loss: Loss | None


class Journal:
    """Exclusive access to a work directory. Used by one thread.

    Args:
        folder: the work directory, created if needed.
        options: the user's choices by option name, for the comparison with an earlier run.
        facts: other values that must match (source path, identity, plan digest).

    Raises:
        UsageError: an earlier run had a different request; names the differences.
        LocalrunError: another process works here.
    """

    def __init__(self, folder: Path, options: Mapping[str, str], facts: Mapping[str, str]) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._file: int | None = None
        try:
            self._take_lock()
            self._check_state({"version": STATE_VERSION, "options": dict(options), **facts})
            self.done = self._load()
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except BaseException:
            self.close()
            raise

    @property
    def _path(self) -> Path:
        return self._folder / "journal.jsonl"

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise LocalrunError(
                f"{self._folder}: another conversion is writing here", hint="wait for it, or choose another directory"
            ) from e

    def _check_state(self, state: dict[str, Any]) -> None:
        path = self._folder / "state.json"
        if not path.exists():
            with replacing(path) as file:
                file.write(json.dumps(state, indent=1).encode())
            return
        try:
            before = json.loads(path.read_bytes())
            known = isinstance(before, dict) and before.get("version") == STATE_VERSION
            changed = describe_changes(before, state) if known else ["it was started by another version of localrun"]
        except (ValueError, AttributeError) as e:
            raise FormatError(f"{path}: damaged", hint=f"delete {self._folder} to start again") from e
        if changed:
            raise UsageError(
                f"{self._folder}: an unfinished conversion can't be resumed: {'; '.join(changed)}",
                hint=f"use the same options, or delete {self._folder} to start again",
            )

    def _load(self) -> dict[int, PartResult]:
        """Finished parts by number. Cuts off what a killed process left unfinished at the end."""
        done: dict[int, PartResult] = {}
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return done
        good = 0
        for line in data.splitlines(keepends=True):
            result = _parse_line(line)
            if result is None:
                break
            done[result[0]] = result[1]
            good += len(line)
        if good < len(data):
            os.truncate(self._path, good)
        return done

    def append(self, results: Iterable[tuple[int, PartResult]]) -> None:
        """Records finished parts, durably; their bytes must have been synced before.

        Raises:
            StoreError: the drive is full or fails; the next run cuts off what was half written.
        """
        assert self._file is not None
        lines = []
        for number, result in results:
            loss = [] if result.loss is None else [result.loss.error_power, result.loss.power]
            lines.append(json.dumps([number, result.checksum, result.weight, result.scale, loss]) + "\n")
        data = "".join(lines).encode()
        with write_errors(self._path):
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)

    def close(self) -> None:
        for fd in (self._file, self._lock):
            if fd is not None:
                os.close(fd)


def describe_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two states, in the user's words."""
    was, now = before["options"], after["options"]
    changes = [
        f"--{_TYPED_AS.get(name, name)} was {was.get(name, 'not given')} and is now {now.get(name, 'not given')}"
        for name in (*now, *(name for name in was if name not in now))
        if was.get(name) != now.get(name)
    ]
    if before.get("identity") != after["identity"]:
        moved = before.get("source") != after["source"]
        changes.append(
            f"the source was {before.get('source')} and is now {after['source']}"
            if moved
            else "the files of the source have changed"
        )
    elif not changes and before.get("plan") != after.get("plan"):
        changes.append("the name, tokenizer or chat template of the source has changed, or localrun was updated")
    return changes


def _parse_line(line: bytes) -> tuple[int, PartResult] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        number, checksum, weight, scale, loss = json.loads(line)
        digests_fit = all(isinstance(digest, str) for digest in (checksum, weight, scale))
        if type(number) is not int or not digests_fit or len(checksum) != 16:
            return None
        return number, PartResult(checksum, weight, scale, Loss(float(loss[0]), float(loss[1])) if loss else None)
    except (ValueError, TypeError, IndexError):
        return None

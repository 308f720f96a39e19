"""Resolves a MODEL argument to a path: it may be a path, a name from `[models]`, `demo`, or a repository in the Hugging Face cache.

Anything else is rejected with the command that was most likely meant.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shlex
from pathlib import Path

from localrun import config, paths
from localrun.atomic import replacing
from localrun.errors import UsageError

DEMO = "demo"
"""The name of the model that comes with localrun."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_RELEASES = {name: re.compile(rf"(deepseek[-_]?)?(v4)?[-_]?{name}", re.I) for name in ("flash", "pro")}
_LAST = "last-model"


def resolve(text: str, settings: config.Settings, *, command: str = "chat") -> Path | None:
    """The path of the model `text`; None for the demo model.

    Raises:
        UsageError: there is no such model; the hint is a command line.
    """
    path = expanded(text)
    if path is not None and path.exists():
        return path
    if text in settings.models:
        named = expanded(settings.models[text])
        if named is None or not named.exists():
            where = paths.config_dir() / config.FILE_NAME
            raise UsageError(f"{where}: [models] {text}: {settings.models[text]}: no such file or directory")
        return named
    if text == DEMO:
        return None
    if _REPOSITORY.fullmatch(text) and (cached := in_hub_cache(text)) is not None:
        return cached
    raise _refusal(text, settings, command)


def named(settings: config.Settings) -> dict[Path, str]:
    """The user's names for models, by path; also of paths where there is nothing."""
    return {path.resolve(): name for name, text in settings.models.items() if (path := expanded(text))}


def expanded(text: str) -> Path | None:
    """`text` as a path, `~` replaced; None if it can't be one."""
    if not text or "\0" in text or len(os.fsencode(text)) > 4000:
        return None
    try:
        path = Path(text).expanduser()
        path.exists()
    except (RuntimeError, OSError):  # ~ without a home folder; a name too long for the file system
        return None
    return path


def is_text(text: str, settings: config.Settings) -> bool:
    """Whether `text`, given as a model, is really a question: neither an existing path or name, nor formatted like one."""
    path = expanded(text)
    if (path is not None and path.exists()) or text in settings.models or text == DEMO:
        return False
    if re.search(r"\s|\?$", text.strip()):
        return not text.startswith(("/", "~", "./", "../"))
    looks_like_path = "/" in text or text.startswith((".", "~")) or text.endswith((".gguf", ".json", ".safetensors"))
    return not looks_like_path and not _near(text, settings) and not any(r.fullmatch(text) for r in _RELEASES.values())


def in_hub_cache(repository: str) -> Path | None:
    """The snapshot of `owner/name` that Hugging Face's tools downloaded; None: not there."""
    if own := os.environ.get("HF_HUB_CACHE"):
        hub = Path(own)
    elif own := os.environ.get("HF_HOME"):
        hub = Path(own) / "hub"
    else:
        hub = paths.home() / ".cache/huggingface/hub"
    folder = hub / f"models--{repository.replace('/', '--')}"
    with contextlib.suppress(OSError):
        snapshot = folder / "snapshots" / (folder / "refs/main").read_text().strip()
        if snapshot.is_dir():
            return snapshot
    return None


def remember(path: Path) -> None:
    """Remembers an opened model, so that `chat` without MODEL reopens it. The demo model's copy in the cache does not count."""
    if path.absolute().is_relative_to(paths.cache_dir()):
        return
    with contextlib.suppress(OSError):
        paths.data_dir().mkdir(parents=True, exist_ok=True)
        with replacing(paths.data_dir() / _LAST) as file:
            file.write(os.fsencode(path.absolute()))


def last() -> Path | None:
    """The model opened last, if it still exists."""
    try:
        path = Path(os.fsdecode((paths.data_dir() / _LAST).read_bytes()))
    except (OSError, ValueError):
        return None
    return path if path.is_absolute() and path.exists() else None


def _near(text: str, settings: config.Settings) -> str | None:
    """A name or a neighbouring file that was probably meant."""
    near = difflib.get_close_matches(text, [*settings.models, DEMO], 1, 0.75)
    if near:
        return near[0]
    path = expanded(text)
    if path is None:
        return None
    try:
        names = [entry.name for entry in os.scandir(path.parent)]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, 1, 0.75)
    return str(path.parent / near[0]) if near else None


def _refusal(text: str, settings: config.Settings, command: str) -> UsageError:
    if re.search(r"\s", text.strip()) and not text.startswith(("/", "~", "./", "../")):
        return UsageError(
            f"there is no model '{text}'", hint=f"to ask it as a question: localrun run -p {shlex.quote(text)}"
        )
    if command == "plan" and (kinds := difflib.get_close_matches(text, _RELEASES, 1, 0.75)):
        return UsageError(f"{text}: no such model", hint=f"did you mean: localrun plan {kinds[0]}")
    if near := _near(text, settings):
        return UsageError(f"{text}: no such model", hint=f"did you mean: localrun {command} {shlex.quote(near)}")
    release = next((name for name, form in _RELEASES.items() if form.fullmatch(text.split("/")[-1])), None)
    if release is not None and "/" not in text:
        plan = f"localrun plan {release}"
        if command == "plan":
            return UsageError(f"{text}: no such file or directory", hint=f"did you mean: {plan}")
        return UsageError(
            f"there is no model {text} here", hint=f"{plan} shows what it needs; then download it and pass its folder"
        )
    if _REPOSITORY.fullmatch(text) and release is not None and command == "plan":
        return UsageError(
            f"{text} is not on this machine", hint=f"nothing has to be downloaded for: localrun plan {release}"
        )
    if _REPOSITORY.fullmatch(text):
        folder = f"~/models/{text.split('/')[1]}"
        return UsageError(
            f"{text} is not on this machine; localrun downloads nothing",
            hint=f"hf download {text} --local-dir {folder}, then: localrun {command} {folder}"
            + (" DIR" if command == "convert" else "")
            + (f"; first: localrun plan {release}" if release and command != "plan" else ""),
        )
    return UsageError(f"{text}: no such file or directory", hint="localrun list shows the models on this machine")

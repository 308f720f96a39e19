"""The bundled demo model: a checkpoint in the official format, converted on first use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
import uuid
from pathlib import Path

from localrun import paths
from localrun.atomic import replacing
from localrun.errors import UsageError

log = logging.getLogger(__name__)

MANIFEST_NAME = "localrun.json"
"""`quant.model.manifest` has it, too, and takes long to import; a test compares them."""

PARTIAL_AGE_S = 3600


def checkpoint() -> Path:
    """The folder of the demo checkpoint.

    Raises:
        UsageError: this installation has none.
    """
    try:
        from localrun.demo import checkpoint_dir
    except ImportError:
        raise UsageError("this installation has no demo model", hint="pass a model: localrun chat PATH") from None
    folder: Path = checkpoint_dir()
    return folder


def converted() -> Path:
    """The folder of the converted demo model in the cache; converts it if necessary.

    If the cache is not writable, returns the checkpoint itself, which runs unconverted but loads more slowly.

    Raises:
        UsageError: this installation has no demo model.
        LocalrunError: it can't be converted.
    """
    source = checkpoint()
    # Reading the checkpoint needs imports that take half a second, so the conversion is looked up by file names,
    # sizes and times.
    stamp = paths.cache_dir() / f"demo-{_files_digest(source)}.stamp"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = paths.cache_dir() / Path(stamp.read_text().strip()).name
        if known.name.startswith("demo-") and is_whole(known):
            return known

    from localrun.quant.convert.converter import convert
    from localrun.quant.open import open_model

    target = paths.cache_dir() / f"demo-{open_model(source).identity[:16]}"
    if not is_whole(target):
        shutil.rmtree(target, ignore_errors=True)
        _remove_partial()
        # Converted next to the target and renamed, so two simultaneous first starts are safe.
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
        try:
            convert(source, partial)
            partial.rename(target)
        except OSError as error:
            if not is_whole(target):
                log.info("%s: can't keep the demo model: %s", target, error)
                return source
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError), replacing(stamp) as file:  # where it fails, next time takes longer
        file.write(target.name.encode())
    return target


def is_whole(folder: Path) -> bool:
    """Whether the converted copy has all files in the sizes of its manifest: a power cut may leave empty ones."""
    try:
        files = json.loads((folder / MANIFEST_NAME).read_bytes())["files"]
        return bool(files) and all((folder / file["name"]).stat().st_size == file["size_bytes"] for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def discard() -> None:
    """Deletes the converted copy: what can't be loaded is made again."""
    for folder in paths.cache_dir().glob("demo-*"):
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def _remove_partial() -> None:
    """What killed runs left. One that is at work has touched its folder within the hour."""
    with contextlib.suppress(OSError):
        for folder in paths.cache_dir().glob("demo-*.partial"):
            if time.time() - folder.stat().st_mtime > PARTIAL_AGE_S:
                shutil.rmtree(folder, ignore_errors=True)


def _files_digest(folder: Path) -> str:
    """Changes with any file's name, size or time."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    text = repr([str(folder.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]

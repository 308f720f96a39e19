"""The demo model that comes with localrun: an official-format checkpoint in the package, converted on its first use."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import uuid
from pathlib import Path

from localrun import paths
from localrun.errors import UsageError

log = logging.getLogger(__name__)


def checkpoint() -> Path:
    """The folder of the demo checkpoint.

    Raises:
        UsageError: this installation has none.
    """
    try:
        from localrun.demo import checkpoint_dir
    except ImportError:
        raise UsageError("this installation has no demo model", hint="name a model: localrun chat PATH") from None
    folder: Path = checkpoint_dir()
    return folder


def converted() -> Path:
    """The folder of the converted demo model in the cache; converts it if it is not there.

    Where the cache can't be written, the checkpoint itself: it runs as it lies, only loading takes longer.

    Raises:
        UsageError: this installation has no demo model.
        LocalrunError: it can't be converted.
    """
    source = checkpoint()
    # Looking into the checkpoint needs imports of half a second: what it is converted to is remembered by its files' names,
    # sizes and times.
    stamp = paths.cache_dir() / f"demo-{_files_digest(source)}.stamp"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = paths.cache_dir() / Path(stamp.read_text().strip()).name
        if known.name.startswith("demo-") and known.is_dir():
            return known

    from localrun.quant.convert.converter import convert
    from localrun.quant.open import open_model

    target = paths.cache_dir() / f"demo-{open_model(source).identity[:16]}"
    if not target.is_dir():
        # Converted beside the target and renamed: two first starts at once both end well.
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
        try:
            convert(source, partial)
            partial.rename(target)
        except OSError as error:
            if not target.is_dir():
                log.info("%s: the demo model can't be kept: %s", target, error)
                return source
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):  # next time it takes longer
        stamp.write_text(target.name)
    return target


def _files_digest(folder: Path) -> str:
    """Changes with any file's name, size or time."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    text = repr([str(folder.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]

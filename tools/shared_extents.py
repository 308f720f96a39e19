"""Files that share stored bytes, so that whole models of hundreds of GB fit on a disk of tens.

    python -m tools.shared_extents make disk.img /mnt/models --size 46GiB     # as root: an XFS in a file, mounted
    python -m tools.shared_extents remove disk.img /mnt/models

XFS and btrfs let ranges of two files share their blocks (ioctl FICLONERANGE, `linux/fs.h`). Each file still has a page cache of its
own, and O_DIRECT goes past it, so every read is a real read of the drive: a benchmark on such a model is one on the whole model.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from localrun.alignment import align_up
from localrun.errors import LocalrunError
from localrun.units import parse_size

BLOCK_BYTES = 4096
"""Offsets and lengths of shared ranges are multiples of the file system's block; 4096 is the default of XFS and btrfs."""

_FICLONERANGE = 0x4020940D
"""`_IOW(0x94, 13, struct file_clone_range)`: s64 src_fd, u64 src_offset, u64 src_length, u64 dest_offset."""

_HINT = "make one in a file, as root: python -m tools.shared_extents make IMAGE FOLDER --size SIZE"


class SharingError(LocalrunError, OSError):
    """This file system can't let files share blocks."""


def share(source: Path, source_offset: int, target: Path, target_offset: int, n_bytes: int) -> None:
    """Makes a range of `target` the same blocks as a range of `source`; both files exist, offsets are whole blocks.

    A length that is no whole number of blocks is rounded up: both files must have room for it, or end there.

    Raises:
        SharingError: another file system, or one without shared extents.
    """
    if source_offset % BLOCK_BYTES or target_offset % BLOCK_BYTES:
        raise ValueError(f"offsets {source_offset} and {target_offset} are not multiples of {BLOCK_BYTES}")
    length = align_up(n_bytes, BLOCK_BYTES)
    with source.open("rb") as src, target.open("r+b") as dst:
        if source_offset + length > os.fstat(src.fileno()).st_size:
            length = 0  # to the source's end
        request = struct.pack("qQQQ", src.fileno(), source_offset, length, target_offset)
        try:
            fcntl.ioctl(dst, _FICLONERANGE, request)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY):
                raise SharingError(
                    f"{target}: its file system can't share blocks between files ({error.strerror})", hint=_HINT
                ) from error
            raise


def check(folder: Path) -> None:
    """Refuses a folder whose file system can't share blocks, before gigabytes are written; it need not exist, and isn't made.

    Raises:
        SharingError: see `share`.
    """
    folder = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    first, second = (folder / f".sharing-{os.getpid()}-{number}" for number in (1, 2))
    try:
        first.write_bytes(bytes(BLOCK_BYTES))
        second.touch()
        share(first, 0, second, 0, BLOCK_BYTES)
    finally:
        first.unlink(missing_ok=True)
        second.unlink(missing_ok=True)


def make_volume(image: Path, folder: Path, size_bytes: int) -> None:
    """An XFS with shared extents in the sparse file `image`, mounted on `folder` past the page cache.

    Raises:
        LocalrunError: not root, no mkfs.xfs, no loop device; the message has what the program said.
    """
    if os.geteuid() != 0:
        raise LocalrunError(
            "mounting a file needs root", hint="or give a folder on an XFS or btrfs that is there already"
        )
    if shutil.which("mkfs.xfs") is None:
        raise LocalrunError("mkfs.xfs is not installed", hint="apt install xfsprogs (Fedora, Arch: xfsprogs)")
    if image.exists():
        raise LocalrunError(f"{image} exists already", hint="remove it first, or choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size_bytes)
    _run("mkfs.xfs", "-q", "-m", "reflink=1", str(image))
    # Direct I/O to the backing file: its pages would otherwise be cached a second time, and reads would not be the drive's.
    device = _run("losetup", "--direct-io=on", "--show", "--find", str(image)).strip()
    _run("mount", device, str(folder))


def remove_volume(image: Path, folder: Path) -> None:
    """Unmounts what `make_volume` made and deletes the image."""
    device = _run("findmnt", "--noheadings", "--output", "SOURCE", str(folder)).strip()
    _run("umount", str(folder))
    _run("losetup", "--detach", device)
    image.unlink()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LocalrunError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="shared_extents", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("action", choices=("make", "remove"))
    parser.add_argument("image", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="46GiB", help="of the file system; the image is sparse (46GiB)")
    options = parser.parse_args(arguments)
    try:
        if options.action == "make":
            make_volume(options.image, options.folder, parse_size(options.size))
        else:
            remove_volume(options.image, options.folder)
    except (LocalrunError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, LocalrunError) and error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

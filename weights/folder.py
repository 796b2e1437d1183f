"""Folders that appear whole, or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3cp.errors import CheckpointError, InputError

__all__ = ["new_folder", "replaced_folder"]

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextmanager
def new_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `target`, which takes its place when the block ends well.

    When it does not, nothing is left; after a kill, a hidden folder beside `target` is.

    Args:
        num_bytes: that will be written, held to the free space first.

    Raises:
        InputError: `target` exists and is not an empty folder.
        CheckpointError: the disk is full, or cannot be written to.
    """
    target = Path(target).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty folder: give another")
    with _temporary(target, num_bytes) as folder:
        yield folder
        os.rename(folder, target)  # replaces an empty folder, too


@contextmanager
def replaced_folder(target: Path, num_bytes: int, *, stale: tuple[str, ...]) -> Iterator[Path]:
    """As `new_folder`, for a target that may exist: what else is in it stays, unless it is stale.

    The old folder is what it was until the new one is whole, and then goes at once.

    Args:
        stale: patterns of the files that the new ones replace.
    """
    target = Path(target).resolve()  # a link stays a link, to the new folder
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file: give the name of a folder")
    with _temporary(target, num_bytes) as folder:
        yield folder
        if not target.exists():
            os.rename(folder, target)
            return
        others = [
            path
            for path in target.iterdir()
            if not any(path.match(pattern) for pattern in stale)
            and not (folder / path.name).exists()
        ]
        for path in others:
            if path.is_file() and not path.is_symlink():
                _link(path, folder / path.name)
            elif path.is_symlink():
                (folder / path.name).symlink_to(path.readlink())
        _exchange(folder, target)
        old = folder.with_name(f"{folder.name}.old")
        os.rename(folder, old)
        for path in others:  # folders cannot be linked
            if path.name not in os.listdir(target):
                os.rename(old / path.name, target / path.name)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _temporary(target: Path, num_bytes: int) -> Iterator[Path]:
    folder = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < num_bytes:
            raise CheckpointError(
                f"{target} needs {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there"
            )
        folder.mkdir()
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    try:
        yield folder
        _sync(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(a: Path, b: Path) -> None:
    """Swaps two folders, in one step where the system can."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        paths = os.fsencode(a), os.fsencode(b)
        if libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(b))
    aside = a.with_name(f"{a.name}.old")
    os.rename(b, aside)
    os.rename(a, b)
    os.rename(aside, a)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _sync(folder: Path) -> None:
    """Renames are on disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

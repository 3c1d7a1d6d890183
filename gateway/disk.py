"""Reads files whole, and makes changes to a directory last.

In: a path that someone has configured, which can lead anywhere; a directory in which files were created, renamed or
removed.  Out: the file's bytes; the changes on disk, after a power failure too.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.errors import NotNow

MEBIBYTE = 1_048_576

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""The errors of a machine or process that has no descriptor or memory left."""

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a directory",
}


class _Lack(threading.local):
    """What this thread could not read for want of descriptors or memory."""

    words = ""


_lack = _Lack()


@contextmanager
def all_read() -> Iterator[None]:
    """Raise `NotNow` if this thread could not open a file in this block for want of descriptors or memory.

    Whoever reads the file takes that for a fault of the file, and might go without the rule or the key in it.
    """
    _lack.words = ""
    try:
        yield
    finally:
        if _lack.words:
            raise NotNow([f"{_lack.words}; raise the unit's LimitNOFILE, or find what uses them up"])


def read_file(path: Path, limit: int = MEBIBYTE, *, from_pipe: bool = False) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    `from_pipe` permits anything that can be read to its end, and waits for it: only for what a user names on the
    command line, as in `--password-file <(pass show broker)`.

    Raises `OSError`, whose `strerror` says what is wrong and what to do; `ValueError` for a NUL character in the path.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY) if from_pipe else open_file(path)
    except OSError as error:
        if error.errno in EXHAUSTED:
            _lack.words = f"{path} cannot be read: {error.strerror}"
        raise
    try:
        parts, left = [], limit + 1
        # One read returns everything of a regular file, but not of a pipe or a file in /proc.
        while left and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(descriptor)
    if not left:
        words = f"it is larger than {limit // MEBIBYTE} MiB: replace it, or correct the path"
        raise OSError(errno.EFBIG, words, str(path))
    return b"".join(parts)


def open_file(path: Path) -> int:
    """Open a regular file for reading; return its descriptor.  Raises as `read_file`.

    Anything else is refused: a FIFO would block its reader for ever, and some devices act when they are opened.
    """
    _check_regular(path, os.stat(path))  # noqa: PTH116  Path.stat is slower
    # It may have been replaced since.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check_regular(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def sync_directory(path: Path) -> None:
    """Wait until the entries of a directory are on disk: fsync of a file does not cover its name.  Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file: replace it, or correct the path", str(path))

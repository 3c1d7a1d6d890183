"""Makes changes to a directory last.

In: a directory in which files were created, renamed or removed.  Out: the changes on disk, after a power failure too.
"""

from __future__ import annotations

import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Wait until the entries of a directory are on disk: fsync of a file does not cover its name.  Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

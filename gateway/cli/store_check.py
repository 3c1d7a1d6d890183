"""Checks the store of a configuration: whether its directory can be written, how much fits, how long fsync takes.

In: a configuration.  Out: a `Step`, or none if no rule says `store`.  Nothing is left on disk.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from time import monotonic

from gateway.cli.report import Status, Step
from gateway.cli.service_view import OWN, ServiceView
from gateway.config import Config
from gateway.disk import MEBIBYTE, open_file
from gateway.store.database import RESERVE, SCHEMA_VERSION
from gateway.store.opening import store_directory, store_is_wanted

_STEP = "store"
_TRIES = 5
_BLOCK = 4096
_SLOW = 0.05  # seconds of an fsync above which a device notices
# What the files take beside the messages: pages that are not full, the write-ahead log, the reserve.
_FILES_PER_BYTE, _FILES = 1.2, RESERVE + 4 * 1024 * 1024
# The header of an SQLite file has its user version here (fileformat2.html §1.3.12).
_USER_VERSION = slice(60, 64)


def store_step(
    config: Config, view: ServiceView | None, *, with_lock: bool, environment: Mapping[str, str] = os.environ
) -> Step | None:
    """Check the store, and with `with_lock` also whether another gateway uses it."""
    if not store_is_wanted(config):
        return None
    directory = store_directory(config, environment)
    if directory is None and view is not None:
        # The service's own state directory, which systemd makes.
        directory = Path(OWN[0]) / "store"
    if directory is None:
        return Step(
            _STEP,
            Status.FAIL,
            "a rule says store = true, but store.directory is not set, and there is no STATE_DIRECTORY",
            "Set store.directory to a directory for this gateway alone.",
        )
    if view is not None and not any(directory.is_relative_to(own) for own in OWN):
        return Step(
            _STEP,
            Status.WARN,
            f"{directory}: {view.unit} can write only below {OWN[0]}, unless a drop-in says otherwise",
            f"Remove store.directory, or add ReadWritePaths={directory} to the unit (systemctl edit {view.unit}).",
        )
    newer = _newer_version(directory / "store.db")
    if newer:
        message = f"{directory / 'store.db'} was written by a newer version (schema {newer}, not {SCHEMA_VERSION})"
        return Step(_STEP, Status.FAIL, message, "Install that version again, or name another store.directory.")
    return _disk_step(directory, config.store.max_size, with_lock=with_lock)


def _disk_step(directory: Path, max_size: int, *, with_lock: bool) -> Step:
    place = directory
    while not place.is_dir() and place != place.parent:
        place = place.parent
    try:
        seconds = _fsync_seconds(place)
        state = os.statvfs(place)
    except OSError as error:
        remedy = "Give the gateway's user write access, or name another store.directory."
        return Step(_STEP, Status.FAIL, f"{directory} cannot be written: {error.strerror}", remedy)
    free = state.f_bavail * state.f_frsize
    used = sum(path.stat().st_size for path in directory.glob("store.db*")) if directory.is_dir() else 0
    reserved = RESERVE if (directory / "reserve").exists() else 0
    wanted = int(max_size * _FILES_PER_BYTE) + _FILES - reserved
    facts = {"directory": str(directory), "fsync_seconds": round(seconds, 4), "free_bytes": free, "used_bytes": used}
    words = f"{directory}: fsync takes {seconds * 1000:.1f} ms, {_mebibytes(free)} are free"
    if free + used < wanted:
        message = f"{words}, but store.max_size needs up to {_mebibytes(wanted)}"
        remedy = "Lower store.max_size, or use a larger disk: a full disk stops the gateway from accepting messages."
        return Step(_STEP, Status.WARN, message, remedy, facts=facts)
    if with_lock and _is_locked(directory / "lock"):
        remedy = "If the running gateway uses it, ignore this; otherwise give each gateway its own store.directory."
        return Step(_STEP, Status.WARN, f"{words}; a gateway is using it", remedy, facts=facts)
    if seconds > _SLOW:
        remedy = "Use another disk: a device waits for each acknowledgement at least this long."
        return Step(_STEP, Status.WARN, f"{words}; that is slow", remedy, facts=facts)
    return Step(_STEP, Status.PASS, words, facts=facts)


def _fsync_seconds(place: Path) -> float:
    """Return the median of some writes of a block, each made durable.  Raises OSError."""
    taken = []
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        for _ in range(_TRIES):
            began = monotonic()
            file.write(bytes(_BLOCK))
            os.fsync(file.fileno())
            taken.append(monotonic() - began)
    return median(taken)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _newer_version(path: Path) -> int:
    """Return the schema version of a file that this program cannot use, else 0."""
    try:
        with os.fdopen(open_file(path), "rb") as file:
            version = int.from_bytes(file.read(_USER_VERSION.stop)[_USER_VERSION], "big")
    except OSError:
        return 0
    return version if version > SCHEMA_VERSION else 0


def _mebibytes(size: int) -> str:
    return f"{size / MEBIBYTE:,.0f} MiB"

"""Builds the compiled core over a kernel that a test makes up: `recv`, `send` and `epoll_wait` are Python's.

In: `gateway/relay/_core.c`, a C compiler.  Out: a module like `gateway.relay._core`, from the same source, and `Kernel`
in place of the system calls.  With `edits`, the source has faults that were planted in it.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from gateway.tls.direct import functions

SOURCE = Path(__file__).parent.parent.parent / "gateway" / "relay" / "_core.c"
_VIRTUAL = Path(__file__).parent / "virtual.c"
_FLAGS = ("-std=c11", "-D_DEFAULT_SOURCE", "-O1", "-fPIC", "-shared", "-fvisibility=hidden")

_RECEIVE = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_SEND = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_WAIT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int)


class Records(ctypes.Structure):
    """`struct records` of the core."""

    _fields_ = (("missing", ctypes.c_size_t), ("header_size", ctypes.c_size_t), ("header", ctypes.c_uint8 * 5))


class Kernel(Protocol):
    """The system calls of the core.  They raise `OSError` with its errno."""

    def recv(self, descriptor: int, size: int) -> bytes: ...

    def send(self, descriptor: int, data: bytes) -> int: ...

    def wait(self, most: int) -> list[tuple[int, int]]: ...


class VirtualCore:
    """The module, with `use_kernel` and `fail_after`; everything else is the module's own."""

    def __init__(self, path: Path, *kept: object) -> None:
        self._kept = kept
        spec = importlib.util.spec_from_file_location("_core", path, loader=ExtensionFileLoader("_core", str(path)))
        assert spec is not None
        self.module: Any = importlib.util.module_from_spec(spec)
        self.module.use(*functions())
        self._library = ctypes.CDLL(str(path))
        self._library.records.restype = ctypes.c_size_t
        self._calls: tuple[Any, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def fail_after(self, allocations: int) -> None:
        """Let so many allocations of bytes objects succeed and the next one fail; -1 for none."""
        self._library.fail_after(allocations)

    def records(self, state: Records, data: bytes) -> int:
        """Return how many TLS records `data` completes, counted as for a lent pair."""
        completed: int = self._library.records(ctypes.byref(state), data, ctypes.c_size_t(len(data)))
        return completed

    def use_kernel(self, kernel: Kernel | None, *, waits: bool = True) -> None:
        """Call `kernel` from here on, for `epoll_wait` only if it `waits`; the real one if it is None."""
        if kernel is None:
            self._library.set_kernel(None, None, None)
            return

        def receive(descriptor: int, data: int, size: int) -> int:
            try:
                received = kernel.recv(descriptor, size)
            except OSError as error:
                return -(error.errno or errno.EIO)
            assert len(received) <= size
            ctypes.memmove(data, received, len(received))
            return len(received)

        def send(descriptor: int, data: int, size: int) -> int:
            try:
                return kernel.send(descriptor, ctypes.string_at(data, size))
            except OSError as error:
                return -(error.errno or errno.EIO)

        def wait(pairs: Any, most: int) -> int:
            ready = kernel.wait(most)
            for index, pair in enumerate(ready):
                pairs[2 * index], pairs[2 * index + 1] = pair
            return len(ready)

        # C keeps no reference to them.
        self._calls = (_RECEIVE(receive), _SEND(send), _WAIT(wait) if waits else None)
        self._library.set_kernel(*self._calls)


@cache
def build(*edits: tuple[str, str]) -> VirtualCore:
    """Compile, with `edits` made to the source first: each text, of which there must be one, becomes another.

    Raises `OSError` if there is no compiler, `CalledProcessError` if it refuses.
    """
    temporary = TemporaryDirectory(prefix="virtual-core-")
    directory = Path(temporary.name)
    source = SOURCE.read_text()
    for before, after in edits:
        assert source.count(before) == 1, f"{source.count(before)} times in {SOURCE.name}: {before}"
        source = source.replace(before, after)
    (directory / "_core.c").write_text(source)
    output = directory / "_core.abi3.so"
    include = [f"-I{directory}", f"-I{sysconfig.get_path('include')}"]
    compiler = shlex.split(os.environ.get("CC") or "cc")
    subprocess.run([*compiler, *_FLAGS, *include, "-o", str(output), str(_VIRTUAL)], check=True)
    return VirtualCore(output, temporary)

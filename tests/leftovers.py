"""Nothing stays behind: no descriptor, no timer, no object of a session."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

from gateway.relay.device import DeviceProtocol
from gateway.relay.proxied import ProxiedConnection
from gateway.relay.upstream import UpstreamProtocol
from gateway.session.session import Session
from gateway.tls.channel import TLSChannel
from tests.harness import RunningGateway, eventually, open_descriptors

_OF_SESSIONS = (Session, ProxiedConnection, DeviceProtocol, UpstreamProtocol, TLSChannel)


class Leftovers:
    """What there was before the sessions of a test, to compare with what there is after them.

    Make it when the gateway runs and nobody is connected; ask it when devices and brokers have closed their sockets.
    """

    def __init__(self, gateway: RunningGateway) -> None:
        self._gateway = gateway
        # What exists now is left out of the collector's sight: it is not looked for, and the search is quick.
        gc.collect()
        gc.freeze()
        self._before = self._count()

    def check(self) -> None:
        """Wait until there is no more than before; fail with what is left."""
        self._gateway.wait_empty()
        eventually(lambda: not self._left(), lambda: f"nothing left of sessions, but {self._left()}")

    def _left(self) -> dict[str, int]:
        return {name: count for name, count in self._count().items() if count > self._before[name]}

    def _count(self) -> Counter[str]:
        gc.collect()
        counts: Counter[str] = Counter(type(each).__name__ for each in gc.get_objects() if type(each) in _OF_SESSIONS)
        calls: list[Any] = self._gateway.call(self._gateway.reactor.getDelayedCalls)
        counts["delayed calls"] = len(calls)
        counts["descriptors"] = open_descriptors()
        return counts

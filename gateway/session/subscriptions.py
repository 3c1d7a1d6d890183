"""What a stored device has subscribed to, and what of it the broker has not been told.

In: the device's SUBSCRIBEs and UNSUBSCRIBEs, what the broker granted.  Out: what to ask of the broker; plain values for
the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.mqtt.message import Subscription

MOST = 100
MOST_BYTES = 65_536
"""So many subscriptions are remembered of a device, and so many bytes of Topic Filters."""


class Subscriptions:
    """Topic Filters, each with its options.  `untold` are changes without the broker's answer; None is a removal."""

    def __init__(self) -> None:
        self.table: dict[str, Subscription] = {}
        self.untold: dict[str, Subscription | None] = {}

    def fits(self, asked: Iterable[str]) -> bool:
        """Whether there is room for these Topic Filters, to subscribe to or to unsubscribe from."""
        filters = {*self.table, *self.untold, *asked}
        return len(filters) <= MOST and sum(len(text.encode()) for text in filters) <= MOST_BYTES

    def add(self, wanted: Iterable[Subscription], *, told: bool) -> None:
        """The device has these; `told` says that the broker granted them."""
        for each in wanted:
            self.table[each.topic_filter] = each
            self._change(each.topic_filter, each, told=told)

    def remove(self, filters: Iterable[str], *, told: bool) -> None:
        """The device has these no more."""
        for text in filters:
            self.table.pop(text, None)
            self._change(text, None, told=told)

    def clear(self) -> None:
        """The session is new."""
        self.table.clear()
        self.untold.clear()

    def to_ask(self, *, session_present: bool) -> tuple[list[list[Subscription]], list[str]]:
        """Return what to subscribe to, in groups of one Subscription Identifier, and what to unsubscribe from."""
        wanted = list(self.table.values())
        if session_present:
            wanted = [each for each in self.untold.values() if each is not None]
        groups: dict[int, list[Subscription]] = {}
        for each in wanted:
            groups.setdefault(each.identifier, []).append(each)
        gone = [text for text, each in self.untold.items() if each is None] if session_present else []
        return list(groups.values()), gone

    def dumped(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "table": [[each.topic_filter, each.options, each.identifier] for each in self.table.values()],
            "untold": list(self.untold),
        }

    def load(self, table: Sequence[Sequence[object]], untold: Iterable[object]) -> None:
        """Take what `dumped` returned."""
        for text, options, identifier in table:
            self.table[str(text)] = Subscription(str(text), int(str(options)), int(str(identifier)))
        self.untold = {str(text): self.table.get(str(text)) for text in untold}

    def _change(self, text: str, now: Subscription | None, *, told: bool) -> None:
        if told:
            self.untold.pop(text, None)
        else:
            self.untold[text] = now

"""SUBSCRIBE and UNSUBSCRIBE of a stored device: asked of the broker, or answered without it and asked later.

In: the device's requests, the broker's answers, connections that come and go.  Out: packets for both sides; in the
device's state, what it has subscribed to and what of it the broker has not been told.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import define

from gateway.errors import EndReason, PacketError
from gateway.mqtt.message import (
    Subscription,
    body_of,
    identifier_of,
    read_subscriptions,
    suback,
    suback_codes,
    subscribe,
    unsuback,
    unsubscribe,
    with_identifier,
)
from gateway.mqtt.packets import PacketType, ProtocolVersion
from gateway.mqtt.relayed import read_subscribe, read_unsubscribe
from gateway.session.outgoing import Outgoing
from gateway.session.saving import Saving
from gateway.session.stored_state import DeviceState
from gateway.session.visit import Visit

_FIRST_REFUSAL = 0x80
_QUOTA_EXCEEDED = 0x97


@define(slots=True)
class _Request:
    """One of them: whose, the device's Packet Identifier; `visit` is None for the gateway's own."""

    visit: Visit | None
    identifier: int
    wanted: list[Subscription]
    gone: tuple[str, ...]

    @property
    def filters(self) -> list[str]:
        """The Topic Filters in it."""
        return [*self.gone, *(each.topic_filter for each in self.wanted)]


class Requests:
    """Those of one device.

    `to_broker` sends a packet; `answered` is called once a device has got an answer, which it may have waited for.
    """

    def __init__(
        self,
        state: DeviceState,
        saving: Saving,
        outgoing: Outgoing,
        to_broker: Callable[[bytes], None],
        answered: Callable[[Visit], None],
    ) -> None:
        self._state = state
        self._saving = saving
        self._outgoing = outgoing
        self._to_broker = to_broker
        self._answered = answered
        # Those that the broker has not answered, by the Packet Identifier that it knows.
        self._open: dict[int, _Request] = {}

    def ask(self, visit: Visit, packet_type: PacketType, packet: bytes, *, is_up: bool) -> None:
        """Take one of the device; without a broker, `is_up` being False, answer it.  Raises PacketError."""
        identifier = identifier_of(packet)
        if packet_type is PacketType.SUBSCRIBE:
            filters = read_subscribe(visit.version, body_of(packet)).filters
            wanted = read_subscriptions(visit.version, packet, filters)
            request = _Request(visit, identifier, wanted, ())
        else:
            gone = tuple(text for text, _ in read_unsubscribe(visit.version, body_of(packet)).filters)
            request = _Request(visit, identifier, [], gone)
        # Whatever the broker has not answered is remembered should it be lost.
        asked = [text for each in (*self._open.values(), request) for text in each.filters]
        if not self._state.subscriptions.fits(asked):
            words = "more subscriptions than the store remembers of a device"
            raise PacketError(EndReason.RULE_REFUSED, _QUOTA_EXCEEDED, words)
        visit.requests += 1
        if is_up:
            number = self._outgoing.low_identifier()
            self._open[number] = request
            self._to_broker(with_identifier(packet, number))
        else:
            self._answer_offline(visit, request)

    def take_answer(self, packet_type: PacketType, packet: bytes, version: ProtocolVersion, now: Visit | None) -> bool:
        """Take a SUBACK or an UNSUBACK; return whether anybody waited for it.  `now` is the device that is there.

        Raises PacketError.
        """
        number = identifier_of(packet)
        request = self._open.pop(number, None)
        self._outgoing.reserved.discard(number)
        if request is None:
            return False
        subscriptions = self._state.subscriptions
        if packet_type is PacketType.UNSUBACK:
            subscriptions.remove(request.gone, told=True)
        else:
            codes = suback_codes(version, packet)
            granted = [each for each, code in zip(request.wanted, codes, strict=False) if code < _FIRST_REFUSAL]
            subscriptions.add(granted, told=True)
            if request.visit is None and not _as_wanted(request.wanted, codes):
                # The device was told something else.
                if now is not None:
                    now.device.finish(
                        EndReason.STORED_SESSION_DIFFERS, "the broker granted less than the gateway had told the device"
                    )
                subscriptions.remove([each.topic_filter for each in request.wanted if each not in granted], told=True)
        self._saving.save()
        if request.visit is not None:
            self._answer(request.visit, with_identifier(packet, request.identifier))
        return True

    def restore(self, version: ProtocolVersion, *, session_present: bool) -> None:
        """Ask the broker for what the device has subscribed to and the broker does not know."""
        groups, gone = self._state.subscriptions.to_ask(session_present=session_present)
        for wanted in groups:
            number = self._outgoing.low_identifier()
            self._open[number] = _Request(None, 0, wanted, ())
            self._to_broker(subscribe(version, number, wanted))
        if gone:
            number = self._outgoing.low_identifier()
            self._open[number] = _Request(None, 0, [], tuple(gone))
            self._to_broker(unsubscribe(version, number, gone))

    def forget(self) -> None:
        """Nobody waits for an answer any more."""
        self._open.clear()

    def forget_of(self, visit: Visit | None) -> None:
        """A device has left, and does not wait for its answers."""
        self._open = {key: each for key, each in self._open.items() if each.visit is not visit}

    def lost(self) -> None:
        """The broker is lost, and answers nothing any more."""
        requests, self._open = self._open, {}
        self._outgoing.reserved.clear()
        for request in requests.values():
            if request.visit is not None and not request.visit.gone:
                self._answer_offline(request.visit, request)

    # ---- inside

    def _answer_offline(self, visit: Visit, request: _Request) -> None:
        """Answer what a device has asked for, and ask the broker for it later."""
        subscriptions = self._state.subscriptions
        if request.wanted:
            subscriptions.add(request.wanted, told=False)
            answer = suback(visit.version, request.identifier, [each.qos for each in request.wanted])
        else:
            subscriptions.remove(request.gone, told=False)
            answer = unsuback(visit.version, request.identifier, len(request.gone))
        self._saving.save(lambda: self._answer(visit, answer), lambda error: visit.not_stored(str(error)))

    def _answer(self, visit: Visit, answer: bytes) -> None:
        """Give a device its SUBACK or UNSUBACK."""
        visit.requests -= 1
        if not visit.gone:
            visit.device.send(answer)
            self._answered(visit)


def _as_wanted(wanted: list[Subscription], codes: bytes) -> bool:
    return all(code == each.qos for each, code in zip(wanted, codes, strict=False))

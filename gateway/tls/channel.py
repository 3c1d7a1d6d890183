"""TLS to the broker without sockets: bytes in, bytes out, and nothing sent before the broker is verified.

In: ciphertext from the network, plaintext to send.  Out: ciphertext for the network, plaintext received, and facts
about the verified peer.  Raises `UpstreamFailure` for every failure; anything unexpected is a refusal.

The states only move forward::

    HANDSHAKING  →  VERIFIED  →  CLOSED
         └──────── any failure ────┘

Only VERIFIED passes plaintext to OpenSSL: in any other state `send` raises; it never keeps bytes for later.
"""

from __future__ import annotations

import contextlib
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import Enum, auto
from functools import lru_cache
from hmac import compare_digest

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto

from gateway.config import TLS, Config
from gateway.config.algorithms import Algorithms
from gateway.errors import ConfigError, EndReason, GatewayError, UpstreamFailure
from gateway.session.record import Peer
from gateway.text import printable
from gateway.tls import ocsp, strict
from gateway.tls.broker_identity import Identity
from gateway.tls.choice import choose
from gateway.tls.engine import Addresses, Engine
from gateway.tls.failures import handshake_failure, verification_failure
from gateway.tls.tickets import Ticket, Tickets, Verified, good_until
from gateway.tls.trust import TLSPolicy, load_policy, platform_roots, spki_pin

_RECORD_HEADER_SIZE = 5
# Records decrypted at a time, some 2 µs each: 64 KiB can be thousands of them.
_MOST_RECORDS_AT_ONCE = 500
# See `gateway/tls/tickets.py`.
_RESUMABLE_VERSION = "TLSv1.3"


class NotVerified(GatewayError):
    """Plaintext was given to a channel that is not verified: an internal error, caught before any byte was sent."""


class ChannelState(Enum):
    """The state of a channel."""

    HANDSHAKING = auto()
    VERIFIED = auto()
    CLOSED = auto()


# Checked for each message: in Python 3.11, an Enum lookup takes longer than a function call.
_VERIFIED = ChannelState.VERIFIED


class TLSChannel:
    """One TLS connection to one broker, client side.

    `state` is its state, `peer` is set once it is VERIFIED, `received_close` once the broker's close_notify has
    arrived, `broken` if the channel failed after plaintext that `receive` has returned, `waiting` while `outgoing`
    may have something, `due` is how many records wait for the next `receive`, which may be of no bytes. `approved`
    says whether OpenSSL trusts the chain and the identity matches, which is not all that VERIFIED requires.

    With `tickets`, the channel resumes a TLS session if allowed, and leaves a ticket for the next one.
    """

    __slots__ = (
        "__weakref__",
        "_approved",
        "_asked",
        "_connection",
        "_engine",
        "_failure",
        "_identity",
        "_matched",
        "_missing",
        "_offered",
        "_partial_header",
        "_policy",
        "_staple",
        "_tickets",
        "_verified",
        "broken",
        "due",
        "peer",
        "received_close",
        "state",
        "waiting",
    )

    def __init__(self, policy: TLSPolicy, identity: Identity, tickets: Tickets | None = None) -> None:
        """Take the policy, the identity to verify, and this broker's tickets.  Raises `ValueError` for another's."""
        if tickets is not None and (tickets.policy is not policy or tickets.identity != identity):
            raise ValueError(f"the tickets do not belong to {identity.name} under this policy")
        self._policy = policy
        self._identity = identity
        self._tickets = tickets
        self._failure: UpstreamFailure | None = None
        # Whether OpenSSL has asked about any certificate; it does not in a resumed handshake.
        self._asked = False
        self._approved = False
        self._matched = ""
        # The ticket that was offered, until the handshake is done.
        self._offered: Ticket | None = None
        # What this channel's tickets stand for; `None` if it must leave none.
        self._verified: Verified | None = None
        # Where the received ciphertext ends: bytes missing of the current record, or the first bytes of a header.
        self._missing = 0
        self._partial_header = b""
        self.due = 0
        # The broker's OCSP response, if it was asked for one and has sent one.
        self._staple = b""
        self.waiting = False
        self.peer: Peer | None = None
        self.received_close = False
        self.broken: UpstreamFailure | None = None
        self.state = ChannelState.HANDSHAKING
        self._connection = SSL.Connection(policy.context, None)
        self._engine: Engine = choose()(self._connection)
        self._connection.set_app_data(self)
        policy.introduce(self._connection)
        if identity.sni is not None:
            self._connection.set_tlsext_host_name(identity.sni)
        if policy.ocsp != "off":
            self._connection.request_ocsp()
        self._connection.set_connect_state()
        ticket = tickets.offer() if tickets is not None else None
        if ticket is not None:
            self._connection.set_session(ticket.session)
            self._offered = ticket
            # OpenSSL generates a key for each preferred group and keeps them as long as the connection: 10 KiB, and as
            # much work as the rest of a resumed handshake.  The broker will use only one of them.
            if ticket.verified.group:
                self._engine.offer_group(ticket.verified.group)

    @property
    def approved(self) -> bool:
        """Whether chain and identity were approved."""
        return self._approved

    @property
    def has_staple(self) -> bool:
        """Whether the broker has sent an OCSP response."""
        return bool(self._staple)

    @property
    def resuming(self) -> bool:
        """Whether the handshake in progress may resume a session.

        Once the broker has shown a certificate it does not: the ticket was declined, and it is a full handshake.
        """
        return self._offered is not None and not self._asked

    def sent_chain(self) -> list[x509.Certificate]:
        """Return the chain that the broker sent, its own certificate first, verified or not, for diagnosis.

        Raises what `cryptography` raises for certificates that it cannot read.
        """
        return [certificate.to_cryptography() for certificate in self._connection.get_peer_cert_chain() or []]

    def agreed(self) -> tuple[str, str, str]:
        """Return the TLS version, the cipher and the application protocol that the handshake agreed on."""
        connection = self._connection
        alpn = connection.get_alpn_proto_negotiated().decode("ascii", "surrogateescape")
        return connection.get_protocol_version_name(), connection.get_cipher_name() or "", alpn

    def start(self) -> None:
        """Start the handshake; `outgoing` then holds the ClientHello."""
        self._handshake()

    def receive(self, ciphertext: bytes) -> bytes:
        """Take bytes from the network and return the plaintext that they complete; empty before VERIFIED.

        Raises `UpstreamFailure` when the handshake, the verification or a record fails; `outgoing` may then hold an
        alert.  After that, and after `close`, received bytes are dropped.
        """
        if self.state is _VERIFIED:
            records = self._completed_records(ciphertext)
            if self.due or records > _MOST_RECORDS_AT_ONCE:
                records = self._take_few(records)
            plaintext, ended = self._engine.decrypt(ciphertext, records)
            return plaintext if ended is None else self._ended(plaintext, ended)
        if self.state is ChannelState.CLOSED or not ciphertext:
            return b""
        records = self._completed_records(ciphertext)
        self._connection.bio_write(ciphertext)
        if not self._handshake():
            return b""
        plaintext, ended = self._engine.decrypt(b"", self._take_few(records))
        return plaintext if ended is None else self._ended(plaintext, ended)

    def _take_few(self, completed: int) -> int:
        """Return how many records to decrypt now, when so many more are complete."""
        due = self.due + completed
        taken = min(due, _MOST_RECORDS_AT_ONCE)
        self.due = due - taken
        return taken

    def send(self, plaintext: bytes) -> bytes:
        """Encrypt, and return everything to send to the network.

        Raises `NotVerified` unless the channel is VERIFIED, and `UpstreamFailure` when OpenSSL fails or the channel has
        broken after plaintext that `receive` has returned.
        """
        if self.state is not _VERIFIED:
            if self.broken is not None:
                # A copy, because a raised exception references its frames.
                raise UpstreamFailure(self.broken.reason, self.broken.detail)
            raise NotVerified(f"tried to send {len(plaintext)} bytes on a channel that is {self.state.name}")
        try:
            return self._engine.encrypt(plaintext)
        except SSL.Error as error:
            self.waiting = True
            raise self._fail(UpstreamFailure(EndReason.UPSTREAM_LOST, _words(error))) from None

    def lend(self) -> tuple[int, bytes] | None:
        """Give where the records stand, for the compiled core: bytes missing of one, or the beginning of a header.

        `None` unless the channel is VERIFIED and all that remains to be done is to encrypt and to decrypt.
        """
        if self.state is not _VERIFIED or self.waiting or self.due or self.broken is not None or self.received_close:
            return None
        return self._missing, self._partial_header

    def take_back(self, missing: int, partial_header: bytes) -> None:
        """Go on from where `lend` began and the core has ended."""
        self._missing = missing
        self._partial_header = partial_header

    def addresses(self) -> Addresses | None:
        """Return where OpenSSL's objects are; `None` if the compiled core must not use them."""
        return self._engine.addresses()

    def ended(self, plaintext: bytes, result: int) -> bytes:
        """As `receive`, when the core has had `plaintext` of OpenSSL, and then `result` in place of a record."""
        return self._ended(plaintext, self._engine.why(result))

    def outgoing(self) -> bytes:
        """Return and clear what else must be sent: handshake messages, alerts, answers."""
        if not self.waiting:
            return b""
        self.waiting = False
        return self._engine.waiting()

    def close(self) -> None:
        """Close the channel: `outgoing` then holds close_notify if it was VERIFIED (RFC 8446 §6.1)."""
        if self.state is ChannelState.VERIFIED:
            # An error means that the connection is already broken; no close_notify is possible.
            with contextlib.suppress(SSL.Error):
                self._connection.shutdown()
            self.waiting = True
        self.state = ChannelState.CLOSED

    def dispose(self) -> None:
        """Drop the reference from OpenSSL's object to this one, a cycle that would outlive the session."""
        self.state = ChannelState.CLOSED
        self._connection.set_app_data(None)
        self._failure = None  # Once raised, it references its frames, which reference this.

    def _handshake(self) -> bool:
        """Continue the handshake; return whether the channel is VERIFIED now."""
        self.waiting = True
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return False
        except SSL.ZeroReturnError:
            raise self._fail(UpstreamFailure(EndReason.TLS_CLOSED, "close_notify in the handshake")) from None
        except SSL.Error as error:
            offered = self._policy.offered
            # Not in a variable: the exception holds this frame, and the frame would hold the exception.
            raise self._fail(
                self._failure or handshake_failure(_queue(error), approved=self._approved, offered=offered)
            ) from None
        except Exception as error:  # noqa: BLE001  pyOpenSSL re-raises here what its callback raised
            raise self._fail(_unexpected(error)) from None
        try:
            self.peer = self._confirm()
        except UpstreamFailure as failure:
            raise self._fail(failure) from None
        except Exception as error:  # noqa: BLE001  anything unexpected during verification means refusal
            raise self._fail(_unexpected(error)) from None
        self.state = ChannelState.VERIFIED
        return True

    def _completed_records(self, ciphertext: bytes) -> int:
        """Return how many TLS records `ciphertext` completes (RFC 8446 §5.1), and remember where it ends.

        So the channel calls OpenSSL once per record, and not once more to learn, by an expensive exception, that there
        is no more.
        """
        if self._partial_header:
            ciphertext = self._partial_header + ciphertext
            self._partial_header = b""
        size = len(ciphertext)
        end = self._missing
        if not end and size == _RECORD_HEADER_SIZE + (ciphertext[3] << 8 | ciphertext[4] if size > 4 else 0):
            return 1  # The usual case: one complete record.
        completed = 1 if 0 < end <= size else 0
        while end + _RECORD_HEADER_SIZE <= size:
            end += _RECORD_HEADER_SIZE + (ciphertext[end + 3] << 8 | ciphertext[end + 4])
            if end <= size:
                completed += 1
        if end < size:
            self._partial_header = ciphertext[end:]
            self._missing = 0
        else:
            self._missing = end - size
        return completed

    def _ended(self, plaintext: bytes, ended: SSL.Error) -> bytes:
        """Return the plaintext that came before something other than application data, and handle the latter."""
        self.due = 0  # OpenSSL has nothing complete any more, or is not asked again.
        if isinstance(ended, SSL.ZeroReturnError):
            self.received_close = True
            return plaintext
        self.waiting = True
        if isinstance(ended, SSL.WantReadError):
            # Some records were not application data: a KeyUpdate, which may need an answer, or a ticket.
            self._keep_ticket()
            return plaintext
        failure = handshake_failure(_queue(ended), approved=True)
        if failure.reason is EndReason.TLS_CLIENT_CERTIFICATE_REFUSED and not self._is_1_3():
            # TLS 1.2 settles certificates in its handshake; afterwards, a broker whose request to renegotiate was
            # declined ends so (RFC 5246 §7.2.2).
            words = f"{failure.detail}; perhaps it asked for TLS renegotiation, which the gateway declines"
            failure = UpstreamFailure(EndReason.UPSTREAM_LOST, words)
        elif failure.reason is not EndReason.TLS_CLIENT_CERTIFICATE_REFUSED:
            # In TLS 1.3 a client learns only after its handshake that its certificate was refused; anything else that
            # breaks a verified channel is a lost upstream.
            failure = UpstreamFailure(EndReason.UPSTREAM_LOST, failure.detail)
        self._fail(failure)
        if not plaintext:
            raise failure
        # What came before is still delivered: a refusal, or the reason for closing.
        self.broken = failure
        return plaintext

    def _is_1_3(self) -> bool:
        return str(self._connection.get_protocol_version_name()) == "TLSv1.3"

    def _fail(self, failure: UpstreamFailure) -> UpstreamFailure:
        self.state = ChannelState.CLOSED
        return failure

    def judge(self, certificate: crypto.X509, error: int, depth: int, accepted: bool) -> bool:
        """Answer OpenSSL's question about one certificate of the chain, from the root down to the broker's own.

        OpenSSL's own refusal is never overruled.  The identity is checked here too, so that a wrong broker gets an
        alert instead of a completed handshake.
        """
        self._asked = True
        if not accepted:
            self._failure = self._failure or verification_failure(
                error, depth, datetime.now(UTC), certificate, self._policy.roots
            )
            return False
        if depth == 0:
            self._matched = self._identity.match(certificate.to_cryptography())
            self._approved = True
        return True

    def stapled(self, response: bytes) -> None:
        """Take the broker's OCSP response; it is judged when the handshake is done."""
        self._staple = response

    def refuse(self, failure: UpstreamFailure) -> None:
        """Record why the chain is refused; the first reason counts."""
        self._approved = False
        self._failure = self._failure or failure

    def _confirm(self) -> Peer:
        """Check the peer again, because a handshake can end without the callback being called."""
        if self._failure is not None:
            raise self._failure
        certificate = self._connection.get_peer_certificate()
        if certificate is None:
            raise UpstreamFailure(EndReason.TLS_VERIFICATION_ERROR, "the handshake finished without a certificate")
        resumed = self._resumed(certificate)
        verified = resumed or self._verified_in_full(_shared(certificate.to_cryptography()))
        leaf = verified.certificate
        if self._identity.match(leaf) != verified.matched:
            raise UpstreamFailure(EndReason.TLS_VERIFICATION_ERROR, "the certificate changed during the handshake")
        tls_version, cipher, alpn = self.agreed()
        if self._policy.alpn and alpn not in self._policy.alpn:
            offered = ", ".join(self._policy.alpn)
            raise UpstreamFailure(
                EndReason.TLS_ALPN_MISMATCH, f"offered {offered}; the broker chose {printable(alpn) or 'none'}"
            )
        if self._policy.pins:
            self._check_pins(verified.pins)
        if self._policy.strict and resumed is None:
            chain = self._connection.get_verified_chain() or []
            roots = self._policy.roots or platform_roots()
            strict.judge([each.to_cryptography() for each in chain], roots, self._identity)
        self._approved = True
        self._offered = None
        if tls_version == _RESUMABLE_VERSION:
            self._verified = verified
        return _peer(leaf, verified.matched, tls_version, cipher, alpn, resumed is not None)

    def _resumed(self, certificate: crypto.X509) -> Verified | None:
        """Return what the original full handshake verified, or `None` if the session was not resumed.

        Raises `UpstreamFailure` if it was resumed but its ticket is no longer valid.
        """
        if self._asked or self._offered is None or self._tickets is None:
            return None
        ticket = self._offered
        try:
            present = self._connection.master_key() or b""
        except SSL.Error:
            return None  # A new session, which has no resumption secret yet.
        if not ticket.secret or not compare_digest(present, ticket.secret):
            return None
        if crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate) != ticket.verified.der:
            return None
        if not self._tickets.holds(ticket.verified):
            raise UpstreamFailure(EndReason.TLS_VERIFICATION_ERROR, "the ticket expired during the handshake")
        return ticket.verified

    def _verified_in_full(self, leaf: x509.Certificate) -> Verified:
        """Return what OpenSSL verified in this handshake.  Raises `UpstreamFailure` if it did not."""
        chain = self._connection.get_verified_chain()
        if not chain or not self._approved:
            raise UpstreamFailure(EndReason.TLS_VERIFICATION_ERROR, "the handshake finished without a verified chain")
        if self._tickets is None and not self._policy.pins and self._policy.ocsp == "off":
            return Verified(leaf, b"", self._matched, (), "", 0.0, 0.0)
        certificates = [certificate.to_cryptography() for certificate in chain]
        holds = self._judge_staple(certificates)
        pins = tuple(spki_pin(certificate) for certificate in certificates) if self._policy.pins else ()
        since = self._tickets.now() if self._tickets is not None else 0.0
        group = self._connection.get_group_name() or ""
        until = min(good_until(self._policy, certificates, since), holds)
        return Verified(leaf, leaf.public_bytes(Encoding.DER), self._matched, pins, group, since, until)

    def _judge_staple(self, chain: Sequence[x509.Certificate]) -> float:
        """Return until when the OCSP response holds, in seconds since the epoch.  Raises `UpstreamFailure`."""
        if self._policy.ocsp == "off":
            return float("inf")
        until = ocsp.judge(self._staple, chain, datetime.now(UTC), required=self._policy.ocsp == "must-staple")
        return float("inf") if until is None else until.timestamp()

    def _keep_ticket(self) -> None:
        """Keep a ticket for the next channel, if one has arrived."""
        if self._tickets is None or self._verified is None or self.state is not ChannelState.VERIFIED:
            return
        try:
            secret = self._connection.master_key() or b""
        except SSL.Error:
            return  # No ticket has arrived yet.
        session = self._connection.get_session()
        if session is not None:
            self._tickets.keep(Ticket(session, secret, self._verified))
            self._verified = None  # Brokers send several; one is enough.

    def _check_pins(self, pins: tuple[bytes, ...]) -> None:
        if self._policy.pins.isdisjoint(pins):
            shown = b64encode(pins[0]).decode("ascii") if pins else "none"
            raise UpstreamFailure(EndReason.TLS_PIN_MISMATCH, f"the pin of the broker's key is sha256/{shown}")


@lru_cache(maxsize=32)
def _shared(certificate: x509.Certificate) -> x509.Certificate:
    """Return the first equal certificate, so that a thousand sessions share one object."""
    return certificate


@lru_cache(maxsize=32)
def _peer(certificate: x509.Certificate, matched: str, tls_version: str, cipher: str, alpn: str, resumed: bool) -> Peer:
    """Return the facts about a broker; a thousand sessions of one broker share them."""
    return Peer(
        subject=printable(certificate.subject.rfc4514_string()),
        issuer=printable(certificate.issuer.rfc4514_string()),
        matched_san=matched,
        not_after=certificate.not_valid_after_utc,
        tls_version=tls_version,
        cipher=cipher,
        alpn=printable(alpn),
        resumed=resumed,
    )


def make_policy(tls: TLS, intermediates: Sequence[x509.Certificate] = ()) -> TLSPolicy:
    """Build the policy for `tls`, verified by `TLSChannel`.  Raises `ConfigError`."""
    choose()  # At start-up, not at the first session: it takes some milliseconds and may log a warning.
    return load_policy(tls, _verify, _take_staple, intermediates)


def _take_staple(connection: SSL.Connection, response: bytes, _data: object) -> bool:
    """Give an OCSP response to the channel that owns `connection`; as in `_verify`, nothing is raised here."""
    channel = connection.get_app_data()
    if not isinstance(channel, TLSChannel):
        return False
    channel.stapled(response)
    return True


def make_policies(config: Config) -> dict[Algorithms, TLSPolicy]:
    """Build a policy for each of the algorithms that upstreams are offered.  Raises `ConfigError`."""
    policies: dict[Algorithms, TLSPolicy] = {}
    for index, upstream in enumerate(config.upstream):
        algorithms = config.algorithms(upstream)
        if algorithms in policies:
            continue
        try:
            policies[algorithms] = make_policy(config.tls.offering(algorithms))
        except ConfigError as error:
            problems = error.problems
            for key in ("ciphers", "groups", "signature_algorithms"):
                if getattr(upstream, key):
                    problems = [problem.replace(f"tls.{key}:", f"upstream[{index}].{key}:") for problem in problems]
            raise ConfigError(problems) from None
    return policies


def _verify(connection: SSL.Connection, certificate: crypto.X509, error: int, depth: int, accepted: int) -> bool:
    """Answer OpenSSL for the channel that owns `connection`; any exception is a refusal.

    pyOpenSSL stores what a callback raises on the Context, which all sessions share: it would end the next session that
    fails.  So nothing is raised here.
    """
    channel = connection.get_app_data()
    if not isinstance(channel, TLSChannel):
        return False
    try:
        return channel.judge(certificate, error, depth, bool(accepted))
    except UpstreamFailure as failure:
        channel.refuse(failure)
    except Exception as problem:  # noqa: BLE001  anything unexpected during verification means refusal
        channel.refuse(_unexpected(problem))
    return False


def _unexpected(error: Exception) -> UpstreamFailure:
    return UpstreamFailure(EndReason.TLS_VERIFICATION_ERROR, printable(f"{type(error).__name__}: {error}"))


def _queue(error: SSL.Error) -> list[object]:
    """Return OpenSSL's error queue from a pyOpenSSL exception: its only argument, or an errno and its name."""
    if len(error.args) == 1 and isinstance(error.args[0], list):
        return error.args[0]
    return list(error.args)


def _words(error: SSL.Error) -> str:
    return handshake_failure(_queue(error), approved=True).detail

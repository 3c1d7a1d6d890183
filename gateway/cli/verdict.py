"""A TLS handshake put into steps: what the broker showed, and whether it was believed.

In: a channel whose handshake is over, well or badly.  Out: the steps certificate, chain, identity, tls, pin, strict, as
far as the handshake went; the last of them is the one that failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cryptography import x509

from gateway.cli.certificates import as_facts, expiry, first_to_expire, issuer, subject
from gateway.cli.report import Status, Step
from gateway.errors import EndReason, UpstreamFailure
from gateway.text import printable
from gateway.tls.alt_names import shown_names, subject_alt_names
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import TLSChannel
from gateway.tls.trust import TLSPolicy

# What can fail after chain and identity were approved; everything else is a matter of the handshake itself.
_LATE_STEPS = {EndReason.TLS_PIN_MISMATCH: "pin", EndReason.TLS_STRICT_REFUSED: "strict"}


def failed(name: str, failure: UpstreamFailure, remedy: str = "") -> Step:
    """Return the step that failed, in the words that a session's record has."""
    message = f"{failure.reason}: {failure.detail or failure.reason.meaning}"
    return Step(name, Status.FAIL, message, remedy or failure.reason.remedy, facts={"reason": failure.reason})


def tls_steps(
    channel: TLSChannel, identity: Identity, policy: TLSPolicy, failure: UpstreamFailure | None
) -> Iterator[Step]:
    """Tell what happened between ClientHello and CONNECT; `failure` is `None` if the broker was verified."""
    chain: list[x509.Certificate] = []
    try:
        chain = channel.sent_chain()
        certificate = _certificate(chain) if chain else None
    except Exception as error:  # noqa: BLE001  whatever a hostile certificate makes the parser raise, it is no PASS
        certificate = Step("certificate", Status.WARN, f"it cannot be read ({_named(error)})")
    if certificate is None:
        none = UpstreamFailure(EndReason.TLS_HANDSHAKE_FAILED, "the broker sent no certificate")
        yield failed("certificate", failure or none)
        return
    yield certificate
    if failure is not None and not channel.approved:
        yield from _not_approved(chain, identity, failure)
        return
    yield Step("chain", Status.PASS, f"leads to a trusted root; the broker sent {len(chain)} of it")
    yield _identity(chain[0], identity) if chain else Step("identity", Status.PASS, f"it is for {identity.name}")
    failed_at = None if failure is None else _LATE_STEPS.get(failure.reason, "tls")
    for name, message in _agreed(channel, policy):
        if failure is not None and failed_at == name:
            yield failed(name, failure)
            return
        yield Step(name, Status.PASS, message)


def _certificate(chain: Sequence[x509.Certificate]) -> Step:
    leaf, first = chain[0], first_to_expire(chain)
    status, left = expiry(first)
    if first is not leaf:
        left = f"its CA {subject(first)}: {left}"
    message = f"{subject(leaf)}; names {shown_names(leaf)}; issuer {issuer(leaf)}; {left}"
    # One that is not valid now is the failure of the chain, which comes next.
    remedy = "Have it renewed before it expires, and find out why that has not happened by itself."
    facts = {**as_facts(leaf), "chain": [as_facts(certificate) for certificate in chain]}
    return Step(
        "certificate",
        Status.PASS if status is Status.FAIL else status,
        message,
        remedy if status is Status.WARN else "",
        facts=facts,
    )


def _not_approved(chain: Sequence[x509.Certificate], identity: Identity, failure: UpstreamFailure) -> Iterator[Step]:
    if failure.reason is EndReason.TLS_NAME_MISMATCH and chain:
        yield Step("chain", Status.PASS, f"leads to a trusted root; the broker sent {len(chain)} of it")
        yield _identity(chain[0], identity)
        return
    if failure.reason is EndReason.TLS_UNTRUSTED_CHAIN and chain:
        last = f"; the last of {len(chain)} that the broker sent is {subject(chain[-1])}, issuer {issuer(chain[-1])}"
        failure = UpstreamFailure(failure.reason, failure.detail + last)
    yield failed("chain", failure)
    if chain:
        # A session does not get so far, but whoever mends the chain wants to know what comes next.
        yield _identity(chain[0], identity)


def _identity(certificate: x509.Certificate, identity: Identity) -> Step:
    try:
        return Step("identity", Status.PASS, f"{identity.match(certificate)} is {identity.name}")
    except UpstreamFailure as failure:
        return failed("identity", failure, _identity_remedy(certificate, identity, failure))
    except Exception as error:  # noqa: BLE001  as in the channel: anything unexpected is no match
        reason = EndReason.TLS_VERIFICATION_ERROR
        return failed("identity", UpstreamFailure(reason, _named(error)))


def _named(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}")


def _identity_remedy(certificate: x509.Certificate, identity: Identity, failure: UpstreamFailure) -> str:
    names = subject_alt_names(certificate)
    wanted = f"DNS:{identity.name}" if identity.sni is not None else f"IP:{identity.name}"
    anew = f"the certificate issued anew with the subjectAltName {wanted}"
    if not names:
        return f"Have {anew}; a common name says nothing about hosts (RFC 9525 §2)."
    if not any(name.startswith(("DNS:", "IP:")) for name in names):
        return f"Have {anew}; none of the names that it has is a host name or an IP address."
    if "wildcard" in failure.detail:
        return f"Have {anew}; a wildcard stands alone to the left of at least two labels, as in *.example.com."
    return (
        "If one of its names is the broker's, use it as the upstream's host or as server_name; "
        f"if the broker has none of them, have {anew}; otherwise another server answers here."
    )


def _agreed(channel: TLSChannel, policy: TLSPolicy) -> Iterator[tuple[str, str]]:
    """Give the steps after the identity, as they read when they are passed."""
    version, cipher, alpn = channel.agreed()
    yield "tls", f"{version}, {cipher}, {f'ALPN {printable(alpn)}' if alpn else 'no ALPN'}"
    if policy.pins:
        yield "pin", "a public key of the chain is pinned"
    if policy.strict:
        yield "strict", "the second opinion agrees"

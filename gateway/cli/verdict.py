"""A TLS handshake as steps: what the broker sent, and whether it was accepted.

In: a channel whose handshake has succeeded or failed.  Out: the steps certificate, chain, identity, tls, pin, strict,
as far as the handshake went; if it failed, the last of them is the one that failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attrs import asdict, evolve
from cryptography import x509

from gateway.cli.certificates import as_facts, expiry, first_to_expire, issuer, subject
from gateway.cli.report import Status, Step
from gateway.errors import EndReason, UpstreamFailure
from gateway.text import printable
from gateway.tls.algorithms import Offer
from gateway.tls.alt_names import shown_names, subject_alt_names
from gateway.tls.broker_identity import Identity
from gateway.tls.channel import TLSChannel
from gateway.tls.failures import OTHER_KEY
from gateway.tls.survey import advice
from gateway.tls.trust import TLSPolicy

# What can fail after chain and identity were approved; every other failure is the handshake's.
_LATE_STEPS = {
    EndReason.TLS_OCSP_UNUSABLE: "ocsp",
    EndReason.TLS_REVOKED: "ocsp",  # A CRL says so earlier.
    EndReason.TLS_PIN_MISMATCH: "pin",
    EndReason.TLS_STRICT_REFUSED: "strict",
}
_OTHER_KEY_REMEDY = (
    "The CA in tls.ca_file has the right name, but another key: it was made a second time, or another CA has the same "
    "name. Replace it with the certificate of the CA that issued the broker's."
)


def failed(name: str, failure: UpstreamFailure, remedy: str = "") -> Step:
    """Return a failed step, in the words of a session record."""
    message = f"{failure.reason}: {failure.detail or failure.reason.meaning}"
    return Step(name, Status.FAIL, message, remedy or failure.reason.remedy, facts={"reason": failure.reason})


def tls_steps(
    channel: TLSChannel,
    identity: Identity,
    policy: TLSPolicy,
    failure: UpstreamFailure | None,
    has: Offer | None = None,
) -> Iterator[Step]:
    """Yield what happened between ClientHello and CONNECT; `failure` is `None` if the broker was verified.

    `has` is what the broker has, if that is known.
    """
    chain: list[x509.Certificate] = []
    try:
        chain = channel.sent_chain()
        certificate = _certificate(chain) if chain else None
    except Exception as error:  # noqa: BLE001  a hostile certificate may make the parser raise anything; never PASS
        certificate = Step("certificate", Status.WARN, f"cannot be parsed ({_named(error)})")
    if certificate is None:
        none = UpstreamFailure(EndReason.TLS_HANDSHAKE_FAILED, "the broker sent no certificate")
        yield _unanswered(failure or none, policy, has)
        return
    yield certificate
    if failure is not None and not channel.approved:
        yield from _not_approved(chain, identity, failure)
        return
    yield Step("chain", Status.PASS, f"ends at a trusted root; the broker sent {_count(len(chain))}")
    yield _identity(chain[0], identity) if chain else Step("identity", Status.PASS, f"valid for {identity.name}")
    failed_at = None if failure is None else _LATE_STEPS.get(failure.reason, "tls")
    for name, message in _agreed(channel, policy):
        if failure is not None and failed_at == name:
            yield failed(name, failure)
            return
        yield Step(name, Status.PASS, message)


def _unanswered(failure: UpstreamFailure, policy: TLSPolicy, has: Offer | None) -> Step:
    """Return the step of a broker that showed no certificate, with what either side offers if that is known."""
    if has is None:
        return failed("certificate", failure)
    if policy.offered not in failure.detail:
        failure = UpstreamFailure(failure.reason, f"{failure.detail or 'no answer'}; offered: {policy.offered}")
    failure = UpstreamFailure(failure.reason, f"{failure.detail}; the broker has: {has}")
    step = failed("certificate", failure, advice(policy.offer, has))
    return evolve(step, facts={**step.facts, "offered": asdict(policy.offer), "broker": asdict(has)})


def _certificate(chain: Sequence[x509.Certificate]) -> Step:
    leaf, first = chain[0], first_to_expire(chain)
    status, left = expiry(first)
    if first is not leaf:
        left = f"its CA {subject(first)}: {left}"
    message = f"{subject(leaf)}; names {shown_names(leaf)}; issuer {issuer(leaf)}; {left}"
    # A certificate that is not valid now fails the next step, chain.
    remedy = "Renew it before it expires, and find out why automatic renewal has not done so."
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
        yield Step("chain", Status.PASS, f"ends at a trusted root; the broker sent {_count(len(chain))}")
        yield _identity(chain[0], identity)
        return
    remedy = ""
    if failure.reason is EndReason.TLS_UNTRUSTED_CHAIN and chain:
        last = f"; the last of {_count(len(chain))} from the broker is {subject(chain[-1])}, issuer {issuer(chain[-1])}"
        remedy = _OTHER_KEY_REMEDY if OTHER_KEY in failure.detail else ""
        failure = UpstreamFailure(failure.reason, failure.detail + last)
    yield failed("chain", failure, remedy)
    if chain:
        # A session stops before this, but this is the next thing to fix.
        yield _identity(chain[0], identity)


def _identity(certificate: x509.Certificate, identity: Identity) -> Step:
    try:
        return Step("identity", Status.PASS, f"{identity.match(certificate)} matches {identity.name}")
    except UpstreamFailure as failure:
        return failed("identity", failure, _identity_remedy(certificate, identity, failure))
    except Exception as error:  # noqa: BLE001  as in the channel: an unexpected error is no match
        reason = EndReason.TLS_VERIFICATION_ERROR
        return failed("identity", UpstreamFailure(reason, _named(error)))


def _count(certificates: int) -> str:
    return f"{certificates} certificate{'s' if certificates > 1 else ''}"


def _named(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}")


def _identity_remedy(certificate: x509.Certificate, identity: Identity, failure: UpstreamFailure) -> str:
    names = subject_alt_names(certificate)
    wanted = f"DNS:{identity.name}" if identity.sni is not None else f"IP:{identity.name}"
    reissued = f"the certificate reissued with the subjectAltName {wanted}"
    if not names:
        return f"Have {reissued}; the common name is not used (RFC 9525 §2)."
    if not any(name.startswith(("DNS:", "IP:")) for name in names):
        return f"Have {reissued}; none of its names is a host name or an IP address."
    if "wildcard" in failure.detail:
        return f"Have {reissued}; a wildcard must be the whole leftmost label, as in *.example.com."
    return (
        "If one of these names is the broker's, set the upstream's host or server_name to it. "
        f"If this is the right broker, have {reissued}. Otherwise another server is answering."
    )


def _agreed(channel: TLSChannel, policy: TLSPolicy) -> Iterator[tuple[str, str]]:
    """Yield the steps after identity with their messages if passed."""
    version, cipher, alpn = channel.agreed()
    yield "tls", f"{version}, {cipher}, {f'ALPN {printable(alpn)}' if alpn else 'no ALPN'}"
    if policy.ocsp != "off":
        words = "the broker's OCSP response says good" if channel.has_staple else "the broker sent no OCSP response"
        yield "ocsp", words
    if policy.pins:
        yield "pin", "a public key in the chain matches a pin"
    if policy.strict:
        yield "strict", "the strict verification accepted the chain"

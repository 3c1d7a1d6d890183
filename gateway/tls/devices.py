"""TLS with the devices' own certificates: each shows its own, all verify the broker in the same way.

In: the `[tls]` section, certificates and keys.  Out: a `TLSPolicy` for each.

A Context is large, because it holds the roots; an identity is small.  So there is one Context for each set of
intermediate certificates, which devices of one CA share, and the certificate and key are given to each connection.
The Context with the gateway's own certificate is never used: OpenSSL would choose between the two.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import attrs
from cryptography import x509
from OpenSSL import SSL

from gateway.config import TLS
from gateway.config.algorithms import Algorithms
from gateway.tls.channel import make_policy
from gateway.tls.trust import ClientIdentity, TLSPolicy

# With the platform's roots, a Context takes most of a mebibyte.
_MAX_CONTEXTS = 64

_K = TypeVar("_K", bound=Hashable)


class DevicePolicies(Generic[_K]):
    """The policies of devices with certificates of their own, by key.

    There is one for each of the `algorithms` that upstreams are offered; without any, those of `tls`.
    Those of `before` may be used again; they must be of the same `tls` and `algorithms`, with the same files.
    """

    def __init__(
        self, tls: TLS, before: DevicePolicies[_K] | None = None, algorithms: Sequence[Algorithms] = ()
    ) -> None:
        self._tls = attrs.evolve(
            tls,
            client_cert=None,
            client_key=None,
            client_key_password_file=None,
            client_key_password_credential="",
            renew_command=(),
            rotate_key=False,
        )
        self._before = before
        self._algorithms = tuple(algorithms) or (tls.algorithms,)
        # By their intermediate certificates, in the order of the algorithms.
        self._shared: dict[tuple[x509.Certificate, ...], tuple[TLSPolicy, ...]] = {}
        # With the first of the algorithms; the others are made of it when they are used.
        self._policies: dict[_K, TLSPolicy] = {}

    @property
    def all(self) -> Iterable[TLSPolicy]:
        """The policies of all devices."""
        return self._policies.values()

    def get(self, key: _K, algorithms: Algorithms | None = None) -> TLSPolicy | None:
        """Return a device's policy, or None if it has no certificate of its own."""
        policy = self._policies.get(key)
        if policy is None or policy.own is None or algorithms in {None, self._algorithms[0]}:
            return policy
        shared = self._shared[policy.own.chain[1:]][self._algorithms.index(algorithms)]
        return attrs.evolve(shared, own=policy.own)

    def shared(self, intermediates: tuple[x509.Certificate, ...]) -> tuple[TLSPolicy, ...] | None:
        """Return what the policies of devices with these intermediate certificates have in common."""
        return self._shared.get(intermediates)

    def add(self, key: _K, client: ClientIdentity) -> None:
        """Make the policy of a device.

        Raises `ValueError` for a certificate that OpenSSL refuses, and for too many sets of intermediates.
        """
        known = None if self._before is None else self._before.get(key)
        shared = self._contexts(client.chain[1:])[0]
        if known is not None and known.own is client and known.context is shared.context:
            self._policies[key] = known
            return
        policy = attrs.evolve(shared, own=client)
        try:
            policy.introduce(SSL.Connection(policy.context, None))
        except SSL.Error as error:
            queue = error.args[0] if error.args else []
            words = "; ".join(str(reason) for _, _, reason in queue) or "no reason given"
            remedy = "use at least RSA 2048 or P-256, signed with SHA-256"
            raise ValueError(f"client_cert: refused by OpenSSL ({words}); {remedy}") from None
        self._policies[key] = policy

    def done(self) -> None:
        """Forget what was there before; nothing is added any more."""
        self._before = None

    def _contexts(self, intermediates: tuple[x509.Certificate, ...]) -> tuple[TLSPolicy, ...]:
        shared = self._shared.get(intermediates)
        if shared is None:
            if (len(self._shared) + 1) * len(self._algorithms) > _MAX_CONTEXTS:
                remedy = "leave out those that the broker has itself"
                most = _MAX_CONTEXTS // len(self._algorithms)
                raise ValueError(f"client_cert: more than {most} sets of intermediates; {remedy}")
            shared = None if self._before is None else self._before.shared(intermediates)
            shared = self._shared[intermediates] = shared or tuple(
                make_policy(self._tls.offering(each), intermediates) for each in self._algorithms
            )
        return shared

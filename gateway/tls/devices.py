"""TLS with the devices' own certificates: each shows its own, all verify the broker in the same way.

In: the `[tls]` section, certificates and keys.  Out: a `TLSPolicy` for each, or `ConfigError`.

A Context is large, because it holds the roots; an identity is small.  So there is one Context for each set of
intermediate certificates, which devices of one CA share, and the certificate and key are given to each connection.
The Context with the gateway's own certificate is never used: OpenSSL would choose between the two.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import attrs
from cryptography import x509
from OpenSSL import SSL

from gateway.config import TLS
from gateway.errors import ConfigError
from gateway.tls.channel import make_policy
from gateway.tls.trust import ClientIdentity, TLSPolicy

# With the platform's roots, a Context takes most of a mebibyte.
_MAX_CONTEXTS = 64

_K = TypeVar("_K", bound=Hashable)


def device_policies(tls: TLS, identities: Mapping[_K, tuple[str, ClientIdentity]]) -> dict[_K, TLSPolicy]:
    """Make a policy for each identity, given with its name for messages.

    Raises `ConfigError` for every certificate that OpenSSL refuses, and for too many sets of intermediates.
    """
    alike = attrs.evolve(tls, client_cert=None, client_key=None)
    shared: dict[tuple[x509.Certificate, ...], TLSPolicy] = {}
    policies: dict[_K, TLSPolicy] = {}
    problems: list[str] = []
    for key, (shown, client) in identities.items():
        intermediates = client.chain[1:]
        if intermediates not in shared:
            if len(shared) == _MAX_CONTEXTS:
                remedy = "leave out those that the broker has itself"
                raise ConfigError([f"{shown}: client_cert: more than {_MAX_CONTEXTS} sets of intermediates; {remedy}"])
            shared[intermediates] = make_policy(alike, intermediates)
        policy = attrs.evolve(shared[intermediates], own=client)
        try:
            policy.introduce(SSL.Connection(policy.context, None))
        except SSL.Error as error:
            queue = error.args[0] if error.args else []
            words = "; ".join(str(reason) for _, _, reason in queue) or "no reason given"
            remedy = "use at least RSA 2048 or P-256, signed with SHA-256"
            problems.append(f"{shown}: client_cert: refused by OpenSSL ({words}); {remedy}")
        policies[key] = policy
    if problems:
        raise ConfigError(problems)
    return policies

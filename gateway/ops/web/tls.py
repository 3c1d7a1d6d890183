"""TLS for the status endpoint.

In: the certificate and key of `[status]`.  Out: what makes the server's side of a connection, or `ConfigError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cryptography import x509
from OpenSSL import SSL
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from zope.interface import implementer

from gateway.config import TLS, Status
from gateway.errors import ConfigError
from gateway.tls.trust import read_client_identity


@implementer(IOpenSSLServerConnectionCreator)
class ServerSide:
    """Makes the server's side of connections, TLS 1.2 or 1.3, with one certificate; `chain` begins with that."""

    def __init__(self, context: SSL.Context, chain: Sequence[x509.Certificate]) -> None:
        self._context = context
        self.chain = chain

    def serverConnectionForTLS(self, protocol: Any) -> SSL.Connection:  # noqa: N802  the interface's name
        """See `IOpenSSLServerConnectionCreator`."""
        del protocol
        return SSL.Connection(self._context, None)


def server_side(status: Status) -> ServerSide | None:
    """Read the files of `status`; None if it has no certificate.  Raises `ConfigError`."""
    files = TLS(client_cert=status.server_cert, client_key=status.server_key)
    identity, problems = read_client_identity(files)
    if problems:
        raise ConfigError([each.replace("tls.client_", "status.server_", 1) for each in problems])
    if identity is None:
        return None
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    try:
        context.use_certificate(identity.chain[0])
        for certificate in identity.chain[1:]:
            context.add_extra_chain_cert(certificate)
        context.use_privatekey(identity.key)
    except SSL.Error:
        words = "is refused by OpenSSL; use at least RSA 2048 or P-256, signed with SHA-256"
        raise ConfigError([f"status.server_cert: {status.server_cert} {words}"]) from None
    return ServerSide(context, identity.chain)

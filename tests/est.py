"""A small EST server (RFC 7030): `simplereenroll`, over HTTPS with client authentication."""

from __future__ import annotations

import ssl
import threading
from base64 import b64decode, encodebytes
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from tests.pki import CLIENT, NOW, Certified, certify


class EST:
    """A CA that renews the certificates it issued, for their subject and names alone; `url` is its operation.

    It answers with `status`, and with a certificate only if that is 200.  `requests` are the bodies that it was sent.
    """

    def __init__(self, ca: Certified, status: int = 200) -> None:
        self._ca = ca
        self.status = status
        self.requests: list[bytes] = []
        context = certify(ca, subject="est").server().context()
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=ca.pem.decode())
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *arguments: _Handler(self, *arguments))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://localhost:{self._server.server_port}/.well-known/est/simplereenroll"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """Close everything."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def reenroll(self, body: bytes, shown: x509.Certificate) -> tuple[int, bytes]:
        """Answer a request (RFC 7030 §4.2.2) of a client that has shown this certificate: a status and a body."""
        self.requests.append(body)
        request = x509.load_der_x509_csr(b64decode(body))
        same_names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value == (
            shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        )
        if not request.is_signature_valid or request.subject != shown.subject or not same_names:
            return 403, b""
        if self.status != 200:
            return self.status, b""
        # RFC 7030 §4.2.3: the certificate that was issued, and no other.
        return 200, encodebytes(pkcs7.serialize_certificates([self._issue(request)], Encoding.DER))

    def _issue(self, request: x509.CertificateSigningRequest) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(request.subject)
            .issuer_name(self._ca.certificate.subject)
            .public_key(request.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(hours=1))
            .not_valid_after(NOW + timedelta(days=90))
            .add_extension(x509.ExtendedKeyUsage([CLIENT]), critical=False)
        )
        for extension in request.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        return builder.sign(self._ca.key, hashes.SHA256())


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, est: EST, *arguments: Any) -> None:
        self._est = est
        super().__init__(*arguments)

    def do_POST(self) -> None:
        right = self.path == "/.well-known/est/simplereenroll" and self.headers["Content-Type"] == "application/pkcs10"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        shown = x509.load_der_x509_certificate(self.connection.getpeercert(binary_form=True))
        status, answer = self._est.reenroll(body, shown) if right else (400, b"")
        self.send_response(status)
        self.send_header("Content-Type", "application/pkcs7-mime; smime-type=certs-only")
        self.send_header("Content-Transfer-Encoding", "base64")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: Any) -> None:
        """Keep quiet."""

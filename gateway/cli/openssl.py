"""The `openssl s_client` command that makes the same connection as a session.

In: the configuration.  Out: a line for a shell.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from gateway.config import TLS, Upstream
from gateway.config.algorithms import is_of_tls_1_3
from gateway.config.proxies import ProxyServer
from gateway.tls.broker_identity import Identity
from gateway.tls.trust import ca_dir_files, platform_bundle

# For a certificate without host names in its subjectAltName: s_client accepts its common name, and has no option that
# forbids it.  This shows that there is none, and fails.
_SHOW_NAMES = " </dev/null | openssl x509 -noout -ext subjectAltName | grep -e DNS: -e 'IP Address:'"


def s_client_command(
    upstream: Upstream, tls: TLS, proxy: ProxyServer | None = None, *, client_chain: bool, has_names: bool = True
) -> str:
    """Return the command, through an `http://` proxy if there is one.

    `client_chain` says whether the client certificate's file also has its CA certificates, `has_names` whether the
    broker's certificate has names of hosts.

    s_client takes one file of roots and CRLs, so several are joined by process substitution (bash, zsh).
    Raises `OSError` or `ValueError` if the roots cannot be found.
    """
    identity = Identity.of(upstream.verify_name)
    words = ["openssl", "s_client", "-connect", upstream.address]
    if proxy is not None:
        words += ["-proxy", proxy.address.removeprefix("http://")]
        if upstream.proxy_username:
            words += ["-proxy_user", upstream.proxy_username]
        if upstream.proxy_password_file is not None:
            words += ["-proxy_pass", f"file:{upstream.proxy_password_file}"]
    if identity.sni is None:
        words += ["-noservername", "-verify_ip", identity.name]
    else:
        words += ["-servername", identity.name, "-verify_hostname", identity.name]
    words.append("-verify_return_error")
    if tls.verification == "strict":
        words.append("-x509_strict")
    if tls.min_version == "1.3":
        words.append("-tls1_3")
    of_tls_1_3 = [cipher for cipher in tls.ciphers if is_of_tls_1_3(cipher)]
    of_tls_1_2 = [cipher for cipher in tls.ciphers if not is_of_tls_1_3(cipher)]
    for option, names in (
        ("-ciphersuites", of_tls_1_3),
        ("-cipher", of_tls_1_2),
        ("-groups", tls.groups),
        ("-sigalgs", tls.signature_algorithms),
    ):
        if names:
            words += [option, ":".join(names)]
    if tls.alpn:
        words += ["-alpn", ",".join(tls.alpn)]
    if tls.client_cert is not None:
        words += ["-cert", str(tls.client_cert), "-key", str(tls.client_key or tls.client_cert)]
        if tls.client_key_password_file is not None:
            words += ["-pass", f"file:{tls.client_key_password_file}"]
        if client_chain:
            words += ["-cert_chain", str(tls.client_cert)]
    if tls.ocsp != "off":
        words.append("-status")
    if tls.crl_file:
        words += ["-crl_check", "-crl_check_all"]
    command = " ".join([shlex.join(words), *_trusted(_files(tls))])
    return command if has_names else command + _SHOW_NAMES


def _files(tls: TLS) -> list[Path]:
    """Return the files of roots and CRLs that s_client needs besides its defaults."""
    files = [*tls.ca_file, *(ca_dir_files(tls.ca_dir) if tls.ca_dir is not None else ())]
    if tls.crl_file and not files:
        # With -CAfile, s_client ignores the platform's roots.
        files = [platform_bundle()]
    return [*files, *tls.crl_file]


def _trusted(files: Sequence[Path]) -> list[str]:
    if not files:
        return []
    if len(files) == 1:
        return ["-CAfile", shlex.quote(str(files[0]))]
    return ["-CAfile", f"<(cat {shlex.join(map(str, files))})"]

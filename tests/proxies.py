"""Real proxies in processes of their own, on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from tests.balancers import Program
from tests.harness import PATIENCE
from tests.ports import free_port
from tests.tools import require_tool

USERNAME, PASSWORD = "gateway", "s3cret:with a colon"


class Squid(Program):
    """squid.  `url` is its HTTP port, or, with a certificate and key in one PEM file, its HTTPS port.

    `allowed` are the ports of brokers that it lets through.  With `authenticate` it wants `USERNAME` and `PASSWORD`.
    With `intercept`, a CA in one PEM file, it ends TLS itself and shows certificates of that CA.
    """

    def __init__(
        self,
        *allowed: int,
        authenticate: bool = False,
        certificate: Path | None = None,
        intercept: Path | None = None,
        port: int = 0,
    ) -> None:
        # squid refuses to run as root, and the directories of tests are root's alone.
        self._home = TemporaryDirectory(prefix="squid-")
        directory = Path(self._home.name)
        directory.chmod(0o755)
        if certificate is not None:
            certificate = Path(shutil.copy(certificate, directory))
        if intercept is not None:
            intercept = Path(shutil.copy(intercept, directory))
        self.port = port or free_port()
        self.url = f"{'https' if certificate else 'http'}://localhost:{self.port}"
        lines = [
            f"pid_filename {directory}/squid.pid",
            f"cache_log {directory}/cache.log",
            f"access_log stdio:{directory}/access.log",
            "cache deny all",
            "shutdown_lifetime 0",
            "visible_hostname proxy.test",
            f"acl brokers port {' '.join(map(str, allowed))}" if allowed else "acl brokers port 1",
            "http_access deny !brokers",
        ]
        if certificate is not None:
            lines.append(f"https_port 127.0.0.1:{self.port} tls-cert={certificate}")
        elif intercept is not None:
            store = directory / "certificates"
            helper = "/usr/lib/squid/security_file_certgen"
            subprocess.run([helper, "-c", "-s", str(store), "-M", "4MB"], check=True, capture_output=True)
            lines += [
                f"http_port 127.0.0.1:{self.port} ssl-bump generate-host-certificates=on tls-cert={intercept}",
                f"sslcrtd_program {helper} -s {store} -M 4MB",
                "sslcrtd_children 1",
                "sslproxy_cert_error allow all",
                "tls_outgoing_options flags=DONT_VERIFY_PEER",
                "ssl_bump bump all",
            ]
        else:
            lines.append(f"http_port 127.0.0.1:{self.port}")
        if authenticate:
            passwords = directory / "passwords"
            hashed = subprocess.run(
                [require_tool("openssl"), "passwd", "-apr1", PASSWORD], check=True, capture_output=True, text=True
            )
            passwords.write_text(f"{USERNAME}:{hashed.stdout}")
            lines += [
                f"auth_param basic program /usr/lib/squid/basic_ncsa_auth {passwords}",
                "auth_param basic children 1",
                "acl known proxy_auth REQUIRED",
                "http_access deny !known",
            ]
        lines.append("http_access allow all")
        path = directory / "squid.conf"
        path.write_text("\n".join(lines) + "\n")
        if os.geteuid() == 0:
            for each in (directory, *directory.rglob("*")):
                shutil.chown(each, "proxy")
        super().__init__(
            [require_tool("squid"), "-N", "-n", f"test{self.port}", "-f", str(path)], directory / "squid.log"
        )
        wait_for_port(self, self.port)

    def stop(self) -> None:
        """End it, and take its directory away."""
        super().stop()
        self._home.cleanup()


class Tinyproxy(Program):
    """tinyproxy, on a free port unless told otherwise."""

    def __init__(self, directory: Path, *allowed: int, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"http://localhost:{self.port}"
        path = directory / "tinyproxy.conf"
        ports = "".join(f"ConnectPort {port}\n" for port in allowed)
        path.write_text(f"Port {self.port}\nListen 127.0.0.1\nTimeout 600\nAllow 127.0.0.1\nMaxClients 500\n{ports}")
        super().__init__([require_tool("tinyproxy"), "-d", "-c", str(path)], directory / "tinyproxy.log")
        wait_for_port(self, self.port)


class Dante(Program):
    """dante, a SOCKS server, on a free port unless told otherwise."""

    def __init__(self, directory: Path, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"socks5://localhost:{self.port}"
        path = directory / "danted.conf"
        path.write_text(f"""
logoutput: stderr
internal: 127.0.0.1 port = {self.port}
external: lo
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: root
client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 command: connect }}
""")
        super().__init__(
            [require_tool("danted"), "-f", str(path), "-p", str(directory / "danted.pid")], directory / "danted.log"
        )
        wait_for_port(self, self.port)

    @staticmethod
    def _start(command: list[str], output: IO[bytes], pass_fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=output, stderr=output, pass_fds=pass_fds, process_group=0)

    def stop(self) -> None:
        """End it with its children, which relay connections and would outlive it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


class MicroSocks(Program):
    """microsocks, a SOCKS5 server that wants `USERNAME` and `PASSWORD`."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"socks5://localhost:{self.port}"
        command = [require_tool("microsocks"), "-i", "127.0.0.1", "-p", str(self.port), "-u", USERNAME, "-P", PASSWORD]
        super().__init__(command, directory / "microsocks.log")
        wait_for_port(self, self.port)


def wait_for_port(program: Program, port: int) -> None:
    """Wait until a program listens."""
    program.wait_until(lambda: _listens(port), f"something listens on {port}")


def _listens(port: int) -> bool:
    # To connect would leave an entry in the proxy's log, and sometimes a session.
    wanted = f"{port:04X}"
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:] + Path("/proc/net/tcp6").read_text().splitlines()[1:]
    return any(row.split()[1].endswith(f":{wanted}") and row.split()[3] == "0A" for row in rows)

"""The relays: how each is configured, started, observed and stopped.

In: ports, certificates.  Out: a running relay on a core of its own, its processes, its memory.

Each does the same task: MQTT on a port of loopback, one verified TLS connection to the broker for each session, one
line of log or more for each, and apart from that its defaults.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.load import CannotMeasure, start_on

ROOT = Path(__file__).resolve().parent.parent
# The name that the broker's certificate is for.
BROKER_NAME = "broker.example"
_PATIENCE = 20.0  # seconds for a relay to open its port, or to end
# Below the ports that Linux gives to outgoing connections.
_PORTS = range(21883, 32000)
_LISTEN = "0A"  # in /proc/net/tcp


@dataclass(frozen=True)
class Setting:
    """What a relay is configured with."""

    directory: Path
    port: int
    broker_port: int
    ca_file: Path


@dataclass(frozen=True)
class Relay:
    """A relay that can be started: its name, what it is, and how to get its command line."""

    name: str
    version: str
    command: Callable[[Setting], list[str]]
    processes: int = 1
    environment: dict[str, str] = field(default_factory=dict)


def _nginx(program: str, module: str) -> Callable[[Setting], list[str]]:
    def command(setting: Setting) -> list[str]:
        path = setting.directory / "nginx.conf"
        path.write_text(f"""\
{module}
daemon off;
worker_processes 1;
worker_rlimit_nofile {descriptor_limit()};
pid {setting.directory}/nginx.pid;
error_log stderr;
events {{ worker_connections {descriptor_limit()}; }}
stream {{
    log_format sessions '$remote_addr:$remote_port $status $bytes_sent $bytes_received $session_time';
    access_log {setting.directory}/sessions.log sessions;
    server {{
        listen 127.0.0.1:{setting.port};
        proxy_pass 127.0.0.1:{setting.broker_port};
        proxy_timeout 1h;
        proxy_ssl on;
        # Before 1.23.4 nginx would choose TLS 1.2, whose session resumption needs no key exchange.
        proxy_ssl_protocols TLSv1.2 TLSv1.3;
        proxy_ssl_verify on;
        proxy_ssl_trusted_certificate {setting.ca_file};
        proxy_ssl_name {BROKER_NAME};
        proxy_ssl_server_name on;
    }}
}}
""")
        return [program, "-e", "stderr", "-c", str(path)]

    return command


def _haproxy(program: str) -> Callable[[Setting], list[str]]:
    def command(setting: Setting) -> list[str]:
        path = setting.directory / "haproxy.cfg"
        path.write_text(f"""\
global
    nbthread 1
    maxconn {descriptor_limit() // 2 - 100}
    log stdout format raw local0
defaults
    mode tcp
    log global
    option tcplog
    timeout connect 30s
    timeout client 1h
    timeout server 1h
listen mqtt
    bind 127.0.0.1:{setting.port}
    server broker 127.0.0.1:{setting.broker_port} ssl verify required ca-file {setting.ca_file} \
verifyhost {BROKER_NAME} sni str({BROKER_NAME})
""")
        return [program, "-db", "-f", str(path)]

    return command


def _stunnel(program: str) -> Callable[[Setting], list[str]]:
    def command(setting: Setting) -> list[str]:
        path = setting.directory / "stunnel.conf"
        path.write_text(f"""\
foreground = yes
syslog = no
pid =
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
[mqtt]
client = yes
accept = 127.0.0.1:{setting.port}
connect = 127.0.0.1:{setting.broker_port}
CAfile = {setting.ca_file}
verifyChain = yes
checkHost = {BROKER_NAME}
sni = {BROKER_NAME}
""")
        return [program, str(path)]

    return command


def _gateway(program: list[str], unhindered: str) -> Callable[[Setting], list[str]]:
    def command(setting: Setting) -> list[str]:
        path = setting.directory / "gateway.toml"
        path.write_text(f"""\
[[upstream]]
host = "127.0.0.1"
port = {setting.broker_port}
server_name = "{BROKER_NAME}"
[[listen]]
endpoint = "127.0.0.1:{setting.port}"
[tls]
ca_file = "{setting.ca_file}"
{unhindered}""")
        return [*program, "--nodaemon", "--pidfile=", "mqtts-gateway", "--config", str(path)]

    return command


def _unhindered(python: Path, environment: dict[str, str]) -> str:
    """Return what lets sessions come as they like: the other relays do, and set-up is to be compared.

    There are more of them a minute than one Client Identifier may have.  A gateway from before there was pacing, or
    rules, would refuse their sections.
    """
    ask = "from gateway.config import template_text; print(template_text())"
    template = subprocess.run(
        [python, "-P", "-c", ask], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    sections = {"[pacing]": "new_sessions_per_second = 0", "[devices]": "connects_per_minute = 0"}
    return "".join(f"{name}\n{key}\n" for name, key in sections.items() if name in template.stdout)


def find_peer(name: str) -> Relay:
    """Return nginx, haproxy or stunnel.  Raises `CannotMeasure` if it is not installed."""
    if name == "nginx":
        program = _program("nginx", "nginx-light libnginx-mod-stream")
        built = _output(program, "-V")
        module = ""
        if "--with-stream=dynamic" in built:
            module = "load_module modules/ngx_stream_module.so;"
            prefix = next((word[9:] for word in built.split() if word.startswith("--prefix=")), "")
            if not Path(prefix, "modules/ngx_stream_module.so").exists():
                raise CannotMeasure("nginx has no stream module: apt install libnginx-mod-stream")
        version = built.partition("nginx/")[2].split()[0]
        return Relay(name, version, _nginx(program, module), processes=2)
    if name == "haproxy":
        program = _program("haproxy", "haproxy")
        return Relay(name, _output(program, "-v").partition("version ")[2].split()[0], _haproxy(program))
    program = _program("stunnel4", "stunnel4") if shutil.which("stunnel") is None else _program("stunnel", "stunnel4")
    return Relay(name, _output(program, "-version").partition("stunnel ")[2].split()[0], _stunnel(program))


def find_gateway(name: str, where: Path) -> Relay:
    """Return a gateway: `where` is a checkout, run by this Python, or a `twistd` beside which it is installed."""
    if not where.exists():
        raise CannotMeasure(f"{name}: {where} does not exist")
    if not where.is_dir():
        return Relay(name, "installed", _gateway([str(where)], _unhindered(where.with_name("python"), {})))
    twistd = Path(sys.executable).with_name("twistd")
    if not twistd.exists():
        raise CannotMeasure(f"{name}: there is no twistd beside {sys.executable}: pip install -e .[test]")
    environment = {"PYTHONPATH": str(where)}
    pacing = _unhindered(Path(sys.executable), environment)
    return Relay(name, _commit(where), _gateway([str(twistd)], pacing), environment=environment)


class RunningRelay:
    """A relay that has opened its port."""

    def __init__(self, relay: Relay, process: subprocess.Popen[bytes], log: Path) -> None:
        self._relay = relay
        self._process = process
        self._log = log

    @property
    def pids(self) -> list[int]:
        """The relay's processes."""
        return _with_children(self._process.pid)

    def memory(self) -> dict[str, float]:
        """Return PSS and RSS of all processes, in KiB."""
        memory = {"pss": 0.0, "rss": 0.0}
        for pid in self.pids:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                key, _, value = line.partition(":")
                if key.lower() in memory:
                    memory[key.lower()] += float(value.split()[0])
        return memory

    def log(self) -> str:
        """Return the last lines that the relay has written."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-4:])

    def wait_ready(self, port: int) -> None:
        """Wait until the port is open and all processes are there.  Raises `CannotMeasure`."""
        deadline = time.monotonic() + _PATIENCE
        while not (_is_listening(port) and len(self.pids) >= self._relay.processes):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise CannotMeasure(f"{self._relay.name} does not start:\n{self.log()}")
            time.sleep(0.02)


@contextlib.contextmanager
def running(relay: Relay, setting: Setting, core: int) -> Iterator[RunningRelay]:
    """Run a relay on a core; it is stopped at the end.  Raises `CannotMeasure` if it does not start."""
    path = setting.directory / "log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            relay.command(setting),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=setting.directory,
            env=os.environ | relay.environment,
            start_new_session=True,
            preexec_fn=lambda: start_on(core),
        )
        try:
            started = RunningRelay(relay, process, path)
            started.wait_ready(setting.port)
            yield started
        finally:
            _stop(process)


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on."""
    ports: list[int] = []
    # In no order, because another benchmark may be looking for ports, too.
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise CannotMeasure("there are no free ports on loopback")


def descriptor_limit() -> int:
    """Return how many descriptors this process and its children may open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(hard, 1 << 16)


def _program(name: str, packages: str) -> str:
    program = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))
    if program is None:
        raise CannotMeasure(f"{name} is not installed: apt install {packages}")
    return program


def _output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout


def _commit(checkout: Path) -> str:
    if shutil.which("git") is None:
        return "of unknown version"
    described = subprocess.run(
        ["git", "-C", str(checkout), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "not under version control"


def _with_children(pid: int) -> list[int]:
    pids = [pid]
    # A process may end while it is looked at, and so may a thread.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                pids += _with_children(int(child))
    return pids


def _is_listening(port: int) -> bool:
    lines = map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(local.endswith(f":{port:04X}") and state == _LISTEN for _, local, _, state, *_ in lines)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

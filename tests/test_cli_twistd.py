"""What `twistd mqtts-gateway` makes of its flags, and what it says about bad input: clear words, never a traceback."""

from __future__ import annotations

import inspect
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.protocol import Factory
from twisted.internet.threads import blockingCallFromThread
from twisted.python.usage import UsageError

from gateway.config import Listener, from_flags
from gateway.config.flags import FLAGS, config_from
from gateway.errors import ConfigError
from gateway.net.listening import ListenFailed, listen
from gateway.tap import Options
from tests.harness import eventually
from tests.pki import certify, rsa_key


def run_twistd(*options: str, daemon: tuple[str, ...] = ("-n", "--pidfile=")) -> subprocess.CompletedProcess[str]:
    """Run `twistd mqtts-gateway` to its end."""
    twistd = Path(sys.executable).with_name("twistd")
    return subprocess.run(
        [sys.executable, twistd, *daemon, "mqtts-gateway", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def taken_port() -> Any:
    """Return a port of loopback on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_flags_are_those_of_the_configuration() -> None:
    """Nothing that `from_flags` takes is forgotten, and nothing is offered that it does not take."""
    assert {flag.name for flag in FLAGS} == {"config", *inspect.signature(from_flags).parameters}


def test_twistd_takes_every_flag() -> None:
    """Flags that take one value take it as it is; the others take several."""
    options = Options()
    options.parseOptions(
        shlex.split(
            "--upstream a.example --upstream=b.example:1 --client-cert c.pem --client-key k.pem --ca-file ca.pem "
            f"--crl-file crl.pem --alpn mqtt --allow 10.0.0.0/8 --server-name n.example --listen 1884 --pin {'A' * 43}="
        )
    )
    config = options.config
    assert [upstream.address for upstream in config.upstream] == ["a.example:8883", "b.example:1"]
    assert config.tls.client_cert == Path.cwd() / "c.pem"
    assert config.tls.client_key == Path.cwd() / "k.pem"
    assert config.listen[0].endpoint == "1884"


def test_twistd_help_names_every_flag() -> None:
    """The help is made of the same list, and a flag that may be repeated says so."""
    usage = Options().getUsage()
    for flag in FLAGS:
        assert f"{flag.option}=" in usage
    assert usage.count("Repeatable.") == sum(flag.repeatable for flag in FLAGS)


def test_a_flag_for_one_value_is_not_given_twice() -> None:
    """Which of the two is meant is nobody's guess."""
    with pytest.raises(UsageError, match="--client-cert: give it once"):
        Options().parseOptions(["--upstream", "a", "--client-cert", "1", "--client-cert", "2"])


def test_flags_and_a_file_do_not_mix() -> None:
    """Each flag beside --config is named, and so is a second file."""
    with pytest.raises(ConfigError) as raised:
        config_from({"config": ["a", "b"], "listen": ["1883"], "pin": ["x"], "alpn": []})
    assert raised.value.problems == [
        "--config: give it once",
        "--listen: not allowed together with --config; put it into the file",
        "--pin: not allowed together with --config; put it into the file",
    ]


def test_no_flags_at_all_say_what_is_needed() -> None:
    """The first thing that anybody tries gets the two ways to go on."""
    with pytest.raises(ConfigError, match=r"--config FILE, or --upstream HOST\[:PORT\]"):
        config_from({})


@pytest.mark.parametrize(
    ("endpoint", "cause", "remedy"),
    [
        ("tcp:port=0:interface=192.0.2.1", "Cannot assign requested address", "no interface of this machine"),
        ("unix:/nonexistent/mqtt.sock", "No such file or directory", "create the directory"),
        ("systemd:domain=INET:name=mqtt", "no socket named 'mqtt'", "FileDescriptorName="),
        ("teleport:to=mars", "Unknown endpoint type", ""),
    ],
)
def test_a_listener_that_cannot_open_says_why(reactor: Any, endpoint: str, cause: str, remedy: str) -> None:
    """Cause and remedy are told apart from each other and from a port that is in use."""
    with pytest.raises(ListenFailed) as raised:
        blockingCallFromThread(reactor, listen, reactor, Listener(endpoint), Factory())
    assert cause in raised.value.cause
    assert remedy in raised.value.remedy
    assert not raised.value.in_use


def test_a_listener_in_use_is_known_as_such(reactor: Any, taken_port: int, tmp_path: Path) -> None:
    """A TCP port by its errno, a UNIX socket by its lock."""
    with pytest.raises(ListenFailed) as raised:
        blockingCallFromThread(reactor, listen, reactor, Listener(f"127.0.0.1:{taken_port}"), Factory())
    assert raised.value.in_use
    assert "ss -ltnp" in str(raised.value)
    (tmp_path / "mqtt.sock.lock").symlink_to(str(os.getppid()))
    with pytest.raises(ListenFailed) as raised:
        blockingCallFromThread(reactor, listen, reactor, Listener(f"unix:{tmp_path}/mqtt.sock"), Factory())
    assert raised.value.in_use


@pytest.mark.slow
def test_twistd_ends_in_words_when_options_are_wrong(tmp_path: Path) -> None:
    """An unknown option, a missing file, an unknown key: each is named, with status 1."""
    config = tmp_path / "mqtts-gateway.toml"
    config.write_text('[[upstream]]\nhost = "broker.example.com"\nprot = 1\n')
    for options, words in (
        (["--upstraem", "x"], "option --upstraem not recognized"),
        (["--config", str(tmp_path / "none.toml")], "cannot be read: No such file or directory"),
        (["--config", str(config)], "upstream[0].prot: unknown key: did you mean `port`?"),
    ):
        done = run_twistd(*options)
        assert done.returncode == 1
        assert words in done.stdout
        assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_twistd_ends_in_words_when_a_certificate_cannot_be_used(tmp_path: Path) -> None:
    """A file that is no certificate and a client certificate that OpenSSL refuses are both found before the start."""
    garbage = tmp_path / "ca.pem"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")
    weak = certify(key=rsa_key(1024)).write(tmp_path / "weak.pem")
    for options, words in (
        (["--ca-file", str(garbage)], f"tls.ca_file: {garbage} contains a damaged certificate"),
        (["--client-cert", str(weak)], f"tls.client_cert: {weak} is refused by OpenSSL (ee key too small)"),
    ):
        done = run_twistd("--upstream", "localhost:1", "--listen", "127.0.0.1:0", *options)
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stdout + done.stderr


def test_twistd_ends_in_words_when_a_port_is_taken(taken_port: int, tmp_path: Path) -> None:
    """In the foreground and as a daemon, whose starter hears of it too; no PID file stays behind."""
    options = ("--upstream", "localhost:1", "--listen", f"127.0.0.1:{taken_port}")
    words = f"listen[0].endpoint: cannot listen on 127.0.0.1:{taken_port}: Address already in use"
    done = run_twistd(*options)
    assert done.returncode == 1
    assert words in done.stdout
    assert "Traceback" not in done.stdout + done.stderr

    pid_file, log_file = tmp_path / "pid", tmp_path / "log"
    done = run_twistd(*options, daemon=(f"--pidfile={pid_file}", f"--logfile={log_file}"))
    assert done.returncode == 1
    assert "cannot listen on" in done.stderr
    # The starter hears of it before the daemon has come to its end.
    eventually(lambda: words in log_file.read_text(), "the words in the log")
    assert "Traceback" not in log_file.read_text()
    eventually(lambda: not pid_file.exists(), "no PID file")


def test_deadlines_do_not_follow_the_time_of_day() -> None:
    """A box without a clock battery has its clock set by years; no keepalive may run out by that."""
    script = (
        "import time; from twisted.internet import reactor; from gateway import tap; options = tap.Options(); "
        "options.parseOptions(['--upstream', 'broker.example', '--listen', '127.0.0.1:0']); tap.makeService(options); "
        "assert reactor.seconds is time.monotonic; "
        "assert abs(reactor.callLater(5, print).getTime() - time.monotonic() - 5) < 5"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

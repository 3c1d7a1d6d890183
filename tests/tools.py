"""Programs that tests start: those that Python does not bring, by `require_tool("mosquitto")`, and their signals."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import NoReturn

import paho.mqtt.client as paho
import pytest

# The Debian package of each program whose package is named otherwise.
_PACKAGES = {
    "danted": "dante-server",
    "squid": "squid-openssl",
    "pkcs11-tool": "opensc",
    "softhsm2-util": "softhsm2",
    "promtool": "prometheus",
    "mosquitto_pub": "mosquitto-clients",
    "mosquitto_sub": "mosquitto-clients",
    "systemd-analyze": "systemd",
    "zabbix_agentd": "zabbix-agent",
}


def require_tool(name: str) -> str:
    """Return the path of a program; where it is missing, fail in CI (`CI=true`) and skip on a user's machine."""
    # Debian keeps brokers and other daemons in directories that a user's PATH often leaves out.
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))
    if path is None:
        _missing(name, _PACKAGES.get(name, name))
    return path


def require_file(pattern: str, package: str) -> Path:
    """Return the file that matches an absolute pattern, as `require_tool`."""
    found = sorted(Path("/").glob(pattern.removeprefix("/")))
    if not found:
        _missing(pattern, package)
    return found[0]


def _missing(name: str, package: str) -> NoReturn:
    advice = f"{name} is not installed: apt install {package}"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{advice} (in CI everything is there, so that nothing is skipped)")
    pytest.skip(advice)


def as_from_a_terminal() -> None:
    """Undo what `nohup` and a shell's background jobs hand down to a child: signals that are ignored stay ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_paho(client: paho.Client) -> None:
    """Stop a client's thread, and close the sockets that wake it.

    paho leaves these to the garbage collector, which complains of them during whatever test comes next.
    """
    client.loop_stop()
    client._reset_sockets()

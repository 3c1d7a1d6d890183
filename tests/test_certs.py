"""Keys: none in the repository, and those that `certs/make_dev_certs.py` makes are fit for use."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
import trustme
from cryptography import x509

from gateway.cli.certificates import expiry
from gateway.cli.report import Status
from gateway.config import from_mapping
from gateway.tls.channel import make_policy
from tests.tools import require_tool

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "certs" / "make_dev_certs.py"
# A header alone is how documents and tests speak of keys; a key has at least a line of base64 behind it, maybe quoted.
PRIVATE_KEY = re.compile(
    rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----[\s\"'\\nb]*(?:[A-Za-z-]+: [^\n]*\n)*[A-Za-z0-9+/=]{40}"
)
KEY_SUFFIXES = {".key", ".p12", ".pfx", ".jks", ".der", ".pk8"}


def make(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script."""
    command = [sys.executable, str(SCRIPT), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_private_key_is_tracked() -> None:
    """Neither by name nor by content."""
    git = require_tool("git")
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git clone, so nothing is tracked")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    tracked = [ROOT / name for name in listed.decode().split("\0") if name]
    assert SCRIPT in tracked
    # A file may be tracked and deleted, while someone works on it.
    with_keys = [
        path
        for path in tracked
        if path.is_file() and (path.suffix in KEY_SUFFIXES or PRIVATE_KEY.search(path.read_bytes()))
    ]
    assert with_keys == []


@pytest.mark.parametrize("indent", [b"", b'    "'])
def test_a_key_would_be_found(indent: bytes) -> None:
    """In a file of its own, and in source code."""
    key = trustme.CA().issue_cert("localhost").private_key_pem.bytes()
    assert PRIVATE_KEY.search(b"\n".join(indent + line for line in key.splitlines()))


def test_the_files_work(tmp_path: Path) -> None:
    """The gateway takes CA and client certificate, and the broker's names are those that were asked for."""
    out = tmp_path / "new" / "certs"
    result = make(out, "--broker", "broker.lan", "--broker", "10.0.0.7", "--device", "sensor-1", "--days", "5")
    assert result.returncode == 0, result.stderr
    config = from_mapping(
        {
            "upstream": [{"host": "broker.lan"}],
            "tls": {
                "ca_file": str(out / "ca.pem"),
                "client_cert": str(out / "device-sensor-1.pem"),
                "client_key": str(out / "device-sensor-1.key"),
            },
        }
    )
    policy = make_policy(config.tls)
    assert policy.client is not None
    broker = x509.load_pem_x509_certificate((out / "broker.pem").read_bytes())
    broker.verify_directly_issued_by(policy.roots[0])
    names = broker.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.lan"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("10.0.0.7")]
    left = broker.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=4) < left <= timedelta(days=5)
    assert str(out) in result.stdout


def test_a_fresh_set_has_nothing_to_warn_of(tmp_path: Path) -> None:
    """`mqtts-gateway check --strict` is content with the files, and with how long the broker's certificate has left."""
    assert make(tmp_path, "--device", "a").returncode == 0
    files = {"ca-file": "ca.pem", "client-cert": "device-a.pem", "client-key": "device-a.key"}
    options = [f"--{flag}={tmp_path / name}" for flag, name in files.items()]
    command = [sys.executable, "-m", "gateway.cli.main", "check", "--offline", "--strict", "--quiet", *options]
    result = subprocess.run(
        [*command, "--listen=127.0.0.1:0", "--upstream=localhost"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    broker = x509.load_pem_x509_certificate((tmp_path / "broker.pem").read_bytes())
    assert expiry(broker)[0] is Status.PASS


def test_a_life_begins_an_hour_ago(tmp_path: Path) -> None:
    """A little before the certificate is made, for clocks that are slow; one that ends soon is warned of."""
    assert make(tmp_path, "--days", "5").returncode == 0
    broker = x509.load_pem_x509_certificate((tmp_path / "broker.pem").read_bytes())
    assert timedelta(minutes=59) < datetime.now(UTC) - broker.not_valid_before_utc < timedelta(hours=2)
    assert expiry(broker)[0] is Status.WARN


def test_without_trustme_it_says_what_to_install(tmp_path: Path) -> None:
    """The package that is missing, not a name that no package index knows."""
    (tmp_path / "trustme.py").write_text("raise ImportError\n")
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "trustme is missing: pip install trustme, or '.[demo]' in a clone\n"


def test_keys_are_for_their_owner_alone_and_the_ca_has_none(tmp_path: Path) -> None:
    """Mode 0600, and no key with which more could be issued."""
    assert make(tmp_path / "out", "--device", "a").returncode == 0
    keys = {path.name for path in (tmp_path / "out").iterdir() if b"PRIVATE KEY" in path.read_bytes()}
    assert keys == {"broker.key", "device-a.key"}
    modes = {name: stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in keys}
    assert modes == dict.fromkeys(keys, 0o600)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A second run names what is there, and changes nothing."""
    assert make(tmp_path).returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = make(tmp_path, "--device", "a")
    assert result.returncode == 1
    assert "already holds ca.pem, broker.pem, broker.key: nothing is overwritten" in result.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """In words, without a traceback."""
    (tmp_path / "file").touch()
    result = make(tmp_path / "file" / "certs")
    assert result.returncode == 1
    assert result.stderr == f"{tmp_path / 'file' / 'certs'}: Not a directory\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "../up"], "is no name for a device"),
        (["--days", "0"], "is no number of days"),
        (["--broker", "not a name"], "cannot issue a certificate for such a name"),
    ],
)
def test_bad_options_are_explained(tmp_path: Path, options: list[str], said: str) -> None:
    """In words, without a traceback, and nothing is written."""
    result = make(tmp_path / "out", *options)
    assert result.returncode != 0
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_default_directory_is_ignored_by_git() -> None:
    """What the script makes cannot be committed by accident."""
    git = require_tool("git")
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git clone, so nothing is ignored")
    for name in ("certs/dev/ca.pem", "certs/dev/notes.txt", "broker.key"):
        assert subprocess.run([git, "check-ignore", "-q", name], cwd=ROOT, check=False).returncode == 0, name

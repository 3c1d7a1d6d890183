"""`mqtts-gateway check --files`: the rules' files, and what the installed service could not read although root can."""

from __future__ import annotations

import grp
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, pkcs12

from gateway.cli import check, service_view
from gateway.cli.login import make_login
from gateway.cli.main import console
from gateway.cli.report import Report, Status, Step
from gateway.cli.service_view import ServiceView
from tests.pki import CLIENT, Certified, certify, certify_ca

CHECKED = "1 rule: 2 keys, certificates and passwords passed"


@pytest.fixture(scope="module")
def root() -> Certified:
    """Return the CA that is trusted."""
    return certify_ca()


class Site:
    """A configuration with one rule, in a directory."""

    def __init__(self, directory: Path, root: Certified) -> None:
        self.directory = directory
        self.config = directory / "gateway.toml"
        (directory / "ca.pem").write_bytes(root.pem)
        leaf = certify(root, subject="d1", names=(), purposes=[CLIENT])
        self.write("d1.pem", leaf.pem, 0o644)
        self.write("d1.key", leaf.key_pem, 0o600)
        self.rule()

    def write(self, name: str, data: bytes, mode: int) -> Path:
        """Write a file beside the configuration."""
        path = self.directory / name
        path.write_bytes(data)
        path.chmod(mode)
        return path

    def rule(self, **keys: Any) -> None:
        """Write the configuration, with these keys of the rule."""
        keys = keys or {"client_cert": "d1.pem", "client_key": "d1.key"}
        lines = ['[[upstream]]\nhost = "b.example"\n[tls]\nca_file = "ca.pem"\n[[device]]\nname = "d1"']
        lines += [f"{key} = {json.dumps(value)}" for key, value in {"match_client_id": "d1", **keys}.items()]
        self.config.write_text("\n".join(lines))
        self.config.chmod(0o644)

    def steps(self) -> list[Step]:
        """Return the steps about files."""
        report = Report(lambda _: None)
        check.examine_files({flag.name: [] for flag in check.FLAGS} | {"config": [str(self.config)]}, report)
        return [step for step in report.steps if step.name == "file"]

    def problems(self) -> list[Step]:
        """Return the steps about files that have a problem."""
        return [step for step in self.steps() if step.status is not Status.PASS]


@pytest.fixture
def site(root: Certified) -> Iterator[Site]:
    """Return a configuration that has no problem, in a directory that everybody can enter, unlike pytest's."""
    with TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Site(Path(directory), root)


def test_the_files_of_rules_are_one_line_if_all_is_well(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """There may be thousands."""
    assert console(["check", "--files", "--config", str(site.config)]) == 0
    assert CHECKED in capfd.readouterr().out


def break_it(site: Site, root: Certified, name: str) -> tuple[Status, str]:
    """Break the rule's files; return what is to be said."""
    match name:
        case "missing certificate":
            (site.directory / "d1.pem").unlink()
            return Status.FAIL, "d1.pem: cannot be read: No such file"
        case "FIFO for a certificate":
            (site.directory / "d1.pem").unlink()
            os.mkfifo(site.directory / "d1.pem")
            return Status.FAIL, "d1.pem: cannot be read: it is a FIFO, not a regular file"
        case "garbage key":
            site.write("d1.key", b"garbage", 0o600)
            return Status.FAIL, "d1.key: "
        case "key of another":
            site.write("d1.key", root.key_pem, 0o600)
            return Status.FAIL, "d1.key: is not the key of the first certificate"
        case "world-readable key":
            site.write("d1.key", (site.directory / "d1.key").read_bytes(), 0o644)
            return Status.FAIL, "d1.key: private key is world-readable"
        case "certificate that ends in a week":
            leaf = certify(root, subject="d1", names=(), purposes=[CLIENT], valid_for=8)
            site.write("d1.pem", leaf.pem, 0o644)
            site.write("d1.key", leaf.key_pem, 0o600)
            return Status.WARN, "days left"
        case "missing SAS key":
            site.rule(sas_key_file="d1.sas", sas_resource="x")
            return Status.FAIL, "d1.sas: cannot be read: No such file"
        case "SAS key that is none":
            site.write("d1.sas", b"?", 0o600)
            site.rule(sas_key_file="d1.sas", sas_resource="x")
            return Status.FAIL, "base64"
        case "key that cannot sign":
            site.write("d1.jwt", b"-----", 0o600)
            site.rule(jwt_key_file="d1.jwt", jwt_audience="x")
            return Status.FAIL, "d1.jwt: "
        case "open password":
            site.write("d1.password", b"secret", 0o644)
            site.rule(password_file="d1.password")
            return Status.FAIL, "password is world-readable"
        case "writable password":
            site.write("d1.password", b"secret", 0o602)
            site.rule(password_file="d1.password")
            return Status.FAIL, "world-writable"
        case "missing program":
            site.rule(password_command=["/nonexistent/program"])
            return Status.FAIL, "password_command: does not exist"
        case "open topics":
            site.rule(publish_prefix="plant/")
            return Status.WARN, "topics that begin with $"
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "missing certificate",
        "FIFO for a certificate",
        "garbage key",
        "key of another",
        "world-readable key",
        "certificate that ends in a week",
        "missing SAS key",
        "SAS key that is none",
        "key that cannot sign",
        "open password",
        "writable password",
        "missing program",
        "open topics",
    ],
)
def test_a_file_of_a_rule_that_is_not_right(
    site: Site, root: Certified, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its line names the rule and the file; the exit status counts, a warning's with --strict."""
    status, words = break_it(site, root, name)
    (step,) = site.problems()
    assert step.status is status
    assert step.message.startswith("rule d1: ")
    assert words in step.message
    assert "secret" not in step.message.removesuffix("secret")
    expected = {Status.FAIL: (1, 1), Status.WARN: (0, 2)}[status]
    command = ["check", "--files", "--quiet", "--config", str(site.config)]
    assert (console(command), console([*command, "--strict"])) == expected
    assert words in capfd.readouterr().out


def test_nobody_is_told_to_read_a_fifo_as_another_user(site: Site, root: Certified) -> None:
    """What is wrong with it says what to do."""
    break_it(site, root, "FIFO for a certificate")
    (step,) = site.problems()
    assert (step.message.endswith("replace it, or correct the path"), step.remedy) == (True, "")


@pytest.mark.parametrize("name", ["missing certificate", "world-readable key", "missing SAS key", "missing program"])
def test_what_failed_is_not_among_what_passed(site: Site, root: Certified, name: str) -> None:
    """The line that counts the rest counts no file that has a line of its own, and is left out if there is no rest."""
    break_it(site, root, name)
    counted = [step.message for step in site.steps() if step.message.startswith("1 rule:")]
    rest = "1 rule: 1 of 2 keys, certificates and passwords passed"
    assert counted == ([rest] if name == "world-readable key" else [])


def test_a_prefix_with_filters_is_closed(site: Site) -> None:
    """`#` is no `$aws/…`."""
    site.rule(publish_prefix="plant/", publish=["#"], subscribe_prefix="plant/", subscribe=["a/#"])
    assert site.problems() == []


def test_cas_of_one_name_are_told_apart_by_key_identifiers(site: Site, root: Certified) -> None:
    """Without them OpenSSL may try the wrong one; the same certificate twice is one."""
    site.rule(max_qos=1)
    for others in (root.pem, certify_ca().pem):
        site.write("ca.pem", root.pem + others, 0o644)
        assert site.problems() == []
    site.write("ca.pem", root.pem + certify_ca(subject_key_identifier=False).pem, 0o644)
    (step,) = site.problems()
    assert (step.status, "named CN=Root CA" in step.message) == (Status.WARN, True)


# ---- the service's view


UNIT = """[Service]
ExecStart=/opt/mqtts-gateway/bin/twistd mqtts-gateway --config {config}
DynamicUser=yes
LoadCredential=credentials:{directory}/credentials
{more}
"""


@pytest.fixture
def install(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that installs a unit in a system of its own."""
    system = tmp_path / "system"
    monkeypatch.setattr(service_view, "_ROOT", system)
    monkeypatch.setattr(service_view, "HIDDEN", ())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (site.directory / "credentials").mkdir(mode=0o700)

    def write(more: str = "") -> Path:
        unit = system / "etc/systemd/system/mqtts-gateway.service"
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.write_text(UNIT.format(config=site.config, directory=site.directory, more=more))
        return unit

    return write


def test_what_only_root_can_read_fails(site: Site, install: Callable[..., Path]) -> None:
    """The service's key 0600, the outage of a device that was just added; without a service it is as it should be."""
    assert site.problems() == []
    install()
    (step,) = site.problems()
    assert step.status is Status.FAIL
    assert "d1.key: mqtts-gateway.service cannot read it: mode 0600" in step.message
    assert f"chgrp {service_view.KEY_GROUP} {site.directory}/d1.key && chmod 640" in step.remedy
    for name, remedy in (("ca.pem", "chmod o+r"), ("gateway.toml", "chmod o+r")):
        (site.directory / name).chmod(0o600)
        assert any(name in step.message and remedy in step.remedy for step in site.problems())
        (site.directory / name).chmod(0o644)


def test_a_group_of_the_service_may_read_it(site: Site, install: Callable[..., Path]) -> None:
    """Also one that a drop-in adds; a directory that others cannot enter counts, and a group that is not its own."""
    own = grp.getgrgid((site.directory / "d1.key").stat().st_gid).gr_name
    (site.directory / "d1.key").chmod(0o640)
    unit = install("SupplementaryGroups=" + own)
    assert site.problems() == []
    unit = install()
    assert len(site.problems()) == 1
    drop_in = Path(f"{unit}.d") / "keys.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(f"[Service]\n# more\nSupplementaryGroups={own}\n")
    assert site.problems() == []
    drop_in.write_text(f"[Service]\nSupplementaryGroups={own}\nSupplementaryGroups=\n")
    assert len(site.problems()) == 1


def test_a_credential_is_read_by_systemd(site: Site, install: Callable[..., Path]) -> None:
    """Only root can read the original, and that is right; a link is not passed on."""
    install()
    (site.directory / "d1.key").rename(site.directory / "credentials/d1.key")
    site.rule(client_cert="d1.pem", client_key="credentials/d1.key")
    assert site.problems() == []
    (site.directory / "credentials/d1.key").rename(site.directory / "real.key")
    (site.directory / "credentials/d1.key").symlink_to(site.directory / "real.key")
    assert "symbolic link" in site.problems()[0].message


def test_a_password_from_a_credential_needs_its_file(site: Site, install: Callable[..., Path]) -> None:
    """Root has none of the service's credentials, but knows where they come from."""
    site.rule(password_credential="credentials_d1.password")
    assert site.problems() == []
    install()
    (step,) = site.problems()
    assert (step.status, f"{site.directory}/credentials/d1.password: no file" in step.message) == (Status.FAIL, True)
    site.write("credentials/d1.password", b"x", 0o600)
    assert site.problems() == []


def test_the_files_of_a_proxy_are_looked_at_too(site: Site) -> None:
    """Its password, and the CA of its certificate."""
    site.config.write_text(
        '[[upstream]]\nhost = "b"\nproxy = "https://p.example:443"\nproxy_username = "u"\n'
        'proxy_password_file = "none.password"\nproxy_ca_file = "none.pem"\n[tls]\nca_file = "ca.pem"\n'
    )
    assert [Path(step.facts["path"]).name for step in site.problems()] == ["none.pem", "none.password"]


def test_the_files_of_the_status_page_are_looked_at_too(site: Site) -> None:
    """Its certificate, and whether the key belongs to it."""
    text = '[[upstream]]\nhost = "b"\n[tls]\nca_file = "ca.pem"\n[status]\nserver_cert = "d1.pem"\nserver_key = "{}"\n'
    site.config.write_text(text.format("d1.key"))
    assert site.problems() == []
    assert any(step.message.endswith("d1.key: private key of d1.pem, mode 0600") for step in site.steps())
    site.write("d2.key", certify().key_pem, 0o600)
    site.config.write_text(text.format("d2.key"))
    (step,) = site.problems()
    assert "d2.key: is not the key of the first certificate" in step.message


def test_a_service_of_another_configuration_or_of_root_has_no_say(site: Site, install: Callable[..., Path]) -> None:
    """Nor has one that is not installed."""
    unit = install("DynamicUser=no\nUser=root")
    assert site.problems() == []
    install("DynamicUser=no\nUser=nobody")
    assert len(site.problems()) == 1
    unit.write_text("[Service]\nExecStart=/opt/x --config /etc/other.toml\n")
    assert ServiceView.of(site.config) is None


def test_directories_of_rules_are_looked_at_too(site: Site, install: Callable[..., Path]) -> None:
    """The directory, and each rule in it."""
    install()
    rules = site.directory / "devices"
    rules.mkdir(mode=0o755)
    site.config.write_text('[[upstream]]\nhost = "b"\n[tls]\nca_file = "ca.pem"\n[devices]\ndirectory = "devices"\n')
    site.write("devices/d2.toml", b"max_qos = 1\n", 0o600)
    (step,) = site.problems()
    assert "devices/d2.toml: mqtts-gateway.service cannot read it" in step.message
    rules.chmod(0o700)
    assert any("devices: mqtts-gateway.service cannot read it" in step.message for step in site.problems())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to a group that it is not in")
def test_a_device_that_root_adds_can_be_read_by_the_service(
    site: Site, install: Callable[..., Path], root: Certified, capfd: pytest.CaptureFixture[str]
) -> None:
    """The documented workflow: add, check, reload.  Without a group, `check` says what is missing."""
    (site.directory / "devices").mkdir(mode=0o755)
    site.config.write_text('[[upstream]]\nhost = "b"\n[tls]\nca_file = "ca.pem"\n[devices]\ndirectory = "devices"\n')
    site.write("ca-key.pem", root.key_pem, 0o600)
    issuing = [
        "--ca-cert",
        str(site.directory / "ca.pem"),
        "--ca-key",
        str(site.directory / "ca-key.pem"),
        "--days",
        "60",
    ]
    check_it = ["check", "--files", "--config", str(site.config)]
    add = ["device", "add", "--config", str(site.config), *issuing]
    install("SupplementaryGroups=games")
    assert console([*add, "sensor-1"]) == 0
    status = (site.directory / "devices/sensor-1-key.pem").stat()
    assert (status.st_mode & 0o777, status.st_gid) == (0o640, grp.getgrnam("games").gr_gid)
    assert console(check_it) == 0
    install()
    assert console([*add, "sensor-2"]) == 0
    assert (site.directory / "devices/sensor-2-key.pem").stat().st_mode & 0o777 == 0o600
    assert console(check_it) == 1
    assert "sensor-2-key.pem: mqtts-gateway.service cannot read it" in capfd.readouterr().out


# ---- what is said


def test_a_path_with_a_typo_is_corrected_not_given_to_another_user(site: Site) -> None:
    """The file that is meant is named, or the last directory that exists."""
    for name, remedy in (("caa.pem", "Is ca.pem meant?"), ("sub/ca.pem", f"there is no {site.directory}/sub")):
        site.config.write_text(f'[[upstream]]\nhost = "b"\n[tls]\nca_file = "{name}"\n')
        (step,) = site.problems()
        assert remedy in step.remedy
        assert "runs as" not in step.remedy


def test_a_ca_of_the_future_is_a_matter_of_the_clock(site: Site) -> None:
    """Not of the CA."""
    site.rule(max_qos=1)
    site.write("ca.pem", certify_ca(valid_from=10).pem, 0o644)
    (step,) = site.problems()
    assert (step.status, "clock" in step.remedy) == (Status.FAIL, True)
    site.write("ca.pem", certify_ca(valid_from=10).pem + certify_ca().pem, 0o644)
    (step,) = site.problems()
    assert (step.status, "clock" in step.remedy) == (Status.WARN, True)


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
def test_a_password_that_windows_saved_is_not_sent(site: Site, mark: bytes) -> None:
    """Its byte order mark would be part of it; white space may be meant, and is a warning."""
    path = site.write("d1.password", mark + b"x", 0o600)
    site.rule(password_file="d1.password")
    (step,) = site.problems()
    assert (step.status, "byte order mark" in step.message) == (Status.FAIL, True)
    with pytest.raises(ValueError, match="byte order mark"):
        make_login("d1", "u", str(path))
    site.write("d1.password", b"x \n", 0o600)
    (step,) = site.problems()
    assert (step.status, "white space" in step.message) == (Status.WARN, True)


@pytest.mark.parametrize("table", ["tls", "rule"])
def test_pkcs12_and_its_passphrase_are_seen_as_the_service_sees_them(
    site: Site, install: Callable[..., Path], root: Certified, table: str
) -> None:
    """Mode, content and readability of both files; the passphrase from a credential as from a file."""
    leaf = certify(root, subject="d1", names=(), purposes=[CLIENT])
    encryption = BestAvailableEncryption(b"right")
    data = pkcs12.serialize_key_and_certificates(b"d1", leaf.key, leaf.certificate, None, encryption)
    site.write("credentials/d1.p12", data, 0o600)
    site.write("credentials/d1.pass", b"right\n", 0o600)
    install()

    def write(**keys: str) -> None:
        site.rule(**({"keep_alive_min": 0} if table == "tls" else keys))
        if table == "tls":
            lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
            site.config.write_text(site.config.read_text().replace("[tls]\n", f"[tls]\n{lines}"))

    write(client_cert="credentials/d1.p12", client_key_password_file="credentials/d1.pass")
    assert site.problems() == []
    write(client_cert="credentials/d1.p12", client_key_password_credential="credentials_d1.pass")
    assert site.problems() == []
    site.write("credentials/d1.pass", b"wrong\n", 0o600)
    (step,) = site.problems()
    assert "d1.p12: cannot be decrypted: the passphrase is wrong" in step.message
    (site.directory / "credentials/d1.pass").unlink()
    (step,) = site.problems()
    assert "d1.pass: cannot be read: No such file" in step.message
    write(client_cert="credentials/d1.p12")
    (step,) = site.problems()
    assert "d1.p12: is encrypted: write its passphrase to a file" in step.message
    site.write("d1.pass", b"right\n", 0o644)
    write(client_cert="credentials/d1.p12", client_key_password_file="d1.pass")
    (step,) = site.problems()
    assert "passphrase is world-readable" in step.message
    (site.directory / "d1.pass").chmod(0o600)
    (step,) = site.problems()
    assert "d1.pass: mqtts-gateway.service cannot read it" in step.message


@pytest.mark.parametrize("name", ["ca.pem", "d1.pem"])
def test_a_private_key_among_public_certificates_is_found(site: Site, name: str) -> None:
    """Where everyone can read the file; the key is as good as published."""
    path = site.directory / name
    path.write_bytes(path.read_bytes() + (site.directory / "d1.key").read_bytes())
    path.chmod(0o644)
    (problem,) = site.problems()
    assert problem.status is Status.FAIL
    assert (str(path) in problem.message, "private key" in problem.message) == (True, True)
    path.chmod(0o640)
    assert not [step for step in site.problems() if "private key" in step.message]


def test_without_flags_the_services_configuration_is_checked(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """If there is one."""
    monkeypatch.setattr(check, "_DEFAULT", site.config)
    assert console(["check", "--files"]) == 0
    assert f"{site.config}: 1 listener" in capfd.readouterr().out
    assert console(["check", "--files", "--upstream", "other.example"]) == 0
    assert str(site.config) not in capfd.readouterr().out
    monkeypatch.setattr(check, "_DEFAULT", site.config.with_name("none"))
    assert console(["check", "--files"]) == 1
    assert "no broker is configured" in capfd.readouterr().out

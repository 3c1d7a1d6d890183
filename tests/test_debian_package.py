"""The Debian package: its contents, SBOM, lintian, the same bytes twice, and its whole life under a systemd."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.box import ROOT, Box, require_box
from tests.harness import eventually
from tests.mqtt_packets import connect, publish
from tests.test_service import ACCEPTED, BROKER, CONFIG, UNIT, Plant
from tests.tools import require_tool

pytestmark = pytest.mark.slow

LIBRARY = "./usr/lib/mqtts-gateway"


def build(into: Path, wheels: Path, **environment: str) -> Path:
    """Build the package as CONTRIBUTING.md says, with the same wheels of dependencies each time."""
    command = [sys.executable, ROOT / "package.py", into, "--wheels", wheels]
    said = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return Path(said.strip())


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory for the wheels of dependencies."""
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="module")
def package(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the package, built from this tree."""
    for program in ("dpkg-deb", "readelf", "lintian", "man"):
        require_tool(program)
    return build(tmp_path_factory.mktemp("package"), wheels)


@pytest.fixture(scope="module")
def listing(package: Path) -> dict[str, str]:
    """Return the mode and owner of each file in the package."""
    lines = subprocess.check_output(["dpkg-deb", "--contents", package], text=True).splitlines()
    entries = (line.split(maxsplit=5) for line in lines)
    return {path.partition(" -> ")[0]: f"{mode} {owner}" for mode, owner, _, _, _, path in entries}


def test_it_has_all_that_belongs_to_a_service(package: Path, listing: dict[str, str]) -> None:
    """Programs, units, manual, completion, documents; one module for each Python where they differ; root's alone."""
    share = "./usr/share"
    assert {
        "./usr/bin/mqtts-gateway",
        f"./etc/{CONFIG.relative_to('/etc')}",
        f"./usr/lib/systemd/system/{UNIT}",
        f"{share}/man/man1/mqtts-gateway.1.gz",
        f"{share}/bash-completion/completions/mqtts-gateway",
        f"{share}/doc/mqtts-gateway/copyright",
        f"{share}/doc/mqtts-gateway/changelog.Debian.gz",
        f"{LIBRARY}/python/gateway/relay/_core.abi3.so",
        *(f"{LIBRARY}/python/_cffi_backend.cpython-{version}-x86_64-linux-gnu.so" for version in (311, 312, 313)),
    } <= listing.keys()
    assert [path for path in listing if re.search(r"/tests?/|__pycache__|/units/|\.c$", path)] == []
    assert {entry.split()[1] for entry in listing.values()} == {"root/root"}
    assert [path for path, entry in listing.items() if entry[0] != "l" and "w" in entry[5] + entry[8]] == []
    control = subprocess.check_output(["dpkg-deb", "--field", package], text=True)
    assert re.search(
        r"^Depends: python3 \(>= 3\.11\), python3 \(<< 3\.14\), libc6 \(>= 2\.\d+\), libgcc-s1, libstdc\+\+6,",
        control,
        re.MULTILINE,
    )


def test_every_distribution_inside_has_its_licence(package: Path, listing: dict[str, str], tmp_path: Path) -> None:
    """Under the name of its directory of metadata."""
    subprocess.run(["dpkg-deb", "--extract", package, tmp_path], check=True)
    text = (tmp_path / "usr/share/doc/mqtts-gateway/copyright").read_text()
    inside = {path.split("/")[5] for path in listing if re.search(r"/python/[^/]+\.dist-info/", path)}
    assert len(inside) > 15
    assert [name for name in inside if f"/{name}/" not in text and not name.startswith("mqtts_gateway-")] == []


def test_the_bill_of_materials_names_every_distribution_inside(
    package: Path, listing: dict[str, str], tmp_path: Path
) -> None:
    """With version and licence, in a document that CycloneDX's own schema accepts."""
    document = package.with_suffix(".cdx.json")
    components = json.loads(document.read_text())["components"]
    found = {f"{each['name'].replace('-', '_')}-{each['version']}" for each in components}
    inside = {path.split("/")[5] for path in listing if re.search(r"/python/[^/]+\.dist-info/", path)}
    own = f"mqtts_gateway-{package.name.split('_')[1].partition('-')[0]}"
    assert {name.removesuffix(".dist-info").lower() for name in inside} == found | {own}
    assert all(each["licenses"][0]["expression"] for each in components)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path / "tools"]
    subprocess.run([*pip, "cyclonedx-python-lib[json-validation]>=11"], check=True)
    program = (
        "import sys; from cyclonedx.schema import SchemaVersion; from cyclonedx.validation.json import *;"
        "sys.exit(JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "tools")}
    subprocess.run([sys.executable, "-c", program, document], env=environment, check=True)


def test_the_manual_and_the_completion_name_every_command(package: Path, tmp_path: Path) -> None:
    """`man` formats the page without a warning; bash completes commands, options and fixed values."""
    subprocess.run(["dpkg-deb", "--extract", package, tmp_path], check=True)
    share = tmp_path / "usr/share"
    page = subprocess.run(
        ["man", "--warnings", "-l", share / "man/man1/mqtts-gateway.1.gz"],
        env={**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert page.stderr == ""
    for words in ("mqtts-gateway check", "mqtts-gateway device add", "--upstream HOST[:PORT]", "EXIT STATUS"):
        assert words in page.stdout
    script = share / "bash-completion/completions/mqtts-gateway"
    for typed, expected in (
        ("che", "check"),
        ("check --upst", "--upstream"),
        ("device a", "add"),
        ("demo --profile aws", "aws-like"),
    ):
        words = ["mqtts-gateway", *typed.split()]
        ask = f'. "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD={len(words) - 1}; _mqtts_gateway; echo "${{COMPREPLY[@]}}"'
        assert subprocess.check_output(["bash", "-c", ask, "bash", script, *words], text=True).split() == [expected]


def test_lintian_finds_no_error(package: Path) -> None:
    """Nor a warning, apart from that it closes no bug of Debian's."""
    said = subprocess.run(["lintian", "--allow-root", package], capture_output=True, text=True, check=False)
    findings = [line for line in said.stdout.splitlines() if "initial-upload-closes-no-bugs" not in line]
    assert (findings, said.returncode) == ([], 0), said.stderr


def test_built_again_it_is_the_same(package: Path, wheels: Path, tmp_path: Path) -> None:
    """Byte for byte, at another time, in another directory, under another umask."""
    before = os.umask(0o077)
    try:
        again = build(tmp_path, wheels, TZ="Asia/Tokyo")
        assert again.read_bytes() == package.read_bytes()
        assert again.with_suffix(".cdx.json").read_bytes() == package.with_suffix(".cdx.json").read_bytes()
    finally:
        os.umask(before)


@pytest.fixture
def plant() -> Iterator[Plant]:
    """Return a box in which the gateway has never been."""
    require_box()
    with Box() as box:
        plant = Plant(box, install=False)
        yield plant
        plant.stop()


def upgraded(package: Path, directory: Path) -> Path:
    """Return the same package under a higher version."""
    root = directory / "root"
    subprocess.run(["dpkg-deb", "--raw-extract", package, root], check=True)
    control = root / "DEBIAN/control"
    control.write_text(re.sub(r"^(Version: .*)-1$", r"\1-2", control.read_text(), flags=re.MULTILINE))
    newer = directory / package.name.replace("-1_", "-2_")
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", root, newer], check=True)
    return newer


def bring(box: Box, package: Path) -> str:
    """Copy a package into the box; return its path there."""
    inside = f"/root/{package.name}"
    box.do("sh", "-c", 'base64 --decode >"$1"', "sh", inside, stdin=b64encode(package.read_bytes()).decode())
    return inside


def test_its_whole_life(package: Path, tmp_path: Path, plant: Plant) -> None:
    """Install, configure, start, a message; an upgrade that ends the session gently; remove; purge leaves nothing."""
    box = plant.box
    box.do("rm", "--force", "/var/lib/man-db/auto-update")  # or each step has man-db read every manual page here
    snapshot = "find /etc /usr /var/lib -xdev -not -path '/var/lib/dpkg/*' -not -path '*/__pycache__*' | sort"
    before = set(box.do("sh", "-c", snapshot).splitlines())
    said = box.do("dpkg", "--install", bring(box, package))
    assert "systemctl enable --now mqtts-gateway" in said
    assert box.run("systemctl", "is-active", UNIT).stdout.strip() == "inactive"
    assert box.do("mqtts-gateway", "--version").startswith("mqtts-gateway ")
    assert "apt remove" in box.run("mqtts-gateway", "uninstall").stderr
    assert "systemctl enable --now" in box.run("mqtts-gateway", "install").stderr

    chain, key = plant.issued("gateway-1")
    for name, content in (("ca.pem", plant.ca.cert_pem.bytes().decode()), ("me.pem", chain), ("me.key", key)):
        box.write(f"/root/{name}", content, 0o600)
    answers = [f"{BROKER}:{plant.broker.port}", "/root/ca.pem", "/root/me.pem", "/root/me.key", ""]
    assert "PASS  connack" in box.do("mqtts-gateway", "setup", stdin="\n".join(answers))
    box.do("sed", "-i", "s/^\\[drain\\]$/[drain]\\nseconds = 0.5/", CONFIG)
    box.do("systemctl", "enable", "--now", UNIT)
    received = len(plant.broker.received)
    sent = connect("pump") + publish(payload=b"21.5")
    with plant.device() as device:
        device.send(sent)
        assert device.read(4) == ACCEPTED
        eventually(lambda: plant.broker.received[received:] == sent, "both packets")
    log = box.log(UNIT)
    assert "compiled" in box.do("mqtts-gateway", "status", "--config", CONFIG, "--json"), log
    assert not re.search(r"Traceback|\[Errno|Permission|not permitted|cannot be read", log)

    process = box.property(UNIT, "MainPID")
    with plant.session() as device:
        newer = upgraded(package, tmp_path)
        box.do("dpkg", "--install", bring(box, newer))
        assert device.read_to_end() == b""
    assert box.property(UNIT, "MainPID") not in {process, "0"}
    with plant.session():
        pass

    # A version that cannot use the configuration does not end the one that runs.
    process = box.property(UNIT, "MainPID")
    box.write(CONFIG, f"nonsense = 1\n{box.read(CONFIG)}")
    postinst = "/var/lib/dpkg/info/mqtts-gateway.postinst"
    done = box.run(postinst, "configure", newer.name.split("_")[1])  # as dpkg calls it after an upgrade
    assert done.returncode == 0
    assert "previous version is still running" in done.stderr
    assert box.property(UNIT, "MainPID") == process

    box.do("dpkg", "--remove", "mqtts-gateway")
    assert box.property(UNIT, "LoadState") == "not-found"
    assert "nonsense" in box.read(CONFIG)
    assert box.run("pgrep", "--full", "mqtts-gateway").stdout == ""
    box.do("dpkg", "--purge", "mqtts-gateway")
    left = set(box.do("sh", "-c", snapshot).splitlines()) - before
    assert left <= {"/etc/systemd/system/multi-user.target.wants", "/var/lib/private"}  # systemd's own
    assert "mqtts-gateway" not in box.read("/etc/group")

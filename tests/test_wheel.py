"""The wheel, as a user gets it: installed into an environment of its own, with the sources out of reach.

Needs the package index, which whoever runs this has just used to install pytest.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Broker, Device, eventually
from tests.mqtt_packets import connect, publish

ROOT = Path(__file__).resolve().parent.parent
CORE = "gateway/relay/_core.abi3.so"
PLUGIN = "twisted/plugins/mqtts_gateway_plugin.py"

pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    """Run a command from the root directory; return what it wrote, fail with it."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{result.stdout}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built from this tree."""
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", directory, ROOT)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of programs of a new environment that has nothing but the wheel and what it needs."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", environment)
    programs = environment / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", wheel)
    return programs


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that starts a program from the root directory and returns the file with its output."""
    processes: list[subprocess.Popen[bytes]] = []

    def starter(*command: str | Path) -> Path:
        log = tmp_path / "log"
        with log.open("wb") as output:
            processes.append(subprocess.Popen(command, cwd="/", stdout=output, stderr=subprocess.STDOUT))
        return log

    yield starter
    for process in processes:
        process.terminate()
        process.wait(20)


def test_the_wheel_holds_the_package_and_the_plugin_and_nothing_else(wheel: Path) -> None:
    """No tests, no caches, no certificates; the configuration's template is there."""
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gateway").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in {".c", ".so"}
    }
    units = {f"gateway/units/{path.name}" for path in (ROOT / "systemd").iterdir()}
    core = {CORE} if "-abi3-" in wheel.name else set()
    assert {name for name in names if ".dist-info/" not in name} == sources | units | {PLUGIN} | core
    assert "gateway/config/template.toml" in names
    assert len(units) == 4


def test_the_compiled_core_is_there_and_works(wheel: Path, installed: Path) -> None:
    """Where there is a compiler, as there must be for these tests."""
    assert "-cp311-abi3-" in wheel.name
    program = "from gateway.relay.core import engine; print(engine(), engine().name)"
    assert run(installed / "python", "-c", program).endswith(" compiled\n")


def test_its_description_has_no_link_into_the_repository(wheel: Path) -> None:
    """Where a package index shows it, they would lead nowhere; the words of each are there."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        headers, _, text = archive.read(name).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in headers
    assert text.startswith("# mqtts-gateway\n")
    assert "docs/operations.md" in text
    assert re.findall(r"\]\((?!https?:)|(?:src|href)=\"(?!https?:)", text) == []


@pytest.fixture(scope="module")
def installers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of programs of an environment with pipx and uv."""
    environment = tmp_path_factory.mktemp("installers")
    run(sys.executable, "-m", "venv", environment)
    run(environment / "bin/python", "-m", "pip", "install", "--quiet", "pipx", "uv")
    return environment / "bin"


@pytest.fixture(scope="module")
def dependencies(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with all that the wheel needs, fetched by pip: uv would read other settings than pip does."""
    directory = tmp_path_factory.mktemp("dependencies")
    run(sys.executable, "-m", "pip", "download", "--quiet", "--dest", directory, wheel, "pip")
    return directory


@pytest.mark.parametrize(
    ("program", "command"),
    [("pipx", ("install", "--python", sys.executable)), ("uv", ("tool", "install", "--python", sys.executable))],
)
def test_installers_of_programs_install_it(
    program: str, command: tuple[str, ...], wheel: Path, installers: Path, dependencies: Path, tmp_path: Path
) -> None:
    """Each puts `mqtts-gateway` on the path, and the rest into an environment of its own."""
    variables = {
        "PIPX_HOME": tmp_path / "pipx",
        "PIPX_BIN_DIR": tmp_path / "bin",
        "UV_TOOL_DIR": tmp_path / "uv",
        "UV_TOOL_BIN_DIR": tmp_path / "bin",
        "UV_CACHE_DIR": tmp_path / "cache",
        "UV_CONFIG_FILE": tmp_path / "uv.toml",
        "PIP_NO_INDEX": 1,
        "PIP_FIND_LINKS": dependencies,
    }
    (tmp_path / "uv.toml").write_text(f'no-index = true\nfind-links = ["{dependencies}"]\n')
    settings = [f"{name}={value}" for name, value in variables.items()]
    run("env", *settings, installers / program, *command, wheel)
    assert run(tmp_path / "bin/mqtts-gateway", "--version").startswith("mqtts-gateway ")
    assert "--upstream" in run(tmp_path / "bin/mqtts-gateway", "run", "--help")
    assert {path.name for path in (tmp_path / "bin").iterdir()} == {"mqtts-gateway"}


def test_without_a_compiler_the_wheel_is_for_all(tmp_path: Path) -> None:
    """It has all but the core; and it is said what is missing."""
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    said = run("env", "CC=/nonexistent/cc", *command)
    (built,) = tmp_path.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl"), said
    assert CORE not in zipfile.ZipFile(built).namelist()


def test_pip_is_content(installed: Path) -> None:
    """Everything that the wheel needs is there, in versions that get on."""
    assert "No broken requirements found" in run(installed / "python", "-m", "pip", "check")


def test_twistd_knows_the_gateway(installed: Path) -> None:
    """From anywhere."""
    assert re.search(r"^ +mqtts-gateway +\S", run(installed / "twistd", "--help"), re.MULTILINE)


def test_it_relays_a_session(
    installed: Path, start: Callable[..., Path], start_broker: Callable[..., Broker], ca_file: Path
) -> None:
    """CONNECT and PUBLISH reach the broker through its TLS, the broker's CONNACK the device."""
    broker = start_broker()
    log = start(
        *(installed / "twistd", "--nodaemon", "--pidfile=", "mqtts-gateway", "--listen", "127.0.0.1:0"),
        *("--upstream", f"localhost:{broker.port}", "--ca-file", str(ca_file)),
    )
    listening = re.compile(r"listening for plain MQTT on 127\.0\.0\.1:(\d+)")
    port = int(
        eventually(lambda: listening.search(log.read_text()), lambda: f"it listens; it said {log.read_text()}")[1]
    )
    with Device(port) as device:
        device.send(connect())
        assert device.read(4) == b"\x20\x02\x00\x00"
        device.send(publish(payload=b"21.5"))
        eventually(lambda: broker.received == connect() + publish(payload=b"21.5"), "the broker has got both packets")


def test_the_command_is_there(installed: Path) -> None:
    """`mqtts-gateway` is on the environment's path and explains itself."""
    assert "demo" in run(installed / "mqtts-gateway", "--help")


def test_it_installs_its_service(installed: Path, tmp_path: Path) -> None:
    """The units are in the wheel and get this environment's paths; if the service can see those."""
    stage = tmp_path / "stage"
    result = subprocess.run(
        [installed / "mqtts-gateway", "install", "--root", stage], cwd="/", capture_output=True, text=True, check=False
    )
    # Tests have their environments below /tmp, which the unit hides.
    assert result.returncode == 1
    assert f"this environment is {installed.parent}, which the service cannot see" in result.stderr
    assert not stage.exists()
    code = (
        "import sys; from gateway.cli import install; install.HIDDEN = (); "
        "install._closed = lambda *_: (); from gateway.cli.main import console; sys.exit(console(sys.argv[1:]))"
    )
    run(installed / "python", "-c", code, "install", "--root", stage)
    unit = (stage / "etc/systemd/system/mqtts-gateway.service").read_text()
    assert f"ExecStart={installed}/twistd " in unit
    assert (stage / "etc/mqtts-gateway/gateway.toml").exists()


def test_uninstalled_it_leaves_no_plugin(installed: Path) -> None:
    """The last test: `twistd` knows nothing of it any more."""
    run(installed / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "mqtts-gateway")
    assert "mqtts-gateway" not in run(installed / "twistd", "--help")
    assert list(installed.parent.rglob(Path(PLUGIN).name)) == []

"""`mqtts-gateway` itself: subcommands, exit statuses, and a standard output that nobody reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest

from gateway import __version__
from gateway.cli.main import COMMANDS, console


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `mqtts-gateway` in a process of its own."""
    command = [sys.executable, "-m", "gateway.cli.main", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(command, text=True, check=False, timeout=60, **(streams | options))


def test_the_entry_point_is_the_console() -> None:
    """What pip installs as mqtts-gateway is the function tested here."""
    (entry,) = entry_points(group="console_scripts", name="mqtts-gateway")
    assert entry.load() is console


def test_it_tells_its_version(capfd: pytest.CaptureFixture[str]) -> None:
    """One line, status 0."""
    assert console(["--version"]) == 0
    assert capfd.readouterr().out == f"mqtts-gateway {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["chekc"], "invalid choice: 'chekc'"),
        (["--nope", "check"], "unrecognized arguments: --nope"),
        (["check", "--upstraem", "x"], "unrecognized arguments: --upstraem"),
        (["check", "--conf", "x"], "unrecognized arguments: --conf"),
        (["init", "a", "b"], "unrecognized arguments: b"),
        (["--upstream", "a b"], "such as: mqtts-gateway run --upstream 'a b'"),
        (["--config=x"], "such as: mqtts-gateway run --config=x"),
    ],
)
def test_a_wrong_command_line_is_status_1(capfd: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """Not argparse's 2, which means warnings here; options are not guessed from their beginnings."""
    assert console(arguments) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "usage", "hint"),
    [
        (["device", "list", "d1"], "device list", "device show ID"),
        (["device", "renew", "d1", "d2"], "device renew", ""),
        (["store", "show", "d1", "d2"], "store show", ""),
        (["status", "--nope"], "status", ""),
    ],
)
def test_the_usage_of_the_command_is_shown(
    capfd: pytest.CaptureFixture[str], arguments: list[str], usage: str, hint: str
) -> None:
    """Not that of the whole program."""
    assert console(arguments) == 1
    err = capfd.readouterr().err
    assert f"usage: mqtts-gateway {usage} [-h]" in err
    assert hint in err


def test_descriptions_keep_capital_letters(capfd: pytest.CaptureFixture[str]) -> None:
    """Only their first letter is made one."""
    assert console(["device", "import", "--help"]) == 0
    assert "Add devices from a CSV file" in capfd.readouterr().out


def test_every_command_has_help(capfd: pytest.CaptureFixture[str]) -> None:
    """The options of a command are there although its module is loaded only on demand."""
    for command, option in (("check", "--upstream HOST[:PORT]"), ("init", "--force"), ("demo", "--once")):
        assert console([command, "--help"]) == 0
        assert option in capfd.readouterr().out
    assert console(["--help"]) == 0
    out = capfd.readouterr().out
    listed = out.partition("`mqtts-gateway`: ")[2].partition(".")[0]
    assert set(COMMANDS) == set(re.findall(r"\w+", listed))


def test_a_command_loads_only_what_it_needs() -> None:
    """`init` works without Twisted, `check` without what the demo needs."""
    code = (
        "import sys; from gateway.cli.main import console; console({0!r}); "
        "sys.exit(', '.join({{'twisted', 'gateway.cli.demo', 'amqtt'}} & set(sys.modules) - {{{1!r}}}) or 0)"
    )
    for arguments, allowed in ((["init", "-"], ""), (["--version"], ""), (["check", "--help"], "twisted")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments, allowed)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_an_output_that_cannot_be_written_ends_in_words() -> None:
    """A full disk and a closed stream are told, a reader that went away is not; never a traceback."""
    with open("/dev/full", "w") as full:  # noqa: PTH123  a device, opened as a shell would
        done = run("check", "--config", "/nonexistent", stdout=full)
    assert (done.returncode, done.stderr) == (1, "mqtts-gateway: cannot continue: No space left on device\n")
    done = run("check", "--config", "/nonexistent", stdout=None, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (1, "mqtts-gateway: standard output is closed\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = run("check", "--config", "/nonexistent", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_output_that_lacks_characters_gets_escapes() -> None:
    """A terminal of the last century is no reason to stop."""
    done = run("check", "--config", "/nonexistent/brök", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1
    assert "/nonexistent/br\\xf6k" in done.stdout
    assert done.stderr == ""

"""`mqtts-gateway setup`: from nothing to a configuration that works, with each answer tested at once.

In: answers on a terminal or standard input, or flags.  Out: a configuration with its certificates and keys beside it,
and the next steps; if anything fails, nothing has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attrs import define, evolve, field, fields, frozen

from gateway.cli import install
from gateway.cli.device_files import SECRET, DeviceProblem, Writer, public_pem, toml
from gateway.cli.init import filled_in
from gateway.cli.places import Places, is_debian_package, systemd_runs
from gateway.cli.report import Status, Step, TextView, complain
from gateway.cli.service_view import ServiceView
from gateway.config import from_flags, load_file, template_text
from gateway.disk import read_file
from gateway.errors import ConfigError, EndReason
from gateway.text import unprintable_escaped
from gateway.tls.trust import LARGEST_PEM, lacks_passphrase

_CONFIG = Places(Path("/")).config
_PUBLIC = 0o644
# The steps of `check` that each answer decides.
_REACHED = ("configuration", "dns", "tcp")
_VERIFIED = (*_REACHED, "file", "client-hello", "certificate", "chain", "identity")
_SERVED = (*_VERIFIED, "clock", "tls", "connect", "connack")
# The broker is the right one and has answered; what it says is about the test session, which is no device.
_ANSWER = EndReason.UPSTREAM_REFUSED
_YES = frozenset({"y", "yes"})


class SetupFailed(Exception):
    """Setup cannot go on; the message says why, and is empty if that was printed."""


@frozen
class _Answers:
    """What is known of the broker so far."""

    upstream: str = ""
    server_name: str = ""
    ca_file: str = ""
    client_cert: str = ""
    client_key: str = ""
    client_key_password_file: str = ""
    device_certificates: bool = False

    def flags(self) -> list[str]:
        """Return what concerns the gateway's own connection as flags of `check`."""
        given = {
            "--upstream": self.upstream,
            "--server-name": self.server_name,
            "--ca-file": self.ca_file,
            "--client-cert": self.client_cert,
            "--client-key": self.client_key,
            "--client-key-password-file": self.client_key_password_file,
        }
        return [word for flag, value in given.items() if value for word in (flag, value)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of `setup`."""
    parser.add_argument(
        "--config", type=Path, default=_CONFIG, metavar="FILE", help="the configuration to write (default: %(default)s)"
    )
    parser.add_argument("--upstream", default="", metavar="HOST[:PORT]", help="the broker; then nothing is asked")
    parser.add_argument("--server-name", default="", metavar="NAME", help="the name in the broker's certificate")
    parser.add_argument("--ca-file", default="", metavar="FILE", help="the CA of the broker (default: the platform's)")
    parser.add_argument("--client-cert", default="", metavar="FILE", help="the gateway's own certificate")
    parser.add_argument("--client-key", default="", metavar="FILE", help="its private key")
    parser.add_argument(
        "--client-key-password-file", default="", metavar="FILE", help="the file with the passphrase of that key"
    )
    parser.add_argument(
        "--device-certificates",
        action="store_true",
        help="each device gets a certificate of its own (`device add`); devices without a rule are refused",
    )
    parser.add_argument("--install", action="store_true", help="also install the systemd service")


def run(arguments: argparse.Namespace) -> int:
    """Ask, test and write; return 0, or 1 on failure."""
    try:
        _check_place(arguments.config, for_service=arguments.install and not is_debian_package())
        answers = _Answers(**{each.name: getattr(arguments, each.name) for each in fields(_Answers)})
        wants_service = arguments.install and not is_debian_package()
        if answers.upstream:
            _Tests().test(answers, _SERVED)
        else:
            answers = _asked(answers)
            wants_service = wants_service or _wants_service(arguments.config)
        _write(arguments.config, answers)
    except (SetupFailed, DeviceProblem, OSError) as problem:
        if str(problem):
            complain(str(problem))
        complain("setup failed; nothing was changed")
        return 1
    except ConfigError as error:
        for each in error.problems:
            complain(each)
        complain("setup failed; nothing was changed")
        return 1
    for line in _about_devices(arguments.config, answers):
        print(line)
    if not wants_service:
        print(_next_steps(arguments.config))
    elif install.run(argparse.Namespace(root="/", dry_run=False, upstream=None)) != 0:
        complain("the configuration is written, but the service is not installed. Run: mqtts-gateway install")
        return 1
    return 0


# ---- the answers


def _asked(answers: _Answers) -> _Answers:
    """Ask for each answer and test it; on a terminal, ask again after a wrong one.  Raises `SetupFailed`."""
    print("Each answer is tested with a connection. The broker's log may show some of them as failed.")
    tests = _Tests(asks=True)
    answers = _until_right(answers, _ask_upstream, _REACHED, tests)
    answers = _until_right(answers, _ask_ca, _VERIFIED, tests)
    return _until_right(answers, _ask_client, _SERVED, tests)


def _until_right(
    answers: _Answers, ask: Callable[[_Answers], _Answers], steps: Collection[str], tests: _Tests
) -> _Answers:
    while True:
        answered = ask(answers)
        try:
            return tests.test(answered, steps)
        except SetupFailed:
            if not sys.stdin.isatty():
                raise


def _ask_upstream(answers: _Answers) -> _Answers:
    return evolve(answers, upstream=_ask("The broker's host name, or HOST:PORT", "--upstream"))


def _ask_ca(answers: _Answers) -> _Answers:
    words = "The file with the CA that issued the broker's certificate"
    return evolve(answers, ca_file=_ask_file(words, "--ca-file", answers.ca_file, "a public CA"))


def _ask_client(answers: _Answers) -> _Answers:
    words = "The file with a client certificate for the gateway, if the broker asks for one"
    certificate = _ask_file(words, "--client-cert", answers.client_cert, "none")
    key = passphrase = ""
    if certificate:
        key = _ask_file("The file with its private key", "--client-key", answers.client_key, "in the same file")
    if certificate and lacks_passphrase(Path(key or certificate)):
        words, given = "The key is encrypted. The file with its passphrase", answers.client_key_password_file
        passphrase = _ask_file(words, "--client-key-password-file", given, "none")
    return evolve(answers, client_cert=certificate, client_key=key, client_key_password_file=passphrase)


def _ask_file(words: str, flag: str, given: str, none: str) -> str:
    """Ask for a file; an empty answer means the one `given` by the flag, or else `none`."""
    return _ask(f"{words} (empty: {given or none})", flag, may_be_empty=True) or given


def _ask(words: str, flag: str, *, may_be_empty: bool = False) -> str:
    while True:
        print(f"{words}: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            print()
            raise SetupFailed(f"standard input ended before this answer; {flag} gives it on the command line")
        answer = line.strip()
        if not sys.stdin.isatty():
            print(unprintable_escaped(answer))  # a terminal shows it anyway
        if answer or may_be_empty:
            return answer


def _wants_service(config: Path) -> bool:
    if config != _CONFIG or is_debian_package() or os.geteuid() != 0 or not systemd_runs():
        return False
    return _ask("Install the systemd service (y/n)", "--install").lower() in _YES


# ---- the tests


@define
class _Tests:
    """Tests answers; an answer that changes nothing needs no new test."""

    asks: bool = False
    _flags: list[str] = field(factory=list, init=False)
    _steps: list[Step] = field(factory=list, init=False)
    _shown: set[str] = field(factory=set, init=False)

    def test(self, answers: _Answers, wanted: Collection[str]) -> _Answers:
        """Run `check` with these answers, and show the steps in `wanted`.  Raises `SetupFailed` if one of them failed.

        If only the broker's name is wrong, ask for the right one.
        """
        if answers.flags() != self._flags:
            self._flags, self._steps = answers.flags(), list(_checked(answers.flags()))
        steps = [step for step in self._steps if step.name in wanted and step.status is not Status.SKIP]
        view = TextView(sys.stdout, quiet=False)
        for step in steps:
            # A message of a step that passed may have a time in it.
            words = step.name if step.status is Status.PASS and step.name != "file" else f"{step.name} {step.message}"
            if words not in self._shown or step.status is Status.FAIL:
                view.show(step)
            self._shown.add(words)
        failed = [step for step in steps if step.status is Status.FAIL]
        if not failed:
            return answers
        self._flags = []
        reason = failed[0].facts.get("reason")
        if reason == _ANSWER:
            print("The broker answers. Whether it accepts a device depends on the device's own name and password.")
            return answers
        if reason == EndReason.TLS_CLIENT_CERTIFICATE_REFUSED and len(failed) == 1 and not answers.client_cert:
            return self._with_device_certificates(answers)
        if reason == EndReason.TLS_NAME_MISMATCH and len(failed) == 1 and sys.stdin.isatty():
            words = "The name of your broker in that certificate (empty: none of them)"
            if name := _ask(words, "--server-name", may_be_empty=True):
                return self.test(evolve(answers, server_name=name), wanted)
        raise SetupFailed

    def _with_device_certificates(self, answers: _Answers) -> _Answers:
        """Go on if each device gets a certificate of its own: the broker then needs none of the gateway."""
        if not answers.device_certificates and not self.asks:
            raise SetupFailed("if each device gets a certificate of its own, run this again with --device-certificates")
        if not answers.device_certificates:
            words = "Does each device get a certificate of its own? Then the gateway needs none (y/n)"
            if _ask(words, "--device-certificates").lower() not in _YES:
                raise SetupFailed
        print("The broker asks for a certificate: each device needs one of its own before it can connect.")
        return evolve(answers, device_certificates=True)


def _checked(flags: list[str]) -> Iterator[Step]:
    """Yield the steps of a `check`, in a process of its own: a reactor runs once."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", "gateway.cli.main", "check", "--json", *flags]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)  # noqa: S603  ours
    try:
        steps = json.loads(done.stdout)["steps"]
    except (ValueError, KeyError):
        raise SetupFailed("`check` gave no result") from None
    for each in steps:
        yield Step(
            each["step"],
            Status(each["status"]),
            each["message"],
            each["remedy"] or "",
            each["upstream"] or "",
            each.get("facts", {}),
        )


# ---- the files


def _check_place(config: Path, *, for_service: bool) -> None:
    """Raise `SetupFailed` if the configuration cannot be written, or somebody has written one."""
    if for_service and config != _CONFIG:
        raise SetupFailed(f"--install: the service uses {_CONFIG}; leave out --config")
    if config.exists() and not _is_as_shipped(config):
        raise SetupFailed(f"{config} already exists: edit it, or name another file with --config")
    above = next(each for each in config.absolute().parents if each.exists())
    if not os.access(above, os.W_OK):
        raise SetupFailed(f"{above} cannot be written: run this with sudo, or name another file with --config")


def _is_as_shipped(config: Path) -> bool:
    """Whether a configuration is as `init`, `install` or the Debian package wrote it."""
    text, template = read_file(config).decode(errors="replace"), template_text()
    if text == template:
        return True
    try:
        return text == filled_in(template, load_file(config).upstream[0])
    except ConfigError:
        return False


def _write(config: Path, answers: _Answers) -> None:
    """Write the configuration and what it names.  Raises what goes wrong, and has changed nothing then."""
    directory = config.absolute().parent
    with _new_directories() as make, Writer.all_or_nothing() as writer:
        make(directory, 0o755)
        make(directory / "devices", 0o755)
        tls: dict[str, Path] = {}
        if answers.ca_file:
            tls["ca_file"] = _placed(Path(answers.ca_file), directory, "ca.pem", _PUBLIC, writer)
        if answers.client_cert:
            keys = directory / "credentials"
            make(keys, 0o700)
            if answers.client_key and not Path(answers.client_key).samefile(answers.client_cert):
                tls["client_cert"] = _placed(Path(answers.client_cert), directory, "client.pem", _PUBLIC, writer)
                tls["client_key"] = _placed(Path(answers.client_key), keys, "client.key", SECRET, writer)
            else:
                name = "client" + Path(answers.client_cert).suffix
                tls["client_cert"] = _placed(Path(answers.client_cert), keys, name, SECRET, writer)
            if answers.client_key_password_file:
                source = Path(answers.client_key_password_file)
                tls["client_key_password_file"] = _placed(source, keys, "client.passphrase", SECRET, writer)
        text = _text(answers, {key: _relative(path, directory) for key, path in tls.items()}).encode()
        if config.exists():
            writer.replace(config, text)
        else:
            writer.write(config, text, _PUBLIC)
        failed = [step for step in _checked(["--files", "--config", str(config)]) if step.status is Status.FAIL]
        for step in failed:
            TextView(sys.stdout, quiet=False).show(step)
        if failed:
            raise SetupFailed
    print(f"wrote {config}" + "".join(f"\nuses {path}" for path in tls.values()))


def _text(answers: _Answers, tls: dict[str, str]) -> str:
    (upstream,) = from_flags(upstream=[answers.upstream]).upstream
    text = filled_in(template_text(), upstream).replace('#directory = "devices"\n', 'directory = "devices"\n', 1)
    if answers.server_name:
        text = text.replace('#server_name = ""\n', f"server_name = {toml(answers.server_name)}\n", 1)
    if answers.device_certificates:
        text = text.replace('#unknown = "pass"\n', 'unknown = "refuse"\n', 1)
    keys = "".join(f"{key} = {toml(value)}\n" for key, value in tls.items())
    return text.replace("\n[tls]\n", f"\n[tls]\n{keys}", 1)


def _placed(source: Path, directory: Path, name: str, mode: int, writer: Writer) -> Path:
    """Return the path of a file in the directory: the file itself if it is there, or a copy.

    A copy that everyone may read has the certificates alone: there may be a key in the same file.
    """
    if source.absolute().is_relative_to(directory):
        return source.absolute()
    data, target = public_pem(source) if mode == _PUBLIC else read_file(source, LARGEST_PEM), directory / name
    if target.exists():
        if read_file(target, LARGEST_PEM) != data:
            raise SetupFailed(f"{target} already exists with other content than {source}: move it away, or name it")
    else:
        writer.write(target, data, mode)
    return target


def _relative(path: Path, directory: Path) -> str:
    return str(path.relative_to(directory))


@contextmanager
def _new_directories() -> Iterator[Callable[[Path, int], None]]:
    """Yield a function that makes a directory; an exception removes those that are new."""
    made: list[Path] = []

    def make(directory: Path, mode: int) -> None:
        missing = [each for each in (directory, *directory.parents) if not each.exists()]
        for each in reversed(missing):
            each.mkdir()
            made.append(each)
            each.chmod(mode if each == directory else 0o755)

    try:
        yield make
    except BaseException:
        for each in reversed(made):
            # It may have been put to use meanwhile.
            with suppress(OSError):
                each.rmdir()
        raise


def _next_steps(config: Path) -> str:
    file = shlex.quote(str(config))
    is_service = ServiceView.of(config.absolute()) is not None
    start = "systemctl enable --now mqtts-gateway" if is_service else f"mqtts-gateway run --config {file}"
    return "\n".join(
        [
            "next:",
            f"  {start}",
            "then point a device to port 1883 of this machine, and see what it does:",
            f"  mqtts-gateway status --config {file}",
        ]
    )


def _about_devices(config: Path, answers: _Answers) -> Iterator[str]:
    """Yield lines on the certificates under which devices reach the broker."""
    if answers.device_certificates:
        yield "next, for each device, with the CA that signs its certificate (or --csr); all others are refused:"
        yield f"  mqtts-gateway device add ID --ca-cert ca.pem --ca-key ca-key.pem --config {shlex.quote(str(config))}"
    elif answers.client_cert:
        yield "devices without a rule use the gateway's certificate; to refuse them, set under [devices]:"
        yield '  unknown = "refuse"'

"""The directory of device rules, as the `device` commands see it.

In: the path of a configuration.  Out: `Rules`: the rules with their files, and the command that applies a change.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from gateway.cli.device_files import DeviceProblem, Files, as_argument, exact_pattern
from gateway.cli.device_table import Problems
from gateway.cli.service_view import ServiceView
from gateway.config import Config, DeviceRule, load_file
from gateway.config.anchor import Anchor
from gateway.config.directory import RuleFiles, read_directory
from gateway.config.profiles import with_profile
from gateway.text import printable


@frozen
class Rules:
    """The directory of rules, and the configuration that names it."""

    config: Config
    file: Path
    directory: Path

    @classmethod
    def of(cls, path: Path) -> Rules:
        """Return those of a configuration.  Raises `ConfigError`, or `DeviceProblem` if it names no directory."""
        config = load_file(path)
        directory = config.devices.directory
        if directory is None:
            raise DeviceProblem(
                f'{path} does not set a directory for rules. Set directory = "devices" under [devices] and create it'
            )
        return cls(config, path, directory)

    @property
    def profile(self) -> tuple[str, str]:
        """The name of the profile, and the first broker's host."""
        return self.config.devices.profile, self.config.upstream[0].host

    def filled(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """Return a rule's table with the profile's values."""
        return with_profile(*self.profile, table)

    def devices(self) -> list[tuple[Path, DeviceRule]]:
        """Return the rules in the directory, each with its file."""
        rules, problems = read_directory(
            self.directory, Anchor.of(self.file.absolute().parent), self.profile, RuleFiles()
        )
        if problems:
            raise Problems(problems)
        return rules

    @property
    def next_step(self) -> str:
        """The command that applies a change."""
        view = ServiceView.of(self.file.absolute())
        if view is not None:
            action = "reload" if view.is_active else "enable --now"
            return f"systemctl {action} {view.unit.removesuffix('.service')}"
        return "mqtts-gateway reload, or send SIGHUP to the gateway"

    def check_command(self, client_identifier: str) -> str:
        """The command that tries a device's rule."""
        return f"mqtts-gateway check --device {as_argument(client_identifier)} --config {shlex.quote(str(self.file))}"

    def after_replacing(self, file: Path) -> str:
        """Return what makes a running gateway use the new content of a file that its configuration names."""
        file = Path(os.path.normpath(file))  # a rule may say ../credentials
        view = ServiceView.of(self.file.absolute())
        if view is not None and any(file.is_relative_to(directory) for directory in view.credentials):
            return (
                f"next: systemctl restart {view.unit.removesuffix('.service')}; systemd hands files in {file.parent} "
                "to the service only when it starts"
            )
        return "no reload is needed: new sessions use the new content"

    @property
    def key_group(self) -> int | None:
        """The group that gives the installed service read access to a secret of root's; `None` if there is none."""
        view = ServiceView.of(self.file.absolute()) if os.geteuid() == 0 else None
        return None if view is None else view.key_group

    def check_all(self) -> None:
        """Load the configuration anew, with what was written.  Raises `ConfigError` if the gateway would refuse it."""
        load_file(self.file)

    def find(self, client_identifier: str) -> tuple[Path, DeviceRule]:
        """Return a device's rule and its file.  Raises `DeviceProblem`."""
        pattern = exact_pattern(client_identifier)
        for path, device in self.devices():
            if device.match_client_id == (pattern,):
                return path, device
        # A rule for everyone in the device's file: somebody edited it.
        own = Files.of(self.directory, client_identifier).rule
        for path, device in self.devices():
            if path == own and not device.match_client_id:
                return path, device
        raise DeviceProblem(f'there is no rule for "{printable(client_identifier)}" in {self.directory}')

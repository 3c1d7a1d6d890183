"""Builds the compiled core (gateway/relay/_core.c) where there is a C compiler; the gateway works without it, too.

In: hatchling's build.  Out: a wheel for CPython 3.11 and later on this platform, or, without a compiler or with
MQTTS_GATEWAY_PURE=1, one for any.  `MQTTS_GATEWAY_TARGET` names another platform and `CC` a compiler for it; then a
failure to compile fails the build (`wheels.py` uses it).

The long description is README.md without what only works in the repository: relative links and pictures.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

SOURCE = "gateway/relay/_core.c"
BINARY = "gateway/relay/_core.abi3.so"
FLAGS = ("-std=c11", "-O2", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wconversion")

# In README.md: [text](docs/page.md#heading), <img src="docs/picture.png" …>.
RELATIVE_LINK = re.compile(r"\[([^]]+)\]\((?![a-z]+:)[^)]+\)")
PICTURE = re.compile(r'<img src="(?![a-z]+:)[^>]*>\n*')


class DescriptionHook(MetadataHookInterface):
    """Makes the long description, which is shown where relative links lead nowhere."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme`."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = PICTURE.sub("", RELATIVE_LINK.sub(r"\1", text))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


class CoreBuildHook(BuildHookInterface[Any]):
    """Adds the core to a wheel, and puts it into the tree for an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, or say why not."""
        if self.target_name != "wheel" or os.environ.get("MQTTS_GATEWAY_PURE") == "1":
            return
        platform = os.environ.get("MQTTS_GATEWAY_TARGET")
        directory = Path(tempfile.mkdtemp(prefix="mqtts-gateway-core-"))
        root = Path(self.root)
        output = root / BINARY if version == "editable" else directory / Path(BINARY).name
        try:
            compile_core(root, output)
        except (OSError, subprocess.CalledProcessError) as error:
            if platform:
                raise
            self.app.display_warning(f"The compiled core is left out, each message will cost more CPU: {error}")
            return
        if version != "editable":
            build_data["force_include"][str(output)] = BINARY
        platform = platform or sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{platform}"


def compile_core(root: Path, output: Path) -> None:
    """Compile the core.  Raises `OSError` without a compiler, `CalledProcessError` if it refuses."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    include = sysconfig.get_path("include")
    flags = [*FLAGS, *shlex.split(os.environ.get("CFLAGS", ""))]
    # Written beside and renamed: a gateway that runs from this tree has the old one mapped.
    fresh = output.with_suffix(".new")
    try:
        subprocess.run([*compiler, *flags, f"-I{include}", "-o", str(fresh), str(root / SOURCE)], check=True)  # noqa: S603  the compiler that was asked for
        fresh.replace(output)
    finally:
        fresh.unlink(missing_ok=True)

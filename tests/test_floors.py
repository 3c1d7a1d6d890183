"""The floors of the house (docs/architecture.md): who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Top floor first.  A module imports only from its own floor or from floors below it.  A package stands for all in it.
FLOORS = (
    {"gateway.cli", "gateway.tap"},
    {"gateway.service"},
    {"gateway.gateway"},
    {"gateway.ops", "gateway.prepared", "gateway.reception", "gateway.stored_devices"},
    {"gateway.dial"},
    {"gateway.relay"},
    {"gateway.rules"},
    {"gateway.tls"},
    {"gateway.session", "gateway.net", "gateway.store"},
    {"gateway.config"},
    {"gateway.mqtt"},
    {
        "gateway",
        "gateway.disk",
        "gateway.drain",
        "gateway.errors",
        "gateway.fair",
        "gateway.pieces",
        "gateway.text",
    },
)
FLOOR_OF = {name: -level for level, names in enumerate(FLOORS) for name in names}
# These never import Twisted: they are rules, and can be read and tested as such.
WITHOUT_TWISTED = {
    "gateway.config",
    "gateway.disk",
    "gateway.drain",
    "gateway.errors",
    "gateway.fair",
    "gateway.mqtt",
    "gateway.net.proxy_header",
    "gateway.net.websocket",
    "gateway.pieces",
    "gateway.session",
    "gateway.store",
    "gateway.text",
}
UNKNOWN = 99


def module_name(path: Path) -> str:
    """Return the dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "gateway").rglob("*.py"))}


def floor(module: str) -> int:
    """Return a module's floor: its own, or its package's; one of its own above all others if it has none."""
    while module not in FLOOR_OF and module.count(".") > 1:
        module = module.rpartition(".")[0]
    return FLOOR_OF.get(module, UNKNOWN)


def is_without_twisted(module: str) -> bool:
    """Whether a module is one of those that never import Twisted, or is in a package of them."""
    return module in WITHOUT_TWISTED or module.rpartition(".")[0] in WITHOUT_TWISTED


def imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, anywhere in it, under its absolute name."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from gateway import session` imports a module, `from gateway.session.session import Session` does not.
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield full if full in MODULES else module


def test_every_module_has_a_floor() -> None:
    """A new module is given its floor in the table above."""
    assert [module for module in MODULES if floor(module) == UNKNOWN] == []


def test_the_table_names_no_module_that_is_gone() -> None:
    """What is listed exists."""
    assert [module for module in FLOOR_OF if module not in MODULES] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_floor_or_below(module: str) -> None:
    """Imports inside functions count as well."""
    own = floor(module)
    assert own is not None
    above = [name for name in imports(MODULES[module]) if name.split(".")[0] == "gateway" and floor(name) > own]
    assert above == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Two modules that need each other are one module, or share a third."""
    unvisited = {name: {other for other in imports(path) if other in MODULES} for name, path in MODULES.items()}
    while free := [name for name, needed in unvisited.items() if not needed & unvisited.keys() - {name}]:
        for name in free:
            del unvisited[name]
    assert sorted(unvisited) == []


@pytest.mark.parametrize("module", [name for name in MODULES if is_without_twisted(name)])
def test_the_lower_floors_do_not_name_twisted(module: str) -> None:
    """Not even where it would only be imported on the way."""
    assert [name for name in imports(MODULES[module]) if name.split(".")[0] in {"twisted", "OpenSSL", "asyncio"}] == []


def test_the_lower_floors_run_without_twisted() -> None:
    """Imported in a process of their own, they bring neither Twisted nor OpenSSL with them."""
    lower = [name for name in MODULES if is_without_twisted(name)]
    assert {"gateway.session.session", "gateway.mqtt.framer", "gateway.config.load"} <= set(lower)
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'twisted', 'OpenSSL', 'zope', 'asyncio'}))"
    )
    command = [sys.executable, "-c", program, *lower]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_the_plugin_imports_nothing_of_the_gateway() -> None:
    """`twistd` loads every plugin that is installed, whatever it was started for."""
    (plugin,) = (ROOT / "twisted" / "plugins").glob("*.py")
    assert list(imports(plugin)) == ["twisted.application.service"]


def test_twisteds_package_stays_twisteds() -> None:
    """An `__init__.py` here would hide Twisted, or the plugin."""
    assert list((ROOT / "twisted").rglob("__init__.py")) == []

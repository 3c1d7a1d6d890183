"""Mutation: change one thing in a module at a time, and see whether its tests notice.

python -m tests.mutate gateway/mqtt/connack.py tests/test_mqtt_connack.py tests/test_mqtt_framer.py --sample 100

Nothing is written into the tree: each mutant is loaded in a forked process in place of the module, and the given tests
run there until the first fails. The unchanged module runs first, and must pass. Mutants of which no test takes notice
are printed with their line; each is a test that is missing, or code that has no effect. What a test starts in another
process (`mqtts-gateway run`) runs the unchanged module.
"""

# ruff: noqa: T201  a command line tool prints

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import hypothesis
import pytest

# Loaded once, before forking, because it takes longest. Not the reactor: its epoll descriptor must not be shared.
for _heavy in ("OpenSSL.SSL", "attrs", "cryptography.x509", "twisted.internet.base", "twisted.logger", "trustme"):
    importlib.import_module(_heavy)

_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_EXAMPLES = 10  # of each Hypothesis test, unless `--thorough`


class Change:
    """One change to one node of a module. `apply` returns the new node."""

    def __init__(self, node: ast.AST, apply: Callable[[], ast.AST]) -> None:
        self.node = node
        self.apply = apply
        self.line: int = getattr(node, "lineno", 0)

    def words(self) -> str:
        """Return the line, and what it says before and after."""
        before = ast.unparse(self.node).partition("\n")[0]
        return f"{self.line}: {before[:100]}  →  {ast.unparse(self.apply()).partition(chr(10))[0][:100]}"


def _copy(node: ast.AST, **fields: Any) -> ast.AST:
    """Return a copy of the node with other fields."""
    kept = {name: getattr(node, name) for name in node._fields if hasattr(node, name)}
    return ast.copy_location(type(node)(**kept | fields), node)


def _swap(operator: ast.AST) -> ast.AST:
    return _SWAPPED[type(operator)]()


def _changes(node: ast.AST) -> Iterator[Change]:
    """Yield every change that can be made at a node."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in _SWAPPED:
            yield Change(node, lambda: _copy(node, ops=[_swap(operator)]))
        case ast.BoolOp(op=operator) | ast.BinOp(op=operator) if type(operator) in _SWAPPED:
            yield Change(node, lambda: _copy(node, op=_swap(operator)))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield Change(node, lambda: operand)
        case ast.If() | ast.IfExp() | ast.While():
            yield Change(node, lambda: _copy(node, test=ast.Constant(value=False)))
            if not isinstance(node, ast.While):
                yield Change(node, lambda: _copy(node, test=ast.Constant(value=True)))
        case ast.Constant(value=bool(value)):
            yield Change(node, lambda: _copy(node, value=not value))
        case ast.Constant(value=(int() | float()) as value):
            yield Change(node, lambda: _copy(node, value=value + 1))
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.Raise() | ast.Break() | ast.Continue() | ast.AugAssign():
            yield Change(node, lambda: ast.copy_location(ast.Pass(), node))
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield Change(node, lambda: ast.copy_location(ast.Pass(), node))
        case ast.Return(value=ast.expr() as returned) if not (
            isinstance(returned, ast.Constant) and returned.value is None
        ):
            yield Change(node, lambda: _copy(node, value=ast.Constant(value=None)))


def _without_effect(node: ast.AST) -> list[ast.AST]:
    """Return the parts of a node that no test can see: annotations, formatted text, imports, slots."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            return [part for part in (node.returns, *(argument.annotation for argument in arguments)) if part]
        case ast.AnnAssign():
            return [node.annotation]
        case ast.FormattedValue() | ast.ImportFrom() | ast.Import():
            return [node]
        case ast.Assign(targets=[ast.Name(id="__slots__")]):
            return [node]
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return [node]
    return []


def changes(tree: ast.Module) -> list[Change]:
    """Return every change that can be made to a module, in a fixed order."""
    hidden = {id(inner) for node in ast.walk(tree) for part in _without_effect(node) for inner in ast.walk(part)}
    return [change for node in ast.walk(tree) if id(node) not in hidden for change in _changes(node)]


class _Replace(ast.NodeTransformer):
    def __init__(self, change: Change) -> None:
        self._change = change

    def visit(self, node: ast.AST) -> Any:
        return self._change.apply() if node is self._change.node else self.generic_visit(node)


def mutant(source: str, index: int) -> ast.Module:
    """Return the module with one of its `changes` made."""
    tree = ast.parse(source)
    changed: ast.Module = _Replace(changes(tree)[index]).visit(tree)
    return ast.fix_missing_locations(changed)


class _Mutant(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the module under test, and loads the changed one."""

    def __init__(self, path: Path, tree: ast.Module) -> None:
        self._name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        self._path = path
        self._code = compile(tree, str(path), "exec")

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        spec = importlib.util.spec_from_loader(fullname, self, origin=str(self._path.resolve()))
        assert spec
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)  # noqa: S102 - running it is the purpose


def _quick_hypothesis() -> None:
    """Try few examples of each property: most mutants fail in the first."""
    from hypothesis.internal.conjecture.engine import ConjectureRunner

    began = ConjectureRunner.__init__

    def begin(self: Any, test: Any, *, settings: Any = None, **others: Any) -> None:
        few = hypothesis.settings(
            settings,
            max_examples=min(settings.max_examples, _EXAMPLES),
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # the simplest failure is of no use here
        )
        began(self, test, settings=few, **others)

    ConjectureRunner.__init__ = begin  # type: ignore[assignment,method-assign]


def _test(path: Path, index: int | None, arguments: argparse.Namespace, scratch: str) -> int:
    """Run the tests over one mutant, or the unchanged module, in this process. Returns pytest's exit status."""
    output = os.open(f"{scratch}/output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if index is not None:
        sys.meta_path.insert(0, _Mutant(path, mutant(path.read_text(), index)))
    if not arguments.thorough:
        _quick_hypothesis()
    only = ["-k", arguments.only] if arguments.only else []
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*options, f"--basetemp={Path(scratch, 'tmp')}", *only, *arguments.tests]))


def _judge(path: Path, index: int | None, arguments: argparse.Namespace, seconds: float) -> tuple[str, str]:
    """Fork, test, and return "killed", "alive" or "hung", and what the tests wrote."""
    with TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as scratch:
        child = os.fork()
        if not child:
            status = 99
            try:
                os.setpgid(0, 0)
                signal.alarm(int(seconds))
                status = _test(path, index, arguments, scratch)
            finally:
                os._exit(status)
        _, waited = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # brokers that a test which was cut short left behind
        output = Path(scratch, "output")
        written = output.read_text(errors="replace") if output.exists() else ""
    status = os.waitstatus_to_exitcode(waited)
    return {0: "alive", -signal.SIGALRM: "hung"}.get(status, "killed"), written


def main() -> int:
    """Test the mutants of a module. Returns 1 if one is alive."""
    parser = argparse.ArgumentParser(description="Change a module in one place at a time; does a test fail?")
    parser.add_argument("module", type=Path, help="gateway/mqtt/connack.py")
    parser.add_argument("tests", nargs="+", help="test files, or single tests, that must notice")
    parser.add_argument("--sample", type=int, help="try so many changes, chosen at random but always the same")
    parser.add_argument("--lines", help="try only changes to these lines: 34,150-160")
    parser.add_argument("--only", help="an expression for pytest's -k")
    parser.add_argument("--thorough", action="store_true", help="run Hypothesis tests with all their examples")
    arguments = parser.parse_args()
    began = time.monotonic()
    verdict, written = _judge(arguments.module, None, arguments, 3600)
    if verdict != "alive":
        print(written, "The tests fail without any change.", file=sys.stderr)
        return 2
    patience = 30 + 3 * (time.monotonic() - began)
    found = changes(ast.parse(arguments.module.read_text()))
    chosen = [index for index, change in enumerate(found) if _wanted(change.line, arguments.lines)]
    if arguments.sample and arguments.sample < len(chosen):
        chosen = sorted(random.Random(1).sample(chosen, arguments.sample))  # noqa: S311 - not for security
    counts = Counter[str]()
    for index in chosen:
        verdict, _ = _judge(arguments.module, index, arguments, patience)
        counts[verdict] += 1
        if verdict == "killed":
            print(".", end="", flush=True)
        else:
            print(f"\n{verdict} {arguments.module}:{found[index].words()}", flush=True)
    print(f"\n{arguments.module}: {len(chosen)} of {len(found)} changes tried: {dict(counts)}")
    return 1 if counts["alive"] else 0


def _wanted(line: int, lines: str | None) -> bool:
    """Tell whether a line is among `lines`, for example "34,150-160"."""
    if not lines:
        return True
    spans = [part.partition("-") for part in lines.split(",")]
    return any(int(first) <= line <= int(last or first) for first, _, last in spans)


if __name__ == "__main__":
    sys.exit(main())

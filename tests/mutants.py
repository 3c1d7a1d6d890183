"""What can be changed in a module, one place at a time, and how the changed code gets into a loaded module."""

from __future__ import annotations

import ast
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

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


class Places:
    """Where the nodes of a module are: the outermost function around each, and the lines of its statement."""

    def __init__(self, tree: ast.Module) -> None:
        self._functions: dict[int, tuple[str, int]] = {}
        self._lines: dict[int, range] = {}
        self._constants: dict[int, str] = {}
        self._kept: dict[int, str] = {}
        self._reads = defaultdict[str, list[ast.AST]](list)
        self._find_functions(tree, ())
        for node in ast.walk(tree):
            match node:
                case ast.stmt():
                    self._find_lines(node)
                case ast.Name(id=name, ctx=ast.Load()) | ast.Attribute(attr=name, ctx=ast.Load()):
                    self._reads[name].append(node)

    def function(self, node: ast.AST) -> tuple[str, int] | None:
        """Return the qualified name and the first line of the function whose body has the node; None: no function's."""
        return self._functions.get(id(node))

    def lines(self, node: ast.AST) -> set[int]:
        """Return the lines of the statement that the node is in; of a compound one, such as `if`, those of its head.

        Of the value of a constant of the module or a class, the lines of the functions that use it here.
        """
        if name := self._constants.get(id(node)):
            return self._uses(name)
        own = set(self._lines[id(node)])
        # What keeps its results is executed in one test, and used in others.
        return own | self._uses(name) if (name := self._kept.get(id(node))) else own

    def _uses(self, name: str) -> set[int]:
        return {line for read in self._reads[name] if self.function(read) for line in self._lines[id(read)]}

    def _find_functions(self, parent: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(parent):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min((decorator.lineno for decorator in child.decorator_list), default=child.lineno)
                place = ".".join((*names, child.name)), first
                inner = [id(node) for part in child.body for node in ast.walk(part)]
                self._functions |= dict.fromkeys(inner, place)
                if any("cache" in ast.unparse(decorator) for decorator in child.decorator_list):
                    self._kept |= dict.fromkeys(inner, child.name)
            else:
                self._find_functions(child, (*names, child.name) if isinstance(child, ast.ClassDef) else names)

    def _find_lines(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if not self.function(statement):
                    self._constants |= {id(node): name for node in ast.walk(statement)}
        head = [part for part in ast.iter_child_nodes(statement) if not isinstance(part, ast.stmt | ast.excepthandler)]
        compound = any(isinstance(part, ast.stmt) for part in ast.iter_child_nodes(statement))
        last = max((getattr(part, "end_lineno", 0) for part in head), default=0) if compound else statement.end_lineno
        lines = range(statement.lineno, max(last or 0, statement.lineno) + 1)
        self._lines |= {id(node): lines for part in head for node in ast.walk(part)} | {id(statement): lines}


def replace(place: tuple[str, int], changed: CodeType, path: str) -> bool:
    """Give the loaded functions of this place, name and line in the file `path`, the code that `changed` has for it.

    Every reference to them stays as it is. Returns False if it cannot be done: the variables from outside differ.
    """

    def here(code: CodeType) -> bool:
        return (code.co_qualname, code.co_firstlineno) == place

    code = next(code for code in _codes(changed) if here(code))
    loaded = gc.get_objects()
    functions = [
        found
        for found in loaded
        if isinstance(found, FunctionType) and found.__code__.co_filename == path and here(found.__code__)
    ]
    for cached in loaded:
        if type(cached) is type(_caching) and cached.__wrapped__ in functions:
            cached.cache_clear()
    for function in functions:
        outside = function.__code__.co_freevars
        if not code.co_freevars and outside:  # such as `__class__`, when the change left out the only super()
            code = code.replace(co_freevars=outside)
        if code.co_freevars != outside:
            return False
        function.__code__ = code
    return bool(functions)


@cache
def _caching() -> None:
    """Stand for the type of functions that keep their results."""


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)

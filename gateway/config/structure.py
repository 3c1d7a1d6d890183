"""Turns a mapping into a `Config`, or into a list of its problems.

In: a mapping as parsed from TOML.  Out: `Config`, or `ConfigError` with one line for each unknown key, wrong type and
invalid value, each with its dotted key. cattrs collects the exceptions; this module words them.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import GenericAlias
from typing import Any, Literal, get_args, get_origin

import attrs
from cattrs import Converter
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn, override

from gateway.config.devices import DeviceRule
from gateway.config.schema import Config, Proxy
from gateway.config.validators import MisfitError, Network
from gateway.config.value_words import described, number, quoted
from gateway.errors import ConfigError

_MISSING = {
    "upstream": 'missing: write [[upstream]] with host = "broker.example.com"',
    "host": 'missing: name the broker, as in host = "broker.example.com"',
    "endpoint": 'missing: give a port or an endpoint, as in endpoint = "1883"',
}


def structure(mapping: Mapping[str, Any]) -> Config:
    """Make a Config; paths stay as written. Raises ConfigError."""
    try:
        config: Config = _converter.structure(mapping, Config)
    except (BaseValidationError, ValueError) as error:
        raise ConfigError(list(_lines(error, ""))) from None
    return config


def structure_device(mapping: Mapping[str, Any]) -> DeviceRule:
    """Make a rule from the table of its file; paths stay as written. Raises ConfigError."""
    try:
        device: DeviceRule = _converter.structure(mapping, DeviceRule)
    except (BaseValidationError, ValueError) as error:
        raise ConfigError(list(_lines(error, ""))) from None
    return device


class _WrongTypeError(ValueError):
    """The value has the wrong type."""

    def __init__(self, expected: str, value: object, hint: str = "") -> None:
        super().__init__(expected, value, hint)
        self.unit = ""  # known to the key, not to the type

    def __str__(self) -> str:
        expected, value, hint = self.args
        return f"expected {expected}{self.unit}, got {described(value)}{hint}"


# From values to types.


def _text(value: object, _type: object) -> str:
    if not isinstance(value, str):
        raise _WrongTypeError("a text", value)
    return value


def _boolean(value: object, _type: object) -> bool:
    if not isinstance(value, bool):
        raise _WrongTypeError("true or false", value)
    return value


def _whole_number(value: object, _type: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _WrongTypeError("a whole number", value)
    return value


def _real_number(value: object, _type: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _WrongTypeError("a number", value)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{number(value)} is out of range") from None


def _path(value: object, _type: object) -> Path:
    if not isinstance(value, str):
        raise _WrongTypeError("a path", value)
    if not value:
        raise ValueError("the path is empty: name a file, or leave the key out")
    return Path(value)


def _network(value: object, _type: object) -> Network:
    if not isinstance(value, str):
        raise _WrongTypeError("a network", value)
    try:
        return ipaddress.ip_network(value)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ValueError(f'{quoted(value)} is neither a network, such as "192.168.1.0/24", nor an address') from None
    raise ValueError(f'{quoted(value)} has host bits set: did you mean "{meant}"?')


def _proxy(value: object, type_: object) -> Proxy:
    return "unix" if value == "unix" else _network(value, type_)


def _is_choice(type_: Any) -> bool:
    return get_origin(type_) is Literal


def _choice(value: object, type_: Any) -> object:
    choices = get_args(type_)
    if value not in choices:
        hint = ": write it in quotes" if isinstance(value, float) and str(value) in choices else ""
        raise _WrongTypeError(" or ".join(map(quoted, choices)), value, hint)
    return value


def _is_several(type_: Any) -> bool:
    return get_origin(type_) is tuple


def _several(value: object, type_: Any) -> tuple[Any, ...]:
    """Make a tuple of a list; a single text may stand for a list of one."""
    (element, _) = get_args(type_)
    if attrs.has(element):
        if isinstance(value, Mapping):
            raise ValueError("this is a single table: write its name in double brackets, since there may be several")
        if not isinstance(value, list):
            raise _WrongTypeError("tables with their name in double brackets", value)
    elif isinstance(value, str):
        value = [value]
    elif not isinstance(value, list):
        raise _WrongTypeError("a text or a list of texts", value)
    list_type: Any = GenericAlias(list, element)
    return tuple(_converter.structure(value, list_type))


def _table(class_: type[attrs.AttrsInstance]) -> Callable[[object, object], object]:
    """Make the hook for a section."""
    hooks: dict[str, Any] = {field.name: override(struct_hook=_field(field)) for field in attrs.fields(class_)}
    from_table = make_dict_structure_fn(
        class_,
        _converter,
        _cattrs_forbid_extra_keys=True,
        _cattrs_detailed_validation=True,
        _cattrs_use_linecache=False,
        **hooks,
    )

    def structure_table(value: object, type_: object) -> object:
        if not isinstance(value, Mapping):
            raise _WrongTypeError("a table", value)
        return from_table(value, type_)

    return structure_table


def _field(field: attrs.Attribute[Any]) -> Callable[[object, object], object]:
    """Make the hook for one key. It runs the validator, too: the class itself would stop at the first problem."""
    unit = f" of {field.metadata['unit']}" if "unit" in field.metadata else ""

    def structure_field(value: object, type_: Any) -> object:
        try:
            structured = _converter.structure(value, type_)
        except _WrongTypeError as error:
            error.unit = unit
            raise
        if field.validator is not None:
            field.validator(None, field, structured)
        return structured

    return structure_field


def _make_converter() -> Converter:
    converter = Converter(detailed_validation=True)
    converter.register_structure_hook(str, _text)
    converter.register_structure_hook(bool, _boolean)
    converter.register_structure_hook(int, _whole_number)
    converter.register_structure_hook(float, _real_number)
    converter.register_structure_hook(Path, _path)
    converter.register_structure_hook(Network, _network)
    converter.register_structure_hook(Proxy, _proxy)
    converter.register_structure_hook_func(_is_choice, _choice)
    converter.register_structure_hook_func(_is_several, _several)
    converter.register_structure_hook_factory(attrs.has, _table)
    return converter


_converter = _make_converter()


# From exceptions to lines.


def _lines(error: BaseException, key: str) -> Iterator[str]:
    """Yield a line for each problem in an exception; `key` is the dotted key being structured."""
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _lines(inner, _dotted(key, inner))
    elif isinstance(error, ForbiddenExtraKeysError):
        for unknown in sorted(error.extra_fields, key=str):
            yield f"{_joined(key, unknown)}: {_unknown_key(unknown, error.cl)}"
    elif isinstance(error, KeyError):  # raised by cattrs for a missing key without default
        yield f"{key}: {_MISSING[key.rpartition('.')[2]]}"
    else:
        yield f"{key or 'the configuration'}: {error}"


def _dotted(key: str, error: BaseException) -> str:
    """Extend `key` to the part that the exception is about."""
    if isinstance(error, MisfitError):
        return key + error.where
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return _joined(key, note.name)
        if isinstance(note, IterableValidationNote):
            return f"{key}[{note.index}]"
    return key


def _joined(key: str, name: object) -> str:
    shown = str(name)
    shown = shown if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", shown) else quoted(shown)
    return f"{key}.{shown}" if key else shown


def _unknown_key(name: object, class_: type[attrs.AttrsInstance]) -> str:
    known = [field.name for field in attrs.fields(class_)]
    close = difflib.get_close_matches(str(name).replace("-", "_"), known, n=1)
    if close:
        return f"unknown key: did you mean `{close[0]}`?"
    for place in _places():  # it is under the wrong header, or before the first one
        if place.rpartition(".")[2] == name:
            return f"unknown key here: did you mean `{place}`?"
    return f"unknown key: known keys are {', '.join(known)}"


def _places() -> list[str]:
    """Return the dotted keys of all sections and of all keys in them."""
    sections: list[tuple[str, Any]] = [(field.name, field.type) for field in attrs.fields(Config)]
    return [name for name, _ in sections] + [
        f"{name}.{field.name}"
        for name, type_ in sections
        for field in attrs.fields(get_args(type_)[0] if _is_several(type_) else type_)
    ]

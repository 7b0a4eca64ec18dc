"""Frozen dataclasses from the plain data of JSON and YAML.

The annotations say which fields there are and of what types; a range, or what values mean together, is checked by the
`__post_init__` of the dataclass.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
import types
import typing
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from facespec.errors import SpecError

MAX_INTEGER, MAX_NUMBER, MAX_TEXT = 1 << 62, 1e30, 10_000

_T = TypeVar("_T")
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def parse_json(text: str | bytes, name: str) -> dict[str, Any]:
    """Return the object that JSON text holds; `name` is what the text is called in errors.

    Raises:
        SpecError: It is no such text.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{name}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise SpecError(f"{name}: not a JSON object")
    return data


def build(kind: type[_T], data: object, name: str = "", by_hand: bool = False) -> _T:
    """Return a dataclass from plain data; lists become tuples where the annotations say so.

    Args:
        kind: A dataclass of texts, numbers, booleans, `Any`, tuples, dicts, dataclasses, and `X | None` of these.
        data: Values of its fields by name.
        name: What the data is called in errors; its fields are `name.field`.
        by_hand: The data was written by a person: fields may be left out, and a `float` may be written as an integer or
            as text, which is what YAML takes 1e-3 for. Otherwise numbers stay as they are, so that what was read is
            written again in the same words.

    Raises:
        SpecError: A field is unknown, missing, of another type, not finite or too large.
    """
    if not isinstance(data, dict):
        raise SpecError(f"{name} is missing or not an object")
    hints = typing.get_type_hints(kind)
    where = f"{name}: " if name else ""
    if unknown := sorted(data.keys() - hints):
        import difflib  # what few calls need does not slow the start of all

        near = difflib.get_close_matches(unknown[0], hints, 1)
        raise SpecError(f"{where}unknown fields {short(unknown)}{f': did you mean {near[0]}?' if near else ''}")
    if not by_hand and (missing := sorted(hints.keys() - data)):
        raise SpecError(f"{where}missing fields {short(missing)}")
    start = f"{name}." if name else ""
    return kind(**{key: _convert(value, hints[key], f"{start}{key}", by_hand) for key, value in data.items()})


def check_types(instance: Any) -> None:
    """Raise SpecError unless the fields of a dataclass are what their annotations say."""
    for name, kind in typing.get_type_hints(type(instance)).items():
        _convert(getattr(instance, name), kind, name, False)


def short(value: object) -> str:
    """Return a value for a message: at most 200 characters, whatever it is."""
    try:
        return _REPR.repr(value)[:200]
    except ValueError:  # Python does not write integers of more than 4,300 digits
        return f"{type(value).__name__} too long to write"


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    raise SpecError(f"{name} is {short(value)}: expected {expected}")


def _convert(value: Any, kind: Any, name: str, by_hand: bool) -> Any:
    """Return `value` as the type of a field, or refuse it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, name, by_hand)  # type: ignore[arg-type]
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, parts[0], name, by_hand)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            _refuse(name, value, "a list")
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) != len(value):
            _refuse(name, value, f"{len(kinds)} values")
        return tuple(_convert(item, part, name, by_hand) for item, part in zip(value, kinds, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            _refuse(name, value, "an object")
        return {key: _convert(item, parts[1], f"{name}[{short(key)}]", by_hand) for key, item in value.items()}
    if by_hand and kind is float and type(value) in (int, str):
        with suppress(ValueError, OverflowError):
            value = float(value)
    fits: Any = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (type(value) is bool and kind is not bool):
        _refuse(name, value, _WORDS[kind])
    if kind is float and not abs(value) < MAX_NUMBER:
        _refuse(name, value, f"a finite number below {MAX_NUMBER:g}")
    if kind is int and abs(value) >= MAX_INTEGER:
        raise SpecError(f"{name} is too large")
    if kind is str and len(value) >= MAX_TEXT:
        raise SpecError(f"{name} is too long")
    return value

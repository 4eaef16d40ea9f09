"""Frozen dataclasses from JSON values, strictly: no key too many or too few, every value of its field's type.

By hand, since embedders are to be importable with torch, numpy and Pillow alone.
"""

from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def from_json(kind: type[Record], said: object, where: str) -> Record:
    """The dataclass `kind` from a JSON object; lists become tuples. `where` is what an error calls the object.

    Raises:
        ValueError: a key is unknown or missing, or a value does not fit; names the key.
    """
    if not isinstance(said, dict):
        raise ValueError(f"{where}: not a JSON object")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for key in said:
        if key not in known:
            raise ValueError(f"{where}.{key}: unexpected key")
    for key, field in known.items():
        if key not in said and field.default is MISSING:
            raise ValueError(f"{where}.{key}: missing")
    hints = get_type_hints(kind)
    try:
        return kind(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in said.items()})
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _value(hint: Any, said: object, where: str) -> Any:
    """A JSON value as `hint` wants it."""
    if isinstance(hint, type) and is_dataclass(hint):
        return from_json(hint, said, where)
    for choice in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        found, value = _fitted(choice, said)
        if found:
            return value
    raise ValueError(f"{where}: {said!r} does not fit")


def _fitted(hint: Any, said: object) -> tuple[bool, Any]:
    if get_origin(hint) is Literal:
        return said in get_args(hint), said
    if get_origin(hint) is tuple:
        return _fitted_tuple(get_args(hint), said)
    if hint is float:
        return isinstance(said, int | float) and not isinstance(said, bool), said
    return type(said) is hint, said


def _fitted_tuple(hints: tuple[Any, ...], said: object) -> tuple[bool, Any]:
    if not isinstance(said, list):
        return False, None
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(said)
    fitted = [_fitted(hint, value) for hint, value in zip(hints, said, strict=False)]
    return len(said) == len(hints) and all(found for found, _ in fitted), tuple(value for _, value in fitted)

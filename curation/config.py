"""Settings: strict models, YAML files, `key=value` overrides, and errors that say which key and what was meant."""

import difflib
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from curation import storage
from curation.errors import ConfigError


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Model = TypeVar("Model", bound=Settings)


def load_yaml(uri: str) -> dict[str, Any]:
    """A YAML mapping from any fsspec location. Raises ConfigError."""
    try:
        text = storage.read_bytes(uri).decode()
    except FileNotFoundError:
        raise ConfigError(f"{uri} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {uri}: {error}") from None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{uri} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{uri} must hold a mapping of settings")
    return value


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """`values` with `a.b.0.c=value` applied; values are YAML, numbers index lists. Raises ConfigError."""
    for assignment in assignments:
        path, mark, text = assignment.partition("=")
        if not mark or not path:
            raise ConfigError(f"--set {assignment}: expected key=value, such as dedup.threshold=0.7")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {assignment}: the value is not valid YAML") from None
        values = _set(values, path.split("."), value, assignment)
    return values


def _set(target: Any, path: list[str], value: Any, assignment: str) -> Any:
    key, rest = path[0], path[1:]
    if isinstance(target, list):
        if not key.isdigit() or int(key) >= len(target):
            raise ConfigError(f"--set {assignment}: {key!r} is no index into a list of {len(target)}")
        items = list(target)
        items[int(key)] = _set(items[int(key)], rest, value, assignment) if rest else value
        return items
    if not isinstance(target, dict):
        raise ConfigError(f"--set {assignment}: nothing to set under {key!r}")
    return {**target, key: _set(target.get(key, {}), rest, value, assignment) if rest else value}


def validate(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """`values` as a `model`. Raises ConfigError with one line for the first thing that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{where}: {_explain(model, first)}") from None


def _explain(model: type[BaseModel], error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        guess = suggest(str(error["loc"][-1]), sorted(_fields(model)))
        return f"unknown key {path}{guess}"
    if error["type"] == "missing":
        return f"{path} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def _fields(model: type[BaseModel]) -> set[str]:
    """Names of all keys anywhere below `model`; enough to guess what a misspelt one was meant to be."""
    names: set[str] = set()
    for definition in [model.model_json_schema(), *model.model_json_schema().get("$defs", {}).values()]:
        names |= set(definition.get("properties", {}))
    return names


def suggest(word: str, known: list[str]) -> str:
    """` (did you mean ...?)` where something known is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""

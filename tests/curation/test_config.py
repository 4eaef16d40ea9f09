"""Settings: strict, with errors in one line that say which key and what was meant."""

from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from curation.config import Settings, load_yaml, override, suggest, validate
from curation.errors import ConfigError


class Inner(Settings):
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.5


class Outer(Settings):
    name: str
    inner: Inner = Inner()
    items: tuple[Inner, ...] = ()


def test_valid_settings() -> None:
    found = validate(Outer, {"name": "x", "items": [{"threshold": 0.1}]}, "file.yaml")
    assert found.items[0].threshold == 0.1
    assert found.inner.threshold == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "iner": {}}, r"file\.yaml: unknown key iner \(did you mean inner\?\)"),
        ({"name": "x", "inner": {"treshold": 1}}, r"unknown key inner\.treshold \(did you mean threshold\?\)"),
        ({"name": "x", "zzzz": 1}, r"unknown key zzzz$"),
        ({}, "name is missing"),
        ({"name": "x", "inner": {"threshold": 2}}, r"inner\.threshold: .*less than or equal to 1"),
        ({"name": "x", "items": [{}, {"threshold": "high"}]}, r"items\.1\.threshold: .*number"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        validate(Outer, values, "file.yaml")
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


def test_overrides_reach_everywhere_and_leave_the_original() -> None:
    values = {"a": {"b": 1}, "list": [{"x": 1}, {"x": 2}]}
    assignments = ["a.b=2", "a.c=0.5", "new.key=text", "list.1.x=[1, 2]", "list.0=null", "flag=true", "url=a=b"]
    assert override(values, assignments) == {
        "a": {"b": 2, "c": 0.5},
        "list": [None, {"x": [1, 2]}],
        "new": {"key": "text"},
        "flag": True,
        "url": "a=b",
    }
    assert values == {"a": {"b": 1}, "list": [{"x": 1}, {"x": 2}]}
    assert override(values, []) == values


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("a.b", "expected key=value"),
        ("=1", "expected key=value"),
        ("list.2.x=1", "'2' is no index into a list of 2"),
        ("list.x=1", "'x' is no index"),
        ("a.b.c=1", "nothing to set under 'c'"),
        ("a.b=[1", "not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_made(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override({"a": {"b": 1}, "list": [1, 2]}, [assignment])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [1", "is not valid YAML"),
        (b"- 1\n- 2", "must hold a mapping"),
        (b"", "must hold a mapping"),
        (b"a: \xff\xfe", "cannot read"),
        (b"!!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_files_that_hold_no_settings(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_yaml(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_files(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: {b: 1}\n")
    assert load_yaml(str(tmp_path / "r.yaml")) == {"a": {"b": 1}}
    with pytest.raises(ConfigError, match="does not exist"):
        load_yaml(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="cannot read"):
        load_yaml(str(tmp_path))


def test_suggestions() -> None:
    assert suggest("imgae", ["image", "url"]) == " (did you mean image?)"
    assert suggest("qqq", ["image", "url"]) == ""

"""The commands audit and explain as they are called: what they print, write and refuse."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from curation.errors import ConfigError
from tests.builders import near_copy, photo


def lvd(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def given(tmp_path: Path) -> Path:
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "a.png").write_bytes(photo(101))
    (folder / "b\x1b[31m.png").write_bytes(near_copy(200))
    (folder / "c.jpg").write_bytes(b"nothing")
    return folder


def test_audit_prints_and_writes_what_it_found(tiny_run: Path, given: Path, tmp_path: Path) -> None:
    files = ["--json", tmp_path / "a.json", "--parquet", tmp_path / "a.parquet"]
    done = lvd("audit", tiny_run, given, *files, "--k", 2, "--work", tmp_path / "work")
    assert done.exit_code == 0, done.output
    assert "exact copy in the set" in done.stdout and "reference_component" in done.stdout
    assert "not_an_image" in done.stdout and "b\\x1b[31m.png" in done.stdout
    assert "\x1b" not in done.stdout and "note:" not in done.stdout
    stored = json.loads((tmp_path / "a.json").read_text())
    assert [image["verdict"] for image in stored["images"]] == [
        "exact copy in the set",
        "exact copy in the pool, not in the set",
        "unreadable: not_an_image (unknown image format)",
    ]
    alike = [f for f in stored["images"][0]["findings"] if f["relation"] == "alike"]
    assert len(alike) == 4
    assert len(pq.read_table(tmp_path / "a.parquet")) == sum(max(1, len(i["findings"])) for i in stored["images"])


def test_audit_asks_for_a_place_that_a_cluster_reaches(
    tiny_run: Path, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["--address", "host:1"], ["--workers", "2"]):
        monkeypatch.setenv("RAY_ADDRESS", "host:1")
        refused = lvd("audit", tiny_run, given, *arguments)
        assert isinstance(refused.exception, ConfigError) and "give --work" in str(refused.exception)


def test_explain(tiny_run: Path, tmp_path: Path) -> None:
    done = lvd("explain", tiny_run, "1:2", "--members", 1, "--json", tmp_path / "c.json")
    assert done.exit_code == 0, done.output
    assert "Cluster 2 of level 1" in done.stdout and "outlying" in done.stdout
    assert len(json.loads((tmp_path / "c.json").read_text())["typical"]) == 1
    assert isinstance(lvd("explain", tiny_run, "99").exception, ConfigError)

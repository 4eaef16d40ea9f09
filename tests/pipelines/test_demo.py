"""The demo, small: the whole pipeline over HTTP against a web whose truth is known."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.errors import ConfigError
from pipelines.demo import run_demo
from pipelines.executor import LocalExecutor
from pipelines.progress import quiet
from pipelines.stats import Table
from pipelines.verify import verify


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Table], list[str]]:
    out = tmp_path_factory.mktemp("demo") / "run"
    tables, hints = run_demo(str(out), 240, LocalExecutor(), quiet())
    return out, tables, hints


def _rows(tables: list[Table], title: str) -> dict[str, list[object]]:
    return {str(row[0]): row[1:] for table in tables if table.title == title for row in table.rows}


def test_every_fault_of_the_web_is_rejected_for_its_reason(demo: tuple[Path, list[Table], list[str]]) -> None:
    found = {row[1]: row[2] for table in demo[1] if table.title == "Rejects" for row in table.rows}
    assert found == {"http_not_found": 5, "not_an_image": 2, "too_large": 1, "truncated": 2}


def test_planted_copies_are_found_and_hardly_anything_else(demo: tuple[Path, list[Table], list[str]]) -> None:
    planted = _rows(demo[1], "Planted copies")
    assert planted["byte_copy"][:2] == [14, 14]
    for kind in ("recompressed", "resized"):
        count, found = planted[kind][0], planted[kind][1]
        assert isinstance(count, int)
        assert found == count
    leaks = planted["leak"]
    assert leaks[0] == 30
    assert isinstance(leaks[1], int)
    assert leaks[1] >= 20
    (row,) = next(table.rows for table in demo[1] if table.title == "Dropped wrongly")
    assert row[1] <= 5


def test_a_second_run_makes_nothing_again(demo: tuple[Path, list[Table], list[str]]) -> None:
    out, tables, _ = demo
    before = {path: path.stat().st_mtime_ns for path in out.rglob("part-*.parquet")}
    assert run_demo(str(out), 240, LocalExecutor(), quiet())[0] == tables
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("part-*.parquet")}


def test_the_run_verifies_and_the_hints_name_it(demo: tuple[Path, list[Table], list[str]]) -> None:
    out, _, hints = demo
    assert list(verify(str(out), LocalExecutor(), quiet())) == []
    assert sum(str(out) in hint for hint in hints) >= 4


def test_a_web_of_another_size_in_the_same_place_needs_overwrite(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    run_demo(out, 120, LocalExecutor(), quiet())
    with pytest.raises(ConfigError, match="--overwrite"):
        run_demo(out, 140, LocalExecutor(), quiet())
    tables, _ = run_demo(out, 140, LocalExecutor(), quiet(), overwrite=True)
    in_web = pq.read_table(f"{out}/web/truth.parquet").num_rows
    assert in_web > 140
    assert _rows(tables, "Funnel")["pool rows"][0] == in_web


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="holds no run"):
        run_demo(str(tmp_path), 10, LocalExecutor(), quiet())
    assert (tmp_path / "thesis.tex").read_text() == "precious"

"""Units: made, resumed, skipped, refused and made again, on a stage of three small steps."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from curation.errors import ConfigError, LvdError, PartialError
from curation.manifest import Input, Origin
from curation.shards import PartWriter, ShardSet
from curation.storage import StorageFullError
from pipelines.executor import LocalExecutor, Needs, Outcome
from pipelines.progress import Progress, quiet
from pipelines.unit import MAX_FAILURES, Step, Unit, differences, run_unit, set_input
from tests.builders import execute, fingerprints, rows_of, write_set

SCHEMA = pa.schema([("value", pa.int64())])
CALLS: Counter[tuple[str, int]] = Counter()
BROKEN: dict[int, Exception] = {}


@pytest.fixture(autouse=True)
def _nothing_called_or_broken() -> Iterator[None]:
    CALLS.clear()
    BROKEN.clear()
    yield
    BROKEN.clear()


@dataclass
class Numbers(Step):
    """`parts` parts of one number each, read from the set before where there is one."""

    parts: int
    before: str | None = None

    def schema(self) -> pa.Schema:
        return SCHEMA

    def num_parts(self) -> int:
        return ShardSet(self.before).num_parts if self.before else self.parts

    def write_part(self, part: int, writer: PartWriter) -> None:
        CALLS[self.kind, part] += 1
        if part in BROKEN and self.keep:
            raise BROKEN[part]
        value = ShardSet(self.before).read(part)["value"][0].as_py() + 1 if self.before else part * 10
        writer.write(pa.table({"value": [value]}, schema=SCHEMA))
        if part == 1:
            writer.reject("odd", row=part)

    def info(self) -> dict[str, Any]:
        return {"parts": self.parts}


@dataclass
class Stage(Unit):
    """A working set and two outputs, the second made from the first."""

    out: str
    parts: int = 4
    settings: dict[str, Any] = field(default_factory=lambda: {"a": {"b": 1}})
    raw: str = "content"
    role: str = "pool"

    stage: ClassVar[str] = "count"

    @property
    def title(self) -> str:
        return "count all"

    def inputs(self) -> list[Input]:
        return [Input("raw/x", self.raw)]

    def config(self) -> dict[str, Any]:
        return self.settings

    def steps(self) -> list[Step]:
        work, first = f"{self.out}/first/_work", f"{self.out}/first"
        labels = {"source": "x", "role": self.role}
        return [
            Numbers(work, "work", {}, False, self.parts),
            Numbers(first, "first", labels, True, self.parts, work),
            Numbers(f"{self.out}/second", "second", labels, True, self.parts, first),
        ]


def values(out: Path, name: str = "second") -> list[int]:
    return [row["value"] for row in rows_of(out / name)]


def test_a_unit_makes_its_sets_once(tmp_path: Path) -> None:
    stage = Stage(str(tmp_path))
    assert execute(stage)
    assert values(tmp_path, "first") == [1, 11, 21, 31]
    assert values(tmp_path) == [2, 12, 22, 32]
    manifest = ShardSet(str(tmp_path / "second")).manifest
    assert (manifest["rejects"], manifest["info"], manifest["stage"]) == (1, {"parts": 4}, "count")
    assert not (tmp_path / "first" / "_work").exists()
    assert set(CALLS.values()) == {1}
    assert not execute(stage)
    assert len(CALLS) == 12
    assert set(CALLS.values()) == {1}


def test_all_sets_of_a_unit_carry_one_origin(tmp_path: Path) -> None:
    execute(Stage(str(tmp_path)))
    first, second = (ShardSet(str(tmp_path / name)) for name in ("first", "second"))
    assert first.manifest["inputs"] == second.manifest["inputs"]
    for shard_set in (first, second):
        assert {shard_set.commit(part).fingerprint for part in range(4)} == {shard_set.manifest["fingerprint"]}


def test_parts_that_are_done_are_not_made_again(tmp_path: Path) -> None:
    stage = Stage(str(tmp_path / "broken"))
    BROKEN.update({0: ValueError("first line\nsecond"), 2: LvdError("no luck")})
    message = r"count all: part-00000 of .*first failed: ValueError: first line \(2 of 4 parts are done and kept"
    with pytest.raises(PartialError, match=message) as error:
        execute(stage)
    assert error.value.exit_code == 3
    assert ShardSet(str(tmp_path / "broken/first")).committed() == {1, 3}
    assert not ShardSet(str(tmp_path / "broken/first")).is_complete
    BROKEN.clear()
    CALLS.clear()
    assert execute(stage)
    assert {key for key in CALLS if key[0] == "first"} == {("first", 0), ("first", 2)}
    assert not any(kind == "work" for kind, _ in CALLS)
    execute(Stage(str(tmp_path / "whole")))
    assert fingerprints(tmp_path / "broken") == fingerprints(tmp_path / "whole")


class Forgetful(LocalExecutor):
    """Loses each worker after its work is done and before it has said so; as Ray does, begins the task again."""

    def map(self, work: Callable[[int], Any], items: Iterable[int], needs: Needs) -> Iterator[Outcome]:
        for item in items:
            work(item)
            yield item, work(item)


def test_a_task_begun_again_after_its_commit_finds_it_done(tmp_path: Path) -> None:
    assert run_unit(Stage(str(tmp_path)), Forgetful(), quiet())
    assert set(CALLS.values()) == {1}
    assert values(tmp_path) == [2, 12, 22, 32]


def test_when_no_part_is_done_it_is_a_failure(tmp_path: Path) -> None:
    BROKEN.update(dict.fromkeys(range(4), ValueError("always")))
    with pytest.raises(LvdError, match=r"part-00000 of .* failed: ValueError: always") as error:
        execute(Stage(str(tmp_path)))
    assert error.value.exit_code == 1


def test_a_step_is_given_up_after_many_failures(tmp_path: Path) -> None:
    BROKEN.update(dict.fromkeys(range(100), ValueError("always")))
    with pytest.raises(LvdError):
        execute(Stage(str(tmp_path), parts=100))
    assert sum(kind == "first" for kind, _ in CALLS) == MAX_FAILURES


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ConfigError("no weights"), ConfigError), (StorageFullError("full"), LvdError), (ImportError("x"), LvdError)],
)
def test_what_all_parts_will_meet_stops_at_once(tmp_path: Path, error: Exception, expected: type[LvdError]) -> None:
    BROKEN.update(dict.fromkeys(range(4), error))
    with pytest.raises(LvdError, match="count all") as raised:
        execute(Stage(str(tmp_path)))
    assert type(raised.value) is expected
    assert sum(kind == "first" for kind, _ in CALLS) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"a": {"b": 2}}}, r"a\.b: 1 -> 2"),
        ({"settings": {"a": {}, "c": "x"}}, r"a\.b: 1 -> unset; c: unset -> x"),
        ({"raw": "other"}, "input raw/x has changed"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_origin_is_refused_with_the_difference(
    tmp_path: Path, change: dict[str, Any], message: str, finished: bool
) -> None:
    if finished:
        execute(Stage(str(tmp_path)))
    else:
        BROKEN[3] = ValueError("x")
        with pytest.raises(PartialError):
            execute(Stage(str(tmp_path)))
        BROKEN.clear()
    before = fingerprints(tmp_path)
    changed = Stage(str(tmp_path), **change)
    with pytest.raises(ConfigError, match=rf"first was made from something else \({message}\); pass --overwrite"):
        execute(changed)
    assert fingerprints(tmp_path) == before
    CALLS.clear()
    assert execute(changed, overwrite=True)
    assert len(CALLS) == 12
    assert not execute(changed)


def test_overwrite_leaves_alone_what_has_not_changed(tmp_path: Path) -> None:
    execute(Stage(str(tmp_path)))
    CALLS.clear()
    assert not execute(Stage(str(tmp_path)), overwrite=True)
    assert not CALLS


def test_a_changed_stage_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(Stage(str(tmp_path)))
    monkeypatch.setattr(Stage, "version", 2)
    with pytest.raises(ConfigError, match="count version 1 -> 2"):
        execute(Stage(str(tmp_path)))


def test_differences_name_inputs() -> None:
    old = Origin("k", "s", 1, {}, (Input("a", "1"), Input("b", "1")))
    new = Origin("k", "s", 1, {}, (Input("b", "2"), Input("c", "1")))
    assert list(differences(old, new)) == ["input a is gone", "input b has changed", "input c is new"]
    assert list(differences(old, old)) == []


def test_commits_of_another_origin_do_not_count(tmp_path: Path) -> None:
    """A worker that outlived a driver may commit a part after its set was deleted and begun anew."""
    BROKEN[2] = ValueError("x")
    stage = Stage(str(tmp_path))
    with pytest.raises(PartialError):
        execute(stage)
    BROKEN.clear()
    with PartWriter(str(tmp_path / "first"), 2, SCHEMA, "another fingerprint") as writer:
        writer.write(pa.table({"value": [-1]}, schema=SCHEMA))
    execute(stage)
    assert values(tmp_path) == [2, 12, 22, 32]


def test_parts_without_commit_do_not_count(tmp_path: Path) -> None:
    BROKEN[2] = ValueError("x")
    stage = Stage(str(tmp_path))
    with pytest.raises(PartialError):
        execute(stage)
    BROKEN.clear()
    (tmp_path / "first" / "part-00002.parquet").write_bytes(b"half a part")
    (tmp_path / "first" / ".part-00002.parquet.00.tmp").write_bytes(b"half a part")
    execute(stage)
    assert values(tmp_path) == [2, 12, 22, 32]


def test_working_sets_left_by_a_killed_driver_are_deleted(tmp_path: Path) -> None:
    stage = Stage(str(tmp_path))
    execute(stage)
    write_set(tmp_path / "first" / "_work", "work", [pa.table({"value": [1]}, schema=SCHEMA)])
    assert not execute(stage)
    assert not (tmp_path / "first" / "_work").exists()


def test_a_working_set_of_another_origin_is_made_again(tmp_path: Path) -> None:
    write_set(tmp_path / "first" / "_work", "work", [pa.table({"value": [99]}, schema=SCHEMA)] * 4)
    ShardSet(str(tmp_path / "first")).begin(Stage(str(tmp_path)).origin(Stage(str(tmp_path)).steps()[1], (RAW,)))
    execute(Stage(str(tmp_path)))
    assert values(tmp_path) == [2, 12, 22, 32]


RAW = Input("raw/x", "content")


def test_a_lost_output_is_made_again_and_the_other_kept(tmp_path: Path) -> None:
    stage = Stage(str(tmp_path))
    execute(stage)
    shutil.rmtree(tmp_path / "second")
    CALLS.clear()
    assert execute(stage)
    assert {kind for kind, _ in CALLS} == {"work", "second"}
    assert values(tmp_path) == [2, 12, 22, 32]


def test_a_new_role_is_written_without_work(tmp_path: Path) -> None:
    execute(Stage(str(tmp_path)))
    content = ShardSet(str(tmp_path / "first")).content
    CALLS.clear()
    assert not execute(Stage(str(tmp_path), role="query"))
    for name in ("first", "second"):
        assert ShardSet(str(tmp_path / name)).labels == {"source": "x", "role": "query"}
    assert ShardSet(str(tmp_path / "first")).content == content
    assert not CALLS


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is not empty and holds no shard set of ours"):
            execute(Stage(str(tmp_path)), overwrite)
    assert (tmp_path / "first" / "thesis.tex").exists()


def test_inputs_must_be_complete_and_of_their_kind(tmp_path: Path) -> None:
    execute(Stage(str(tmp_path)))
    found = set_input(str(tmp_path / "first"), "first")
    assert (found.name, found.content) == ("first/x", ShardSet(str(tmp_path / "first")).content)
    with pytest.raises(ConfigError, match="holds first, but images are needed"):
        set_input(str(tmp_path / "first"), "images")
    with pytest.raises(ConfigError, match="is not a shard set"):
        set_input(str(tmp_path / "none"), "images")


class Backwards:
    """An executor that finishes the last part first."""

    workers = 1

    def map(self, work: Any, items: Any, needs: Any) -> Iterator[tuple[int, Any]]:
        for item in reversed(list(items)):
            yield item, work(item)

    def close(self) -> None:
        return None


def test_the_order_of_parts_does_not_matter(tmp_path: Path) -> None:
    execute(Stage(str(tmp_path / "forwards")))
    run_unit(Stage(str(tmp_path / "backwards")), Backwards(), quiet())
    assert fingerprints(tmp_path / "forwards") == fingerprints(tmp_path / "backwards")
    contents = {ShardSet(str(tmp_path / way / "second")).content for way in ("forwards", "backwards")}
    assert len(contents) == 1


def test_progress_counts_parts_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    monkeypatch.setattr(Progress, "begin", lambda self, title, parts, done: lines.append((title, parts, done)))
    monkeypatch.setattr(Progress, "advance", lambda self, rows: lines.append(rows))
    BROKEN[0] = ValueError("x")
    with pytest.raises(PartialError):
        execute(Stage(str(tmp_path)))
    BROKEN.clear()
    execute(Stage(str(tmp_path)))
    work = [("count all: work", 4, 0), 1, 2, 1, 1]
    assert lines == [*work, ("count all", 4, 0), 2, 1, 1, ("count all", 4, 3), 1, ("count all", 4, 0), 1, 2, 1, 1]

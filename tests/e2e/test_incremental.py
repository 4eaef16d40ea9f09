"""Runs that are added to or changed: what stays is not touched, what would change is refused or made again."""

import shutil
from pathlib import Path

import pytest
from world import RECIPE, World, call, contents, finished

SOURCES = {name: source for name, source in RECIPE["sources"].items() if name != "web"}
PARTS = [{"as_is": "birds"}, {"retrieved": "birds", "mode": "sample", "k": 3}, {"balanced": "pool", "target": 20}]
GLOBAL = ("duplicates", "forest", "recall", "centroids", "clusters", "retrieved", "selection", "shards")


@pytest.fixture(scope="module")
def finished_run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one pool, one query set and one reference set."""
    world.write_recipe("first.yaml", sources=SOURCES, parts=PARTS)
    two = {**SOURCES, "more": {"role": "pool", "images": "more.parquet"}}
    world.write_recipe("second.yaml", sources=two, parts=PARTS)
    shutil.copy(world.place / "birds.parquet", world.place / "more.parquet")
    run = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "run", str(world.place / "first.yaml"), "--out", str(run), "--local") == 0
    return run


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def of(kinds: tuple[str, ...], commits: dict[str, tuple[int, int, bytes]]) -> dict[str, tuple[int, int, bytes]]:
    """The commits of sets of these kinds."""
    return {name: commit for name, commit in commits.items() if name.startswith(kinds)}


def test_a_second_pool_recomputes_nothing_of_the_first(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = finished(run)
    command = ("run", str(world.place / "second.yaml"), "--out", str(run), "--local")
    assert call(monkeypatch, *command) == 2
    told = capfd.readouterr().err
    assert "input embeddings/default/more is new" in told
    assert "--overwrite" in told
    assert of(GLOBAL, finished(run)) == of(GLOBAL, before)
    assert {"images/more", "filtered/more", "index/more", "embeddings/default/more"} <= set(contents(run))
    assert call(monkeypatch, *command, "--overwrite") == 0
    after = finished(run)
    local = {name: commit for name, commit in before.items() if not name.startswith(GLOBAL)}
    assert local
    assert {name: after[name] for name in local} == local
    assert not set(of(GLOBAL, before).values()) & set(of(GLOBAL, after).values())
    assert "duplicates/more" in contents(run)
    assert call(monkeypatch, "verify", str(run), "--local") == 0


def test_running_again_does_nothing(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = finished(run)
    assert call(monkeypatch, "run", str(world.place / "first.yaml"), "--out", str(run), "--local") == 0
    told = capfd.readouterr().err
    assert told.count("up to date") == len(told.splitlines()) > 8
    assert finished(run) == before


def test_a_changed_threshold_is_refused_then_made_again_from_dedup_on(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = finished(run)
    command = ("run", str(world.place / "first.yaml"), "--out", str(run), "--local", "--set", "dedup.threshold=0.8")
    assert call(monkeypatch, *command) == 2
    assert "threshold: 0.97 -> 0.8" in capfd.readouterr().err
    assert finished(run) == before
    assert call(monkeypatch, *command, "--overwrite") == 0
    lines = capfd.readouterr().err.splitlines()
    made = [line.split(":")[0] for line in lines if "up to date" not in line]
    assert made[0] == "dedup"
    assert not [title for title in made if title.startswith(("download", "filter", "embed"))]
    after = finished(run)
    changed = {name for name in before if after.get(name) != before[name]}
    assert {name.split("/")[0] for name in changed} <= set(GLOBAL)
    assert set(of(("duplicates",), before)) <= changed


def test_from_takes_earlier_stages_as_they_are(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = finished(run)
    changes = ("--set", "dedup.threshold=0.8", "--set", "seed=8", "--from", "rebalance")
    command = ("run", str(world.place / "first.yaml"), "--out", str(run), "--local", *changes)
    assert call(monkeypatch, *command) == 2
    assert "seed: 7 -> 8" in capfd.readouterr().err
    assert call(monkeypatch, *command, "--overwrite") == 0
    titles = [line.split(":")[0] for line in capfd.readouterr().err.splitlines()]
    assert titles == ["rebalance", "shard"]
    changed = {name.split("/")[0] for name, commit in finished(run).items() if before.get(name) != commit}
    assert changed == {"selection", "shards"}


def test_a_changed_input_is_noticed_by_its_content_not_by_its_time(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ("run", str(world.place / "first.yaml"), "--out", str(run), "--local")
    file = world.place / "birds.parquet"
    known = file.read_bytes()
    file.touch()
    assert call(monkeypatch, *command) == 0
    capfd.readouterr()
    file.write_bytes((world.place / "bench.parquet").read_bytes())
    try:
        assert call(monkeypatch, *command) == 2
        assert "input raw/birds has changed" in capfd.readouterr().err
    finally:
        file.write_bytes(known)

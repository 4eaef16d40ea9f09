"""`lvd retrieve` tells what it costs before, and what came of it after."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from curation.errors import ConfigError
from curation.shards import ShardSet
from pipelines.progress import Progress
from pipelines.retrieve import ClusterRule
from tests.builders import execute, fingerprints
from tests.pipelines.test_retrieve import SIZES, World


def retrieve(world: World, *options: str) -> Result:
    """The command on all pools, in this process."""
    pools = [o for name in SIZES for o in ("--pool", str(world.path / "e" / name))]
    duplicates = [o for name in SIZES for o in ("--duplicates", str(world.path / "d" / name))]
    clusters = [o for name in SIZES for o in ("--clusters", str(world.path / "c" / name))]
    places = [*pools, *duplicates, *clusters, "--centroids", str(world.path / "centroids")]
    out = ["--out", str(world.path / "told"), "--local", "--seed", "3"]
    return CliRunner().invoke(app, ["retrieve", str(world.path / "e/birds"), *places, *out, *options])


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda self, line: lines.append(line))
    return lines


@pytest.mark.parametrize("engine", ["exact", "partitioned"])
def test_cost_counts_and_collisions_are_told(tmp_path: Path, engine: str, said: list[str]) -> None:
    world = World(tmp_path, 0)
    lists = [o for key in ("num_lists=4", "lists_joined=4", "quantizers=1") for o in ("--search", key)]
    rule = ["--images-per-cluster", "2", "--min-hits", "1", "--strategy", "closest"]
    shown = retrieve(world, "--k", "3", "--engine", engine, *lists, *rule)
    assert shown.exit_code == 0, shown.output
    assert "17 queries x 87 pool images (all pairs take one core about a second)" in said[0]
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    for k in (1, 2, 3):
        found = [row["image_id"] for row in world.sampled(3) if row["rank"] <= k]
        unique = len(set(found))
        assert f"birds {k} {len(found)} {unique} {100 * (1 - unique / len(found)):.1f} %" in lines
    assert f"birds sample 51 {len({row['image_id'] for row in world.sampled(3)})}" in lines
    assert any("recall@k" in line for line in lines) == (engine == "partitioned")
    execute(world.unit(3, ClusterRule(2, 1, None, "closest"), "expected"))
    assert fingerprints(tmp_path / "told/birds") == fingerprints(tmp_path / "expected/birds")
    again = retrieve(world, "--k", "3", "--engine", engine, *lists, *rule)
    assert again.stdout == shown.stdout
    assert said[-1] == "retrieve birds: up to date"


def test_an_unknown_strategy_is_refused_before_any_work(tmp_path: Path) -> None:
    world = World(tmp_path, 0)
    refused = retrieve(world, "--images-per-cluster", "2", "--strategy", "spread")
    assert isinstance(refused.exception, ConfigError)
    assert "--strategy spread: give random or closest" in str(refused.exception)
    assert not ShardSet(str(tmp_path / "told/birds")).is_complete

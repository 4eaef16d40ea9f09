"""`lvd dedup --curve`: after the verdicts, what higher thresholds would keep, and chains."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from curation.errors import ConfigError
from curation.shards import ShardSet
from pipelines.chains import curve
from pipelines.stats import cell
from tests.builders import rows_of
from tests.pipelines.near_copies import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path, 3)


def dedup(tmp_path: Path, world: World, *options: str) -> Result:
    """The command on all pools, in this process."""
    images = [option for name in world.pools for option in ("--images", str(tmp_path / "i" / name))]
    pools = [str(tmp_path / "e" / name) for name in world.pools]
    out = ["--out", str(tmp_path / "out"), "--local"]
    return CliRunner().invoke(app, ["dedup", *pools, *images, *out, *options])


def test_the_curve_and_the_components_are_printed(tmp_path: Path, world: World) -> None:
    shown = dedup(tmp_path, world, "--threshold", "0.6", "--curve")
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    rows = [row for name in world.pools for row in rows_of(tmp_path / "out" / name)]
    points = curve(ShardSet(str(tmp_path / "out/_forest")), len(rows))
    for point in points:
        share = f"{100 * point.kept / len(rows):.1f} %"
        assert f"{cell(point.threshold)} {point.kept} {share} {point.largest}" in lines
    assert points[0].kept == sum(row["reason"] != "near_duplicate" for row in rows)
    single = sum(row["component_size"] == 1 for row in rows)
    assert f"1 {single} {single}" in lines
    first = min(rows, key=lambda row: (-row["component_size"], row["component"]))
    source = next(name for name, ids in world.pools.items() if first["image_id"] in ids)
    assert f"{first['component']} {first['component_size']} {source} {first['image_id']}" in lines


def test_what_is_up_to_date_is_shown_alone(tmp_path: Path, world: World) -> None:
    options = ["--threshold", "0.6", "--forest", str(tmp_path / "kept")]
    assert dedup(tmp_path, world, *options).stdout == ""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert "largest component" in dedup(tmp_path, world, *options, "--curve").stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == before


def test_semdedup_is_refused_before_any_work(tmp_path: Path, world: World) -> None:
    refused = dedup(tmp_path, world, "--threshold", "0.9", "--preset", "semdedup", "--curve")
    assert isinstance(refused.exception, ConfigError) and "semdedup has no curve" in str(refused.exception)
    assert not (tmp_path / "out").exists()

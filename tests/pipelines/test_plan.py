"""What a recipe would do before anything runs, and that running it does that and no more."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from curation.errors import ConfigError
from curation.shards import ShardSet
from pipelines.catalog import find_sets
from pipelines.executor import LocalExecutor
from pipelines.plan import nominal_total, plan_tables
from pipelines.price_dedup import dedup_costs, dedup_price_tables
from pipelines.progress import Progress
from pipelines.recipe import DedupSettings, JoinSettings, load_recipe
from pipelines.run import STAGES, Plan, run
from pipelines.verify import verify
from tests.builders import fingerprints, photo


def stages(tables: list[Any]) -> dict[str, list[Any]]:
    """Lines of the first table by set: stage, tasks, rows, bytes, state."""
    return {row[1]: [row[0], *row[2:]] for row in tables[0].rows}


def test_lvd142m_adds_up_to_the_papers_number() -> None:
    recipe = load_recipe("lvd142m")
    assert nominal_total(recipe) == 142_109_386
    assert len(recipe.parts) == 27
    assert sum(part.as_is is not None for part in recipe.parts) == 3
    assert sum(part.mode == "sample" for part in recipe.parts) == 3
    assert sum(part.mode == "cluster" for part in recipe.parts) == 21
    parts = plan_tables(recipe, None)[1].rows
    assert parts[-1] == ["total of those known", 142_109_386]
    assert sum(row[1] for row in parts[:-1]) == 142_109_386
    sizes = dict(parts)
    assert sizes["imagenet22k sample k=4"] == 56_788_344
    assert sizes["imagenet1k sample k=32"] == 40_997_344
    assert sizes["gldv2 sample k=4"] == 6_321_880
    assert sizes["cub cluster"] == 1_000_000  # capped
    assert sizes["amstertime_new cluster"] == 960_000


def test_inputs_that_are_absent_count_as_declared() -> None:
    recipe = load_recipe("lvd142m")
    lines = stages(plan_tables(recipe, None))
    assert lines["images/web"][:3] == ["download", 65_000, 1_300_000_000]
    assert lines["images/benchmarks"][1:3] == [None, None]
    assert lines["retrieved/imagenet1k"][1] == -(-1_281_167 // 20_000)
    assert lines["retrieved/cub"][1] == 1
    assert all(row[5] == "to do" for row in plan_tables(recipe, None)[0].rows[:-1])


def test_the_plan_is_in_order_and_makes_what_a_run_makes(tiny_recipe: Path, tiny_run: Path) -> None:
    recipe = load_recipe(str(tiny_recipe))
    tables = plan_tables(recipe, None)
    order = [STAGES.index(row[0]) for row in tables[0].rows[:-1]]
    assert order == sorted(order)
    assert set(stages(tables)) - {"all"} == set(find_sets(str(tiny_run)))


def test_what_a_join_found_is_measured_where_it_is_not_exact(tiny_recipe: Path) -> None:
    for engine, is_measured in (("exact", False), ("partitioned", True), ("faiss", True)):
        lines = stages(plan_tables(load_recipe(str(tiny_recipe), [f"dedup.join.engine={engine}"]), None))
        assert ("recall" in lines) == is_measured
        assert lines["forest"][:2] == ["dedup", 1]
    for engine in ("exact", "partitioned"):
        lines = stages(plan_tables(load_recipe(str(tiny_recipe), [f"retrieve.engine={engine}"]), None))
        assert ("retrieval_recall/birds" in lines) == (engine == "partitioned")


def test_expected_tasks_are_those_of_the_run(tiny_recipe: Path, tiny_run: Path) -> None:
    """What rows are dropped on the way is not known before; tasks and rows before that are."""
    lines = stages(plan_tables(load_recipe(str(tiny_recipe)), None))
    for name, shard_set in find_sets(str(tiny_run)).items():
        if name != "shards":
            assert lines[name][1] == shard_set.num_parts, name
    for name in ("web", "book", "birds", "bench"):
        manifest = ShardSet(str(tiny_run / "images" / name)).manifest
        assert lines[f"images/{name}"][2] == manifest["rows"] + manifest["rejects"]


def test_sets_that_are_done_have_exact_figures(tiny_recipe: Path, run_copy: Path) -> None:
    ShardSet(str(run_copy / "shards")).delete()
    (run_copy / "clusters" / "web" / "manifest.json").unlink()
    recipe = load_recipe(str(tiny_recipe))
    lines = stages(plan_tables(recipe, str(run_copy)))
    for name, shard_set in find_sets(str(run_copy)).items():
        if shard_set.is_complete:
            assert lines[name][1:3] == [shard_set.num_parts, shard_set.num_rows]
            assert lines[name][4] == "done"
    assert lines["shards"][4] == "to do"
    assert lines["clusters/web"][4] == "4 parts done"


def write_recipe(tmp_path: Path, **source: Any) -> str:
    values = {"sources": {"web": {"role": "pool", **source}}, "parts": [{"balanced": "pool", "target": 5}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "r.yaml")


@pytest.mark.parametrize("rows", [None, 77])
def test_a_corrupt_parquet_file_does_not_stop_a_plan(tmp_path: Path, rows: int | None) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    declared = {"rows": rows} if rows else {}
    lines = stages(plan_tables(load_recipe(write_recipe(tmp_path, images="x.parquet", **declared)), None))
    assert lines["images/web"][2] == rows


def test_rows_are_counted_where_that_costs_little(tmp_path: Path) -> None:
    for number, count in enumerate((30, 12)):
        pq.write_table(pa.table({"url": ["u"] * count}), tmp_path / f"{number}.parquet")
    (tmp_path / "list.txt").write_text("http://a\n")
    lines = stages(plan_tables(load_recipe(write_recipe(tmp_path, urls="*.parquet")), None))
    assert lines["urls/web"][2] == lines["images/web"][2] == 42
    lines = stages(plan_tables(load_recipe(write_recipe(tmp_path, urls="list.txt")), None))
    assert lines["urls/web"][2] is None


def priced(settings: DedupSettings, num_images: int, dim: int = 512) -> dict[str, Any]:
    """Costs by engine and step."""
    return {f"{cost.of} {cost.step}": cost for cost in dedup_costs(settings, num_images, dim)}


def test_dedup_is_priced_by_the_products_that_it_takes() -> None:
    """Two quantizers of 16 lists, all of which are ranked."""
    join = JoinSettings(num_lists=16, lists_joined=2, quantizers=2, partition_rows=1000, recall_sample=50)
    costs = priced(DedupSettings(join=join), 3200, dim=10)
    assert costs["exact join"].operations == sum(2 * 10 * (3200 - i) for i in range(3200)) - 3200 * 10
    assert costs["partitioned lists"].operations == 3200 * 2 * 16 * 20
    assert costs["partitioned joins"].operations == 3200 * 2 * (2 * 3200 / 16) * 20
    assert costs["partitioned recall"].operations == 50 * 3200 * 20
    assert costs["partitioned scatter"].moved == 3200 * 2 * 2 * 20  # two lists lie in two partitions at most
    assert costs["partitioned joins"].held == 1000 * 80
    assert costs["any components"].held == 3200 * 110
    assert costs["exact join"].held == 2 * 3200 * 30 + 3200 * 128


def test_many_lists_joined_travel_twelve_times_and_small_sets_not_at_all() -> None:
    assert priced(DedupSettings(), 2_000_000)["partitioned scatter"].moved == 2_000_000 * 6 * 12 * 1024
    assert priced(DedupSettings(), 1_000_000)["partitioned scatter"].moved == 0
    assert priced(DedupSettings(), 100_000)["partitioned joins"].held == 100_000 * 8 * 512


def test_semdedup_is_priced_within_its_clusters() -> None:
    costs = priced(DedupSettings(preset="semdedup"), 88_000)
    assert [*costs] == ["semdedup lists", "semdedup scatter", "semdedup joins", "any components"]
    assert costs["semdedup joins"].operations == 88_000 * 8_800 * 1024


@pytest.mark.parametrize(
    ("num_images", "engine", "marked"),
    [
        (1_000_000, "auto", {"exact (chosen)", "partitioned", "any"}),
        (1_000_001, "auto", {"exact", "partitioned (chosen)", "any"}),
        (16_000_001, "exact", {"exact (too many)", "partitioned", "any"}),
        (10, "faiss", {"exact", "partitioned", "any", "faiss (chosen)"}),
    ],
)
def test_the_engine_that_a_recipe_takes_is_marked(num_images: int, engine: Any, marked: set[str]) -> None:
    table = dedup_price_tables(DedupSettings(join=JoinSettings(engine=engine)), num_images, 512)[0]
    assert {row[0] for row in table.rows} == marked


def test_the_papers_pool_is_priced_at_the_stated_rates() -> None:
    tables = {table.title: table for table in plan_tables(load_recipe("lvd142m"), None)}
    rows = {(row[0], row[1]): row[2:] for row in tables["Cost of dedup"].rows}
    assert rows["exact (too many)", "join"][:3] == ["8.7e+20", "632,515", "481"]  # 1.3e9 squared times 512
    assert rows["partitioned (chosen)", "lists"][:2] == ["2.1e+17", "151"]  # a sixth of 65,536 lists is ranked
    assert rows["partitioned (chosen)", "joins"] == ["8.9e+18", "3,009", "4.9", None, "4.1 GB"]
    assert rows["partitioned (chosen)", "scatter"][3] == "223.6 TB"
    assert tables["What the cost of dedup rests on"].rows[0][1] == "1,300,000,000"


def test_embedded_pools_are_priced_as_they_are(tiny_recipe: Path, tiny_run: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny_recipe))
    sets = [ShardSet(str(tiny_run / "embeddings" / "default" / name)) for name in ("web", "book")]
    told = {row[0]: row[1] for row in plan_tables(recipe, str(tiny_run))[3].rows}
    assert told["images"] == str(sum(shard_set.num_rows for shard_set in sets))
    assert told["numbers of a vector"] == str(sets[0].manifest["info"]["dim"]) != "512"
    told = {row[0]: row[1] for row in plan_tables(recipe, None)[3].rows}
    assert int(told["images"]) > sum(shard_set.num_rows for shard_set in sets)
    assert told["numbers of a vector"] == "512"
    (tmp_path / "list.txt").write_text("http://a\n")
    unknown = load_recipe(write_recipe(tmp_path, urls="list.txt"))
    assert len(plan_tables(unknown, None)) == 2


def test_units_are_those_of_the_stages(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny_recipe))
    units = list(Plan(recipe, str(tmp_path)).units())
    assert [u.stage for u in units] == [
        *["download"] * 4,
        *["filter"] * 4,
        *["embed"] * 4,
        "dedup",
        "cluster",
        "retrieve",
        "rebalance",
        "shard",
    ]
    plain = load_recipe(str(tiny_recipe), ["parts=[{as_is: birds}]"])
    stages_needed = {u.stage for u in Plan(plain, str(tmp_path)).units()}
    assert stages_needed == set(STAGES) - {"cluster", "retrieve"}


def run_again(recipe: Path, out: Path, *assignments: str, overwrite: bool = False) -> list[str]:
    """Run a recipe; returns the titles of the units that had something to do, not what they tell of their choices."""
    said = io.StringIO()
    run(load_recipe(str(recipe), list(assignments)), str(out), LocalExecutor(), Progress(said), overwrite=overwrite)
    lines = said.getvalue().splitlines()
    return [line.rpartition(": ")[0] for line in lines if " rejected, " in line]


def test_two_runs_give_the_same_bytes(tiny_recipe: Path, tiny_run: Path, tmp_path: Path) -> None:
    run_again(tiny_recipe, tmp_path / "again")
    assert fingerprints(tmp_path / "again") == fingerprints(tiny_run)


def test_a_finished_run_has_nothing_to_do(tiny_recipe: Path, run_copy: Path) -> None:
    before = fingerprints(run_copy)
    assert run_again(tiny_recipe, run_copy) == []
    assert fingerprints(run_copy) == before


def test_another_threshold_is_refused_and_overwrites_only_what_follows(tiny_recipe: Path, run_copy: Path) -> None:
    before = fingerprints(run_copy)
    with pytest.raises(ConfigError, match=r"was made from something else \(threshold: 0\.999 -> 0\.9995\)"):
        run_again(tiny_recipe, run_copy, "dedup.threshold=0.9995")
    assert fingerprints(run_copy) == before
    done = run_again(tiny_recipe, run_copy, "dedup.threshold=0.9995", overwrite=True)
    assert done[0] == "dedup"  # what follows has nothing to do where the same came out
    assert list(verify(str(run_copy), LocalExecutor(), Progress(io.StringIO()))) == []
    done = run_again(tiny_recipe, run_copy, "dedup.threshold=1", overwrite=True)
    assert done == ["dedup", "cluster", "retrieve birds", "rebalance", "shard"]
    assert list(verify(str(run_copy), LocalExecutor(), Progress(io.StringIO()))) == []


def test_a_second_pool_leaves_the_first_as_it_is(tiny_recipe: Path, run_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for number in range(5):
        (tmp_path / "more" / f"{number}.png").write_bytes(photo(500 + number))
    source = f"sources.more={{role: pool, folder: {tmp_path}/more}}"
    done = run_again(tiny_recipe, run_copy, source, overwrite=True)
    own = ["download more", "filter more", "embed more (default)"]
    assert done == [*own, "dedup", "cluster", "retrieve birds", "rebalance", "shard"]
    assert list(verify(str(run_copy), LocalExecutor(), Progress(io.StringIO()))) == []


def test_earlier_stages_are_taken_as_they_are(tiny_recipe: Path, run_copy: Path) -> None:
    said = io.StringIO()
    recipe = load_recipe(str(tiny_recipe), ["filter.min_side=8"])
    run(recipe, str(run_copy), LocalExecutor(), Progress(said), start="embed")
    assert all(line.endswith("up to date") for line in said.getvalue().splitlines())
    with pytest.raises(ConfigError, match="--from shad: no such stage"):
        run(recipe, str(run_copy), LocalExecutor(), Progress(said), start="shad")


def test_a_directory_of_something_else_is_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run_again(tiny_recipe, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

"""Same inputs, same bytes: in one process, with one worker or two, by the recipe or stage by stage."""

from pathlib import Path

import pytest
from world import World, call, contents, digests, lvd


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ray_gives_the_bytes_of_one_process(
    world: World, reference: dict[str, str], workers: str, tmp_path: Path
) -> None:
    lvd("run", "recipe.yaml", "--out", str(tmp_path), "--workers", workers, cwd=world.place)
    assert digests(str(tmp_path)) == reference


def test_the_recipe_leads_through_all_that_can_differ(world: World, reference: dict[str, str]) -> None:
    import duckdb

    run = world.place / "reference"
    assert len([name for name in reference if name.startswith("/shards/")]) > 4
    dropped = duckdb.sql(f"SELECT DISTINCT reason FROM '{run}/duplicates/*/*.parquet' WHERE NOT kept").fetchall()
    assert {("near_duplicate",), ("reference_component",)} <= set(dropped)
    copies = duckdb.sql(f"SELECT max(copies) FROM '{run}/selection/*.parquet'").fetchall()
    reasons = duckdb.sql(f"SELECT DISTINCT unnest(reasons).part FROM '{run}/selection/*.parquet'").fetchall()
    assert copies == [(2,)]
    assert {r for (r,) in reasons} == {"birds as is", "birds sample k=3", "birds cluster", "balanced 140"}


def test_single_stages_give_what_the_recipe_gives(
    world: World, reference: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inputs = {
        "web": ["--role", "pool", "--urls", "urls.csv", "--label-column", "label", "--allow-private"],
        "extra": ["--role", "pool", "--folder", "extra"],
        "birds": ["--role", "query", "--images", "birds.parquet", "--label-column", "label"],
        "bench": ["--role", "reference", "--images", "bench.parquet"],
    }
    monkeypatch.chdir(world.place)

    def at(*names: str) -> list[str]:
        return [str(tmp_path / name) for name in names]

    def stage(*arguments: str) -> None:
        assert call(monkeypatch, *arguments, "--local") == 0, arguments

    for name, where in inputs.items():
        stage("download", "--out", str(tmp_path), "--source", name, "--rows-per-part", "8", *where)
        images, filtered, index = at(f"images/{name}", f"filtered/{name}", f"index/{name}")
        stage("filter", images, "--out", filtered, "--index", index, "--min-side", "32")
        stage("embed", images, "--filtered", filtered, "--out", *at(f"embeddings/default/{name}"))
    vectors = at("embeddings/default/web", "embeddings/default/extra")
    pools = [a for place in at("images/web", "images/extra") for a in ("--images", place)]
    verdicts = [a for place in at("duplicates/web", "duplicates/extra") for a in ("--duplicates", place)]
    clusters = [a for place in at("clusters/web", "clusters/extra") for a in ("--clusters", place)]
    thresholds = ["--threshold", "0.97", "--reference-threshold", "0.98"]
    stage(
        "dedup",
        *vectors,
        *pools,
        "--reference",
        *at("embeddings/default/bench"),
        *thresholds,
        "--seed",
        "7",
        "--forest",
        *at("forest"),
        "--out",
        *at("duplicates"),
    )
    centroids = at("centroids")
    numbers = ["--num-clusters", "6", "--iterations", "5", "--seed", "7"]
    stage("cluster", *vectors, *verdicts, *numbers, "--centroids", *centroids, "--out", *at("clusters"))
    among = [a for place in vectors for a in ("--pool", place)] + verdicts + clusters + ["--centroids", *centroids]
    rule = ["--k", "3", "--images-per-cluster", "4", "--min-hits", "2", "--cap", "20", "--seed", "7"]
    stage("retrieve", *at("embeddings/default/birds"), *among, *rule, "--out", *at("retrieved"))
    givers = [a for place in at("filtered/web", "filtered/extra", "filtered/birds") for a in ("--filtered", place)]
    parts = ["--as-is", "birds", "--retrieved", *at("retrieved/birds"), "--target", "140", "--max-copies", "2"]
    stage("rebalance", *givers, *parts, *clusters, "--seed", "7", "--out", *at("selection"))
    told = ["--images", *at("images/birds"), *clusters, *verdicts, "--shard-bytes", "20000", "--seed", "7"]
    stage("shard", *at("selection"), *pools, *told, "--out", *at("shards"))
    assert contents(tmp_path) == contents(world.place / "reference")
    assert digests(str(tmp_path)) == reference

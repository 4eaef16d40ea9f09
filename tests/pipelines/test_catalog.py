"""The catalogue of a run: a view for each set, and what queries over them say."""

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from curation.errors import ConfigError
from curation.shards import MANIFEST, ShardSet
from pipelines.catalog import complete_sets, find_sets, open_catalog, query
from pipelines.join import EDGES
from pipelines.recall import RECALL
from pipelines.retrieve_recall import RETRIEVAL_RECALL
from tests.builders import image_table, random_ids, rows_of, table, write_embeddings, write_set

SETS = [
    *(f"images/{s}" for s in ("bench", "birds", "book", "web")),
    *(f"filtered/{s}" for s in ("bench", "birds", "book", "web")),
    *(f"index/{s}" for s in ("bench", "birds", "book", "web")),
    *(f"embeddings/default/{s}" for s in ("bench", "birds", "book", "web")),
    *(f"duplicates/{s}" for s in ("book", "web")),
    "forest",
    "centroids",
    *(f"clusters/{s}" for s in ("book", "web")),
    "retrieved/birds",
    "selection",
    "shards",
]


def value(run: Path, sql: str) -> object:
    return query(str(run), sql).column(0)[0].as_py()


def test_all_sets_are_found_in_order_of_the_stages(tiny_run: Path) -> None:
    assert list(find_sets(str(tiny_run))) == SETS


def test_every_set_is_a_view_with_the_rows_of_its_manifest(tiny_run: Path) -> None:
    connection = open_catalog(str(tiny_run))
    for name, shard_set in complete_sets(str(tiny_run)).items():
        view = name.replace("/", "_")
        assert connection.execute(f"SELECT count(*) FROM {view}").fetchone() == (shard_set.num_rows,)
        found = connection.execute(f"SELECT rows, rejects, bytes, content, parts, view FROM sets WHERE name = '{name}'")
        manifest = [shard_set.manifest[key] for key in ("rows", "rejects", "bytes", "content")]
        assert found.fetchone() == (*manifest, shard_set.num_parts, view)


@pytest.mark.parametrize("kind", ["images", "filtered", "index", "embeddings", "duplicates", "clusters"])
def test_sets_of_a_kind_are_one_view_with_their_sources(tiny_run: Path, kind: str) -> None:
    rows = query(str(tiny_run), f"SELECT source, count(*) AS n FROM {kind} GROUP BY 1").to_pylist()
    expected = {s.source: s.num_rows for n, s in complete_sets(str(tiny_run)).items() if n.split("/")[0] == kind}
    assert {row["source"]: row["n"] for row in rows} == expected


def test_views_tell_embedders_query_sets_and_rejects(tiny_run: Path) -> None:
    assert value(tiny_run, "SELECT DISTINCT embedder FROM embeddings") == "default"
    assert value(tiny_run, "SELECT DISTINCT query_set FROM retrieved") == "birds"
    rejects = query(str(tiny_run), "SELECT of, reason FROM rejects ORDER BY reason").to_pylist()
    assert rejects == [{"of": "images/web", "reason": "empty"}, {"of": "images/web", "reason": "not_an_image"}]


def test_joins_over_views(tiny_run: Path) -> None:
    sql = """SELECT count(*) FROM duplicates d JOIN images i USING (source, image_id)
             JOIN filtered f ON f.source = i.source AND f.row = i.row AND f.kept WHERE d.kept"""
    assert value(tiny_run, sql) == value(tiny_run, "SELECT count(*) FROM clusters")
    assert value(tiny_run, "SELECT sum(copies) FROM selection") == value(tiny_run, "SELECT count(*) FROM shards")


def test_a_run_without_rejects_has_an_empty_view(tmp_path: Path) -> None:
    write_set(tmp_path / "images/web", "images", [image_table([b"x"])], source="web", role="pool")
    assert value(tmp_path, "SELECT count(*) FROM rejects") == 0


def test_a_set_without_parts_is_an_empty_view(tmp_path: Path) -> None:
    write_set(tmp_path / "retrieved/birds", "retrieved", [], source="birds", role="query")
    write_set(tmp_path / "retrieved/cars", "retrieved", [], source="cars", role="query")
    assert query(str(tmp_path), "SELECT image_id, rank FROM retrieved").num_rows == 0


@pytest.mark.parametrize("parts", [0, 1])
def test_the_forest_and_the_recall_are_views_even_where_they_are_empty(tmp_path: Path, parts: int) -> None:
    for kind, schema in (("forest", EDGES), ("recall", RECALL)):
        write_set(tmp_path / kind, kind, [schema.empty_table()] * parts)
        found = query(str(tmp_path), f"SELECT * FROM {kind}")
        assert (found.num_rows, found.schema.names) == (0, schema.names)


@pytest.mark.parametrize("parts", [0, 1])
def test_the_recall_of_retrieval_is_a_view_and_the_working_sets_beside_it_are_none(tmp_path: Path, parts: int) -> None:
    row = table(RETRIEVAL_RECALL, recall=[0.5], k=[4])
    for name in ("birds", "art-2"):
        write_set(tmp_path / "retrieved" / name, "retrieved", [], source=name, role="query")
        write_set(tmp_path / "retrieved" / f"_recall_{name}", "retrieval_recall", [row] * parts, source=name)
    write_set(tmp_path / "retrieved/_recall_sample", "recall sample", [row], source="recall")  # of a query set `recall`
    names = ["retrieved/art-2", "retrieved/birds", "retrieval_recall/art-2", "retrieval_recall/birds"]
    assert sorted(find_sets(str(tmp_path))) == sorted(names)
    found = query(str(tmp_path), "SELECT query_set, recall, k FROM retrieval_recall ORDER BY 1").to_pylist()
    assert found == [{"query_set": name, "recall": 0.5, "k": 4} for name in ("art-2", "birds")] * parts
    own = query(str(tmp_path), "SELECT * FROM retrieval_recall_art_2")
    assert (own.num_rows, own.schema.names) == (parts, RETRIEVAL_RECALL.names)


def test_edges_can_be_queried(tiny_run: Path) -> None:
    joined = "SELECT count(*) - count(DISTINCT component) FROM duplicates"
    assert value(tiny_run, "SELECT count(*) FROM forest WHERE a < b") == value(tiny_run, joined)


def test_begun_sets_are_found_and_are_no_views(run_copy: Path) -> None:
    (run_copy / "shards" / MANIFEST).unlink()
    assert "shards" in find_sets(str(run_copy))
    assert "shards" not in complete_sets(str(run_copy))
    with pytest.raises(ConfigError, match="shards"):
        query(str(run_copy), "SELECT * FROM shards")


def test_names_with_dashes_and_underscores_do_not_meet(tmp_path: Path) -> None:
    for name, data in (("a-b", b"1"), ("a_b", b"2"), ("a", b"3")):
        write_set(tmp_path / "images" / name, "images", [image_table([data])], source=name, role="pool")
    rows = query(str(tmp_path), "SELECT source, image FROM images ORDER BY image").to_pylist()
    assert [(row["source"], row["image"]) for row in rows] == [("a-b", b"1"), ("a_b", b"2"), ("a", b"3")]


def test_embedders_and_sources_with_underscores_do_not_meet(tmp_path: Path) -> None:
    ids = random_ids(np.random.default_rng(0), 2)
    for place, name in (("a/b_c", ids[0]), ("a_b/c", ids[1])):
        write_embeddings(tmp_path / "embeddings" / place, place.rpartition("/")[2], [([name], np.ones((1, 3)))])
    rows = query(str(tmp_path), "SELECT embedder, source, image_id FROM embeddings ORDER BY embedder").to_pylist()
    assert [tuple(row.values()) for row in rows] == [("a", "b_c", ids[0]), ("a_b", "c", ids[1])]


def test_directories_with_odd_names(tmp_path: Path) -> None:
    place = tmp_path / "it's [a] run * ?"
    write_set(place / "images/web", "images", [image_table([b"x"]), image_table([b"y"])], source="web", role="pool")
    assert value(place, "SELECT count(*) FROM images_web") == 2


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM nowhere", "nowhere"),
        ("SELECT nothing FROM shards", "nothing"),
        ("", "returns no rows"),
    ],
)
def test_wrong_statements_are_told_in_one_line(tiny_run: Path, sql: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        query(str(tiny_run), sql)
    assert "\n" not in str(error.value)


def test_a_damaged_part_is_told_in_one_line(run_copy: Path) -> None:
    Path(ShardSet(str(run_copy / "shards")).part_uri(0)).write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"part-00000\.parquet"):
        query(str(run_copy), "SELECT count(*) FROM shards")


def test_places_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        find_sets(str(tmp_path))
    with pytest.raises(ConfigError, match="none does not exist"):
        query(str(tmp_path / "none"), "SELECT 1")


def test_a_run_in_another_filesystem(tiny_run: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    shutil.copytree(tiny_run / "centroids", tmp_path / "centroids")
    memory.put(str(tmp_path / "centroids"), f"/{tmp_path.name}/centroids", recursive=True)
    found = query(f"memory://{tmp_path.name}", "SELECT cluster FROM centroids ORDER BY 1")
    assert found["cluster"].to_pylist() == [row["cluster"] for row in rows_of(tiny_run / "centroids")]

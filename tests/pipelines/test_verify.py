"""Proof of a run: a clean one has no problems, and each kind of damage is found and named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from curation import storage
from curation.manifest import Input, Origin, checksum, part_name
from curation.shards import MANIFEST, PartWriter, ShardSet
from pipelines.catalog import find_sets
from pipelines.executor import LocalExecutor
from pipelines.progress import quiet
from pipelines.recall import RECALL
from pipelines.recipe import load_recipe
from pipelines.retrieve_recall import RETRIEVAL_RECALL
from pipelines.run import Plan
from pipelines.verify import verify
from tests.builders import execute, rejects_of, write_set
from tests.pipelines.near_copies import all_lists, dedup_unit, make_world

PARTWISE = ["images/web", "filtered/web", "embeddings/default/web", "duplicates/web", "clusters/web", "selection"]


def problems(run: Path) -> dict[str, list[str]]:
    """All that is found, by set."""
    found: dict[str, list[str]] = {}
    for name, problem in verify(str(run), LocalExecutor(), quiet()):
        found.setdefault(name, []).append(problem)
    return found


def full_part(run: Path, name: str) -> int:
    """A part of a set with several rows."""
    return int(ShardSet(str(run / name)).rows_per_part.argmax())


def rewrite(run: Path, name: str, part: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write a part anew, with a commit to match."""
    shard_set = ShardSet(str(run / name))
    table, commit = shard_set.read(part), shard_set.commit(part)
    rejects = rejects_of(run / name, part) if commit.rejects else []
    with PartWriter(shard_set.uri, part, table.schema, commit.fingerprint) as writer:
        writer.write(change(table), 64)
        for reject in rejects:
            writer.reject(reject.pop("reason"), **reject)


def forge(run: Path) -> None:
    """Make all manifests and fingerprints follow from what lies there, as someone would who wants to hide a change."""
    for shard_set in find_sets(str(run)).values():
        manifest, inputs = shard_set.manifest, []
        for known in manifest["inputs"]:
            if known["uri"]:
                upstream = ShardSet(storage.resolve(known["uri"], shard_set.uri))
                known = {**known, "content": upstream.content, "uri": upstream.uri}
            inputs.append(Input(**known))
        old = Origin.from_record(manifest)
        origin = Origin(old.kind, old.stage, old.version, old.config, tuple(inputs), old.labels)
        for part in range(shard_set.num_parts):
            path = Path(shard_set.uri) / "_commits" / f"{part_name(part)}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": origin.fingerprint}))
        shard_set.finish(origin, shard_set.num_parts, manifest["info"])


def test_a_run_as_it_was_made_has_no_problems(tiny_run: Path, run_copy: Path) -> None:
    assert problems(tiny_run) == {}
    assert problems(run_copy) == {}  # nor has one that was moved


def test_forging_nothing_leaves_no_problems(run_copy: Path) -> None:
    """Else the tests below would find the forgery itself."""
    rewrite(run_copy, "images/web", 0, lambda table: table)
    forge(run_copy)
    assert problems(run_copy) == {}


def all_files(run: Path, pattern: str) -> list[Path]:
    return sorted(p for p in run.rglob(pattern) if p.is_file())


def test_a_flipped_byte_is_found_in_every_set(run_copy: Path, tiny_run: Path) -> None:
    for name, shard_set in find_sets(str(run_copy)).items():
        part = full_part(run_copy, name)
        path = Path(shard_set.part_uri(part))
        data = path.read_bytes()
        for place in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        found = problems(run_copy)[name]
        assert any(f"{part_name(part)}.parquet is damaged" in problem for problem in found)
        path.write_bytes(data)


def only_damage(run: Path, name: str, *words: str) -> None:
    """The set is named with a problem that holds `words`; other sets at most say that they cannot use it."""
    found = problems(run)
    assert any(all(word in problem for word in words) for problem in found.get(name, [])), found


def test_a_flipped_byte_in_the_rejects(run_copy: Path) -> None:
    (path,) = all_files(run_copy / "images" / "web", "rejects/*.parquet")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    only_damage(run_copy, "images/web", f"rejects/{path.name} is damaged")


def test_deleted_and_unexpected_rejects(run_copy: Path) -> None:
    (path,) = all_files(run_copy / "images" / "web", "rejects/*.parquet")
    path.rename(path.with_name("part-00000.parquet"))
    assert path.name != "part-00000.parquet"
    only_damage(run_copy, "images/web", f"rejects/{path.name} is missing")
    only_damage(run_copy, "images/web", "rejects/part-00000 is there, but its commit tells of no rejects")


@pytest.mark.parametrize("name", [*PARTWISE, "index/web", "centroids", "retrieved/birds", "shards"])
def test_a_deleted_part(run_copy: Path, name: str) -> None:
    part = full_part(run_copy, name)
    Path(ShardSet(str(run_copy / name)).part_uri(part)).unlink()
    only_damage(run_copy, name, f"{part_name(part)}.parquet is missing")


@pytest.mark.parametrize("name", ["images/web", "centroids", "shards"])
def test_a_deleted_commit(run_copy: Path, name: str) -> None:
    (run_copy / name / "_commits" / "part-00000.json").unlink()
    only_damage(run_copy, name, "part-00000 has no commit")


@pytest.mark.parametrize("name", ["images/web", "shards"])
def test_a_truncated_part(run_copy: Path, name: str) -> None:
    path = run_copy / name / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    only_damage(run_copy, name, "part-00000.parquet is damaged")


@pytest.mark.parametrize("name", ["images/web", "selection", "shards"])
def test_an_extra_part(run_copy: Path, name: str) -> None:
    parts = ShardSet(str(run_copy / name)).num_parts
    extra = part_name(parts + 3)
    (run_copy / name / f"{extra}.parquet").write_bytes((run_copy / name / "part-00000.parquet").read_bytes())
    assert problems(run_copy) == {name: [f"{extra} is there, but the set has {parts} parts"]}


def edit(run: Path, name: str, change: dict[str, Any], fix_checksum: bool) -> None:
    path = run / name / MANIFEST
    manifest = json.loads(path.read_text())
    manifest |= {key: value(manifest) if callable(value) else value for key, value in change.items()}
    if fix_checksum:
        manifest["checksum"] = checksum(manifest)
    path.write_text(json.dumps(manifest))


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"rows": lambda m: m["rows"] + 1}, "rows does not follow from the commits"),
    "rows_per_part": ({"rows_per_part": lambda m: m["rows_per_part"][::-1]}, "rows_per_part does not follow"),
    "rejects": ({"rejects": 7}, "rejects does not follow"),
    "reasons": ({"reasons": {"x": 1}}, "reasons does not follow"),
    "bytes": ({"bytes": 1}, "bytes does not follow"),
    "content": ({"content": "0" * 64}, "content does not follow"),
    "config": ({"config": {"min_side": 1}}, "the fingerprint does not follow from its settings"),
    "stage": ({"stage": "magic"}, "the fingerprint does not follow"),
    "fingerprint": ({"fingerprint": "0" * 64}, "the fingerprint does not follow"),
}


@pytest.mark.parametrize("what", EDITS)
@pytest.mark.parametrize("fix_checksum", [False, True])
def test_a_manifest_edited_by_hand(run_copy: Path, what: str, fix_checksum: bool) -> None:
    change, message = EDITS[what]
    edit(run_copy, "filtered/web", change, fix_checksum)
    found = "\n".join(problems(run_copy)["filtered/web"])
    assert (message if fix_checksum else "manifest.json was edited after it was written") in found


def test_a_manifest_edited_with_its_fingerprint(run_copy: Path) -> None:
    def forged(manifest: dict[str, Any]) -> str:
        return Origin.from_record({**manifest, "config": {"min_side": 1}}).fingerprint

    edit(run_copy, "filtered/web", {"fingerprint": forged, "config": {"min_side": 1}}, True)
    only_damage(run_copy, "filtered/web", "part-00000 was made from something else than the set")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1', '{"rows_per_part": "many"}'])
def test_a_manifest_that_cannot_be_read(run_copy: Path, text: str) -> None:
    (run_copy / "filtered" / "web" / MANIFEST).write_text(text)
    only_damage(run_copy, "filtered/web", MANIFEST)


def test_a_manifest_without_a_key(run_copy: Path) -> None:
    path = run_copy / "filtered" / "web" / MANIFEST
    manifest = json.loads(path.read_text())
    for key in manifest:
        path.write_text(json.dumps({k: v for k, v in manifest.items() if k != key}))
        only_damage(run_copy, "filtered/web", MANIFEST)


@pytest.mark.parametrize("name", [*PARTWISE, "index/web"])
def test_two_swapped_rows_are_found_by_their_order_alone(run_copy: Path, name: str) -> None:
    """Files, commits, manifests and fingerprints all agree."""
    part = full_part(run_copy, name)
    rewrite(run_copy, name, part, lambda t: pa.concat_tables([t.slice(1, 1), t.slice(0, 1), t.slice(2)]))
    forge(run_copy)
    only_damage(run_copy, name, part_name(part), "swapped or out of order")


@pytest.mark.parametrize("name", PARTWISE)
def test_a_dropped_row_is_found_by_its_absence_alone(run_copy: Path, name: str) -> None:
    part = full_part(run_copy, name)
    rewrite(run_copy, name, part, lambda t: pa.concat_tables([t.slice(0, 1), t.slice(2)]))
    forge(run_copy)
    if name == "selection":
        only_damage(run_copy, "shards", "copies are selected")
    else:
        only_damage(run_copy, name, part_name(part))


@pytest.mark.parametrize("name", ["index/web", "shards"])
def test_a_dropped_row_is_found_by_the_sums(run_copy: Path, name: str) -> None:
    rewrite(run_copy, name, full_part(run_copy, name), lambda t: t.slice(1))
    forge(run_copy)
    assert set(problems(run_copy)) == {name}


def test_an_image_in_place_of_another_is_found_by_the_sums(run_copy: Path) -> None:
    rewrite(run_copy, "shards", 0, lambda t: pa.concat_tables([t.slice(1, 1), t.slice(1)]))
    forge(run_copy)
    assert problems(run_copy) == {"shards": ["do not hold the images that are selected: the sums of ids differ"]}


@pytest.mark.parametrize("name", ["images/web", "shards"])
def test_an_image_under_the_name_of_another(run_copy: Path, name: str) -> None:
    def swapped(table: pa.Table) -> pa.Table:
        pictures = table["image"].to_pylist()
        pictures[:2] = pictures[1::-1]
        at = table.schema.names.index("image")
        return table.set_column(at, table.schema.field(at), pa.array(pictures, pa.binary()))

    part = full_part(run_copy, name)
    rewrite(run_copy, name, part, swapped)
    forge(run_copy)
    only_damage(run_copy, name, part_name(part), "is not the hash of its bytes")


def test_a_retrieved_image_that_is_not_kept(run_copy: Path) -> None:
    def stranger(table: pa.Table) -> pa.Table:
        at = table.schema.names.index("image_id")
        names = ["0" * 32, *table["image_id"].to_pylist()[1:]]
        return table.set_column(at, table.schema.field(at), pa.array(names, pa.string()))

    part = full_part(run_copy, "retrieved/birds")
    rewrite(run_copy, "retrieved/birds", part, stranger)
    forge(run_copy)
    only_damage(run_copy, "retrieved/birds", part_name(part), "images are not kept in duplicates/", "0" * 32)


def replaced(column: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    """A table with other values in a column."""

    def apply(table: pa.Table) -> pa.Table:
        at = table.schema.names.index(column)
        field = table.schema.field(at)
        return table.set_column(at, field, pa.array(change(table[column].to_pylist()), field.type))

    return apply


def first_as(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [value, *values[1:]]


FORESTS: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "turned": (lambda t: t.rename_columns(["b", "a", "similarity"]).select(t.schema.names), "from a lower number"),
    "negative": (replaced("a", first_as(-1)), "1 edges name images that are none of the 45"),
    "unknown": (replaced("b", first_as(45)), "1 edges name images that are none of the 45"),
    "weak": (replaced("similarity", first_as(0.999)), "1 edges are not above the threshold 0.999"),
    "not a number": (replaced("similarity", first_as(float("nan"))), "1 edges are not above the threshold 0.999"),
    "weak first": (replaced("similarity", first_as(0.9991)), "1 edges are stronger than the one before"),
    "one less": (lambda t: t.slice(1), "edges cannot join 45 images to the components of the verdicts"),
    "one more": (lambda t: pa.concat_tables([t.slice(0, 1), t]), "edges cannot join 45 images to the components"),
}


@pytest.mark.parametrize("what", FORESTS)
def test_a_forest_that_is_none(run_copy: Path, what: str) -> None:
    change, message = FORESTS[what]
    rewrite(run_copy, "forest", 0, change)
    forge(run_copy)
    found = problems(run_copy)
    assert set(found) == {"forest"}
    assert any(message in problem for problem in found["forest"]), found


def test_edges_out_of_order_are_found_across_groups(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.verify_parts.GROUP_ROWS", 1)
    rewrite(run_copy, "forest", 0, replaced("similarity", first_as(0.9991)))
    forge(run_copy)
    only_damage(run_copy, "forest", "1 edges are stronger than the one before")


def dedup_alone(run: Path, **changes: Any) -> dict[str, list[str]]:
    """What is found of dedup's sets where they are all there is: pools of vectors, without what they were made of."""
    world = make_world(run, 5)
    (run / "embeddings").mkdir()
    (run / "e").rename(run / "embeddings" / "e")
    (run / "i").rename(run / "images")
    names = {"pools": world.pools, "references": world.references}
    places = {key: [str(run / "embeddings/e" / name) for name in sources] for key, sources in names.items()}
    images = [str(run / "images" / name) for name in world.pools]
    execute(dedup_unit(run, world, **places, images=images, **changes))
    return {n: p for n, p in problems(run).items() if n.split("/")[0] in ("duplicates", "forest", "recall")}


@pytest.mark.parametrize("changes", [{}, {"preset": "semdedup"}, {"max_component": 3}, {"join": all_lists()}])
def test_every_way_to_dedup_stands_its_proof(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert dedup_alone(tmp_path, threshold=0.6, **changes) == {}
    assert ShardSet(str(tmp_path / "forest")).num_rows > 10
    assert (tmp_path / "recall").exists() == ("join" in changes)


def test_components_cut_more_often_than_there_are_edges(tmp_path: Path) -> None:
    """Of cut components the forest has more edges than the verdicts show, but never fewer."""
    dedup_alone(tmp_path, threshold=0.6, max_component=3)
    rewrite(tmp_path, "forest", 0, lambda t: t.slice(0, 2))
    forge(tmp_path)
    only_damage(tmp_path, "forest", "2 edges cannot join 54 images")


def copies_named(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]], near: bool) -> None:
    """Change a row of duplicates/web: the first that is a near-duplicate, or the first that is none."""

    def apply(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        at = next(i for i, row in enumerate(rows) if (row["reason"] == "near_duplicate") == near)
        rows[at] = rows[at] | change(rows[at])
        return pa.Table.from_pylist(rows, table.schema)

    web = ShardSet(str(run / "duplicates/web"))
    parts = [p for p in range(web.num_parts) if "near_duplicate" in web.read(p)["reason"].to_pylist() or not near]
    rewrite(run, "duplicates/web", parts[0], apply)
    forge(run)


@pytest.mark.parametrize("name", ["0" * 31 + "1", "f" * 32])
def test_a_near_duplicate_of_an_image_that_is_nowhere(run_copy: Path, name: str) -> None:
    copies_named(run_copy, lambda row: {"representative_id": name}, near=True)
    message = "near-duplicates name images that do not stand for their components: the sums of ids differ"
    assert problems(run_copy) == {"duplicates/web": [message]}


def test_an_image_that_stays_and_is_said_to_be_a_copy(run_copy: Path) -> None:
    copies_named(run_copy, lambda row: {"representative_id": "0" * 32}, near=False)
    only_damage(run_copy, "duplicates/web", "1 images are no near-duplicates, but others stand for them")


def test_a_component_said_to_be_larger_than_it_is(run_copy: Path) -> None:
    copies_named(run_copy, lambda row: {"component_size": row["component_size"] + 1}, near=False)
    only_damage(run_copy, "duplicates/web", "do not stand for their components")


RECALLS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no row": ([], "0 rows of figures, where one is needed"),
    "two rows": ([{}, {}], "2 rows of figures, where one is needed"),
    "above 1": ([{"recall_component": 1.01}], "recall_component is 1.01, which is no share"),
    "below 0": ([{"recall_joined_low": -0.1}], "recall_joined_low is -0.1, which is no share"),
    "no number": ([{"recall_component_high": float("nan")}], "recall_component_high is nan"),
    "with lists": ([{"recall_joined_at": [0.5, 2.0]}], "recall_joined_at is 2.0, which is no share"),
}


@pytest.mark.parametrize("what", RECALLS)
def test_figures_of_recall_that_are_none(run_copy: Path, what: str) -> None:
    figures, message = RECALLS[what]
    right = {f"recall_component{end}": 0.99 for end in ("", "_low", "_high")} | {"num_sampled": 10}
    write_set(run_copy / "recall", "recall", [pa.Table.from_pylist([right | row for row in figures], RECALL)])
    (problem,) = problems(run_copy)["recall"]
    assert message in problem


def test_figures_of_recall_in_two_parts(run_copy: Path) -> None:
    row = pa.Table.from_pylist([{"recall_component": 1.0}], RECALL)
    write_set(run_copy / "recall", "recall", [row, row])
    only_damage(run_copy, "recall", "2 rows of figures, where one is needed")


def test_figures_of_recall_with_one_row_are_well(run_copy: Path) -> None:
    row = {"recall_component": 1.0, "recall_component_low": 0.0, "recall_joined_at": [0.0, 1.0]}
    write_set(run_copy / "recall", "recall", [pa.Table.from_pylist([row], RECALL)])
    assert problems(run_copy) == {}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"recall": 1.0, "recall_low": 0.0}], None),
        ([], "0 rows of figures, where one is needed"),
        ([{"recall": 1.01}], "recall is 1.01, which is no share"),
        ([{"recall_low": -0.1}], "recall_low is -0.1, which is no share"),
    ],
)
def test_figures_of_the_recall_of_retrieval(run_copy: Path, rows: list[dict[str, Any]], message: str | None) -> None:
    told = pa.Table.from_pylist(rows, RETRIEVAL_RECALL)
    write_set(run_copy / "retrieved/_recall_birds", "retrieval_recall", [told], source="birds", role="query")
    if message is None:
        assert problems(run_copy) == {}
    else:
        only_damage(run_copy, "retrieval_recall/birds", message)


def test_a_stale_upstream_is_named(run_copy: Path, tiny_recipe: Path) -> None:
    """The filter of one source was made again with another rule; what follows from it was not."""
    changed = load_recipe(str(tiny_recipe), ["filter.min_side=8"])
    execute(next(iter(Plan(changed, str(run_copy)).filter())), overwrite=True)
    found = problems(run_copy)
    for name in ("embeddings/default/web", "selection"):
        assert "is stale: filtered/web has changed since it was made from it" in found[name]
    assert not any("stale" in problem for problem in found.get("filtered/web", []))
    assert "embeddings/default/book" not in found


def test_an_upstream_that_is_gone_is_named(run_copy: Path) -> None:
    ShardSet(str(run_copy / "filtered/web")).delete()
    found = problems(run_copy)
    assert "filtered/web, from which it was made, is not there or not complete" in found["embeddings/default/web"]


def test_a_set_that_is_not_complete_is_named(run_copy: Path) -> None:
    (run_copy / "shards" / MANIFEST).unlink()
    assert problems(run_copy) == {"shards": ["is not complete: run again to resume"]}


def test_damage_is_not_blamed_on_what_cannot_be_summed(run_copy: Path) -> None:
    """Where a part could not be read, sums over the set say nothing."""
    path = run_copy / "images" / "web" / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    found = problems(run_copy)
    assert "images/web" in found
    assert "index/web" not in found

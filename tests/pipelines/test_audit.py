"""What audit finds, against the stored sets row by row and against comparing every vector with every other."""

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation import schemas
from curation.errors import ConfigError, LvdError
from curation.hashing import image_id
from curation.partwise import matrix
from curation.scoring import cosine_pairs
from curation.shards import ShardSet
from embedders.dct import DctEmbedder
from pipelines import audit_report, fates, lookalikes
from pipelines import given as given_images
from pipelines.audit import Audit, Audited, Finding, audit
from pipelines.executor import LocalExecutor, Needs
from pipelines.fates import Fate, Fates, find_ids
from pipelines.lookalikes import find_nearest
from pipelines.progress import quiet
from pipelines.shown import printable
from tests.builders import (
    cut,
    image_table,
    near_copy,
    photo,
    random_ids,
    rows_of,
    table,
    truncated,
    write_embeddings,
    write_set,
)

SOURCES = ("web", "book", "birds")
NEITHER = photo(999)


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def ask(run: Path, places: list[str], work: Path, executor: Any = None, **options: Any) -> Audit:
    return audit(str(run), places, str(work), executor or LocalExecutor(), quiet(), **options)


def ask_files(run: Path, tmp_path: Path, files: dict[str, bytes], **options: Any) -> dict[str, Audited]:
    """What is told of each of some files, by name."""
    folder = write_folder(tmp_path / "given", files)
    found = ask(run, [str(folder)], tmp_path / "work", **options)
    return {os.path.relpath(image.name, folder): image for image in found.images}


def exact(image: Audited) -> list[Fate]:
    return [finding.fate for finding in image.findings if finding.relation == "exact"]


GIVEN = {
    "repeated": photo(3),
    "near": near_copy(5),
    "leak": near_copy(200),
    "tiny": photo(40, 20, 20),
    "long": photo(41, 600, 60),
    "broken": truncated(42),
    "query": photo(101),
    "reference": photo(201),
    "book": photo(7),
    "stranger": NEITHER,
    "like": near_copy(9),
}


@pytest.fixture(scope="module")
def told(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Audited]:
    files = {f"{name}.png": data for name, data in GIVEN.items()}
    found = ask_files(tiny_run, tmp_path_factory.mktemp("told"), files)
    return {name.removesuffix(".png"): image for name, image in found.items()}


def test_every_exact_copy_is_found_with_its_rows(tiny_run: Path, told: dict[str, Audited]) -> None:
    for name, data in GIVEN.items():
        rows = {
            (source, row["row"], row["url"], row["label"])
            for source in (*SOURCES, "bench")
            for row in rows_of(tiny_run / "images" / source)
            if row["image_id"] == image_id(data)
        }
        assert {(fate.source, fate.row, fate.url, fate.label) for fate in exact(told[name])} == rows
        assert told[name].image_id == image_id(data)
    assert exact(told["stranger"]) == [] == exact(told["like"])
    assert [len(exact(told[name])) for name in ("repeated", "book")] == [2, 2]


def test_filter_verdicts(told: dict[str, Audited]) -> None:
    dropped = {name: [(f.stage, f.reason) for f in exact(told[name])] for name in ("tiny", "long", "broken")}
    assert dropped == {
        "tiny": [("filter", "too_small")],
        "long": [("filter", "too_elongated")],
        "broken": [("filter", "undecodable")],
    }
    repeated = sorted(exact(told["repeated"]), key=lambda fate: fate.row)
    assert ("filter", "exact_duplicate") in [(fate.stage, fate.reason) for fate in repeated[1:]]
    assert told["broken"].verdict == "unreadable: undecodable"


def test_dedup_verdicts(tiny_run: Path, told: dict[str, Audited]) -> None:
    rows = {row["image_id"]: row for row in rows_of(tiny_run / "duplicates/web")}
    pair = {image_id(photo(5)), image_id(near_copy(5))}
    (dropped,) = [name for name in pair if not rows[name]["kept"]]
    (near,) = exact(told["near"]) if dropped == image_id(near_copy(5)) else [_near_5(told)]
    assert (near.stage, near.reason) == ("dedup", "near_duplicate")
    assert (near.image_id, near.of) == (dropped, (pair - {dropped}).pop())
    assert near.similarity == rows[dropped]["similarity"]
    (leak,) = exact(told["leak"])
    assert (leak.stage, leak.reason, leak.of_source) == ("dedup", "reference_component", "bench")
    assert leak.of == image_id(photo(200))
    assert leak.text == f"dedup: reference_component of {leak.of} (bench, {leak.similarity:.3f})"
    assert told["leak"].verdict == "exact copy in the pool, not in the set"


def _near_5(told: dict[str, Audited]) -> Fate:
    found = [f.fate for f in told["near"].findings if f.relation == "near_copy"]
    return next(fate for fate in found if fate.image_id == image_id(photo(5)))


def test_sources_that_are_no_candidates_are_told_apart(told: dict[str, Audited]) -> None:
    (fate,) = exact(told["reference"])
    assert (fate.role, fate.in_set, fate.stage, fate.reason) == ("reference", False, "rebalance", "reference_set")
    assert told["reference"].verdict == "exact copy only in bench"
    (query,) = exact(told["query"])
    assert query.in_set and query.parts == ("birds as is",)
    assert told["query"].verdict == "exact copy in the set"
    assert told["stranger"].verdict == "no copy found"


def test_what_is_in_the_set_is_what_is_selected(tiny_run: Path, tmp_path: Path) -> None:
    given = {}
    for source in SOURCES:
        given |= {f"{source}{row['row']}.png": row["image"] for row in rows_of(tiny_run / "images" / source)}
    found = ask_files(tiny_run, tmp_path, given, k=1)
    selected = {
        (r["source"], r["image_id"]): [p["part"] for p in r["reasons"]] for r in rows_of(tiny_run / "selection")
    }
    every = {(fate.source, fate.row): fate for image in found.values() for fate in exact(image)}
    kept = {(s, r["row"]) for s in SOURCES for r in rows_of(tiny_run / "filtered" / s) if r["kept"]}
    duplicates = {
        (s, r["image_id"]) for s in ("web", "book") for r in rows_of(tiny_run / "duplicates" / s) if r["kept"]
    }
    reasons = set()
    for key, fate in every.items():
        parts = selected.get((fate.source, fate.image_id)) if key in kept else None
        assert fate.in_set == (parts is not None)
        assert list(fate.parts) == (parts or [])
        if parts is None and key in kept and (fate.source, fate.image_id) in duplicates:
            assert (fate.stage, fate.reason) == ("rebalance", "not_selected")
        reasons.add(fate.reason)
    assert len(every) == sum(len(rows_of(tiny_run / "images" / source)) for source in SOURCES)
    assert reasons > {None, "not_selected", "near_duplicate", "reference_component", "exact_duplicate"}


def test_without_a_balanced_part_what_is_left_was_not_retrieved(run_copy: Path, tmp_path: Path) -> None:
    selection = ShardSet(str(run_copy / "selection"))
    config = {**selection.manifest["config"], "parts": {"0": {"retrieved": "birds", "mode": "sample"}}}
    selection.write_manifest({**selection.manifest, "config": config})
    images = {row["image_id"]: row["image"] for row in rows_of(run_copy / "images/web")}
    kept = [row["image_id"] for row in rows_of(run_copy / "duplicates/web") if row["kept"]]
    taken = {row["image_id"] for row in rows_of(selection)}
    left = next(name for name in kept if name not in taken)
    (image,) = ask_files(run_copy, tmp_path, {"left.png": images[left]}).values()
    assert ("retrieve", "not_retrieved") in [(fate.stage, fate.reason) for fate in exact(image)]


def vectors(run: Path, source: str) -> tuple[list[str], Any]:
    found = ShardSet(str(run / "embeddings/default" / source))
    tables = [found.read(part) for part in range(found.num_parts)]
    return [name for t in tables for name in t["image_id"].to_pylist()], np.concatenate([matrix(t) for t in tables])


def recompressed(seed: int, quality: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(photo(seed))).save(file, "JPEG", quality=quality)
    return file.getvalue()


def neighbors(image: Audited, relation: str) -> list[tuple[bool, float, str, str]]:
    found = [f for f in image.findings if f.relation == relation]
    return [(bool(f.fate.in_set), f.similarity or 0.0, f.fate.source, f.fate.image_id) for f in found]


@pytest.mark.parametrize(("block", "span"), [(8, 2), (8192, 16)])
def test_neighbors_are_those_of_brute_force(
    tiny_run: Path, tmp_path: Path, block: int, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookalikes, "BLOCK_ROWS", block)
    monkeypatch.setattr(lookalikes, "SPAN_BLOCKS", span)
    given = {f"{seed}.jpg": recompressed(seed, 40) for seed in (0, 4, 11, 104, 305)}
    given |= {f"{seed}.png": photo(seed) for seed in (6, 200, 701, 702)}
    found = ask_files(tiny_run, tmp_path, given, k=3, threshold=0.9)
    model = DctEmbedder()
    selected = {(row["source"], row["image_id"]) for row in rows_of(tiny_run / "selection")}
    near_copies = 0
    for name, data in given.items():
        inputs = np.stack([model.preprocess(data)] * 64)
        vector = model.embed(model.upload(inputs))[:1]
        every = []
        for source in SOURCES:
            ids, pool = vectors(tiny_run, source)
            cosine = cosine_pairs(vector, np.zeros(len(ids), int), pool, np.arange(len(ids))).tolist()
            rows = zip(ids, cosine, strict=True)
            every += [((source, other) in selected, value, source, other) for other, value in rows]
        every = sorted((e for e in every if e[3] != image_id(data)), key=lambda e: (-e[1], e[3]))
        expected = [[e for e in every if e[0] == side][:3] for side in (True, False)]
        assert neighbors(found[name], "alike") == [*expected[0], *expected[1]]
        close = [e for side in expected for e in side if e[1] > np.float32(0.9)]
        assert neighbors(found[name], "near_copy") == close
        near_copies += len(close)
    assert near_copies > 3


class Backwards(LocalExecutor):
    """Results come last first."""

    def map(self, work: Any, items: Iterable[int], needs: Needs) -> Iterator[tuple[int, Any]]:
        yield from reversed(list(super().map(work, items, needs)))


class Failing(LocalExecutor):
    def map(self, work: Any, items: Iterable[int], needs: Needs) -> Iterator[tuple[int, Any]]:
        for item in items:
            yield item, ValueError("no") if isinstance(work, lookalikes.SpanSearch) else work(item)


def test_the_order_of_results_does_not_matter(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookalikes, "BLOCK_ROWS", 1)
    monkeypatch.setattr(lookalikes, "SPAN_BLOCKS", 1)
    folder = str(write_folder(tmp_path / "given", {f"{n}.png": photo(n) for n in (2, 7, 500)}))
    one = ask(tiny_run, [folder], tmp_path / "a")
    assert ask(tiny_run, [folder], tmp_path / "b", Backwards()) == one
    with pytest.raises(LvdError, match="the search failed: ValueError: no"):
        ask(tiny_run, [folder], tmp_path / "c", Failing())


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_ids_in_two_pools(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookalikes, "BLOCK_ROWS", 3)
    monkeypatch.setattr(lookalikes, "SPAN_BLOCKS", 2)
    rng = np.random.default_rng(seed)
    ids, pool = random_ids(rng, 20), rng.integers(-2, 3, (20, 4)).astype(np.float16)
    sets = [
        write_embeddings(tmp_path / s, s, list(zip(cut(ids, ends), cut(pool, ends), strict=True)))
        for s, ends in (("a", [4, 4, 9]), ("b", [7, 15]))
    ]
    queries = rng.normal(size=(5, 4)).astype(np.float16)
    given = write_embeddings(tmp_path / "given", "given", [(random_ids(rng, 5), queries)])
    where = ([given.uri], [s.uri for s in sets], None, 5)
    for executor in (LocalExecutor(), Backwards()):
        inside, found = find_nearest(*where, executor, quiet(), "search")
        assert inside.numbers.shape == (5, 0)
        for row in range(5):
            cosine = cosine_pairs(queries, np.full(20, row), pool, np.arange(20))
            order = sorted(range(40), key=lambda n: (-cosine[n % 20], ids[n % 20], n))[:5]
            assert found.numbers[row].tolist() == order
            assert found.similarity[row].tolist() == [cosine[n % 20] for n in order]


def test_a_repeat_beside_the_row_that_was_selected(tmp_path: Path) -> None:
    data = photo(1)
    name = image_id(data)
    verdicts = table(
        schemas.FILTERED, row=[0, 1], image_id=[name] * 2, kept=[True, False], reason=[None, "exact_duplicate"]
    )
    filtered = write_set(tmp_path / "filtered/web", "filtered", [verdicts], source="web", role="pool")
    images = write_set(tmp_path / "images/web", "images", [image_table([data, data])], source="web", role="pool")
    reasons = [[{"part": "all"}]]
    chosen = table(schemas.SELECTION, image_id=[name], source=["web"], copies=[1], reasons=reasons)
    selection = write_set(tmp_path / "selection", "selection", [chosen])
    sets = {"images/web": images, "filtered/web": filtered, "selection": selection}
    found = Fates(sets, lookalikes.Selected(selection.uri, (filtered.uri,)), {("web", 0): {name}})
    assert [(fate.row, fate.in_set, fate.reason) for fate in found(0)] == [
        (0, True, None),
        (1, False, "exact_duplicate"),
    ]


def test_of_an_image_with_many_rows_the_first_are_told(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardSet(str(tiny_run / "index/web"))
    every = {(row["part"], row["image_id"]) for row in rows_of(index)}
    ids = {name for _, name in every}
    assert set(find_ids(index, ids)) == every and len(every) > len(ids)
    monkeypatch.setattr(fates, "MAX_ROWS", 1)
    assert len(list(find_ids(index, ids))) == len(ids)
    assert list(find_ids(index, ["0" * 32])) == list(find_ids(index, [])) == []


def test_a_run_at_any_stage_is_told_of(run_copy: Path, tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "given", {"a.png": photo(2), "b.png": near_copy(5)}))
    verdicts, notes = [], []
    steps = ("shards", "selection", "duplicates", "filtered", "embeddings", "index")
    for number, kind in enumerate(steps):
        for found in {p.parent for p in (run_copy / kind).rglob("manifest.json")}:
            ShardSet(str(found)).delete()
        audited = ask(run_copy, [folder], tmp_path / f"work{number}")
        verdicts.append([image.verdict for image in audited.images])
        notes.append(" / ".join(audited.notes))
        assert audited.has_set == (kind == "shards")
        assert audited.thresholds[-1] == 0.999
    assert notes[0] == ""
    assert "there is no selection yet" in notes[1]
    assert "what dedup drops of book, web is not known yet" in notes[2]
    assert "what filter drops of book, web is not known yet" in notes[3]
    assert "near-copies in book, web are not searched: no vectors by embedder default" in notes[4]
    assert "exact copies in book, web are not looked up: the filter stage is not done" in notes[5]
    assert verdicts[1] == verdicts[2] == ["exact copy in the pool", "exact copy in the pool"]
    assert verdicts[-1] == ["no copy found", "no copy found"]


def test_without_recipe_and_dedup_the_model_states_the_thresholds(run_copy: Path, tmp_path: Path) -> None:
    (run_copy / "recipe.yaml").unlink()
    for name in ("selection", "duplicates/web", "duplicates/book", "centroids", "retrieved/birds"):
        ShardSet(str(run_copy / name)).delete()
    folder = str(write_folder(tmp_path / "given", {"a.png": near_copy(2)}))
    found = ask(run_copy, [folder], tmp_path / "work")
    stated = DctEmbedder().copy_thresholds
    assert found.own == {"dedup": stated.self_dedup, "reference": stated.reference}
    assert found.images[0].verdict == "near-copy in the pool"


def test_what_cannot_be_read_is_counted_and_hostile_names_are_names(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "memory").write_bytes(photo(2))
    files = {"evil\x1b]0;x\x07\n.png": photo(2), "a::memory.png": photo(4), "a::memory": photo(6)}
    files |= {"text\r.jpg": b"<html>", "empty.jpg": b"", "\u202egnp.png": photo(8)}
    folder = write_folder(tmp_path / "given", files)
    (folder / os.fsdecode(b"latin\xe9.png")).write_bytes(photo(10))
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    places = [str(folder), str(folder / "a::memory")]
    found = ask(tiny_run, places, tmp_path / "work")
    problems = {os.path.relpath(i.name, folder): i.problem for i in found.images if i.problem}
    assert problems == {
        "text\r.jpg": "not_an_image (unknown image format)",
        "empty.jpg": "empty, or it cannot be opened",
        "gone.png": "empty, or it cannot be opened",
    }
    ids = {os.path.relpath(i.name, folder): i.image_id for i in found.images if i.image_id}
    assert ids["a::memory.png"] == image_id(photo(4)) and ids["a::memory"] == image_id(photo(6))
    assert len(found.images) == 8
    tables = audit_report.tables(found)
    assert [t.rows for t in tables if t.title == "Unreadable images"] == [
        [["empty, or it cannot be opened", 2], ["not_an_image (unknown image format)", 1]]
    ]
    assert all(cell.isprintable() for t in tables for row in t.rows for cell in row if isinstance(cell, str))
    assert any("evil\\x1b]0;x\\x07\\n.png" in row[1] for row in tables[0].rows)
    audit_report.write_json(found, str(tiny_run), str(tmp_path / "a.json"))
    audit_report.write_parquet(found, str(tmp_path / "a.parquet"))
    stored = json.loads((tmp_path / "a.json").read_text())
    assert [image["verdict"] for image in stored["images"]] == [image.verdict for image in found.images]
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert len(rows) == sum(max(len(image.findings), 1) for image in found.images)
    assert {row["relation"] for row in rows} == {None, "exact", "near_copy", "alike"}


def test_texts_of_the_run_are_escaped() -> None:
    fate = Fate("web", "pool", 0, 0, "0" * 32, "http://x/\x1b[2J\u202e", None, True, parts=("a\x9b",))
    found = Audit([Audited("a", "1" * 32, None, [Finding("exact", None, fate)])], [], {}, [], True)
    cells = [cell for t in audit_report.tables(found) for row in t.rows for cell in row if isinstance(cell, str)]
    assert "http://x/\\x1b[2J\\u202e" in cells and "in the set (a\\x9b)" in cells
    assert printable("bird ünïcode\t") == "bird ünïcode\\t"


def test_the_contamination_of_a_benchmark(tiny_run: Path, tmp_path: Path) -> None:
    given = {f"{seed:03}.png": near_copy(seed) for seed in range(30)}
    given |= {f"{seed}.jpg": recompressed(seed, 30) for seed in range(300, 311)}
    given |= {f"{seed}.png": photo(seed) for seed in (101, 201, 800)}
    folder = str(write_folder(tmp_path / "given", {**given, "bad.png": b"?"}))
    found = ask(tiny_run, [folder], tmp_path / "work", k=2, threshold=0.8)
    report = audit_report.contamination(found)
    assert report.title == "Contamination of 44 images"
    counts = []
    for limit in [None, *found.thresholds]:
        inside = both = 0
        for image in found.images:
            close = [f.fate for f in image.findings if f.relation == "exact"]
            if limit is not None:
                near = [f for f in image.findings if f.relation == "near_copy"]
                close += [f.fate for f in near if np.float32(f.similarity) > np.float32(limit)]
            inside += any(fate.in_set for fate in close)
            both += any(fate.in_set or fate.role == "pool" for fate in close)
        counts.append([inside, f"{100 * inside / 44:.2f} %", both, f"{100 * both / 44:.2f} %"])
    assert [row[1:] for row in report.rows] == counts
    assert [row[0] for row in report.rows][:2] == ["exact copy", "cosine above 0.999 (dedup, reference)"]
    assert found.thresholds == sorted(found.thresholds, reverse=True) and found.thresholds[-1] == 0.8
    assert counts[0][0] < counts[-1][0] and counts[0][2] < counts[-1][2]
    tables = {table.title: table for table in audit_report.tables(found)}
    assert set(tables) == {"Unreadable images", report.title, "Copies that are not in the set", "Worst"}
    worst = tables["Worst"].rows
    assert len(worst) == 10 and worst[0][6].startswith("in the set") and worst[0][1] == "exact"
    missed = [i for i in found.images if any(f.lies("pool") and f.relation != "alike" for f in i.findings)]
    missed = [i for i in missed if not any(f.fate.in_set and f.relation != "alike" for f in i.findings)]
    assert sum(row[2] for row in tables["Copies that are not in the set"].rows) == len(missed) > 0


def test_parquet_files_and_single_files(tiny_run: Path, tmp_path: Path) -> None:
    pages = [photo(300), photo(900), None, photo(7)]
    pq.write_table(pa.table({"picture": pages}), tmp_path / "some.parquet")
    write_folder(tmp_path / "x", {"one": photo(2), "two.png": photo(901)})
    places = [str(tmp_path / "some.parquet"), str(tmp_path / "x/one"), str(tmp_path / "x/two.png")]
    found = ask(tiny_run, places, tmp_path / "work", image_column="picture")
    assert [image.name for image in found.images] == [
        *(f"{places[0]} row {row}" for row in range(4)),
        places[1],
        places[2],
    ]
    assert [image.image_id for image in found.images if image.problem is None] == [
        image_id(data) for data in (photo(300), photo(900), photo(7), photo(2), photo(901))
    ]
    assert [image.problem for image in found.images][2] == "empty, or it cannot be opened"


def test_vectors_of_a_gpu_are_compared_with_those_of_a_cpu(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (*SOURCES, "bench"):
        made = ShardSet(str(run_copy / "embeddings/default" / source))
        made.write_manifest({**made.manifest, "config": {**made.manifest["config"], "device": "cuda"}})
    folder = str(write_folder(tmp_path / "given", {"a.png": near_copy(5)}))
    monkeypatch.setattr(given_images, "_has_gpu", lambda: False)
    found = ask(run_copy, [folder], tmp_path / "work")
    assert [note.split(":")[0] for note in found.notes] == [
        "vectors by default were made on a GPU, those of the given images on a CPU in float32"
    ]
    assert found.images[0].verdict != "no copy found"


def test_what_cannot_be_asked_is_refused_in_one_line(run_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("http://x/1.jpg\n")
    for place, words in ((tmp_path / "none.png", "does not exist"), (tmp_path / "urls.txt", "is a list of URLs")):
        with pytest.raises(ConfigError, match=words):
            ask(run_copy, [str(place)], tmp_path / "work")
    with pytest.raises(ConfigError, match="does not exist"):
        ask(tmp_path / "no-run", [str(tmp_path)], tmp_path / "work")
    embeddings = ShardSet(str(run_copy / "embeddings/default/web"))
    config = {**embeddings.manifest["config"], "model": "0" * 64}
    embeddings.write_manifest({**embeddings.manifest, "config": config})
    write_folder(tmp_path / "given", {"a.png": photo(1)})
    with pytest.raises(ConfigError, match="model dct is not the one that made"):
        ask(run_copy, [str(tmp_path / "given")], tmp_path / "work")

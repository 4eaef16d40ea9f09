"""The steps of the recall audit on small sets cut into blocks and parts, against loops over all pairs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.errors import LvdError
from curation.hashing import id_words, keyed_hash
from curation.manifest import Origin
from curation.partwise import fixed_size_lists
from curation.shards import PartWriter, ShardSet
from pipelines import join, recall, vectors
from pipelines.executor import LocalExecutor
from pipelines.join import SampleStep
from pipelines.nodes import Nodes
from pipelines.progress import quiet
from pipelines.recall import RECALL, RecallStep, TruthStep, check_recall
from pipelines.unit import Step, run_step
from tests.builders import cut, fingerprints, random_ids, rows_of, table, write_embeddings, write_set

BLOCK, PART = 7, 3
SIZES = {"web": 34, "book": 19}
NUM = sum(SIZES.values())
THRESHOLD = 0.9
SEED = 11


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven vectors a block, three blocks a part of the truth; some queries, rows and pairs at a time."""
    for module in (recall, vectors):
        monkeypatch.setattr(module, "BLOCK_ROWS", BLOCK)
    monkeypatch.setattr(join, "SAMPLE_BLOCK", BLOCK)
    for name, value in {"PART_BLOCKS": PART, "QUERY_ROWS": 5, "GROUP_ROWS": 4}.items():
        monkeypatch.setattr(recall, name, value)


def make(step: Step) -> Path:
    run_step(step, Origin(step.kind, "test", 1, {}, ()), "audit", LocalExecutor(), quiet())
    return Path(step.out)


def write_pools(tmp_path: Path, seed: int, hub: int = 0) -> tuple[list[str], np.ndarray]:
    """Two pools of vectors in families, and `hub` copies of one vector. Ids and vectors by number."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((9, 5))[rng.integers(0, 9, NUM)] + 0.4 * rng.standard_normal((NUM, 5))
    x[rng.permutation(NUM)[:hub]] = x[0]
    values, ids = x.astype(np.float16), random_ids(rng, NUM)
    start = 0
    for name, size in SIZES.items():
        ends = sorted(rng.integers(0, size, 2).tolist())
        own = slice(start, start + size)
        parts = list(zip(cut(ids[own], ends), cut(values[own], ends), strict=True))
        write_embeddings(tmp_path / "e" / name, name, parts)
        start += size
    return ids, values


def pools(tmp_path: Path) -> list[str]:
    return [str(tmp_path / "e" / name) for name in SIZES]


def make_sample(tmp_path: Path, size: int = 20, seed: int = SEED) -> Path:
    nodes = Nodes(pools(tmp_path), [])
    return make(SampleStep(str(tmp_path / f"sample{size}-{seed}"), "sample", {}, False, nodes, size, seed, "recall"))


def make_truth(tmp_path: Path, sample: Path, threshold: float = THRESHOLD) -> Path:
    place = str(tmp_path / "truth")
    return make(TruthStep(place, "truth", {}, False, pools(tmp_path), str(sample), threshold, SEED))


def true_pairs(x: np.ndarray, threshold: float = THRESHOLD) -> dict[tuple[int, int], float]:
    """Cosine of all ordered pairs above the threshold."""
    wide, found = x.astype(np.float64).tolist(), {}
    for i, one in enumerate(wide):
        for j, two in enumerate(wide):
            cosine = sum(a * b for a, b in zip(one, two, strict=True)) / math.hypot(*one) / math.hypot(*two)
            if i != j and np.float32(cosine) > np.float32(threshold):
                found[i, j] = cosine
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_sample_is_of_lowest_draw(tmp_path: Path, seed: int) -> None:
    ids, x = write_pools(tmp_path, seed)
    rows = rows_of(make_sample(tmp_path))
    draw = keyed_hash(SEED, "recall", id_words(ids)).tolist()
    expected = sorted(sorted(range(NUM), key=lambda i: draw[i])[:20])
    assert [row["number"] for row in rows] == expected
    assert np.array_equal(np.asarray([row["embedding"] for row in rows], np.float16), x[expected])
    assert [row["number"] for row in rows_of(make_sample(tmp_path, 1000))] == list(range(NUM))
    assert [row["number"] for row in rows_of(make_sample(tmp_path, 20, SEED + 1))] != expected


@pytest.mark.parametrize("seed", range(3))
def test_the_truth_is_all_pairs_of_the_sample(tmp_path: Path, seed: int) -> None:
    _, x = write_pools(tmp_path, seed)
    sample = make_sample(tmp_path)
    truth = ShardSet(str(make_truth(tmp_path, sample)))
    sampled = [row["number"] for row in rows_of(sample)]
    pairs = true_pairs(x)
    assert truth.num_parts == 3
    for part in range(3):
        inside = range(part * PART * BLOCK, min((part + 1) * PART * BLOCK, NUM))
        expected = [(i, j) for i, j in sorted(pairs) if i in sampled and j in inside]
        rows = truth.read(part).to_pylist()
        assert [(row["query"], row["other"]) for row in rows] == expected
        assert [row["pairs"] for row in rows] == [sum(i == k for k, _ in expected) for i, _ in expected]
        assert [row["similarity"] for row in rows] == pytest.approx([pairs[pair] for pair in expected], abs=1e-6)
        assert expected and any(j in sampled for _, j in expected)  # else the test would show little


def test_hubs_are_capped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many pairs those are stored whose other ends have the lowest draws: the same for all of a hub."""
    monkeypatch.setattr(recall, "MAX_PAIRS_PER_VECTOR", 3)
    _, x = write_pools(tmp_path, 4, hub=30)
    sample = make_sample(tmp_path)
    truth, pairs = ShardSet(str(make_truth(tmp_path, sample))), true_pairs(x)
    words = np.asarray([[0, i] for i in range(NUM)], np.uint64)
    draw = keyed_hash(SEED, "recall pairs", words).tolist()
    capped = 0
    for part in range(3):
        rows = truth.read(part).to_pylist()
        inside = range(part * PART * BLOCK, min((part + 1) * PART * BLOCK, NUM))
        for query in {row["query"] for row in rows}:
            others = [j for i, j in pairs if i == query and j in inside]
            stored = [(row["other"], row["pairs"]) for row in rows if row["query"] == query]
            lowest = sorted(sorted(others, key=lambda j: draw[j])[:3])
            assert stored == [(j, len(others)) for j in lowest]
            capped += len(others) > 3
    assert capped > 10


def write_components(tmp_path: Path, labels: np.ndarray) -> str:
    tables = [pa.table({"component": pa.array(part)}) for part in cut(labels, [0, 9, 30])]
    return write_set(tmp_path / "components", "components", tables).uri


def write_lists(tmp_path: Path, lists: np.ndarray) -> str:
    kind = pa.list_(pa.int32(), lists.shape[2])
    parts = cut(lists, [23, 24, 24])
    shard_set, origin = ShardSet(str(tmp_path / "lists")), Origin("lists", "test", 1, {}, ())
    shard_set.begin(origin)
    for number, part in enumerate(parts):
        columns = {f"lists_{r}": fixed_size_lists(np.ascontiguousarray(part[:, r]), kind) for r in range(part.shape[1])}
        values = pa.table(columns)
        with PartWriter(shard_set.uri, number, values.schema, origin.fingerprint) as writer:
            writer.write(values, 6)  # row groups that are no multiple of what is read at once
    shard_set.finish(origin, len(parts), {})
    return shard_set.uri


def audit(tmp_path: Path, labels: np.ndarray, lists: np.ndarray | None, **changes: Any) -> tuple[str, dict[str, Any]]:
    """Run all three steps; the place of the result, and its row."""
    sample = make_sample(tmp_path, changes.pop("size", 20))
    truth = make_truth(tmp_path, sample, changes.pop("threshold", THRESHOLD))
    given = [str(sample), str(truth), write_components(tmp_path, labels)]
    joined = {} if lists is None else {"lists": write_lists(tmp_path, lists), "quantizers": lists.shape[1]}
    joined |= {} if lists is None else {"lists_joined": changes.pop("lists_joined", lists.shape[2])}
    step = RecallStep(str(tmp_path / "recall"), "recall", {}, True, *given, 0.5, SEED, **joined)
    assert not changes
    rows = rows_of(make(step))
    assert len(rows) == 1 and list(rows[0]) == RECALL.names
    return step.out, rows[0]


def expected_shares(tmp_path: Path, hit: Any) -> list[float]:
    """Of each sampled vector with pairs: the share of its pairs for which hit(i, j), from the truth as it is stored."""
    truth = ShardSet(str(tmp_path / "truth"))
    strata = [truth.read(part).to_pylist() for part in range(truth.num_parts)]
    shares = []
    for query in sorted({row["query"] for rows in strata for row in rows}):
        found = total = 0.0
        for own in ([row for row in rows if row["query"] == query] for rows in strata):
            if own:
                found += own[0]["pairs"] * sum(hit(query, row["other"]) for row in own) / len(own)
                total += own[0]["pairs"]
        shares.append(found / total)
    return shares


def random_join(seed: int, quantizers: int = 2, depth: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lists = np.argsort(rng.random((NUM, quantizers, 12)), axis=2)[:, :, :depth].astype(np.int32)
    lists[rng.random(NUM) < 0.2, 1, 2:] = -1
    return rng.integers(0, 2, NUM), lists


@pytest.mark.parametrize("cap", [2000, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_those_of_loops(tmp_path: Path, seed: int, cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "MAX_PAIRS_PER_VECTOR", cap)
    _, x = write_pools(tmp_path, seed, hub=20)
    labels, lists = random_join(seed)
    _, row = audit(tmp_path, labels, lists, lists_joined=3)

    def compared(i: int, j: int, depth: int) -> bool:
        pairs = ((lists[i, r], lists[j, r]) for r in range(2))
        return any(a[0] in b[:depth] or b[0] in a[:depth] for a, b in pairs)

    at = [float(np.mean(expected_shares(tmp_path, lambda i, j, m=m: compared(i, j, m)))) for m in (1, 2, 3, 4)]
    together = expected_shares(tmp_path, lambda i, j: labels[i] == labels[j])
    assert row["recall_joined_at"] == pytest.approx(at)
    assert row["recall_joined"] == row["recall_joined_at"][2]
    assert row["recall_component"] == pytest.approx(float(np.mean(together)))
    for name in ("joined", "component"):
        assert row[f"recall_{name}_low"] < row[f"recall_{name}"] < row[f"recall_{name}_high"]
    sampled = [r["number"] for r in rows_of(tmp_path / f"sample20-{SEED}")]
    degree = [sum(i == query for i, _ in true_pairs(x)) for query in sampled]
    counts = [row[name] for name in ("num_sampled", "num_with_pairs", "num_pairs")]
    assert counts == [20, sum(d > 0 for d in degree), sum(degree)]
    assert (row["quantizers"], row["lists_joined"], row["note"]) == (2, 3, None)


def test_more_than_64_pairs_are_counted_beyond_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "MAX_PAIRS_PER_VECTOR", 2)
    monkeypatch.setattr("curation.recall.PAPER_K", 25)
    _, x = write_pools(tmp_path, 1, hub=30)
    _, row = audit(tmp_path, np.zeros(NUM, np.int64), None, size=NUM)
    degree = [sum(i == query for i, _ in true_pairs(x)) for query in range(NUM)]
    assert row["k_too_short"] == sum(d > 25 for d in degree) >= 30


def test_engines_without_lists(tmp_path: Path) -> None:
    write_pools(tmp_path, 0)
    labels = np.arange(NUM) // 4
    uri, row = audit(tmp_path, labels, None)
    absent = ["recall_joined", "recall_joined_low", "recall_joined_high", "recall_joined_at"]
    assert {row[name] for name in [*absent, "quantizers", "lists_joined"]} == {None}
    assert row["recall_component"] == pytest.approx(
        float(np.mean(expected_shares(tmp_path, lambda i, j: labels[i] == labels[j])))
    )
    message = r"lie in one component; use another engine, or lower dedup\.join\.min_recall$"
    with pytest.raises(LvdError, match=message):
        check_recall(uri, 0.99)


def test_nothing_to_measure_passes_with_a_note(tmp_path: Path) -> None:
    write_pools(tmp_path, 0)
    uri, row = audit(tmp_path, *random_join(0), threshold=1.0)
    assert (row["recall_joined"], row["recall_component"], row["num_with_pairs"]) == (1.0, 1.0, 0)
    assert (row["recall_joined_low"], row["recall_component_high"]) == (0.0, 1.0)
    assert row["note"].endswith("nothing measured")
    check_recall(uri, 1.0)


def test_no_vectors_at_all(tmp_path: Path) -> None:
    for name in SIZES:
        write_embeddings(tmp_path / "e" / name, name, [([], np.zeros((0, 5)))])
    uri, row = audit(tmp_path, np.zeros(0, np.int64), np.zeros((0, 2, 3), np.int32))
    assert (row["num_sampled"], row["recall_component"]) == (0, 1.0)
    check_recall(uri, 1.0)


def write_row(tmp_path: Path, **changes: Any) -> str:
    """A finished recall set of one row, below a target of 0.99 in both figures."""
    figures = {"recall_joined": 0.957, "recall_joined_low": 0.941, "recall_joined_high": 0.97}
    figures |= {"recall_component": 0.98999, "recall_component_low": 0.98, "recall_component_high": 0.99512}
    values = figures | {"num_sampled": 4000, "num_with_pairs": 1234}
    values |= {"quantizers": 2, "lists_joined": 2, "recall_joined_at": [0.9, 0.957]} | changes
    return write_set(tmp_path / "row", "recall", [table(RECALL, **{k: [v] for k, v in values.items()})]).uri


BELOW = (
    "recall is below the target 0.99: of the true pairs of 1,234 sampled vectors 0.9899 (95 % interval 0.9800 to "
    "0.9951) lie in one component, 0.9570 (95 % interval 0.9410 to 0.9700) were compared; "
)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "raise dedup.join.lists_joined above 2 or dedup.join.quantizers to 3, or lower dedup.join.min_recall"),
        (
            {"recall_joined_at": [0.9, 0.957, 0.99531]},
            "raise dedup.join.lists_joined to 3 (compares 0.9953) or dedup.join.quantizers to 3, or lower "
            "dedup.join.min_recall",
        ),
        (
            {"recall_joined_at": [0.9, 0.995]},
            "enough pairs were compared, but the join has lost some: please report this",
        ),
    ],
)
def test_what_is_below_the_target_is_an_error(tmp_path: Path, changes: dict[str, Any], remedy: str) -> None:
    with pytest.raises(LvdError) as raised:
        check_recall(write_row(tmp_path, **changes), 0.99)
    assert str(raised.value) == BELOW + remedy


def test_the_component_figure_decides_and_the_target_itself_passes(tmp_path: Path) -> None:
    write_pools(tmp_path, 2)
    lists = random_join(2)[1]
    uri, row = audit(tmp_path, np.zeros(NUM, np.int64), lists)
    assert row["recall_component"] == 1.0 > row["recall_joined"]
    check_recall(uri, 1.0)


def test_the_step_checks_against_its_target(tmp_path: Path) -> None:
    """The target is no part of what is stored: the same figures fail one and pass another."""
    write_pools(tmp_path, 0)
    uri, row = audit(tmp_path, *random_join(0))
    settings = [uri, "recall", {}, True, "", "", ""]
    RecallStep(*settings, row["recall_component"], SEED).check()
    with pytest.raises(LvdError, match="recall is below the target 1: "):
        RecallStep(*settings, 1.0, SEED).check()


def test_lists_and_components_of_another_making_are_refused(tmp_path: Path) -> None:
    labels, lists = random_join(0)
    for place in ("a", "b"):
        write_pools(tmp_path / place, 0)
    with pytest.raises(LvdError, match=r"holds 4 lists a vector, but the audit is of 5"):
        audit(tmp_path / "a", labels, lists, lists_joined=5)
    with pytest.raises(LvdError, match=r"components has 23 rows, but row \d+ is audited"):
        audit(tmp_path / "b", labels[:-30], lists)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for place in (tmp_path / "one", tmp_path / "two"):
        write_pools(place, 3, hub=10)
        audit(place, *random_join(3))
        found.append({name: value for name, value in fingerprints(place).items() if not name.startswith("e/")})
    assert found[0] == found[1] and len(found[0]) > 4

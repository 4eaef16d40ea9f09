"""What streamed rounds of k-means are made of: the sample over parts that may be empty, and one round's centroids."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.distances import Space
from curation.hashing import id_words, keyed_hash
from curation.kmeans_rounds import Partial, combine, update
from curation.partwise import fixed_size_lists
from curation.shards import PartWriter, ShardSet
from pipelines.cluster_rounds import Kept, RoundStep, SumsStep
from pipelines.levels import centroid_table
from tests.builders import random_ids, write_embeddings, write_set
from tests.vectors import write_verdicts

DIM = 12
PARTS = [range(0), range(7), range(7, 7), range(7, 20)]


def write_pool(tmp_path: Path, seed: int) -> tuple[Kept, list[str], np.ndarray]:
    """A pool with empty parts, some of it kept; the last part but one image has none."""
    rng = np.random.default_rng(seed)
    ids, x = random_ids(rng, 20), rng.standard_normal((20, DIM)).astype(np.float16)
    kept = rng.random(20) < 0.7
    kept[8:] = False
    kept[7] = True
    write_embeddings(tmp_path / "e/web", "web", [([ids[i] for i in part], x[list(part)]) for part in PARTS])
    write_verdicts(tmp_path / "d/web", "web", ids, kept, PARTS)
    found = Kept([str(tmp_path / "e/web")], [str(tmp_path / "d/web")], seed)
    return found, [ids[i] for i in np.flatnonzero(kept)], x[kept]


@pytest.mark.parametrize("seed", range(3))
def test_the_sample_is_what_was_drawn_lowest(tmp_path: Path, seed: int) -> None:
    kept, ids, x = write_pool(tmp_path, seed)
    assert kept.count() == len(ids) > 2
    draws = keyed_hash(seed, "cluster", id_words(ids))
    for count in range(1, len(ids) + 2):
        bound = kept.bound(count)
        assert (bound is None) == (count >= len(ids))
        taken = np.concatenate(list(kept.vectors(kept.places(), bound)))
        np.testing.assert_array_equal(taken, x[np.argsort(np.argsort(draws)) < count])


def test_nothing_kept_is_no_sample(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e/web", "web", [([], np.zeros((0, DIM)))])
    write_verdicts(tmp_path / "d/web", "web", [], np.zeros(0, np.bool_), [range(0)])
    kept = Kept([str(tmp_path / "e/web")], [str(tmp_path / "d/web")], 0)
    assert (kept.count(), kept.bound(1)) == (0, None)


@pytest.mark.parametrize("turn", [0, 3])
def test_a_round_puts_empty_clusters_where_its_seed_and_turn_say(tmp_path: Path, turn: int) -> None:
    rng = np.random.default_rng(turn)
    centroids = rng.standard_normal((5, DIM)).astype(np.float32)
    parts = [
        Partial(rng.standard_normal((5, DIM)), np.array([3, 0, 2, 4, 0]), np.array([3.0, 0.0, 2.0, 4.0, 0.0]))
        for _ in range(2)
    ]
    for part in parts:
        part.sums[[1, 4]] = 0.0
    schema = SumsStep("", "", {}, False, "", DIM, "").schema()
    tables = [
        pa.table([pa.array(p.counts), pa.array(p.squares), fixed_size_lists(p.sums, schema.field("sum").type)], schema)
        for p in parts
    ]
    sums = write_set(tmp_path / "sums", "sums", tables).uri
    before = write_set(tmp_path / "before", "centroids", [centroid_table(centroids)]).uri
    step = RoundStep(str(tmp_path / "after"), "round", {}, False, sums, before, DIM, 7, turn)
    with PartWriter(step.out, 0, step.schema(), "x") as writer:
        step.write_part(0, writer)
    moved = update(centroids, combine(iter(parts)), Space(), seed=7, turn=turn)
    others = [update(centroids, combine(iter(parts)), Space(), seed=s, turn=t) for s, t in ((8, turn), (7, turn + 1))]
    assert not any(np.array_equal(moved, other) for other in others)
    made = ShardSet(step.out)
    np.testing.assert_array_equal(np.stack(made.read(0)["centroid"].to_pylist()), moved)
    assert step.frees() == [sums]

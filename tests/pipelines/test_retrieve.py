"""Retrieval: sample-based against sorting all of the pool, cluster-based against the paper's rule written out."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import schemas
from curation.errors import ConfigError
from curation.hashing import id_words, keyed_hash
from curation.partwise import fixed_size_lists
from curation.scoring import cosine_pairs
from curation.shards import ShardSet
from pipelines import retrieve, vectors
from pipelines.retrieve import ClusterRule, RetrieveUnit
from pipelines.unit import set_input
from tests.builders import cut, execute, fingerprints, random_ids, rows_of, table, write_embeddings, write_set

SIZES = {"web": 50, "book": 37}
NUM_CLUSTERS = 7


class World:
    """Two pools, what dedup kept of them, their clusters, and a query set."""

    def __init__(self, tmp_path: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.path = tmp_path
        self.kept: list[tuple[str, np.ndarray, str, int, int]] = []  # id, vector, source, part, cluster
        self.centroids = rng.standard_normal((NUM_CLUSTERS, 3)).astype(np.float32)
        repeated = rng.standard_normal((6, 3)).astype(np.float16)  # few vectors, many ties
        for name, size in SIZES.items():
            self._pool(rng, name, size, repeated)
        self.query_ids = random_ids(rng, 17)
        self.queries = np.concatenate([rng.standard_normal((11, 3)).astype(np.float16), repeated])
        ends = [0, 4, 4, 12]
        parts = list(zip(cut(self.query_ids, ends), cut(self.queries, ends), strict=True))
        write_embeddings(tmp_path / "e/birds", "birds", parts, "query")
        schema = schemas.centroids(3)
        rows = {"level": [1] * NUM_CLUSTERS, "cluster": range(NUM_CLUSTERS), "centroid": [[0.0] * 3] * NUM_CLUSTERS}
        column = fixed_size_lists(self.centroids, schema.field("centroid").type)
        centroids = table(schema, **rows).set_column(2, schema.field("centroid"), column)
        made_from = tuple(set_input(str(tmp_path / "e" / name), "embeddings") for name in SIZES)
        write_set(tmp_path / "centroids", "centroids", [centroids], inputs=made_from)

    def _pool(self, rng: np.random.Generator, name: str, size: int, repeated: np.ndarray) -> None:
        ids, x = random_ids(rng, size), rng.standard_normal((size, 3)).astype(np.float16)
        x[: size // 2] = repeated[rng.integers(0, 6, size // 2)]
        kept, cluster = rng.random(size) < 0.8, rng.integers(0, NUM_CLUSTERS, size)
        parts = cut(range(size), sorted(rng.integers(0, size, 4).tolist()))
        for number, part in enumerate(parts):
            self.kept += [(ids[i], x[i], name, number, int(cluster[i])) for i in part if kept[i]]
        pieces = [([ids[i] for i in part], x[list(part)]) for part in parts]
        write_embeddings(self.path / "e" / name, name, pieces)
        common = {"source": name, "role": "pool"}
        verdicts = [
            table(
                schemas.DUPLICATES,
                image_id=[ids[i] for i in part],
                component=list(part),
                component_size=[1] * len(part),
                kept=kept[list(part)].tolist(),
            )
            for part in parts
        ]
        write_set(self.path / "d" / name, "duplicates", verdicts, **common)
        chosen = [[i for i in part if kept[i]] for part in parts]
        clusters = [
            table(
                schemas.CLUSTERS,
                image_id=[ids[i] for i in part],
                cluster_1=cluster[part].tolist(),
                distance=[0.0] * len(part),
            )
            for part in chosen
        ]
        write_set(self.path / "c" / name, "clusters", clusters, **common)

    def unit(self, k: int | None, rule: ClusterRule | None, out: str = "out", seed: int = 3) -> RetrieveUnit:
        pools, duplicates, clusters = ([str(self.path / kind / name) for name in SIZES] for kind in "edc")
        where = (str(self.path / "e/birds"), pools, duplicates, clusters, str(self.path / "centroids"))
        return RetrieveUnit(*where, k, rule, seed, str(self.path / out))

    def sampled(self, k: int) -> list[dict[str, Any]]:
        """The k best of the whole pool for each query, ties by id."""
        pool = np.stack([entry[1] for entry in self.kept])
        rows = []
        for name, query in zip(self.query_ids, self.queries, strict=True):
            everything = np.arange(len(pool))
            near = cosine_pairs(query[None], np.zeros(len(pool), np.int64), pool, everything)
            best = sorted(everything, key=lambda i: (-near[i], self.kept[i][0]))[:k]
            for rank, i in enumerate(best, start=1):
                found, _, source, part, _ = self.kept[i]
                row = {"query_image_id": name, "image_id": found, "source": source, "part": part}
                rows.append({**row, "mode": "sample", "rank": rank, "similarity": float(near[i]), "cluster": None})
        return rows

    def clustered(self, rule: ClusterRule, seed: int) -> list[dict[str, Any]]:
        """M images of each cluster that at least `min_hits` queries fall into; no more than `cap` in all."""
        hits: Counter[int] = Counter()
        for query in self.queries:
            everything = np.arange(NUM_CLUSTERS)
            near = cosine_pairs(query[None], np.zeros(NUM_CLUSTERS, np.int64), self.centroids, everything)
            hits[int(near.argmax())] += 1
        draw = {e[0]: int(keyed_hash(seed, "retrieve birds", id_words([e[0]]))[0]) for e in self.kept}
        taken: list[str] = []
        for cluster in range(NUM_CLUSTERS):
            if hits[cluster] >= rule.min_hits:
                members = sorted((e[0] for e in self.kept if e[4] == cluster), key=lambda name: draw[name])
                taken += members[: rule.images_per_cluster]
        if rule.cap is not None:
            taken = sorted(taken, key=lambda name: draw[name])[: rule.cap]
        return [
            {
                "query_image_id": None,
                "image_id": name,
                "source": source,
                "part": part,
                "mode": "cluster",
                "rank": None,
                "similarity": None,
                "cluster": cluster,
            }
            for name, _, source, part, cluster in self.kept
            if name in taken
        ]

    def found(self, out: str = "out") -> list[dict[str, Any]]:
        return rows_of(self.path / out / "birds")


@pytest.fixture(params=[7, 10_000])
def block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (retrieve, vectors):
        monkeypatch.setattr(module, "BLOCK_ROWS", request.param)
    return int(request.param)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 4, 1000])
def test_sample_based_equals_sorting_the_pool(tmp_path: Path, block_rows: int, seed: int, k: int) -> None:
    world = World(tmp_path, seed)
    execute(world.unit(k, None))
    assert world.found() == world.sampled(k)
    assert ShardSet(str(tmp_path / "out/birds")).num_parts == 5


RULES = [
    ClusterRule(1000, 1, None),
    ClusterRule(3, 2, None),
    ClusterRule(3, 3, 5),
    ClusterRule(1000, 1, 9),
    ClusterRule(5, 1000, None),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
def test_cluster_based_equals_the_rule(tmp_path: Path, seed: int, rule: ClusterRule) -> None:
    world = World(tmp_path, seed)
    execute(world.unit(None, rule))
    expected = world.clustered(rule, 3)
    assert world.found() == expected
    assert (expected == []) == (rule.min_hits == 1000)


def test_both_modes_together_are_both(tmp_path: Path, block_rows: int) -> None:
    world = World(tmp_path, 5)
    execute(world.unit(2, RULES[1]))
    assert world.found() == world.sampled(2) + world.clustered(RULES[1], 3)
    assert ShardSet(str(tmp_path / "out/birds")).labels == {"source": "birds", "role": "query"}


def test_two_runs_give_the_same_bytes_and_other_blocks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, 6)
    for out, rows in (("one", 7), ("two", 7), ("three", 1000)):
        monkeypatch.setattr(retrieve, "BLOCK_ROWS", rows)
        execute(world.unit(3, RULES[2], out))
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "two") == fingerprints(tmp_path / "three")


def test_the_seed_counts_for_the_cluster_mode_alone(tmp_path: Path) -> None:
    world = World(tmp_path, 6)
    execute(world.unit(3, None, "a", seed=1))
    assert not execute(world.unit(3, None, "a", seed=2))
    execute(world.unit(None, RULES[1], "b", seed=1))
    with pytest.raises(ConfigError, match="seed: 1 -> 2"):
        execute(world.unit(None, RULES[1], "b", seed=2))


def test_centroids_of_other_vectors_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path, 0)
    other = ShardSet(str(tmp_path / "e/book"))
    other.write_manifest({**other.manifest, "content": "of another model"})
    execute(world.unit(1, None, "sampled"))
    with pytest.raises(ConfigError, match=r"centroids was not made from .*e/book"):
        execute(world.unit(None, RULES[1]))


def test_wrong_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"needs k \(sample-based\), images_per_cluster \(cluster-based\) or both"):
        execute(world.unit(None, None))
    monkeypatch.setattr("curation.neighbors.MAX_EXACT_VECTORS", 10)
    with pytest.raises(ConfigError, match="exact search of 17 vectors against 87 is too large"):
        execute(world.unit(1, None))
    shard_set = ShardSet(str(tmp_path / "e/birds"))
    shard_set.write_manifest({**shard_set.manifest, "config": {"model": "another"}})
    with pytest.raises(ConfigError, match="were not made by one model"):
        execute(world.unit(1, None))

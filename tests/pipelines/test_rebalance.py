"""The selection: what every part of a recipe asks for, unique by image, against dictionaries over all of it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import schemas
from curation.errors import ConfigError
from curation.hashing import id_words, keyed_hash
from curation.shards import ShardSet
from pipelines import rebalance
from pipelines.rebalance import RebalanceUnit, parts_from_sets
from pipelines.recipe import PartSettings
from tests.builders import cut, execute, fingerprints, random_ids, rows_of, table, write_set

SOURCES = {"web": 60, "book": 40, "birds": 25}
POOLS = ("web", "book")
AS_IS = PartSettings(as_is="birds")
SAMPLE = PartSettings(retrieved="birds", mode="sample", k=3)
CLUSTER = PartSettings(retrieved="birds", mode="cluster", images_per_cluster=2)


def balanced(target: int, max_copies: int = 1, name: str | None = None) -> PartSettings:
    return PartSettings(balanced="pool", target=target, max_copies=max_copies, name=name)


class World:
    """Verdicts of three sources, clusters of two pools, and what was retrieved for one query set."""

    def __init__(self, tmp_path: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.path = tmp_path
        self.kept: dict[str, list[tuple[int, str]]] = {}  # by source: (part, id)
        self.cluster: dict[str, int] = {}
        self.retrieved: list[dict[str, Any]] = []
        shared = random_ids(rng, 5)  # bytes that lie in a pool and in the query set
        for name, size in SOURCES.items():
            ids = random_ids(rng, size)
            if name != "book":
                ids[3:8] = shared
            self._source(rng, name, ids)
        self._retrieve(rng)

    def _source(self, rng: np.random.Generator, name: str, ids: list[str]) -> None:
        size = len(ids)
        kept = rng.random(size) < 0.8
        kept[3:8] = True
        parts = cut(range(size), sorted(rng.integers(0, size, 3).tolist()))
        common = {"source": name, "role": "pool" if name in POOLS else "query"}
        columns = [
            {"row": list(part), "image_id": [ids[i] for i in part], "kept": kept[list(part)].tolist()} for part in parts
        ]
        write_set(self.path / "f" / name, "filtered", [table(schemas.FILTERED, **c) for c in columns], **common)
        self.kept[name] = [(number, ids[i]) for number, part in enumerate(parts) for i in part if kept[i]]
        if name in POOLS:
            self.cluster |= {i: int(c) for (_, i), c in zip(self.kept[name], rng.integers(0, 6, 60), strict=False)}
            members = [[i for number, i in self.kept[name] if number == part] for part in range(len(parts))]
            tables = [
                table(schemas.CLUSTERS, image_id=m, cluster_1=[self.cluster[i] for i in m], distance=np.zeros(len(m)))
                for m in members
            ]
            write_set(self.path / "c" / name, "clusters", tables, **common)

    def _retrieve(self, rng: np.random.Generator) -> None:
        pool = [(name, part, i) for name in POOLS for part, i in self.kept[name]]
        parts: list[list[dict[str, Any]]] = [[], [], []]
        for query in range(12):
            for rank, j in enumerate(rng.choice(len(pool), 3, replace=False), start=1):
                row = {"source": pool[j][0], "part": pool[j][1], "image_id": pool[j][2], "mode": "sample"}
                similarity = float(rng.integers(0, 3)) / 4  # ties
                parts[query % 2].append({**row, "query_image_id": "0" * 32, "rank": rank, "similarity": similarity})
        for j in sorted(rng.choice(len(pool), 9, replace=False)):
            row = {"source": pool[j][0], "part": pool[j][1], "image_id": pool[j][2], "mode": "cluster"}
            parts[2].append({**row, "query_image_id": None, "rank": None, "similarity": None})
        names = ["query_image_id", "image_id", "source", "part", "mode", "rank", "similarity"]
        tables = [table(schemas.RETRIEVED, **{n: [r[n] for r in part] for n in names}) for part in parts]
        config = {"k": 3, "cluster": {"images_per_cluster": 2, "min_hits": 1, "cap": None}}
        write_set(self.path / "r/birds", "retrieved", tables, config=config, source="birds", role="query")
        self.retrieved = [row for part in parts for row in part]

    def unit(
        self, parts: list[PartSettings], out: str = "out", seed: int = 4, mixture: int | None = None
    ) -> RebalanceUnit:
        filtered = [str(self.path / "f" / name) for name in SOURCES]
        clusters = [str(self.path / "c" / name) for name in POOLS]
        retrieved = {"birds": str(self.path / "r/birds")}
        return RebalanceUnit(parts, filtered, retrieved, clusters, seed, str(self.path / out), mixture=mixture)

    def balance(self, number: int, part: PartSettings, seed: int) -> dict[str, int]:
        """How often each pool image is taken: clusters in turns, the lowest draws of each."""
        sizes = Counter(self.cluster.values())
        count = max(sizes) + 1
        numbers = np.array([[0, c] for c in range(count)], np.uint64)
        order = keyed_hash(seed, f"balance clusters {number}", numbers)
        shares = dict.fromkeys(range(count), 0)
        while missing := (part.target or 0) - sum(shares.values()):
            spare = [c for c in range(count) if shares[c] < sizes[c] * part.max_copies]
            for c in sorted(spare, key=lambda c: order[c])[:missing]:
                shares[c] += 1
        taken: dict[str, int] = {}
        for c in range(count):
            members = [name for name, other in self.cluster.items() if other == c]
            draw = keyed_hash(seed, f"balance {number}", id_words(members))
            ranked = [name for _, name in sorted(zip(draw.tolist(), members, strict=True))]
            for turn in range(shares[c]):
                name = ranked[turn % len(ranked)]
                taken[name] = taken.get(name, 0) + 1
        return taken

    def expected(self, parts: list[PartSettings], seed: int) -> list[dict[str, Any]]:
        """Rows in order of sources, parts and places."""
        asked: dict[str, dict[int, dict[str, Any]]] = {}
        copies: dict[str, int] = {}

        def nominate(name: str, number: int, rank: Any = None, similarity: Any = None, times: int = 1) -> None:
            part = parts[number]
            reason = {"part": part.title, "query_set": part.retrieved, "mode": part.mode}
            reason |= {"rank": rank, "similarity": similarity}
            known = asked.setdefault(name, {}).get(number)
            if known is None or (rank is not None and (rank, -similarity) < (known["rank"], -known["similarity"])):
                asked[name][number] = reason
            copies[name] = max(copies.get(name, 0), times)

        for number, part in enumerate(parts):
            if part.as_is:
                for _, name in self.kept[part.as_is]:
                    nominate(name, number)
            elif part.retrieved:
                for row in self.retrieved:
                    if row["mode"] == part.mode:
                        nominate(row["image_id"], number, row["rank"], row["similarity"])
            else:
                for name, times in self.balance(number, part, seed).items():
                    nominate(name, number, times=times)
        rows: dict[str, dict[str, Any]] = {}
        for source in SOURCES:
            for _, name in self.kept[source]:
                nominated_here = source in POOLS and any(parts[n].as_is is None for n in asked.get(name, {}))
                if name in asked and name not in rows and (nominated_here or source == "birds"):
                    reasons = [asked[name][number] for number in sorted(asked[name])]
                    rows[name] = {"image_id": name, "source": source, "copies": copies[name], "reasons": reasons}
        return list(rows.values())

    def found(self, out: str = "out") -> list[dict[str, Any]]:
        return rows_of(self.path / out)


RECIPES = {
    "as is": [AS_IS],
    "retrieved": [SAMPLE, CLUSTER],
    "balanced": [balanced(30)],
    "copies": [balanced(150, max_copies=3)],
    "all": [AS_IS, SAMPLE, CLUSTER, balanced(20), balanced(55, 2, "more")],
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bucket_rows", [13, 500_000])
@pytest.mark.parametrize("which", RECIPES)
def test_the_selection_equals_dictionaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, bucket_rows: int, seed: int
) -> None:
    monkeypatch.setattr(rebalance, "BUCKET_ROWS", bucket_rows)
    world, parts = World(tmp_path, seed), RECIPES[which]
    execute(world.unit(parts))
    found = world.found()
    assert found == world.expected(parts, 4)
    assert len({row["image_id"] for row in found}) == len(found)
    if which in ("balanced", "copies"):
        assert sum(row["copies"] for row in found) == parts[0].target
    made = ShardSet(str(tmp_path / "out"))
    assert made.num_parts == sum(ShardSet(str(tmp_path / "f" / name)).num_parts for name in SOURCES)


def test_the_same_bytes_come_from_the_first_source_and_keep_all_reasons(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    everything = balanced(len(world.cluster), name="whole pool")
    execute(world.unit([AS_IS, everything]))
    shared = {name for _, name in world.kept["web"]} & {name for _, name in world.kept["birds"]}
    rows = {row["image_id"]: row for row in world.found()}
    assert len(shared) == 5
    for name in shared:
        assert rows[name]["source"] == "web"
        assert [reason["part"] for reason in rows[name]["reasons"]] == ["birds as is", "whole pool"]


def test_buckets_and_repetition_do_not_change_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, 2)
    for out, rows in (("one", 9), ("two", 9), ("three", 500_000)):
        monkeypatch.setattr(rebalance, "BUCKET_ROWS", rows)
        execute(world.unit(RECIPES["all"], out))
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "two") == fingerprints(tmp_path / "three")
    execute(world.unit(RECIPES["all"], "four", seed=5))
    assert fingerprints(tmp_path / "one") != fingerprints(tmp_path / "four")


def test_a_target_out_of_reach_is_told(tmp_path: Path) -> None:
    world = World(tmp_path, 0)
    limit = len(world.cluster)
    with pytest.raises(ConfigError, match=f"rebalance: cannot take {limit + 1} images.*largest possible target is"):
        execute(world.unit([balanced(limit + 1)]))


def test_another_recipe_is_another_origin(tmp_path: Path) -> None:
    world = World(tmp_path, 0)
    execute(world.unit([AS_IS, balanced(20)]))
    with pytest.raises(ConfigError, match=r"parts\.1\.target: 20 -> 21"):
        execute(world.unit([AS_IS, balanced(21)]))


def test_parts_of_sets_at_hand(tmp_path: Path) -> None:
    World(tmp_path, 0)
    parts = parts_from_sets(["birds"], [str(tmp_path / "r/birds")], 7, 2)
    assert parts == [AS_IS, SAMPLE, CLUSTER, balanced(7, 2)]
    with pytest.raises(ConfigError, match="holds filtered, but retrieved are needed"):
        parts_from_sets([], [str(tmp_path / "f/web")], None, 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_mixture_has_exact_size_and_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(rebalance, "BUCKET_ROWS", 13)
    world = World(tmp_path, seed)
    ratios = {"birds as is": 1.0, "birds sample k=3": 2.0, "balanced 60": 5.0}
    parts = [
        p.model_copy(update={"ratio": r}) for p, r in zip([AS_IS, SAMPLE, balanced(60)], ratios.values(), strict=True)
    ]
    execute(world.unit(parts))
    whole = world.found()
    execute(world.unit(parts, mixture=40), overwrite=True)
    mixed = world.found()
    first = Counter(row["reasons"][0]["part"] for row in mixed)
    assert first == {"birds as is": 5, "birds sample k=3": 10, "balanced 60": 25}
    known = {row["image_id"]: row for row in whole}
    assert all(row == known[row["image_id"]] for row in mixed)
    draws = dict(zip(known, keyed_hash(4, "mixture", id_words(list(known))).tolist(), strict=True))
    for title in ratios:
        given = {row["image_id"] for row in mixed if row["reasons"][0]["part"] == title}
        asked = [name for name, row in known.items() if row["reasons"][0]["part"] == title]
        assert given == set(sorted(asked, key=lambda name: draws[name])[: first[title]])


def test_a_mixture_that_a_part_is_too_small_for_is_told(tmp_path: Path) -> None:
    world = World(tmp_path, 0)
    parts = [AS_IS.model_copy(update={"ratio": 9.0}), balanced(30).model_copy(update={"ratio": 1.0})]
    with pytest.raises(ConfigError, match=r"mixture.target of 50 takes 45 images of birds as is, which has \d+"):
        execute(world.unit(parts, mixture=50))

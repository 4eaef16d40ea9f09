"""Balanced parts through the stage, over trees with empty nodes: what is drawn equals the code for arrays in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import schemas
from curation.errors import ConfigError, LvdError
from curation.groups import distance_keys
from curation.hashing import id_words, keyed_hash
from curation.manifest import Input
from curation.sampling import Tree, draw_copies, tree_shares
from curation.shards import ShardSet
from pipelines import balanced
from pipelines.balanced import SharesStep
from pipelines.rebalance import RebalanceUnit
from pipelines.recipe import PartSettings
from tests.builders import (
    TwoWorkers,
    cut,
    execute,
    fingerprints,
    random_ids,
    rows_of,
    table,
    write_embeddings,
    write_set,
)

SIZES = {"web": 130, "book": 70}
FILLED = (0, 1, 2, 4, 5, 6, 7, 10)
"""Finest clusters with images: 3, 8 and 9 have none, nor has cluster 2 of level 2; cluster 10 has one image."""
TREE = Tree((11, 5, 2), (np.int32([0, 0, 1, 1, 3, 3, 4, 4, 2, 2, 0]), np.int32([0, 0, 1, 1, 1])))


class World:
    """Verdicts, clusters of three levels and vectors of two pools."""

    def __init__(self, tmp_path: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.path, self.seed = tmp_path, seed
        self.ids: list[str] = []
        self.place: dict[str, tuple[str, int]] = {}
        found = []
        for name, size in SIZES.items():
            ids, x = random_ids(rng, size), rng.standard_normal((size, 6)).astype(np.float16)
            cluster = rng.choice(FILLED[:-1], size, p=np.array([40, 20, 10, 10, 5, 10, 5]) / 100).astype(np.int32)
            if name == "book":
                cluster[7] = FILLED[-1]
            distance = (rng.integers(0, 6, size) / 8).astype(np.float32)  # ties
            has_vector = rng.random(size) < 0.9
            has_vector[7] = True
            parts = cut(range(size), sorted(rng.integers(0, size, 4).tolist()))
            labels = {"source": name, "role": "pool"}
            rows = [{"row": p, "image_id": [ids[i] for i in p], "kept": [True] * len(p)} for p in parts]
            write_set(tmp_path / "f" / name, "filtered", [table(schemas.FILTERED, **row) for row in rows], **labels)
            pairs = [([ids[i] for i in p], x[list(p)]) for p in parts]
            vectors = write_embeddings(tmp_path / "e" / name, name, pairs)
            self._clusters(name, [[i for i in p if has_vector[i]] for p in parts], ids, cluster, distance, vectors)
            found.append((cluster[has_vector], distance[has_vector], x[has_vector]))
            self.ids += [ids[i] for i in np.flatnonzero(has_vector)]
        self.cluster, self.distance, self.vectors = (np.concatenate(column) for column in zip(*found, strict=True))

    def _clusters(
        self, name: str, parts: list[list[int]], ids: list[str], cluster: Any, distance: Any, vectors: ShardSet
    ) -> None:
        tables = []
        for part in parts:
            path = TREE.path(cluster[part])
            columns = {f"cluster_{level}": numbers for level, numbers in enumerate(path, 1)}
            names = [ids[i] for i in part]
            tables.append(table(schemas.clusters(3), image_id=names, distance=distance[part], **columns))
        made_from = (Input("embeddings/e/" + name, vectors.content),)
        write_set(self.path / "c" / name, "clusters", tables, inputs=made_from, source=name, role="pool")

    def unit(self, parts: list[PartSettings], out: str = "out", vectors: bool = True) -> RebalanceUnit:
        filtered, clusters, embeddings = ([str(self.path / kind / name) for name in SIZES] for kind in "fce")
        where = str(self.path / out)
        return RebalanceUnit(parts, filtered, {}, clusters, self.seed, where, embeddings if vectors else [])

    def expected(self, part: PartSettings, number: int = 0) -> dict[str, int]:
        """Copies of each image that is taken, by `curation.sampling` on arrays."""
        tree = TREE if part.levels else Tree(TREE.num_clusters[:1])
        orders = []
        for level, count in enumerate(tree.num_clusters):
            words = np.array([[level, c] for c in range(count)], np.uint64)
            orders.append(keyed_hash(self.seed, f"balance clusters {number}", words))
        sizes = np.bincount(self.cluster, minlength=11)
        shares = tree_shares(tree, sizes, part.target or 0, part.max_copies, tuple(orders))
        draw = keyed_hash(self.seed, f"balance {number}", id_words(self.ids))
        if part.strategy == "closest":
            draw = distance_keys(self.distance, draw)
        vectors = self.vectors if part.strategy == "spread" else None
        copies = draw_copies(self.cluster, shares, draw, id_words(self.ids), vectors)
        return {name: count for name, count in zip(self.ids, copies.tolist(), strict=True) if count}

    def found(self, out: str = "out") -> dict[str, int]:
        return {row["image_id"]: row["copies"] for row in rows_of(self.path / out)}


def part(target: int = 60, **settings: Any) -> PartSettings:
    return PartSettings(balanced="pool", target=target, **settings)


@pytest.mark.parametrize("strategy", ["random", "closest", "spread"])
@pytest.mark.parametrize("levels", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_stage_equals_the_code_for_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, levels: bool, strategy: str
) -> None:
    world = World(tmp_path, seed)
    settings: dict[str, Any] = {"levels": levels, "strategy": strategy}
    parts = [
        part(**settings),
        part(67, **settings),
        part(300, max_copies=3, **settings),
        part(len(world.ids), name="all", **settings),
    ]
    for number, wanted in enumerate(parts):
        for out, spread_bytes in (("wide", 2**31), ("narrow", 12 * 20)):  # a range of clusters, or some
            monkeypatch.setattr(balanced, "SPREAD_BYTES", spread_bytes)
            execute(world.unit([wanted], f"{out}{number}"))
            found = world.found(f"{out}{number}")
            assert found == world.expected(wanted)
            assert sum(found.values()) == wanted.target


def test_strategies_and_levels_differ(tmp_path: Path) -> None:
    world = World(tmp_path, 0)
    wanted = [part(), part(levels=False), part(strategy="closest"), part(strategy="spread")]
    taken = [set(world.expected(one)) for one in wanted]
    assert len({frozenset(one) for one in taken}) == 4
    at = {name: row for row, name in enumerate(world.ids)}
    mean = [np.mean([world.distance[at[name]] for name in one]) for one in taken]
    assert mean[2] < 0.6 * mean[0]


def test_level_by_level_shares_are_equal(tmp_path: Path) -> None:
    """Both clusters of the top give half; flat, the one with more clusters below gives more."""
    world = World(tmp_path, 1)
    top = dict(zip(world.ids, TREE.path(world.cluster)[2].tolist(), strict=True))
    below = dict(zip(world.ids, TREE.path(world.cluster)[0].tolist(), strict=True))
    execute(world.unit([part(40)]))
    assert np.bincount([top[name] for name in world.found()]).tolist() == [20, 20]
    execute(world.unit([part(40, levels=False)], "flat"))
    flat = np.bincount([below[name] for name in world.found("flat")], minlength=11)
    assert flat[10] == 1 and set(flat[list(FILLED[:-1])].tolist()) == {5, 6}


def test_each_part_of_a_recipe_draws_anew(tmp_path: Path) -> None:
    world, parts = World(tmp_path, 0), [part(name="one"), part(name="two", strategy="closest"), part(name="three")]
    execute(world.unit(parts))
    rows = rows_of(tmp_path / "out")
    for number, one in enumerate(parts):
        taken = {row["image_id"] for row in rows if one.name in {reason["part"] for reason in row["reasons"]}}
        assert taken == set(world.expected(one, number))
    assert set(world.expected(parts[0], 0)) != set(world.expected(parts[2], 2))


def test_a_target_out_of_reach_is_told(tmp_path: Path) -> None:
    world = World(tmp_path, 0)
    limit = 2 * len(world.ids)
    with pytest.raises(ConfigError, match=f"at most 2 of each the largest possible target is {limit}$"):
        execute(world.unit([part(limit + 1, max_copies=2)]))
    execute(world.unit([part(limit, max_copies=2)]))
    assert world.found() == dict.fromkeys(world.ids, 2)


@pytest.mark.parametrize("parts", [0, 2])
def test_a_pool_without_images_is_told(tmp_path: Path, parts: int) -> None:
    labels = {"source": "web", "role": "pool"}
    write_set(tmp_path / "f", "filtered", [schemas.FILTERED.empty_table()] * parts, **labels)
    write_set(tmp_path / "c", "clusters", [schemas.clusters(2).empty_table()] * parts, **labels)
    unit = RebalanceUnit([part(1)], [str(tmp_path / "f")], {}, [str(tmp_path / "c")], 0, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="cannot take 1 images: the clusters hold 0"):
        execute(unit)


def test_workers_and_interruption_do_not_change_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, 1)
    parts = [part(name="one"), part(name="two", strategy="spread"), part(name="three", strategy="closest")]
    execute(world.unit(parts, "one"))
    execute(world.unit(parts, "two"), executor=TwoWorkers())
    whole, calls = SharesStep.write_part, []

    def write_part(step: SharesStep, number: int, writer: Any) -> None:
        calls.append(number)
        if calls == [0, 1]:
            raise LvdError("lost")
        whole(step, number, writer)

    monkeypatch.setattr(SharesStep, "write_part", write_part)
    with pytest.raises(LvdError, match="lost"):
        execute(world.unit(parts, "three"))
    execute(world.unit(parts, "three"))
    assert calls == [0, 1, 2, 1]
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "two") == fingerprints(tmp_path / "three")


def test_vectors_are_read_by_ranges_of_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, read, whole = World(tmp_path, 0), [], SharesStep._vectors

    def vectors(step: SharesStep, rows: Any) -> Any:
        read.append(len(rows))
        return whole(step, rows)

    monkeypatch.setattr(balanced, "SPREAD_BYTES", 12 * 20)
    monkeypatch.setattr(SharesStep, "_vectors", vectors)
    execute(world.unit([part(len(world.ids) // 2, levels=False, strategy="spread")]))
    sizes = np.bincount(world.cluster)
    given = np.bincount([world.cluster[world.ids.index(name)] for name in world.found()], minlength=len(sizes))
    assert sum(read) == sizes[given < sizes].sum()  # clusters that give all their images need no vectors
    assert len(read) > 3 and max(read) <= 20 + sizes.max()


def test_a_spread_without_vectors_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"strategy spread needs the vectors that .*c/web was made from"):
        execute(world.unit([part(strategy="spread")], vectors=False))
    execute(world.unit([part(strategy="closest")], vectors=False))
    ShardSet(str(tmp_path / "e/book")).delete()
    write_embeddings(tmp_path / "e/book", "book", [(world.ids[:1], world.vectors[:1])])
    with pytest.raises(ConfigError, match="c/book was not made from"):
        execute(world.unit([part(strategy="spread")], "other"))


@pytest.mark.parametrize("whole", [True, False])
def test_a_cluster_within_two_is_refused(tmp_path: Path, whole: bool) -> None:
    """One image lies elsewhere than the others of its cluster, or all of one part elsewhere than those of another."""
    world = World(tmp_path, 0)
    clusters = ShardSet(str(tmp_path / "c/book"))
    tables = [clusters.read(number) for number in range(clusters.num_parts)]
    odd = max(range(len(tables)), key=lambda number: tables[number].num_rows)
    column = tables[odd]["cluster_2"].to_numpy().copy()
    column[(tables[odd]["cluster_1"].to_numpy() == 0) if whole else column.argmin()] = 2
    tables[odd] = tables[odd].set_column(2, "cluster_2", [column])
    clusters.delete()
    write_set(clusters.uri, "clusters", tables, source="book", role="pool")
    with pytest.raises(LvdError, match=f"part-0000{odd}.parquet: a cluster of level 1 lies in two of level 2"):
        execute(world.unit([part()]))


@pytest.mark.parametrize(("key", "value"), [("levels", True), ("strategy", "closest")])
def test_keys_of_balanced_parts_go_with_nothing_else(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key} goes with balanced"):
        PartSettings(as_is="birds", **{key: value})

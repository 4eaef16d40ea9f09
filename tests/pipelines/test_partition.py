"""The partitioned join: it meets the pairs that its lists say, in one partition or many, with hubs, killed or not."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import hubs, signs
from curation.codes import encode
from curation.shards import PartWriter, ShardSet
from pipelines import flat, in_place, join, partitioned, unit
from pipelines.dedup import ComponentsStep
from pipelines.executor import LocalExecutor, Needs, Outcome, RayExecutor
from pipelines.partitioned import read_layout
from pipelines.progress import quiet
from pipelines.recipe import JoinSettings
from pipelines.retrieve import ClusterRule
from pipelines.unit import run_unit
from tests.builders import execute, fingerprints
from tests.pipelines.near_copies import (
    all_lists,
    all_pairs,
    brute_force,
    check_forest,
    dedup_unit,
    found_rows,
    joined,
    labels_of,
    make_world,
    maximum_forest,
    stored_forest,
)
from tests.pipelines.test_retrieve import World


def lists_of(num: int, lists_joined: int, **values: Any) -> JoinSettings:
    return joined(
        "partitioned", num_lists=num, lists_joined=lists_joined, **({"quantizers": 3, "min_recall": 0} | values)
    )


def travelling(partition_rows: int | None) -> dict[str, Any]:
    """Settings of a join in partitions of so many rows; None is in place."""
    return {"in_place": True} if partition_rows is None else {"in_place": False, "partition_rows": partition_rows}


@pytest.fixture
def _working_sets_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "_delete_working_sets", lambda steps: None)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitioned, "LIST_ROWS", 37)
    monkeypatch.setattr(flat, "FLAT_ROWS", 31)
    monkeypatch.setattr(in_place, "VISITS", 90)
    monkeypatch.setattr(join, "SAMPLE_BLOCK", 41)


def working(tmp_path: Path, name: str) -> ShardSet:
    return ShardSet(str(tmp_path / "duplicates" / f"_{name}"))


def met(tmp_path: Path, lists_joined: int) -> Callable[[int, int], bool]:
    """Whether one of a pair is stored in a list that the other visits, under some quantizer."""
    stored = working(tmp_path, "lists")
    tables = [stored.read(part) for part in range(stored.num_parts)]
    columns = [[row for table in tables for row in table[name].to_pylist()] for name in tables[0].column_names]
    lists = np.stack([np.asarray(column) for column in columns], axis=1)
    assert lists.shape[2] == lists_joined
    return lambda i, j: any(a[0] in b or b[0] in a for a, b in zip(lists[i], lists[j], strict=True))


@pytest.mark.usefixtures("_small_blocks", "_working_sets_stay")
@pytest.mark.parametrize("partition_rows", [None, 1000, 60, 11])
@pytest.mark.parametrize(("seed", "lists_joined"), [(0, 1), (1, 2), (2, 3)])
def test_pairs_meet_where_their_lists_say(
    tmp_path: Path, seed: int, lists_joined: int, partition_rows: int | None
) -> None:
    """None: in place."""
    world = make_world(tmp_path, seed, pool_sizes=(90, 60), num_families=70, dim=14)
    settings = lists_of(40, lists_joined, quantizers=1 + seed % 2, **travelling(partition_rows))
    execute(dedup_unit(tmp_path, world, references=[], join=settings, threshold=0.6))
    pairs, meet = all_pairs(world, 0.6), met(tmp_path, lists_joined)
    expected = [(a, b, s) for a, b, s in pairs if meet(a, b)]
    check_forest(stored_forest(tmp_path), expected, 150)
    assert maximum_forest(expected, 150) != maximum_forest(pairs, 150)  # else the lists would tell nothing
    if partition_rows is None:
        assert working(tmp_path, "leads").num_rows == 150
        return
    layout = read_layout(working(tmp_path, "layout").uri, 0)
    assert (layout.num_partitions > 1) == (partition_rows < 150)
    assert (layout.num_cells > 1).any() == (partition_rows == 11)


@pytest.mark.usefixtures("_small_blocks", "_working_sets_stay")
@pytest.mark.parametrize("partition_rows", [None, 1000, 60])
def test_long_vectors_go_through_the_sieve_wherever_they_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition_rows: int | None
) -> None:
    """In place and scattered the same pairs: those that meet and differ in few bits, here fewer than as a rule."""
    monkeypatch.setattr(signs, "DEVIATIONS", 0.0)
    world = make_world(tmp_path, 5, pool_sizes=(90, 60), num_families=20, dim=512)
    settings = lists_of(12, 2, quantizers=2, **travelling(partition_rows))
    execute(dedup_unit(tmp_path, world, references=[], join=settings, threshold=0.83))
    x = np.stack([world.vector[i] for ids in world.pools.values() for i in ids])
    bits, meet = signs.sketches(encode(x).values), met(tmp_path, 2)
    pairs = [(a, b, s) for a, b, s in all_pairs(world, 0.83) if meet(a, b)]
    passed = signs.passes(*(bits[[pair[end] for pair in pairs]] for end in (0, 1)), signs.most_bits(0.83))
    expected = [pair for pair, kept in zip(pairs, passed, strict=True) if kept]
    check_forest(stored_forest(tmp_path), expected, 150)
    assert maximum_forest(expected, 150) != maximum_forest(pairs, 150)


@pytest.mark.usefixtures("_small_blocks")
def test_vectors_are_mapped_once_and_let_go_with_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are still mapped keep their space on the disk although they are deleted."""
    mapped: list[str] = []
    seen: list[int] = []
    make_flat, make_component = in_place.Flat, ComponentsStep.write_part

    def flat_of(uri: str) -> flat.Flat:
        mapped.append(uri)
        return make_flat(uri)

    def write_part(step: ComponentsStep, part: int, writer: PartWriter) -> None:
        seen.append(sum("_flat" in line for line in Path("/proc/self/maps").read_text().splitlines()))
        make_component(step, part, writer)

    monkeypatch.setattr(in_place, "Flat", flat_of)
    monkeypatch.setattr(ComponentsStep, "write_part", write_part)
    world = make_world(tmp_path, 0, pool_sizes=(90, 60))
    execute(dedup_unit(tmp_path, world, references=[], join=lists_of(40, 2, in_place=True), threshold=0.6))
    assert len(mapped) == 1 and seen == [0]


def planted_hub(tmp_path: Path, seed: int, settings: JoinSettings, threshold: float = 0.9) -> tuple[Any, int]:
    """A world of 500 with a hub of 200 around one center, 50 of them equal, joined."""
    world = make_world(tmp_path, seed, pool_sizes=(260, 240), num_families=120, dim=16, hub=100)
    execute(dedup_unit(tmp_path, world, references=[], join=settings, threshold=threshold))
    return world, 500


HUB_ENGINES = {
    "exact": joined("exact"),
    "in place": all_lists(in_place=True),
    "one partition": all_lists(in_place=False),
    "scattered": all_lists(in_place=False, partition_rows=250, num_lists=4, lists_joined=4, quantizers=1),
}


@pytest.fixture
def pair_edges(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of edges that the pairs of each run hold before the forest reduces them."""
    from pipelines.dedup import ForestStep

    seen: list[int] = []
    plain = ForestStep.write_part

    def write_part(self: ForestStep, part: int, writer: Any) -> None:
        seen.append(sum(ShardSet(uri).num_rows for uri in self.edges))
        plain(self, part, writer)

    monkeypatch.setattr(ForestStep, "write_part", write_part)
    return seen


@pytest.mark.usefixtures("_working_sets_stay")
@pytest.mark.parametrize("name", HUB_ENGINES)
def test_hubs_keep_components_at_every_threshold_below_tau(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for constant in ("JOIN_ROWS", "LEAST_JOIN_ROWS"):
        monkeypatch.setattr(join, constant, 150)
    world, num = planted_hub(tmp_path, 0, HUB_ENGINES[name], threshold=0.6)
    assert working(tmp_path, "hubs").num_rows >= 1
    found = stored_forest(tmp_path)
    for cut in (0.6, 0.7, 0.8, 0.9, 0.95, hubs.TAU):
        kept = [edge for edge in found if edge[2] > np.float32(cut)]
        assert labels_of(kept, num) == labels_of(all_pairs(world, cut), num)
    assert len(set(labels_of(found, num))) < 300


@pytest.mark.usefixtures("_working_sets_stay")
@pytest.mark.parametrize("partition_rows", [None, 1000, 120])
@pytest.mark.parametrize("quantizers", [1, 3])
def test_a_hub_costs_edges_linear_in_its_size(
    tmp_path: Path, pair_edges: list[int], quantizers: int, partition_rows: int | None
) -> None:
    """Its members are scattered over lists and partitions, and hang together by their pivot nevertheless."""
    settings = lists_of(32, 1, quantizers=quantizers, **travelling(partition_rows))
    world, num = planted_hub(tmp_path, 1, settings)
    assert pair_edges[0] <= 4 * num
    members = {i for a, b, s in all_pairs(world, 0.99) for i in (a, b)}
    pivots = [row["number"] for row in working(tmp_path, "hubs").read(0, ["number"]).to_pylist()]
    assert len(members) >= 200 and pivots
    labels = labels_of(stored_forest(tmp_path), num)
    assert len({labels[member] for member in members & set(near(world, pivots[0]))}) == 1
    lists = working(tmp_path, "lists").read(0)["lists_0"].to_pylist()
    assert len({lists[member][0] for member in members}) > 1


def near(world: Any, pivot: int) -> list[int]:
    """What lies in the ball of a node."""
    return [other for a, b, s in all_pairs(world, hubs.BALL) for other in (a, b) if pivot in (a, b)]


class Killed(LocalExecutor):
    """Is killed before the `tasks`-th task that finds work to do; tells what it was asked for."""

    def __init__(self, tasks: int) -> None:
        self.left = tasks
        self.asked: list[tuple[str, int]] = []

    def map(self, work: Callable[[int], Any], items: Iterable[int], needs: Needs) -> Iterator[Outcome]:
        for item in items:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.asked.append((work.step.out.rsplit("/", 1)[1], item))  # type: ignore[attr-defined]
            yield item, work(item)


def made(place: Path) -> dict[str, str]:
    return {name: value for name, value in fingerprints(place).items() if name[:2] not in ("e/", "i/")}


SCATTERED = all_lists(in_place=False, partition_rows=60, num_lists=4, lists_joined=2, quantizers=2, min_recall=0)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("settings", [SCATTERED, all_lists(quantizers=5, in_place=True)])
def test_killed_at_every_task_it_makes_each_part_once(tmp_path: Path, settings: JoinSettings) -> None:
    for place in (tmp_path / "whole", tmp_path / "killed"):
        world = make_world(place, 3, pool_sizes=(60, 40))
    whole = Killed(10_000)
    assert run_unit(dedup_unit(tmp_path / "whole", world, join=settings), whole, quiet())
    asked: list[tuple[str, int]] = []
    for _ in whole.asked:
        executor = Killed(1)
        with suppress(KeyboardInterrupt):
            run_unit(dedup_unit(tmp_path / "killed", world, join=settings), executor, quiet())
        asked += executor.asked
    assert asked == whole.asked
    assert max(Counter(asked).values()) == 1
    assert made(tmp_path / "killed") == made(tmp_path / "whole")
    assert not run_unit(dedup_unit(tmp_path / "killed", world, join=settings), Killed(0), quiet())


@pytest.mark.usefixtures("_small_blocks")
def test_what_was_scattered_is_freed_and_not_scattered_again(tmp_path: Path) -> None:
    """Killed with all pairs done and the forest not."""
    world = make_world(tmp_path, 3, pool_sizes=(60, 40))
    names = [name for name, _ in asked_in_one_go(tmp_path / "other")]
    executor = Killed(names.index("forest"))
    with pytest.raises(KeyboardInterrupt):
        run_unit(dedup_unit(tmp_path, world, join=SCATTERED), executor, quiet())
    left = sorted(path.name for path in (tmp_path / "duplicates").iterdir())
    assert left == ["_hubs", "_layout", "_lists", "_pairs_0", "_pairs_1", "_quantizers", "_sample", "book", "web"]
    resumed = Killed(10_000)
    run_unit(dedup_unit(tmp_path, world, join=SCATTERED), resumed, quiet())
    again = [name for name, _ in resumed.asked]
    assert again == names[names.index("forest") :]
    assert "_reference_scatter_0" in again and "_scatter_0" not in again


def asked_in_one_go(tmp_path: Path) -> list[tuple[str, int]]:
    executor = Killed(10_000)
    world = make_world(tmp_path, 3, pool_sizes=(60, 40))
    run_unit(dedup_unit(tmp_path, world, join=SCATTERED), executor, quiet())
    return executor.asked


@pytest.mark.usefixtures("_small_blocks")
def test_a_partition_that_fails_is_made_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scattered vectors stay while one of their partitions is missing."""
    from pipelines.partition import PartitionStep

    world = make_world(tmp_path, 3, pool_sizes=(60, 40))
    plain = PartitionStep.write_part

    def write_part(self: PartitionStep, part: int, writer: Any) -> None:
        if part == 1:
            raise ValueError("a bad day")
        plain(self, part, writer)

    with monkeypatch.context() as patch:
        patch.setattr(PartitionStep, "write_part", write_part)
        with pytest.raises(Exception, match=r"part-00001 of .*_pairs_0 failed: ValueError: a bad day \(\d+ of"):
            execute(dedup_unit(tmp_path, world, join=SCATTERED))
    assert working(tmp_path, "scatter_0").is_complete
    resumed = Killed(10_000)
    run_unit(dedup_unit(tmp_path, world, join=SCATTERED), resumed, quiet())
    assert resumed.asked[:2] == [("_pairs_0", 1), ("_scatter_1", 0)]
    asked_in_one_go(tmp_path / "whole")
    names = ("duplicates", "forest", "recall")
    assert [made(tmp_path / name) for name in names] == [made(tmp_path / "whole" / name) for name in names]


@pytest.fixture(scope="module")
def two_ray_workers() -> Iterator[RayExecutor]:
    executor = RayExecutor(2)
    yield executor
    executor.close()


@pytest.mark.parametrize("partition_rows", [None, 30])
def test_ray_gives_the_same_bytes(tmp_path: Path, partition_rows: int | None, two_ray_workers: RayExecutor) -> None:
    settings = all_lists(num_lists=5, lists_joined=5, quantizers=2, **travelling(partition_rows))
    local, spread = tmp_path / "local", tmp_path / "ray"
    for place in (local, spread):
        world = make_world(place, 4)
    execute(dedup_unit(local, world, join=settings))
    run_unit(dedup_unit(spread, world, join=settings), two_ray_workers, quiet())
    assert made(local) == made(spread)
    assert found_rows(spread, world) == brute_force(world, 0.9, 0.8, "component")


@pytest.mark.parametrize("engine", ["exact", "partitioned"])
def test_ray_retrieves_the_same_bytes(tmp_path: Path, engine: str, two_ray_workers: RayExecutor) -> None:
    """Both ways to retrieve, in as many tasks as there are parts and ranges; the recall that was measured, too."""
    world = World(tmp_path, 2)
    search = {"num_lists": 6, "lists_joined": 2, "quantizers": 2, "partition_rows": 30, "min_recall": 0}
    for out, executor in (("local", LocalExecutor()), ("ray", two_ray_workers)):
        execute(world.unit(4, ClusterRule(3, 1, 9), out, engine=engine, **search), executor=executor)
    made = fingerprints(tmp_path / "local")
    assert made == fingerprints(tmp_path / "ray")
    assert any(name.startswith("_recall_birds/") for name in made) == (engine == "partitioned")
    assert sum(name.startswith("birds/") for name in made) == 6


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(("seed", "hub"), [(0, 0), (1, 0), (2, 40)])
def test_in_place_gives_the_bytes_that_partitions_give(tmp_path: Path, seed: int, hub: int) -> None:
    """With lists that miss pairs, equal vectors, zero vectors, references and a hub."""
    for rows in (None, 1000, 50):
        world = make_world(tmp_path / str(rows), seed, pool_sizes=(110, 90), num_families=60, dim=12, hub=hub)
        settings = lists_of(30, 2, quantizers=2, **travelling(rows))
        execute(dedup_unit(tmp_path / str(rows), world, join=settings, threshold=0.8, reference_threshold=0.7))
    in_place, one, many = (made(tmp_path / place) for place in ("None", "1000", "50"))
    assert in_place == one == many
    assert any(name.startswith("forest/") for name in in_place)

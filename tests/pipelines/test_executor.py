"""Executors: every item once, exceptions come back, lost workers are replaced."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curation.errors import ConfigError, LvdError, PartialError
from pipelines.executor import Executor, LocalExecutor, Needs, RayExecutor, open_executor


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[Executor]:
    from ray import cloudpickle

    executor = RayExecutor(2)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    yield executor
    executor.close()


@pytest.fixture(params=["local", "ray"])
def executor(request: pytest.FixtureRequest) -> Executor:
    return LocalExecutor() if request.param == "local" else request.getfixturevalue("ray_executor")


class Square:
    """Squares; fails for some."""

    def __call__(self, item: int) -> int:
        if item == 3:
            raise ConfigError("three is not wanted")
        if item == 4:
            raise ValueError("nor is four")
        return item * item


def collect(executor: Executor, work: Any, items: Any, needs: Needs | None = None) -> dict[int, Any]:
    outcomes = list(executor.map(work, items, needs or Needs()))
    assert len({item for item, _ in outcomes}) == len(outcomes)
    return dict(outcomes)


@pytest.mark.parametrize("resident", [False, True])
def test_every_item_comes_back_once_and_exceptions_with_it(executor: Executor, resident: bool) -> None:
    found = collect(executor, Square(), range(12), Needs(resident=resident))
    errors = {item: found.pop(item) for item in (3, 4)}
    assert found == {item: item * item for item in range(12) if item not in (3, 4)}
    assert type(errors[3]) is ConfigError
    assert str(errors[3]) == "three is not wanted"
    assert isinstance(errors[4], ValueError)
    assert collect(executor, Square(), []) == {}


@pytest.mark.parametrize(
    ("resources", "needs", "workers"),
    [
        ({"CPU": 2}, Needs(), 2),
        ({"CPU": 2}, Needs(cpus=2), 1),
        ({"CPU": 16, "GPU": 4}, Needs(), 2),
        ({"CPU": 16, "GPU": 1}, Needs(gpus=1), 1),
        ({"CPU": 7, "GPU": 4}, Needs(cpus=4, gpus=1), 1),
    ],
)
def test_no_more_workers_than_find_a_place(
    ray_executor: RayExecutor,
    monkeypatch: pytest.MonkeyPatch,
    resources: dict[str, float],
    needs: Needs,
    workers: int,
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    assert ray_executor._workers_for(needs) == workers


def test_workers_that_would_wait_for_ever_are_refused(ray_executor: RayExecutor) -> None:
    for needs in (Needs(resident=True, cpus=3), Needs(resident=True, gpus=1000)):
        with pytest.raises(ConfigError, match=f"needs {needs.cpus} cores and {needs.gpus} GPUs, but the cluster has 2"):
            list(ray_executor.map(Square(), range(3), needs))
    assert collect(ray_executor, Square(), range(3), Needs(resident=True, cpus=2)) == {0: 0, 1: 1, 2: 4}


class Counting:
    """Tells how many items this worker has worked on, and which process it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, item: int) -> tuple[int, int]:
        self.count += 1
        time.sleep(0.02)
        return os.getpid(), self.count


def test_residents_keep_what_they_have_loaded(ray_executor: Executor) -> None:
    found = collect(ray_executor, Counting(), range(10), Needs(resident=True))
    workers = {pid for pid, _ in found.values()}
    assert len(workers) == 2
    for worker in workers:
        counts = sorted(count for pid, count in found.values() if pid == worker)
        assert counts == list(range(1, len(counts) + 1))


def test_few_items_are_spread_over_the_workers(ray_executor: Executor) -> None:
    found = collect(ray_executor, Counting(), range(2), Needs(resident=True))
    assert len({pid for pid, _ in found.values()}) == 2


def test_work_in_flight_is_bounded(ray_executor: Executor) -> None:
    asked = []

    def items() -> Iterator[int]:
        for item in range(30):
            asked.append(item)
            yield item

    for finished, _ in enumerate(ray_executor.map(Square(), items(), Needs()), start=1):
        assert len(asked) - finished <= 2 * ray_executor.workers + 1
    assert len(asked) == 30


class Dying:
    """Kills its worker at the first attempt of item 1, or at every attempt of item 2."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def __call__(self, item: int) -> int:
        marker = Path(self.directory) / "died"
        if item == 1 and not marker.exists():
            marker.touch()
            os._exit(1)
        if item == 2:
            os._exit(1)
        return item


@pytest.mark.parametrize("resident", [False, True])
def test_a_lost_worker_is_replaced(ray_executor: Executor, tmp_path: Path, resident: bool) -> None:
    assert collect(ray_executor, Dying(str(tmp_path)), [0, 1, 3, 4], Needs(resident=resident)) == {
        item: item for item in (0, 1, 3, 4)
    }
    assert (tmp_path / "died").exists()


def test_an_item_that_kills_every_worker_comes_back_as_an_error(ray_executor: Executor, tmp_path: Path) -> None:
    found = collect(ray_executor, Dying(str(tmp_path)), [0, 2])
    assert found[0] == 0
    assert isinstance(found[2], LvdError)
    assert not isinstance(found[2], ConfigError | PartialError)
    assert "a worker was lost 4 times over" in str(found[2])


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="--local"):
        open_executor(None, "auto", True)
    with pytest.raises(ConfigError, match="--local"):
        open_executor(2, None, True)
    with pytest.raises(ConfigError, match="at least 1"):
        open_executor(0, None, False)
    assert isinstance(open_executor(1, None, True), LocalExecutor)


class TorchThreads:
    """How many threads torch has."""

    def __call__(self, item: int) -> int:
        import torch

        return torch.get_num_threads()


def test_torch_has_one_thread_whatever_the_worker_did_before(ray_executor: Executor) -> None:
    """Ray tells a process once: one whose first task had two cores would spin on both in all that follow."""
    before = collect(ray_executor, TorchThreads(), range(2), Needs(cpus=2))
    after = collect(ray_executor, TorchThreads(), range(4))
    resident = collect(ray_executor, TorchThreads(), range(2), Needs(resident=True))
    assert {*before.values(), *after.values(), *resident.values()} == {1}

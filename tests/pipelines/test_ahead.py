"""Work ahead in threads: order, bounds, errors and an end without threads left behind."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from pipelines.ahead import IN_FLIGHT, ahead, ordered_map


def counted(stop: int, taken: list[int]) -> Iterator[int]:
    for number in range(stop):
        taken.append(number)
        yield number


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_whatever_takes_longest(seed: int, threads: int) -> None:
    pauses = np.random.default_rng(seed).uniform(0, 0.003, 60)

    def slow(number: int) -> int:
        time.sleep(pauses[number])
        return number * number

    assert list(ordered_map(slow, range(60), threads)) == [n * n for n in range(60)]


def test_calls_run_side_by_side() -> None:
    both = threading.Barrier(2, timeout=20)
    assert list(ordered_map(lambda number: both.wait() >= 0, range(4), 2)) == [True] * 4


@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_items_are_taken_than_said(threads: int) -> None:
    taken: list[int] = []
    for done, _ in enumerate(ordered_map(lambda number: number, counted(100, taken), threads), 1):
        assert len(taken) <= done + threads * IN_FLIGHT - 1
    assert len(taken) == 100


def test_an_error_comes_at_its_place() -> None:
    results = ordered_map(lambda number: 1 // (number - 5), range(10), 2)
    assert [next(results) for _ in range(5)] == [1 // (n - 5) for n in range(5)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_items_come_ahead_in_order_and_in_bounds() -> None:
    taken: list[int] = []
    with ahead(counted(50, taken), 2) as items:
        for number, item in enumerate(items):
            assert item == number
            time.sleep(0.002)
            assert len(taken) <= number + 1 + 2 + 1  # taken by us, waiting, and one in the producer's hand
    assert len(taken) == 50


def test_the_producer_runs_in_a_thread_of_its_own() -> None:
    def who() -> Iterator[int]:
        yield threading.get_ident()

    with ahead(who(), 1) as items:
        assert list(items) != [threading.get_ident()]


def test_an_error_of_the_producer_is_raised_after_what_came_before() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    with ahead(broken(), 3) as items:
        assert next(items) == 1
        with pytest.raises(KeyError, match="gone"):
            next(items)


def test_leaving_early_stops_the_thread_and_closes_the_producer() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    with ahead(endless(), 2) as items:
        next(items)
    assert closed.is_set()
    assert threading.active_count() == before

"""The endless order of a source: each row once an epoch, shuffled, and the same wherever one begins."""

import numpy as np
import pytest

from trainer.order import FILES_TOGETHER, Groups, Order


def groups(files: list[list[int]], window: int = 3, run: int = 1) -> Groups:
    file = np.repeat(np.arange(len(files), dtype=np.int32), [len(sizes) for sizes in files])
    return Groups(file, np.concatenate([np.array(sizes, np.int32) for sizes in files]), window, run)


def some(seed: int) -> Groups:
    rng = np.random.default_rng(seed)
    files = [rng.integers(0, 12, rng.integers(1, 7)).tolist() for _ in range(rng.integers(1, 25))] + [[0, 5, 0]]
    return groups(files, int(rng.integers(1, 9)), int(rng.integers(1, 6)))


def numbers(of: Groups, places: np.ndarray) -> np.ndarray:
    """Rows of the source, numbered through, from (group, row)."""
    starts = np.concatenate([[0], np.cumsum(of.rows)])
    assert (places[:, 1] < of.rows[places[:, 0]]).all()
    return starts[places[:, 0]] + places[:, 1]


@pytest.mark.parametrize("seed", range(12))
def test_an_epoch_has_each_row_once_and_any_stretch_is_found_at_once(seed: int) -> None:
    of = some(seed)
    total, rng = of.num_rows, np.random.default_rng(seed)
    whole = numbers(of, Order(of, seed, "a").stretch(0, 3 * total))
    epochs = whole.reshape(3, total)
    assert (np.sort(epochs, axis=1) == np.arange(total)).all()
    for _ in range(20):
        first, count = int(rng.integers(0, 2 * total)), int(rng.integers(0, total + 1))
        part = numbers(of, Order(of, seed, "a").stretch(first, count))
        assert part.tolist() == whole[first : first + count].tolist()


def test_seeds_names_and_epochs_give_other_orders() -> None:
    of = groups([[10, 10, 10]] * 20)
    orders = [Order(of, 0, "a").stretch(first, 600) for first in (0, 600, 1200)]
    orders += [Order(of, 1, "a").stretch(0, 600), Order(of, 0, "b").stretch(0, 600)]
    for place, one in enumerate(orders):
        for other in orders[:place]:
            same = (numbers(of, one) == numbers(of, other)).sum()
            assert same < 12  # 1 is expected


def test_every_row_is_equally_likely_at_every_place() -> None:
    """Over many epochs: of 60 rows each third of the data falls equally into each sixth of the epoch."""
    of = groups([[5] * n for n in (1, 2, 3, 1, 2, 3)], window=3, run=2)
    order, epochs = Order(of, 5, "a"), 600
    rows = numbers(of, order.stretch(0, 60 * epochs)).reshape(epochs, 60)
    thirds = (rows // 20).reshape(epochs, 6, 10)
    counts = np.array([(thirds == third).sum(axis=(0, 2)) for third in range(3)])
    expected = epochs * 10 / 3
    assert np.abs(counts / expected - 1).max() < 0.12


def test_a_window_is_in_uniformly_random_order_where_runs_are_of_one_row() -> None:
    of = groups([[2, 4]], window=2)
    rows = numbers(of, Order(of, 1, "a").stretch(0, 6 * 1200)).reshape(1200, 6)
    counts = np.array([[(rows[:, place] == row).sum() for row in range(6)] for place in range(6)])
    assert np.abs(counts - 1200 / 6).max() < 5 * np.sqrt(1200 / 6)
    pairs = rows[:, 0] * 6 + rows[:, 1]
    chi = ((np.bincount(pairs, minlength=36).reshape(6, 6)[~np.eye(6, dtype=bool)] - 1200 / 30) ** 2).sum() / (
        1200 / 30
    )
    assert chi < 65  # 29 degrees of freedom; 58 is exceeded once in a thousand


def test_windows_hold_so_many_groups_of_files_that_are_read_together() -> None:
    of = groups([[7] * 5 for _ in range(4 * FILES_TOGETHER)], window=4)
    places = Order(of, 3, "a").stretch(0, of.num_rows)
    windows = places[:, 0].reshape(-1, 4 * 7)
    assert all(len(np.unique(window)) == 4 for window in windows)
    files = of.file[places[:, 0]].reshape(4, -1)
    together = [set(part.tolist()) for part in files]
    assert all(len(part) == FILES_TOGETHER for part in together)
    assert together[0] != set(range(FILES_TOGETHER))
    assert len(set(of.file[windows[0]].tolist())) > 1
    of = groups([[2] * 40], window=4)
    first, second = Order(of, 3, "a").stretch(0, 160)[:, 0].reshape(2, 10, 8)
    assert not {frozenset(w.tolist()) for w in first} & {frozenset(w.tolist()) for w in second}


def test_runs_keep_rows_of_a_group_together() -> None:
    of = groups([[16] * 6], window=6, run=4)
    places = Order(of, 2, "a").stretch(0, 96).reshape(24, 4, 2)
    assert (places[:, :, 0] == places[:, :1, 0]).all()
    assert len(np.unique(places[:4, 0, 0])) > 1
    again = Order(of, 2, "a").stretch(96, 96).reshape(24, 4, 2)
    one, other = ({frozenset(map(tuple, run.tolist())) for run in runs} for runs in (places, again))
    assert not one & other  # the next epoch cuts other runs


@pytest.mark.parametrize("seed", range(4))
def test_what_stands_instead_is_of_the_window_or_from_anywhere(seed: int) -> None:
    of = groups([[5, 5, 5, 5]] * 10, window=2)
    order = Order(of, seed, "a")
    position = 200 + 10 * 7 + 3
    window = {tuple(p) for p in order.stretch(270, 10).tolist()}
    near = {order.instead(position, attempt, anywhere=False) for attempt in range(100)}
    assert near == window
    far = {order.instead(position, attempt, anywhere=True) for attempt in range(400)}
    assert len(far) > 130 and far <= {tuple(p) for p in order.stretch(200, 200).tolist()}
    assert order.instead(position, 3, True) == Order(of, seed, "a").instead(position, 3, True)

"""Batches: the same for any number of workers, no sample twice or never over any ranks, and clear ends."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from curation.errors import ConfigError, LvdError, PartialError
from tests.trainer.images_for_training import batch, number, random_files, write_files
from trainer.loader import TRIES, Loader, Reject
from trainer.samples import Dataset, Source, open_dataset

ROOT = Path(__file__).parents[2]


def loaded(dataset: Dataset, steps: int, **settings: int) -> list[object]:
    return list(itertools.islice(Loader(dataset, number, batch, **settings), steps))  # type: ignore[arg-type]


def in_turns(dataset: Dataset, steps: int, workers: int, **settings: int) -> list[object]:
    """What `workers` workers make, put together, without their processes."""
    loader = Loader(dataset, number, batch, **settings)  # type: ignore[arg-type]
    streams = [loader._steps.of_worker(worker, workers) for worker in range(workers)]
    return [next(streams[step % workers]) for step in range(steps)]


def numbers(items: list[object]) -> list[int]:
    """Of the samples of all batches."""
    return [sample for _, (_, made), _ in items for (sample, _), _ in made]  # type: ignore[attr-defined]


def keys(items: list[object]) -> list[tuple[int, int]]:
    return [key for _, (_, made), _ in items for (_, key), _ in made]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three sources, one of them homogeneous, with broken images."""
    rng, root, first, sources = np.random.default_rng(3), tmp_path_factory.mktemp("mixed"), 0, []
    for name, weight in (("a", 0.2), ("b", 0.5), ("c", 0.3)):
        files = random_files(rng)
        last = write_files(root / name, files, broken=range(first, first + 300, 7), first=first)
        sources.append(Source(name, str(root / name), weight=weight, homogeneous=name == "a"))
        first = last
    return open_dataset(sources, 3_000)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_ranks_and_workers_together_have_each_sample_once_an_epoch(tmp_path: Path, seed: int, ranks: int) -> None:
    rng = np.random.default_rng(seed)
    total = write_files(tmp_path, random_files(rng))
    dataset = open_dataset([Source("a", str(tmp_path))], int(rng.integers(1, 1000)))
    size = int(rng.integers(1, 9))
    steps = -(-3 * total // (size * ranks))
    settings = {"batch_size": size, "ranks": ranks, "seed": seed}
    by_rank = [loaded(dataset, steps, rank=rank, **settings) for rank in range(ranks)]
    for workers in (1, 2, 3):
        assert in_turns(dataset, steps, workers, rank=ranks - 1, **settings) == by_rank[-1]
    seen = [n for step in range(steps) for rank in by_rank for n in numbers([rank[step]])]
    places = [key for step in range(steps) for rank in by_rank for key in keys([rank[step]])]
    assert places == [(seed, place) for place in range(len(places))]
    for epoch in range(3):
        assert sorted(seen[epoch * total : epoch * total + total]) == list(range(total))


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_make_the_same_batches(mixed: Dataset, workers: int) -> None:
    settings = {"batch_size": 4, "rank": 1, "ranks": 2, "start_step": 5, "seed": 2}
    before = torch.get_rng_state()
    made = loaded(mixed, 20, workers=workers, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert made == loaded(mixed, 20, **settings)
    assert [item[0] for item in made] == list(range(5, 25))  # type: ignore[index]
    assert sum(len(item[2]) for item in made) > 3  # type: ignore[index]


def test_a_run_that_goes_on_makes_what_one_not_interrupted_makes(mixed: Dataset) -> None:
    whole = loaded(mixed, 40, batch_size=6, seed=1)
    for step in (0, 1, 7, 39):
        assert in_turns(mixed, 40 - step, 2, batch_size=6, seed=1, start_step=step) == whole[step:]
    other = loaded(mixed, 40, batch_size=6, seed=2)
    assert numbers(other) != numbers(whole)


def test_from_one_rank_to_two_at_any_step_nothing_is_lost_or_repeated(mixed: Dataset) -> None:
    whole = loaded(mixed, 30, batch_size=6, seed=1)
    for step in (1, 13):
        halves = [loaded(mixed, 30 - step, batch_size=3, rank=r, ranks=2, seed=1, start_step=step) for r in (0, 1)]
        together = [n for pair in zip(*halves, strict=True) for n in numbers(list(pair))]
        assert together == numbers(whole[step:])
        assert [k for pair in zip(*halves, strict=True) for k in keys(list(pair))] == keys(whole[step:])


def test_broken_images_are_replaced_by_others_and_named(tmp_path: Path) -> None:
    total = write_files(tmp_path, [[5] * 6] * 4, broken=[3, 50])
    dataset = open_dataset([Source("a", str(tmp_path))], 1_000)
    items = loaded(dataset, total // 4, batch_size=4)
    rejects = [reject for _, _, some in items for reject in some]  # type: ignore[attr-defined]
    first = Reject("a", "id3", str(tmp_path / "000.parquet"), 3, "broken")
    second = Reject("a", "id50", str(tmp_path / "001.parquet"), 20, "broken")
    assert {first, second} == set(rejects)
    seen = numbers(items)
    assert len(seen) == total and set(seen) == set(range(total)) - {3, 50}
    assert all(name == f"id{n}" for _, (_, made), _ in items for (n, _), name in made)  # type: ignore[attr-defined]


def test_where_nothing_can_be_decoded_it_ends(tmp_path: Path) -> None:
    write_files(tmp_path, [[5, 6]], broken=range(11))
    dataset = open_dataset([Source("web", str(tmp_path))])
    with pytest.raises(LvdError, match=rf"^source web: {TRIES + 1} images in a row .*000.parquet, row \d+ \(broken\)"):
        loaded(dataset, 1, batch_size=2)


def test_a_window_of_broken_images_is_left_behind(tmp_path: Path) -> None:
    write_files(tmp_path, [[1]] * 8 + [[1]] * 8, broken=range(8))
    dataset = open_dataset([Source("web", str(tmp_path))], 1)
    assert dataset.images[0].groups.window == 1
    items = loaded(dataset, 16, batch_size=1)
    assert set(numbers(items)) <= set(range(8, 16))
    assert all(len(item[2]) in (0, *range(TRIES // 2 + 1, TRIES)) for item in items)  # type: ignore[index]


def lacks_space(data: bytes, key: tuple[int, int]) -> int:
    if key[1] < 8:
        return 0
    raise PartialError("no space")


def is_wrong(data: bytes, key: tuple[int, int]) -> int:
    raise KeyError("colour\nand more")


def dies(data: bytes, key: tuple[int, int]) -> int:
    os._exit(3)


def count(views: list[int], names: list[str], step: int) -> int:
    return len(views)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_as_one_clear_line(mixed: Dataset, workers: int) -> None:
    loader = Loader(mixed, lacks_space, count, batch_size=4, workers=workers)
    with pytest.raises(PartialError, match=r"^no space$"):
        assert len(list(zip(loader, range(10), strict=False))) < 3
    with pytest.raises(LvdError, match=r"^cannot make the batch of step 7: KeyError: 'colour\\nand more'$") as caught:
        next(iter(Loader(mixed, is_wrong, count, batch_size=4, workers=workers, start_step=7)))
    assert "in is_wrong" in str(caught.value.__cause__)


def test_a_worker_that_dies_is_told_of(mixed: Dataset) -> None:
    with pytest.raises(LvdError, match=r"^a loader process died, .*; try fewer workers"):
        next(iter(Loader(mixed, dies, count, batch_size=4, workers=1)))


def test_numbers_that_make_no_sense(mixed: Dataset) -> None:
    for wrong in ({"batch_size": 0}, {"batch_size": 1, "rank": 2, "ranks": 2}, {"batch_size": 1, "workers": -1}):
        with pytest.raises(ConfigError, match=r"^loader: "):
            Loader(mixed, number, batch, **wrong)


def test_ctrl_c_ends_it_cleanly_and_workers_outlast_it(tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of the terminal: this one goes on for two batches, and no process is left."""
    write_files(tmp_path / "data", [[50] * 3] * 3)
    program = f"""
        import signal, time
        from multiprocessing import active_children
        from tests.trainer.images_for_training import batch, number
        from trainer.loader import Loader
        from trainer.samples import Source, open_dataset

        if __name__ == "__main__":
            dataset = open_dataset([Source("a", {str(tmp_path / "data")!r})])
            loader = Loader(dataset, number, batch, batch_size=4, workers=2)
            stop = []
            signal.signal(signal.SIGINT, lambda *_: stop.append(1))
            left = 20
            for step, _, _ in loader:
                if step == 3:
                    print(*(child.pid for child in active_children()), flush=True)
                    while not stop:
                        time.sleep(0.02)
                left -= bool(stop)
                if not left:
                    break
            print("saved", flush=True)
            signal.signal(signal.SIGINT, signal.default_int_handler)
    """
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(program))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        [sys.executable, str(script)], stdout=-1, stderr=-1, text=True, env=environment, start_new_session=True
    )
    assert running.stdout is not None
    children = [int(pid) for pid in running.stdout.readline().split()]
    assert len(children) == 2
    os.killpg(running.pid, signal.SIGINT)
    try:
        out, errors = running.communicate(timeout=240)
    finally:
        running.kill()
    assert (out, errors, running.returncode) == ("saved\n", "", 0)
    assert gone(children)


def test_an_iterator_that_is_dropped_leaves_no_processes(mixed: Dataset) -> None:
    from multiprocessing import active_children

    before = set(active_children())
    iterator = iter(Loader(mixed, number, batch, batch_size=4, workers=2))
    next(iterator)
    mine = {child.pid for child in set(active_children()) - before if child.pid}
    assert len(mine) == 2
    del iterator
    assert gone(sorted(mine))


def gone(pids: list[int]) -> bool:
    """Whether these processes end within some seconds."""
    for _ in range(200):
        pids = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
        if not pids:
            return True
        time.sleep(0.05)
    return False

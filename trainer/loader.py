"""Batches for one rank, made by worker processes: the same whatever their number, from any step on.

Step s has samples [s G, (s + 1) G) of the endless order, G being batch_size x ranks; rank r has the r-th slice, and a
worker makes whole batches, in turn with the others. Ranks and workers share nothing: each finds its samples by
arithmetic. So a run that goes on with another number of workers, or of ranks and the same G, repeats and loses nothing.

What it costs: a worker reads a row group once for all it takes of a window, so with W workers over all ranks an image's
bytes are read up to W times; with large row groups at most (rows of a group / 8) times, as 8 rows of a group follow one
another. Of local files that is 0.1 ms for each image read in vain, a few in a hundred of the time for its crops.
"""

import itertools
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from curation.errors import ConfigError, LvdError
from embedders.images import UndecodableImage
from trainer.reader import Reader
from trainer.samples import Dataset, Place, Samples

TRIES = 16
"""Samples tried in the place of one that cannot be decoded: half from its window, half from anywhere."""
BATCHES_AHEAD = 2
"""Batches that a worker has ready or in the making."""

View = TypeVar("View")
Made = TypeVar("Made")


class Reject(NamedTuple):
    """An image that could not be used, and so was replaced by another of its source."""

    source: str
    image_id: str
    file: str
    row: int
    reason: str


@dataclass(frozen=True)
class _Failure:
    """What ended a worker: an error of ours as it is, or another in one line; and where it came from."""

    error: LvdError
    trace: str


class _Trace(Exception):  # noqa: N818
    """Shown as the cause of an error that came from a worker: the traceback there."""


class _Steps(IterableDataset[object], Generic[View, Made]):
    """What a worker does. Pickled to each."""

    def __init__(
        self,
        dataset: Dataset,
        make_sample: Callable[[bytes, tuple[int, int]], View],
        collate: Callable[[list[View], list[str], int], Made],
        batch_size: int,
        rank: int,
        ranks: int,
        start_step: int,
        seed: int,
    ) -> None:
        self._dataset, self._make_sample, self._collate = dataset, make_sample, collate
        self._first, self._last = rank * batch_size, (rank + 1) * batch_size
        self._step_size, self._start_step, self._seed = batch_size * ranks, start_step, seed

    def __iter__(self) -> Iterator[tuple[int, Made, list[Reject]] | _Failure]:
        info = get_worker_info()
        return self.of_worker(info.id, info.num_workers) if info else self.of_worker(0, 1)

    def of_worker(self, worker: int, workers: int) -> Iterator[tuple[int, Made, list[Reject]] | _Failure]:
        """Every `workers`-th step, endlessly; what goes wrong is handed on as the last item."""
        step = self._start_step + worker
        try:
            samples = Samples(self._dataset, self._step_size, self._seed)
            with Reader(self._dataset) as reader:
                steps = itertools.count(step, workers)
                places = reader.ahead(p for s in steps for p in samples.part(s, self._first, self._last))
                while True:
                    mine = list(itertools.islice(places, self._last - self._first))
                    yield self._batch(step, mine, samples, reader)
                    step += workers
        except Exception as error:
            yield _failure(error, step)

    def _batch(
        self, step: int, places: list[Place], samples: Samples, reader: Reader
    ) -> tuple[int, Made, list[Reject]]:
        views: list[View] = []
        names: list[str] = []
        rejects: list[Reject] = []
        for slot, place in enumerate(places, self._first):
            key = self._seed, step * self._step_size + slot
            for candidate in _candidates(place, samples):
                name, data = reader.read(candidate)
                try:
                    views.append(self._make_sample(_present(data), key))
                except UndecodableImage as error:
                    rejects.append(self._reject(candidate, name, str(error)))
                else:
                    names.append(name)
                    break
            else:
                raise _unusable(rejects[-1])
        return step, self._collate(views, names, step), rejects

    def _reject(self, place: Place, name: str, reason: str) -> Reject:
        file, row = self._dataset.images[place.source].place(place.group, place.row)
        return Reject(self._dataset.sources[place.source].name, name, file, row, reason)


class Loader(Generic[Made]):
    """Endlessly (step, batch, rejects) from `start_step` on; every iteration begins there anew.

    Worker processes end when the iterator is dropped or closed, and when this process ends. They do not heed Ctrl-C,
    so that this process can finish its step and save.
    """

    def __init__(
        self,
        dataset: Dataset,
        make_sample: Callable[[bytes, tuple[int, int]], View],
        collate: Callable[[list[View], list[str], int], Made],
        *,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        start_step: int = 0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            dataset: the images.
            make_sample: from the bytes of an image and (seed, place of the sample in the endless order) what `collate`
                takes; it raises UndecodableImage where the bytes are no image. Like `collate` it is pickled for the
                workers.
            collate: a batch from what was made, the image_ids and the step.
            batch_size: images of this rank's batch.
            rank, ranks: which slice of each step is this process's, of how many.
            workers: processes that make batches; 0 makes them here.
            start_step: the first one.
            seed: of the run.

        Raises:
            ConfigError: sizes or numbers that make no sense.
        """
        if batch_size < 1 or workers < 0 or start_step < 0 or not 0 <= rank < ranks:
            raise ConfigError(
                f"loader: batch size {batch_size}, rank {rank} of {ranks}, {workers} workers, step {start_step}: "
                "the batch size is at least 1, ranks count from 0, and nothing is negative"
            )
        self._steps = _Steps(dataset, make_sample, collate, batch_size, rank, ranks, start_step, seed)
        self._workers = workers

    def __iter__(self) -> Iterator[tuple[int, Made, list[Reject]]]:
        """
        Raises:
            LvdError: an error from a worker (with its traceback as the cause), or a worker that died.
            ConfigError: the files are no longer as they were.
        """
        items = self._from_workers() if self._workers else self._steps.of_worker(0, 1)
        for item in items:
            if isinstance(item, _Failure):
                raise item.error from _Trace(f"\n{item.trace}")
            yield item

    def _from_workers(self) -> Iterator[tuple[int, Made, list[Reject]] | _Failure]:
        loader = DataLoader(
            self._steps,
            batch_size=None,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_worker,
            multiprocessing_context=_processes(),
            prefetch_factor=BATCHES_AHEAD,
            generator=torch.Generator(),  # else it draws from the generator of this process
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise LvdError(
                f"a loader process died, perhaps for want of memory; try fewer workers or smaller batches "
                f"({str(error).splitlines()[0]})"
            ) from error


def _candidates(place: Place, samples: Samples) -> Iterator[Place]:
    """A sample's place, then those that are tried instead."""
    yield place
    for attempt in range(TRIES):
        yield samples.instead(place, attempt, anywhere=attempt >= TRIES // 2)


def _present(data: bytes | None) -> bytes:
    if data is None:
        raise UndecodableImage("no image")
    return data


def _unusable(last: Reject) -> LvdError:
    return LvdError(
        f"source {last.source}: {TRIES + 1} images in a row cannot be decoded, the last in {last.file}, row {last.row} "
        f"({last.reason}); check that its images are what they should be"
    )


def _failure(error: Exception, step: int) -> _Failure:
    trace = traceback.format_exc()
    if isinstance(error, LvdError):
        return _Failure(error, trace)
    lines = str(error).splitlines() or [""]
    return _Failure(LvdError(f"cannot make the batch of step {step}: {type(error).__name__}: {lines[0]}"), trace)


def _processes() -> multiprocessing.context.BaseContext:
    """How workers start. Not by a plain fork: this process may have threads, of torch, CUDA or pyarrow."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.loader"])  # imported once, not by every worker
    return context


def _begin_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(item: object) -> object:
    return item

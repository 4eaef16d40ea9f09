"""Reads samples: row groups are read ahead by threads, and held while samples of them may still come.

A reader holds the row groups of a window, as long as they are in use, and those read ahead: about WINDOW_BYTES and
8 row groups more for each source.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from curation.hashing import image_id
from trainer.parquet import Rows
from trainer.samples import Dataset, Place

AHEAD = 32
"""Samples whose row groups are read before they are needed."""
THREADS = 8
SPARE_GROUPS = 4
"""Row groups held beyond those of the window and of the samples ahead: where one window meets the next."""


class Reader:
    """The bytes of samples. A context manager: leaving it ends its threads."""

    def __init__(self, dataset: Dataset) -> None:
        self._reads = [images.reader() for images in dataset.images]
        self._most = [images.held + AHEAD // images.groups.run + SPARE_GROUPS for images in dataset.images]
        self._held: list[OrderedDict[int, Future[Rows]]] = [OrderedDict() for _ in dataset.images]
        self._threads = ThreadPoolExecutor(THREADS)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def ahead(self, places: Iterable[Place]) -> Iterator[Place]:
        """The same places, each handed on when reading of those that follow it has begun."""
        waiting: deque[Place] = deque()
        for place in places:
            self._rows(place)
            waiting.append(place)
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting

    def read(self, place: Place) -> tuple[str, bytes | None]:
        """The image_id and the bytes of a sample; of one without bytes None, and no id if none is stored.

        Raises:
            ConfigError: the file is gone or damaged.
        """
        rows = self._rows(place).result()
        data = rows.images[place.row].as_py()
        name = None if rows.ids is None else rows.ids[place.row].as_py()
        if name is None and data is not None:
            name = image_id(data)
        return "" if name is None else str(name), data

    def _rows(self, place: Place) -> Future[Rows]:
        held = self._held[place.source]
        if place.group not in held:
            held[place.group] = self._threads.submit(self._reads[place.source], place.group)
        held.move_to_end(place.group)
        if len(held) > self._most[place.source]:
            held.popitem(last=False)
        return held[place.group]

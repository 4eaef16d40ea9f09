"""Work done ahead in threads, in order and in bounded number: what lets a worker read and decode while it computes."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 4
"""Calls a thread has in hand or waiting, so that none idles while the oldest result is still awaited."""


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`function` of each item, worked out by several threads, yielded in the items' order.

    Holds at most `threads` x IN_FLIGHT items and results. An exception of `function` is raised at its item's place.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="ordered_map") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= threads * IN_FLIGHT:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def ahead(items: Iterator[Item], depth: int) -> Iterator[Iterator[Item]]:
    """The items, produced by a thread of their own that is at most `depth` + 1 of them ahead.

    Leaving the context stops the thread and waits for it, also when not all items were taken. An exception of the
    producer is raised where its item would have come.
    """
    ready: queue.Queue[tuple[bool, Item | BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(more: bool, value: Item | BaseException | None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put((more, value), timeout=0.1)
                return

    def produce() -> None:
        try:
            for item in items:
                put(True, item)
                if stop.is_set():
                    break
            put(False, None)
        except BaseException as error:  # the consumer raises it
            put(False, error)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    def consume() -> Iterator[Item]:
        while True:
            more, value = ready.get()
            if not more:
                if isinstance(value, BaseException):
                    raise value
                return
            yield value  # type: ignore[misc]

    thread = threading.Thread(target=produce, name="ahead", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stop.set()
        thread.join()

"""What the user sees of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

import os
import time
from typing import Any, TextIO

PLAIN_SECONDS = 30.0


def _own_stderr() -> TextIO:
    """A stream of our own to standard error: libraries that silence file descriptor 2 for a while do not silence us."""
    return os.fdopen(os.dup(2), "w", buffering=1)


class Progress:
    """Progress of one step after the other. Everything goes to standard error."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or _own_stderr()
        self._terminal = self._stream.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._began = self._spoke = 0.0
        self._title, self._parts, self._done, self._rows = "", 0, 0, 0

    def begin(self, title: str, parts: int, done: int) -> None:
        """A step of `parts` parts begins, of which `done` are there from an earlier run."""
        self._title, self._parts, self._done, self._rows = title, parts, done, 0
        self._began = self._spoke = time.monotonic()
        if self._terminal:
            self._bar = _bar(self._stream)
            self._task = self._bar.add_task(title, total=parts, completed=done, rate="")
            self._bar.start()

    def advance(self, rows: int) -> None:
        """One more part is done, with so many rows worked on."""
        self._done += 1
        self._rows += rows
        now = time.monotonic()
        rate = f"{self._rows / max(now - self._began, 1e-9):,.0f} rows/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=rate)
        elif now - self._spoke > PLAIN_SECONDS:
            self._spoke = now
            left = (now - self._began) / self._done * (self._parts - self._done)
            self.say(f"{self._title}: {self._done}/{self._parts} parts, {rate}, about {left:,.0f} s left")

    def end(self) -> None:
        """The step is over, one way or the other."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, line: str) -> None:
        """One plain line."""
        print(line, file=self._stream, flush=True)


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    return RichProgress(*columns, console=Console(file=stream, force_terminal=True), transient=True)


def quiet() -> Progress:
    """A progress that shows nothing, for tests and programs."""
    return Progress(open(os.devnull, "w"))

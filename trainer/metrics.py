"""The numbers of a run: read from the device without waiting, shown, and written to `metrics.jsonl` and TensorBoard."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.step import Metrics

FILE = "metrics.jsonl"
SECONDS_A_LINE = 30.0
"""Between lines where there is no terminal."""
NO_BOARD = f"no TensorBoard here, so {FILE} alone has the numbers; pip install 'lvd-builder[tensorboard]' brings it"


class Reading:
    """Metrics on their way to the host; made right after the step, and read when another one has been begun.

    Attributes:
        time: when it was made, on time.monotonic's clock.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.time = time.monotonic()
        self._names = metrics.names
        self._done: torch.cuda.Event | None = None
        if metrics.values.is_cuda:
            self._values = torch.empty(metrics.values.shape, pin_memory=True)
            self._values.copy_(metrics.values, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()
        else:
            self._values = metrics.values

    def read(self) -> dict[str, float]:
        """The numbers by name."""
        if self._done is not None:
            self._done.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


def not_finite(numbers: dict[str, float]) -> list[str]:
    """Names of the numbers that are infinite or none."""
    return [name for name, value in numbers.items() if not math.isfinite(value)]


class Display:
    """What a person sees of a run, on standard error: a bar on a terminal, one line now and then elsewhere.

    Entered for the length of the run.

    Args:
        steps: of the run.
        begin: steps done before.
        active: whether to show anything.
        clock: seconds that go by.
    """

    def __init__(
        self, steps: int, begin: int, active: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps, self._begin, self._active, self._clock = steps, begin, active, clock
        self._last_line = -math.inf
        self._bar: Progress | None = None

    def __enter__(self) -> "Display":
        if self._active and sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("", total=self._steps, completed=self._begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int, numbers: dict[str, float], images_per_step: int) -> None:
        """The numbers at `done` steps, `images_per_second` among them."""
        rate = numbers["images_per_second"]
        text = f"loss {numbers['loss']:.4f}  lr {numbers['lr']:.2e}  {rate:,.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif self._clock() - self._last_line >= SECONDS_A_LINE or done == self._steps:
            self._last_line = self._clock()
            left = (self._steps - done) * images_per_step / max(rate, 1e-9)
            self.say(f"step {done}/{self._steps}  {text}  {_duration(left)} left")

    def evaluation(self, done: int, numbers: dict[str, float]) -> None:
        """What an evaluation found."""
        self.say(f"step {done}: " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))

    def say(self, line: str) -> None:
        """A line."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)


class Log:
    """Shows and writes the numbers of the main process; entered for the length of the run.

    Args:
        run: the run's directory; `metrics.jsonl` in it goes on where it is.
        steps: of the run.
        begin: steps done before.
        images_per_step: over all ranks.
        active: whether this is the main process; others show and write nothing.
        clock: seconds that go by.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        begin: int,
        images_per_step: int,
        active: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._begin, self._images, self._active = run, begin, images_per_step, active
        self._display = Display(steps, begin, active, clock)
        self._last_step, self._last_time = begin, clock()
        self._file: IO[str] | None = None
        self._board: Any = None

    def __enter__(self) -> "Log":
        if not self._active:
            return self
        drop_after(self._run / FILE, self._begin)
        self._file = (self._run / FILE).open("a")
        self._board = _tensorboard(self._run, self._begin)
        self._display.__enter__()
        if self._board is None:
            self.say(NO_BOARD)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._display.__exit__(kind, error, at)
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def step(self, done: int, numbers: dict[str, float], at: float) -> None:
        """Write and show the numbers at `done` steps, which was at a time; adds `images_per_second` since the last."""
        if not self._active:
            return
        rate = (done - self._last_step) * self._images / max(at - self._last_time, 1e-9)
        self._last_step, self._last_time = done, at
        numbers = {**numbers, "images_per_second": rate}
        self._write(done, numbers)
        self._display.step(done, numbers, self._images)

    def evaluation(self, done: int, numbers: dict[str, float]) -> None:
        """Write and show what an evaluation found."""
        if not self._active:
            return
        self._write(done, numbers)
        self._display.evaluation(done, numbers)

    def leave_out(self, seconds: float) -> None:
        """Time since the last step that does not count as training's, such as an evaluation's."""
        self._last_time += seconds

    def say(self, line: str) -> None:
        """Show a line."""
        self._display.say(line)

    def _write(self, done: int, numbers: dict[str, float]) -> None:
        assert self._file is not None
        self._file.write(json.dumps({"step": done, **numbers}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, done)


class Follower:
    """Shows the numbers that another process writes into a run's `metrics.jsonl`, those of steps beyond `begin`."""

    def __init__(self, run: Path, display: Display, begin: int, images_per_step: int) -> None:
        self._file, self._display, self._shown, self._images = run / FILE, display, begin, images_per_step
        self._offset = self._file.stat().st_size if self._file.exists() else 0
        self._inode = self._file.stat().st_ino if self._file.exists() else 0

    def look(self) -> None:
        """Show what has been written since the last look."""
        try:
            with self._file.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:  # rewritten by a run that goes on; its size may be any by now
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                written = file.read()
        except OSError:
            return
        whole, newline, _ = written.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            numbers = json.loads(line)
            done = numbers.pop("step")
            if "loss" not in numbers and done >= self._shown:
                self._display.evaluation(done, numbers)
            elif done > self._shown:
                self._shown = done
                self._display.step(done, numbers, self._images)


def drop_after(file: Path, step: int) -> None:
    """Remove lines of steps after `step`, which a resumed run does again, and a line that was cut short.

    The file becomes another, complete at once: a Follower sees that, and never half of it.
    """
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(kept))
    partial.replace(file)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _tensorboard(run: Path, begin: int) -> Any:
    """A writer where TensorBoard is installed; what it shows of steps after `begin` is dropped."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=begin + 1)

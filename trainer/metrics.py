"""The numbers of a run: read from the device without waiting, shown, and written to `metrics.jsonl` and TensorBoard."""

import json
import math
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
    """Metrics on their way to the host; made right after the step, and read when another one has been begun."""

    def __init__(self, metrics: Metrics) -> None:
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


class Log:
    """Shows and writes the numbers of the main process; entered for the length of the run.

    On a terminal there is a bar; elsewhere one line now and then.

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
        self._steps, self._images, self._active, self._clock = steps, images_per_step, active, clock
        self._last_step, self._last_time = begin, clock()
        self._last_line = -math.inf
        self._run = run
        self._begin = begin
        self._file: IO[str] | None = None
        self._board: Any = None
        self._bar: Progress | None = None

    def __enter__(self) -> "Log":
        if not self._active:
            return self
        drop_after(self._run / FILE, self._begin)
        self._file = (self._run / FILE).open("a")
        self._board = _tensorboard(self._run, self._begin)
        if self._board is None:
            self.say(NO_BOARD)
        if sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("", total=self._steps, completed=self._begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def step(self, done: int, numbers: dict[str, float]) -> None:
        """Write and show the numbers at `done` steps; `images_per_second` since the last time is added to them."""
        if not self._active:
            return
        now = self._clock()
        rate = (done - self._last_step) * self._images / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = done, now
        self._write(done, {**numbers, "images_per_second": rate})
        self._show(done, f"loss {numbers['loss']:.4f}  lr {numbers['lr']:.2e}  {rate:,.0f} images/s", rate)

    def evaluation(self, done: int, numbers: dict[str, float]) -> None:
        """Write and show what an evaluation found; its time does not count as training's."""
        if not self._active:
            return
        self._write(done, numbers)
        self.say(f"step {done}: " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        self._last_time = self._clock()

    def _write(self, done: int, numbers: dict[str, float]) -> None:
        assert self._file is not None
        self._file.write(json.dumps({"step": done, **numbers}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, done)

    def _show(self, done: int, text: str, rate: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif self._clock() - self._last_line >= SECONDS_A_LINE or done == self._steps:
            self._last_line = self._clock()
            left = (self._steps - done) * self._images / max(rate, 1e-9)
            self.say(f"step {done}/{self._steps}  {text}  {_duration(left)} left")

    def say(self, line: str) -> None:
        """Show a line."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)


def drop_after(file: Path, step: int) -> None:
    """Remove lines of steps after `step`, which a resumed run does again, and a line that was cut short."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    file.write_text("".join(kept))


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

"""What benchmarks share: peak memory of a process with all its children, and a word on the machine."""

import os
import platform
import threading
from contextlib import suppress
from types import TracebackType

import psutil


class PeakMemory:
    """Samples the anonymous memory, and the CPU time, of this process and all its descendants while it is entered.

    Attributes:
        peak: the highest sum of memory seen, in bytes.
    """

    def __init__(self, seconds: float = 0.05) -> None:
        self.peak = 0
        self._seconds = seconds
        self._cpu: dict[tuple[int, float], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        own = psutil.Process()
        while True:
            processes = [own, *own.children(recursive=True)]
            self.peak = max(self.peak, sum(anonymous_bytes(process.pid) for process in processes))
            for process in processes:
                with suppress(psutil.Error):
                    self._cpu[process.pid, process.create_time()] = sum(process.cpu_times()[:2])
            if self._stop.wait(self._seconds):
                return

    def cpu_seconds(self) -> float:
        """CPU time of all processes seen so far, those that are gone included."""
        return sum(self._cpu.copy().values())


def anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory of a process, 0 once it is gone. Linux."""
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def cpu_seconds() -> float:
    """CPU time so far of this process and all its living descendants, and of what these have waited for."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return total


def machine() -> str:
    """The machine in one line."""
    with open("/proc/cpuinfo") as cpuinfo:
        model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "unknown CPU")
    memory = psutil.virtual_memory().total / 2**30
    blas = os.environ.get("OPENBLAS_CORETYPE", "unset")
    python = platform.python_version()
    return f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB, Python {python}, OPENBLAS_CORETYPE {blas}"

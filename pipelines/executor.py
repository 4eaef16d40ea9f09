"""Where work runs: in this process, or on Ray. One method, map, with bounded work in flight.

Results come as they are ready, each with the item it belongs to; an item that fails yields its exception, so that
the others go on. Memory does not grow with the number of items.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from curation.errors import ConfigError, LvdError

Result = TypeVar("Result")
Outcome = tuple[int, Any]

OBJECT_STORE_BYTES = 200_000_000
"""Ray's object store on one machine; nothing large travels through it, parts go through storage."""

ATTEMPTS = 3
"""How often a task lost with its worker is begun again."""

CONNECT_SECONDS = 10.0
"""How long an address may take to answer."""

SAME_CODE = "every node needs this code: install it there, or send it along with `ray job submit --working-dir`"


@dataclass(frozen=True)
class Needs:
    """What one worker needs to run a piece of work.

    Attributes:
        resident: the work holds something costly (a model, a connection pool) that one worker loads once.
        cpus: cores for one worker.
        gpus: GPUs for one worker.
    """

    resident: bool = False
    cpus: int = 1
    gpus: int = 0


class Executor(Protocol):
    """Runs `work(item)` for many items."""

    @property
    def workers(self) -> int:
        """How many items are worked on at once."""
        ...

    def map(self, work: Callable[[int], Any], items: Iterable[int], needs: Needs) -> Iterator[Outcome]:
        """Yield (item, result or exception) as they are ready, in no particular order."""
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


class LocalExecutor:
    """Everything in this process, one item after the other: for debugging and the smallest runs."""

    workers = 1

    def map(self, work: Callable[[int], Any], items: Iterable[int], needs: Needs) -> Iterator[Outcome]:
        for item in items:
            try:
                yield item, work(item)
            except Exception as error:
                yield item, error

    def close(self) -> None:
        return None


def connect(address: str | None, cpus: int) -> Any:
    """Ray, connected to the cluster at `address` (or of RAY_ADDRESS), else started on this machine with so many cores.

    Raises ConfigError when no cluster answers at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:  # records for a dashboard that is not there; a process may even hang at its end over them
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "60")  # else 4 % of a core looks for new log files
    ray = _ray()
    if address and not _listens(address):
        raise ConfigError(f"no Ray cluster answers at {address}: nothing listens there")
    options: dict[str, Any] = {"address": address}
    if not address:
        options = {"address": "local", "num_cpus": cpus, "object_store_memory": OBJECT_STORE_BYTES}
        options["include_dashboard"] = False
    try:
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"no Ray cluster answers at {address}" if address else "Ray did not start on this machine"
        raise ConfigError(f"{where}: {str(error).strip().splitlines()[0]}") from None
    return ray


class RayExecutor:
    """Ray tasks for stateless work, actors where something is loaded once per worker.

    Tasks lost with a worker or a node are begun again by Ray; exceptions are not retried, they come back.
    """

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        """Connect to the cluster at `address` (or of RAY_ADDRESS), else start Ray on this machine.

        Raises ConfigError when no cluster answers at the address.
        """
        self._ray = connect(address, workers or os.cpu_count() or 1)
        self.workers = workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def map(self, work: Callable[[int], Any], items: Iterable[int], needs: Needs) -> Iterator[Outcome]:
        submit = self._actors(work, needs) if needs.resident else self._tasks(work, needs)
        flying: dict[Any, tuple[int, int]] = {}
        slots = [*range(self._workers_for(needs))] * 2
        for item in items:
            if not slots:
                yield from self._collect(flying, slots)
            slot = slots.pop()
            flying[submit(slot, item)] = (item, slot)
        while flying:
            yield from self._collect(flying, slots)

    def _workers_for(self, needs: Needs) -> int:
        """Workers that find a place at once: one that waits for a GPU that is not there would wait for ever."""
        resources = self._ray.cluster_resources()
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if cpus < needs.cpus or gpus < needs.gpus:
            raise ConfigError(
                f"a worker needs {needs.cpus} cores and {needs.gpus} GPUs, but the cluster has {cpus} and {gpus}; "
                "lower threads, or take another device"
            )
        return min(self.workers, cpus // needs.cpus, gpus // needs.gpus if needs.gpus else cpus)

    def _collect(self, flying: dict[Any, tuple[int, int]], slots: list[int]) -> Iterator[Outcome]:
        """Wait for one result at least; free its slot."""
        ready, _ = self._ray.wait(list(flying), num_returns=1)
        for reference in ready:
            item, slot = flying.pop(reference)
            slots.insert(0, slot)
            yield item, self._result(reference)

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, self._ray.exceptions.RaySystemError):
                return ConfigError(f"a worker cannot load the work: {str(error.cause).splitlines()[0]}; {SAME_CODE}")
            return error.cause if isinstance(error.cause, Exception) else error
        except self._ray.exceptions.RayError as error:
            return LvdError(f"a worker was lost {ATTEMPTS + 1} times over: {str(error).strip().splitlines()[0]}")

    def _tasks(self, work: Callable[[int], Any], needs: Needs) -> Callable[[int, int], Any]:
        shared = self._ray.put(work)
        task = self._ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=ATTEMPTS)(_run)
        return lambda slot, item: task.remote(shared, item)

    def _actors(self, work: Callable[[int], Any], needs: Needs) -> Callable[[int, int], Any]:
        place = {"num_cpus": needs.cpus, "num_gpus": needs.gpus}
        kind = self._ray.remote(**place, max_restarts=ATTEMPTS, max_task_retries=ATTEMPTS)(_Resident)
        actors: dict[int, Any] = {}

        def submit(slot: int, item: int) -> Any:
            if slot not in actors:
                actors[slot] = kind.remote(work)
            return actors[slot].run.remote(item)

        return submit

    def close(self) -> None:
        self._ray.shutdown()


def _run(work: Callable[[int], Any], item: int) -> Any:
    _one_torch_thread()
    return work(item)


def _one_torch_thread() -> None:
    """Work that is given several cores has threads of its own, beside which torch's would only wait and spin.

    Ray means to say how many torch may have, but a process keeps the number of the first task that it ran. A model that
    wants more says so when it is loaded.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read where torch is imported later
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


class _Resident:
    """An actor that keeps `work`, and what it has loaded, between items."""

    def __init__(self, work: Callable[[int], Any]) -> None:
        _one_torch_thread()
        self._work = work

    def run(self, item: int) -> Any:
        return self._work(item)


def _listens(address: str) -> bool:
    """Whether anything does at host:port, which Ray would try for minutes; `auto` and the like are Ray's to judge."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return True
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
            return True
    except (OSError, OverflowError):
        return False


def _ray() -> Any:
    """Ray, told before its import how we mean it to behave."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


def open_executor(workers: int | None, address: str | None, local: bool) -> Executor:
    """The executor the options ask for. Raises ConfigError for options that exclude each other."""
    if local and (address or (workers or 1) > 1):
        raise ConfigError(
            "--local runs everything in this process: it goes with neither --address nor --workers above 1"
        )
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers} is too few: at least 1 is needed")
    return LocalExecutor() if local else RayExecutor(workers, address)

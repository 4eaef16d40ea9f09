"""Training on Ray: every rank is a worker of Ray Train, on this machine or on a cluster.

A rank that is lost with its process or node ends the others, and all of them go on from the newest checkpoint, three
times at most. The run's directory must be one that all nodes see under the same path.
"""

import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation.errors import ConfigError, LvdError
from trainer.checkpoints import facts_of, newest
from trainer.loop import Summary
from trainer.metrics import Display, Follower
from trainer.train import signals, train

if TYPE_CHECKING:
    from trainer.config import TrainSettings

ATTEMPTS = 3
"""How often ranks are begun again after one was lost."""
SCRATCH = ".ray"
"""Where in the run's directory Ray Train keeps what it writes while it runs."""
LOOK_SECONDS = 0.5
GRACE_SECONDS = 20.0
"""How long the other ranks have to end by themselves after one has failed."""
BEGUN, FAILED, STOP = "begun", "failed", "stop"


@dataclass(frozen=True)
class Job:
    """What the ranks are to do: the arguments of `trainer.train.train`."""

    settings: "TrainSettings"
    out: str
    resume: bool
    init: str | None
    device: str


class _Board:
    """An actor on which this process and the ranks write what the others must know."""

    def __init__(self) -> None:
        self._written: dict[str, Any] = {}

    def write(self, key: str, value: object) -> None:
        self._written.setdefault(key, value)

    def read(self, key: str) -> Any:
        return self._written.get(key)


@dataclass(frozen=True)
class _Stop:
    """Whether the process that launched the ranks was interrupted."""

    board: Any

    def is_set(self) -> bool:
        """Asks it."""
        return bool(_read(self.board, STOP))


def train_on_ray(ray: Any, job: Job, ranks: int | None = None) -> Summary:
    """Train on the Ray that `ray`, the module, is connected to. Ctrl-C and SIGTERM save the run, as in `train`.

    Args:
        ray: after `ray.init`; it is for the caller to shut it down, which ends ranks that still work after an error.
        job: places in it are absolute, and the same on all nodes.
        ranks: how many; None for one a GPU, or one a node where there are none.

    Raises:
        ConfigError: the cluster is too small; or as `train`.
        LvdError: ranks were lost again and again; or as `train`.
    """
    ranks, job = _placed(ray, job, ranks)
    board = ray.remote(num_cpus=0)(_Board).remote()
    scratch = Path(job.out) / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    steps, begin = job.settings.schedule.steps, _steps_done(Path(job.out))
    fitting = _Fitting(_trainer(job, board, ranks, _cores(ray, ranks, job.device), str(scratch)))
    try:
        with signals() as interrupted, Display(steps, begin) as display:
            follower = Follower(Path(job.out), display, begin, ranks * job.settings.batch_size)
            fitting.start()
            while fitting.is_alive():
                fitting.join(LOOK_SECONDS)
                follower.look()
                if interrupted.is_set():
                    ray.get(board.write.remote(STOP, True))
                if (error := _read(board, FAILED)) is not None:
                    fitting.join(GRACE_SECONDS)
                    raise error
        if (error := _read(board, FAILED)) is not None:
            raise error
        return fitting.summary()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _steps_done(run: Path) -> int:
    """Steps that a run has done, by its newest checkpoint."""
    last = newest(run)
    return facts_of(last).step if last else 0


class _Fitting(threading.Thread):
    """Ray Train at work, off the main thread, where it would take Ctrl-C for itself and save nothing."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(daemon=True)
        self._trainer = trainer
        self._result: Any = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._result = self._trainer.fit()
        except Exception as error:
            self._error = error

    def summary(self) -> Summary:
        """What the main rank gave back. Raises LvdError where it gave nothing."""
        if self._error is not None:
            lines = [line for line in str(self._error).splitlines() if line.strip()]
            raise LvdError(f"training on Ray ended early: {' '.join(lines[:2])}; resume it") from self._error
        found: Summary = self._result.return_value
        return found


def _trainer(job: Job, board: Any, ranks: int, cores: int, scratch: str) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    kit: Any = ray.train
    on_gpu = job.device == "cuda"
    reserved = {"CPU": cores, "GPU": 1} if on_gpu else {"CPU": cores}
    return TorchTrainer(
        _rank,  # type: ignore[arg-type] # what it gives back becomes the result's return_value
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig("cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        scaling_config=kit.ScalingConfig(num_workers=ranks, use_gpu=on_gpu, resources_per_worker=reserved),
        run_config=kit.RunConfig(
            name="train",
            storage_path=scratch,
            failure_config=kit.FailureConfig(max_failures=ATTEMPTS),
            logging_config=kit.LoggingConfig("WARNING"),
        ),
    )


def _rank(config: dict[str, Any]) -> Summary | None:
    """What a rank does. An error of ours goes to the board, not to Ray, which would begin the ranks again."""
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    job, board = config["job"], config["board"]
    again = broadcast_from_rank_zero(bool(_read(board, BEGUN)))
    if get_context().get_world_rank() == 0:
        board.write.remote(BEGUN, True)
    try:
        return train(
            job.settings,
            job.out,
            resume=job.resume or again,
            init=job.init,
            device=job.device,
            interrupted=_Stop(board),
        )
    except LvdError as error:
        _wait(board.write.remote(FAILED, error))
        return None


def _read(board: Any, key: str) -> Any:
    return _wait(board.read.remote(key))


def _wait(reference: Any) -> Any:
    import ray

    return ray.get(reference)


def _placed(ray: Any, job: Job, ranks: int | None) -> tuple[int, Job]:
    """The number of ranks, and the job with its device settled. Raises ConfigError."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    device = job.device
    if device == "auto":
        device = "cuda" if gpus >= (ranks or 1) else "cpu"
    if ranks is None:
        ranks = gpus if device == "cuda" else len(_nodes(ray))
    if device == "cuda" and gpus < max(ranks, 1):
        wanted = f"{max(ranks, 1)} ranks on GPUs"
        raise ConfigError(f"{wanted}: the cluster has {gpus}; lower --workers, or take --device cpu")
    return ranks, replace(job, device=device)


def _cores(ray: Any, ranks: int, device: str) -> int:
    """Cores of each rank: as many as let all ranks find a place at once. Raises ConfigError."""
    nodes = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in _nodes(ray)]
    for cores in range(max((cpus for cpus, _ in nodes), default=0), 0, -1):
        places = [min(cpus // cores, gpus) if device == "cuda" else cpus // cores for cpus, gpus in nodes]
        if sum(places) >= ranks:
            return cores
    raise ConfigError(
        f"{ranks} ranks need a core each, but the cluster has {sum(c for c, _ in nodes)}; lower --workers"
    )


def _nodes(ray: Any) -> list[dict[str, float]]:
    """Resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]

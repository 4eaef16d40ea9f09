"""Checkpoints of a whole run, written while it goes on: all or nothing, the newest kept, for any number of ranks.

A checkpoint is a directory `step-NNNNNNNN` of safetensors files, to which every rank writes its part of the tensors
(torch.distributed.checkpoint), and `run.json`, which is written last. Nothing in it is a pickle. Under its name it is
complete; while it is written it has another. With several machines the directory must be one that all of them see.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from curation.errors import ConfigError, LvdError
from embedders.records import from_json
from embedders.vit import ViTConfig
from trainer.distributed import World
from trainer.step import Trained

# A single process has no process group, as it should be; the writing thread says so, too.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

FORMAT = 1
FACTS = "run.json"
FOLDER = "checkpoints"
PREFIX = "step-"


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself.

    Attributes:
        step: steps done.
        images_per_step: over all ranks.
        network: of the student and of the moving average.
        settings: all that decides the run, by dotted keys.
    """

    step: int
    images_per_step: int
    network: ViTConfig
    settings: dict[str, Any]


def tensors_of(trained: Trained) -> dict[str, Tensor]:
    """All that changes in a run, by name; loading into these tensors restores it."""
    pair, optimizer = trained.pair, trained.optimizer
    found: dict[str, Tensor] = {}
    for prefix, module in (("student", pair.student), ("ema", pair.ema)):
        found |= {f"{prefix}.{name}": value.detach() for name, value in module.named_parameters()}
    for name, value in pair.student.named_parameters():
        found |= {f"optimizer.{name}.{key}": state for key, state in optimizer.state.get(value, {}).items()}
    return found | {f"objective.{name}": value for name, value in trained.objective.state_dict().items()}


class Checkpoints:
    """The checkpoints in a run's directory; all ranks call the same methods in the same order.

    Args:
        run: the run's directory.
        keep: how many of the newest stay.
        world: this process.
    """

    def __init__(self, run: Path, keep: int, world: World) -> None:
        self._folder = run / FOLDER
        self._keep = keep
        self._world = world
        self._writing: tuple[Future[Any], Path, Facts] | None = None
        if world.rank == 0:
            _create(self._folder)
            for left in self._folder.glob(".*"):
                shutil.rmtree(left, ignore_errors=True)
        world.wait()

    def save(self, tensors: Mapping[str, Tensor], facts: Facts) -> None:
        """Copy the tensors and begin to write them; they may change as soon as this returns. Raises LvdError."""
        self.finish()
        target = self._folder / f"{PREFIX}{facts.step:08d}"
        writer = HuggingFaceStorageWriter(str(_partial(target)), save_distributed=True)
        with _errors_name(target):
            future = async_save(dict(tensors), storage_writer=writer, process_group=self._world.group)
        self._writing = cast("Future[Any]", future), target, facts

    def poll(self) -> None:
        """Give what has been written its name, if it is complete. Raises LvdError."""
        if self._writing is not None and self._writing[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written. Raises LvdError."""
        if self._writing is None:
            return
        (future, target, facts), self._writing = self._writing, None
        with _errors_name(target):
            future.result()
            if self._world.rank == 0:
                _publish(target, facts)
                for old in checkpoints_in(self._folder)[: -self._keep]:
                    shutil.rmtree(old)


def restore(checkpoint: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Read a checkpoint into tensors, in place, whatever number of ranks wrote it. Raises LvdError."""
    with _errors_name(checkpoint):
        reader = HuggingFaceStorageReader(str(checkpoint))
        load(dict(tensors), storage_reader=reader, process_group=world.group, no_dist=world.group is None)


def read_tensors(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin with `prefix`, whole and on the CPU, by the rest of their names. Raises LvdError."""
    with _errors_name(checkpoint):
        reader = HuggingFaceStorageReader(str(checkpoint))
        known = reader.read_metadata().state_dict_metadata.items()
        tensors = {
            name: torch.empty(said.size, dtype=said.properties.dtype)  # type: ignore[union-attr] # all are tensors
            for name, said in known
            if name.startswith(prefix)
        }
        load(dict(tensors), storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run's directory."""
    found = checkpoints_in(run / FOLDER)
    return found[-1] if found else None


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if is_checkpoint(path))


def is_checkpoint(path: Path) -> bool:
    """Whether a complete checkpoint lies here."""
    return (path / FACTS).is_file()


def facts_of(checkpoint: Path) -> Facts:
    """What a checkpoint says of itself. Raises ConfigError."""
    place = checkpoint / FACTS
    try:
        content = json.loads(place.read_bytes())
        if content.pop("format") != FORMAT:
            raise ValueError(f"another format than {FORMAT}, which this version reads")
        return Facts(**{**content, "network": from_json(ViTConfig, content["network"], "network")})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{place}: not what a checkpoint says of itself ({error})") from None


def _publish(target: Path, facts: Facts) -> None:
    partial = _partial(target)
    with (partial / FACTS).open("w") as file:
        json.dump({"format": FORMAT, **asdict(facts)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}") from None


@contextmanager
def _errors_name(checkpoint: Path) -> Iterator[None]:
    """What goes wrong with a checkpoint becomes one line that names it."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise LvdError(f"checkpoint {checkpoint}: {first}") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise LvdError(f"checkpoint {checkpoint}: {error}") from error

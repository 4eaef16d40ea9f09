"""The loop: batches in, steps, numbers, evaluations and checkpoints, until all steps are done or someone interrupts."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import nn

from curation.errors import LvdError, StoppedError
from embedders.checkpoints import save_vit
from embedders.dinov2 import standard_preprocessing
from embedders.vit import VisionTransformer
from trainer.build import make_backbone, make_loader, make_network, make_schedules
from trainer.checkpoints import Checkpoints, Facts, newest, tensors_of
from trainer.distributed import World, whole
from trainer.loader import Reject
from trainer.metrics import Log, Reading, not_finite
from trainer.pair import Network
from trainer.samples import Dataset
from trainer.schedules import Values
from trainer.step import Trained, train_step
from trainer.watch import Album, Evaluate

if TYPE_CHECKING:
    from trainer.config import TrainSettings

MODEL = "model.safetensors"
SETTINGS = "settings.json"
REJECTS = "rejects.jsonl"
FAILURE = "failure-rank{rank}.json"
IDS_SHOWN = 3


class Interruption(Protocol):
    """Something that tells whether the run is to stop, such as an event."""

    def is_set(self) -> bool:
        """Whether it is."""
        ...


@dataclass(frozen=True)
class Summary:
    """What came of a run.

    Attributes:
        steps: done, of all invocations; images: that they had.
        seconds: of this invocation.
        numbers: of the last step; empty where none was left to do.
        skipped: how often an image that cannot be decoded was replaced by another, on this rank, in this invocation;
            `rejects.jsonl` names them.
        model: the moving average's backbone, as an embedder `vit:FILE` opens it.
    """

    steps: int
    images: int
    seconds: float
    numbers: dict[str, float]
    skipped: int
    model: Path


class Loop:
    """A run under way."""

    def __init__(
        self, settings: "TrainSettings", run: Path, world: World, dataset: Dataset, trained: Trained, begin: int
    ) -> None:
        self._settings, self._run, self._world, self._dataset = settings, run, world, dataset
        self._trained, self._begin = trained, begin
        self._images = settings.batch_size * world.size
        self._schedules = make_schedules(settings, self._images)
        self._checkpoints = Checkpoints(run, settings.keep, world)
        self._pending: tuple[int, Values, list[str], Reading] | None = None
        self._album: Album | None = None
        self._numbers: dict[str, float] = {}
        self._skipped = 0

    def go(self, interrupted: Interruption, evaluate: Evaluate | None, notes: Sequence[str] = ()) -> Summary:
        """All steps that are left; `notes` are shown first."""
        start = time.monotonic()
        if self._world.rank == 0:
            (self._run / SETTINGS).write_text(self._settings.model_dump_json(indent=1) + "\n")
        with Log(self._run, self._settings.schedule.steps, self._begin, self._images, self._world.rank == 0) as log:
            for note in (self._about(), *notes):
                log.say(note)
            try:
                self._album = self._make_album()
                for done in self._steps(log):
                    self._checkpoints.poll()
                    self._evaluate(done, log, evaluate)
                    self._save(done, log, self._stopped(done, interrupted))
            finally:
                self._checkpoints.finish()  # whatever went wrong, what is being written is not lost
        steps = self._settings.schedule.steps
        model = self._export()
        seconds = time.monotonic() - start
        return Summary(steps, steps * self._images, seconds, self._numbers, self._skipped, model)

    def _about(self) -> str:
        """What is trained, on what."""
        student, world, images = self._trained.pair.student, self._world, sum(self._dataset.num_images)
        weights = sum(value.numel() for value in student.backbone.parameters())
        ranks = f" on {world.size} ranks" if world.size > 1 else ""
        return (
            f"{images:,} images, {self._images} a step{ranks}, on {world.device.type} in {self._trained.precision}; "
            f"a network of {weights / 1e6:.1f} million weights; "
            f"{self._begin} of {self._settings.schedule.steps} steps done"
        )

    def _make_album(self) -> Album | None:
        """Pictures of the first batch, of the main process, where there is something left to do."""
        if self._world.rank or self._begin >= self._settings.schedule.steps:
            return None
        _, batch, _ = next(iter(make_loader(self._settings, self._dataset, self._world, workers=0, start_step=0)))
        return Album(self._run, batch)

    def _steps(self, log: Log) -> Iterator[int]:
        """Do the steps that are left; gives the number done after each."""
        settings, world = self._settings, self._world
        if self._begin >= settings.schedule.steps:
            return
        loader = make_loader(settings, self._dataset, world, _workers(settings), self._begin)
        for step, batch, rejects in loader:
            self._reject(rejects)
            values = self._schedules.at(step)
            ready = batch.pin().to(world.device) if world.device.type == "cuda" else batch
            learns = step >= (settings.schedule.heads_only or 0)
            metrics = train_step(self._trained, ready, step, values, learns)
            self._heed(log)
            self._pending = step, values, batch.image_ids, Reading(metrics)
            yield step + 1
            if step + 1 == settings.schedule.steps:
                return

    def _heed(self, log: Log) -> None:
        """Read the numbers of the last step but the one under way, stop where they are not finite, and log them."""
        if self._pending is None:
            return
        (step, values, ids, reading), self._pending = self._pending, None
        self._numbers = {**reading.read(), "lr": values.lr, "momentum": values.momentum}
        if broken := not_finite(self._numbers):
            raise self._failure(step, ids, broken)
        done = step + 1
        if done % self._settings.log_every == 0 or done in (1, self._settings.schedule.steps):
            log.step(done, self._numbers, reading.time)

    def _stopped(self, done: int, interrupted: Interruption) -> bool:
        """Whether any rank was interrupted; several agree on it now and then."""
        if self._world.group is None:
            return interrupted.is_set()
        if done % self._settings.log_every:
            return False
        anywhere = torch.tensor(float(interrupted.is_set()))
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, self._world.group)
        return bool(anywhere)

    def _save(self, done: int, log: Log, stop: bool) -> None:
        """A checkpoint, if one is due. Raises StoppedError after the last one of a run that is stopped."""
        steps = self._settings.schedule.steps
        if done < steps and not stop and done % self._settings.checkpoint_every:
            return
        self._heed(log)
        config = self._trained.pair.student.backbone.config
        facts = Facts(done, self._images, config, deciding(self._settings, self._dataset))
        self._checkpoints.save(tensors_of(self._trained), facts)
        if stop and done < steps:
            self._checkpoints.finish()
            raise StoppedError(
                f"stopped after {done} of {steps} steps, which are saved in {self._run}; resume to go on"
            )

    def _evaluate(self, done: int, log: Log, evaluate: Evaluate | None) -> None:
        """Numbers and pictures of the moving average, if they are due."""
        every, last = self._settings.eval_every, done == self._settings.schedule.steps
        if not (last or (every and done % every == 0)):
            return
        began = time.monotonic()
        self._heed(log)
        ema = self._trained.pair.ema
        head: nn.Module | None = None
        if isinstance(ema, Network):
            network = whole(ema, lambda: make_network(self._settings))
            backbone, head = network.backbone, network.dino_head
        else:
            backbone = self._whole_backbone()
        if self._world.rank == 0 and evaluate is not None:
            log.evaluation(done, evaluate(backbone, head))
        if self._album is not None:
            self._album.add_patches(done, backbone)
        self._world.wait()
        log.leave_out(time.monotonic() - began)

    def _whole_backbone(self) -> VisionTransformer:
        return whole(self._trained.pair.ema.backbone, lambda: make_backbone(self._settings))

    def _export(self) -> Path:
        """The result as a file for the embedders."""
        backbone, place = self._whole_backbone(), self._run / MODEL
        if self._world.rank == 0:
            size = backbone.config.grid * backbone.config.patch_size
            save_vit(backbone, place, standard_preprocessing(size))
        self._world.wait()
        return place

    def _reject(self, rejects: list[Reject]) -> None:
        """Note images that could not be used, so that none is lost without a word."""
        self._skipped += len(rejects)
        if rejects:
            with (self._run / REJECTS).open("a") as file:
                file.writelines(json.dumps(reject._asdict()) + "\n" for reject in rejects)

    def _failure(self, step: int, ids: list[str], broken: list[str]) -> LvdError:
        self._checkpoints.finish()
        place = self._run / FAILURE.format(rank=self._world.rank)
        place.write_text(json.dumps({"step": step, "not_finite": broken, "image_ids": ids}, indent=1) + "\n")
        shown = ", ".join(ids[:IDS_SHOWN]) + (f" and {len(ids) - IDS_SHOWN} more" if len(ids) > IDS_SHOWN else "")
        last = newest(self._run)
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"
        return LvdError(
            f"step {step}: {', '.join(broken)} not finite, nothing was updated by it; its images on rank "
            f"{self._world.rank} are {shown} (all in {place}); {good}"
        )


def deciding(settings: "TrainSettings", dataset: Dataset) -> dict[str, object]:
    """All that decides a run but the number of images a step, by dotted keys."""
    return {**settings.deciding(), "data.fingerprint": dataset.fingerprint}


def _workers(settings: "TrainSettings") -> int:
    """Processes that make batches: one for each core of this rank but one."""
    if settings.data.workers != "auto":
        return settings.data.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)

"""Training a network, or distilling one, from Python: begin a run or go on with it; Ctrl-C saves it."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from curation.errors import ConfigError
from trainer.build import make_dataset, make_pair, make_trained, resolved
from trainer.checkpoints import facts_of, newest, restore, tensors_of
from trainer.distributed import World, joined
from trainer.loop import SETTINGS, Interruption, Loop, Summary, deciding
from trainer.samples import Dataset
from trainer.watch import Evaluate, labelled_evaluation

if TYPE_CHECKING:
    from trainer.config import TrainSettings


def train(
    settings: "TrainSettings | str | None",
    out: str | os.PathLike[str],
    *,
    images: str | Sequence[str] = (),
    overrides: Sequence[str] = (),
    resume: bool = False,
    init: str | None = None,
    device: str = "auto",
    evaluate: Evaluate | None = None,
    interrupted: Interruption | None = None,
) -> Summary:
    """Train a network, or distil one (`settings.teacher`), into a local directory.

    `train("laptop", "run", images="photos", overrides=["schedule.steps=20"])` is a whole run.

    Args:
        settings: of the run; or the name of a preset, or a YAML file; None for those of the run that is resumed.
        out: the run's directory, new or empty. It gets `checkpoints`, `pictures`, `metrics.jsonl`, `settings.json`,
            and, at the end, `model.safetensors`.
        images, overrides: as for `trainer.config.load_settings`.
        resume: go on with the run in `out`, from its newest checkpoint, else from the beginning; exactly as if it had
            not been interrupted, as long as there are as many ranks.
        init: weights to start from, unless the run goes on from a checkpoint: what `trainer.start.open_weights` reads.
        device: "auto", "cpu" or "cuda".
        evaluate: called every `settings.eval_every` steps and at the end, by the main process, in place of what
            `settings.evaluation` asks for.
        interrupted: asked after steps whether to save and stop; None for Ctrl-C and SIGTERM.

    Raises:
        ConfigError: settings, data, weights or directory do not fit.
        StoppedError: interrupted; the state is saved.
        LvdError: a step was not finite, or something cannot be read or written.
    """
    if "://" in os.fspath(out):
        raise ConfigError(f"{os.fspath(out)} is no local path: train into one, and copy what comes of it")
    run = Path(out)
    settings = settings_of(settings, run, overrides, images)
    with joined(device) as world, signals() if interrupted is None else nullcontext(interrupted) as stop:
        last = _place(run, resume, world)
        dataset = make_dataset(settings)
        images_per_step = settings.batch_size * world.size
        if last is not None:
            settings = _resumed(settings, last, images_per_step, dataset)
        notes: list[str] = []
        if evaluate is None and world.rank == 0:
            evaluate, notes = labelled_evaluation(settings, resolved(settings, world.device)[0])
        pair, left = make_pair(settings, None if last else init)
        settings = _with_heads_only(settings, left)
        trained = make_trained(settings, pair, world)
        if last is not None:
            restore(last, tensors_of(trained), world)
        loop = Loop(settings, run, world, dataset, trained, facts_of(last).step if last else 0)
        return loop.go(stop, evaluate, notes)


def settings_of(
    settings: "TrainSettings | str | None", run: Path, overrides: Sequence[str] = (), images: str | Sequence[str] = ()
) -> "TrainSettings":
    """What `train` means by its arguments of these names. Raises ConfigError."""
    from curation.config import load_yaml
    from trainer.config import changed, load_settings

    if isinstance(settings, str):
        return load_settings(settings, overrides, images)
    if settings is not None:
        return changed(settings.model_dump(mode="json"), "settings", overrides, images)
    if not (run / SETTINGS).is_file():
        raise ConfigError(f"{run} holds no run to resume: name a preset or a YAML file to begin one")
    return changed(load_yaml(str(run / SETTINGS)), str(run / SETTINGS), overrides, images)


def _place(run: Path, resume: bool, world: World) -> Path | None:
    """Make the run's directory, or find the checkpoint to go on from. Raises ConfigError."""
    try:
        used = run.exists() and any(not path.name.startswith(".") for path in run.iterdir())
        if used and not resume:
            raise ConfigError(f"{run} is not empty: resume the run in it, or take another directory")
        if used and not (run / SETTINGS).is_file():
            raise ConfigError(f"{run} holds no run to resume: take another directory")
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {run}: {error.strerror}") from None
    world.wait()
    return newest(run)


def _resumed(settings: "TrainSettings", last: Path, images: int, dataset: Dataset) -> "TrainSettings":
    """Settings of the run that goes on: those given. Raises ConfigError where they are not those it had."""
    from trainer.config import difference

    facts = facts_of(last)
    if settings.schedule.heads_only is None:
        settings = _heads_only(settings, facts.settings["schedule.heads_only"])
    if facts.images_per_step != images:
        raise ConfigError(
            f"the run in {last} has {facts.images_per_step} images a step, now it would be {images}: set batch_size "
            "so that batch_size x ranks stays the same"
        )
    changed = difference(facts.settings, deciding(settings, dataset))
    if changed is not None:
        raise ConfigError(f"another run was begun in {last.parent.parent}: {changed}; take another directory for this")
    return settings


def _with_heads_only(settings: "TrainSettings", left: list[str]) -> "TrainSettings":
    """Settings in which it is settled how long the heads learn alone."""
    if settings.schedule.heads_only is not None:
        return settings
    schedule = settings.schedule
    return _heads_only(settings, 2 * schedule.in_steps(schedule.freeze_last_layer) if left else 0)


def _heads_only(settings: "TrainSettings", steps: int) -> "TrainSettings":
    schedule = settings.schedule.model_copy(update={"heads_only": steps})
    return settings.model_copy(update={"schedule": schedule})


@contextmanager
def signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, once; the second time they act as ever."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals come to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def heed(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, heed)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

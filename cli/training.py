"""Commands that train networks: train, distill. In this process, under torchrun, or on Ray."""

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Address, Device, Precision, complete_preset

if TYPE_CHECKING:
    from trainer.config import TrainSettings
    from trainer.loop import Summary

Recipe = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of a preset; left out: what the run that is resumed has.",
        autocompletion=complete_preset,
    ),
]
RunPlace = Annotated[str, typer.Option("--out", "-o", metavar="RUN", help="The run's directory, on this machine.")]
Images = Annotated[
    list[str] | None,
    typer.Option(
        "--images",
        metavar="PLACE",
        help="What to train on, in place of data.sources: Parquet files, a glob pattern, a folder, "
        "or a run of the pipeline. May be given several times.",
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe's key, such as schedule.steps=1000.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in RUN, exactly as if nothing had interrupted it.")
]
Init = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Begin with these weights: a run, a checkpoint of one, a file, dinov2_*."),
]
EvalTrain = Annotated[
    str | None, typer.Option(metavar="PLACE", help="Labelled Parquet files: the bank of k-NN during training.")
]
EvalTest = Annotated[str | None, typer.Option(metavar="PLACE", help="The same: the queries, and of the gauges.")]
Ranks = Annotated[
    int | None,
    typer.Option("--workers", "-w", min=1, help="Processes that train, on Ray; default: this one alone, without Ray."),
]


def train(
    out: RunPlace,
    recipe: Recipe = None,
    images: Images = None,
    assignments: Set = None,
    init: Init = None,
    resume: Resume = False,
    eval_train: EvalTrain = None,
    eval_test: EvalTest = None,
    device: Device = None,
    precision: Precision = None,
    workers: Ranks = None,
    address: Address = None,
) -> None:
    """Pretrain a vision transformer as DINOv2 does, on final shards, Parquet files or folders of images.

    Ctrl-C saves and stops; the same command with --resume goes on. Several GPUs: torchrun, or --workers on Ray.

    \b
    Examples:
      lvd train laptop --images photos.parquet --out net --set schedule.steps=2 --set batch_size=8
      lvd train laptop --images flowers --init net --out more \\
        --eval-train photos.parquet --eval-test photos.parquet \\
        --set schedule.steps=2 --set batch_size=8
      lvd train --out more --resume
    """
    given = _shorthands(eval_train, eval_test, precision) + (assignments or [])
    _train(_settings(recipe, out, images, given), out, resume, init, device, workers, address)


def distill(
    out: RunPlace,
    recipe: Recipe = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What to learn from: a run, a checkpoint of one, a file, dinov2_*."),
    ] = None,
    images: Images = None,
    objective: Annotated[
        str | None, typer.Option(help="auto, heads (as published; the teacher has some) or features.")
    ] = None,
    assignments: Set = None,
    init: Init = None,
    resume: Resume = False,
    eval_train: EvalTrain = None,
    eval_test: EvalTest = None,
    device: Device = None,
    precision: Precision = None,
    workers: Ranks = None,
    address: Address = None,
) -> None:
    """Train a network to give what a larger, frozen one gives: no masks, no drop-path (model.drop_path is set to 0).

    \b
    Examples:
      lvd distill laptop --teacher net --images photos.parquet --out small \\
        --set model.dim=96 --set schedule.steps=2 --set batch_size=8
    """
    from curation.errors import ConfigError

    given = _shorthands(eval_train, eval_test, precision)
    given += ["model.drop_path=0"] if recipe is not None else []
    given += [f"teacher.model={json.dumps(teacher)}"] if teacher is not None else []
    given += [f"teacher.objective={objective}"] if objective is not None else []
    settings = _settings(recipe, out, images, given + (assignments or []))
    if settings.teacher is None:
        raise ConfigError("nothing to learn from: give --teacher")
    _train(settings, out, resume, init, device, workers, address)


def _settings(recipe: str | None, out: str, images: list[str] | None, assignments: list[str]) -> "TrainSettings":
    from pathlib import Path

    from trainer.train import settings_of

    return settings_of(recipe, Path(out), assignments, images or [])


def _shorthands(eval_train: str | None, eval_test: str | None, precision: str | None) -> list[str]:
    """Options that stand for keys, as assignments."""
    values = {"evaluation.train": eval_train, "evaluation.test": eval_test, "precision": precision}
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


def _train(
    settings: "TrainSettings",
    out: str,
    resume: bool,
    init: str | None,
    device: str | None,
    workers: int | None,
    address: str | None,
) -> None:
    from curation.errors import ConfigError
    from curation.storage import absolute
    from trainer.config import located_weights
    from trainer.train import train as train_here

    init = None if init is None else located_weights(init, absolute("."))
    if workers is None and address is None:
        _tell(train_here(settings, out, resume=resume, init=init, device=device or "auto"))
        return
    if "RANK" in os.environ:
        raise ConfigError("--workers and --address start ranks on Ray: leave them out under torchrun")
    from pipelines.executor import connect
    from trainer.launch import Job, train_on_ray

    ray = connect(address, max(workers or 1, os.cpu_count() or 1))
    try:
        _tell(train_on_ray(ray, Job(settings, absolute(out), resume, init, device or "auto"), workers))
    finally:
        ray.shutdown()


def _tell(summary: "Summary") -> None:
    """What came of it, said once."""
    from datetime import timedelta

    if os.environ.get("RANK", "0") != "0":
        return
    print(f"{summary.steps:,} steps, {summary.images:,} images; {timedelta(seconds=round(summary.seconds))} this time")
    if summary.skipped:
        rejects = summary.model.with_name("rejects.jsonl")
        print(f"{summary.skipped} times an image could not be decoded and another took its place: {rejects}")
    print(f"model: {summary.model} (as an embedder: vit:{summary.model})")


COMMANDS = (train, distill)

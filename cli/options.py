"""Options that several commands share, and what commands do with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cli.output import Format
    from pipelines.executor import Executor
    from pipelines.progress import Progress
    from pipelines.unit import Unit

Workers = Annotated[
    int | None, typer.Option("--workers", "-w", help="Tasks at once; default: the processors there are.")
]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster, such as auto or host:6379.")]
Local = Annotated[bool, typer.Option("--local", help="Everything in this process, without Ray.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Make again what was made from something else.")]
Out = Annotated[str, typer.Option("--out", "-o", help="Where the result goes; any URI fsspec opens.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe's key, such as dedup.threshold=0.7.")]
RunPlace = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or any URI fsspec opens.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Precision = Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")]
Style = Annotated[str, typer.Option("--format", "-f", help="table, csv, json or markdown.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws.")]
Pools = Annotated[list[str], typer.Argument(metavar="EMBEDDINGS...", help="Embeddings of the pools.")]


@contextmanager
def workplace(workers: int | None, address: str | None, local: bool) -> Iterator[tuple["Executor", "Progress"]]:
    """An executor and a progress display, given back afterwards."""
    from pipelines.executor import open_executor
    from pipelines.progress import Progress

    progress = Progress()
    executor = open_executor(workers, address, local)
    try:
        yield executor, progress
    finally:
        executor.close()


def run_stage(unit: "Unit", overwrite: bool, workers: int | None, address: str | None, local: bool) -> None:
    """Bring one stage's outputs up to date."""
    from pipelines.run import make

    with workplace(workers, address, local) as (executor, progress):
        make(unit, executor, progress, overwrite)


def settings_of(model: Any, where: str, /, **values: Any) -> Any:
    """Settings from options; those left out keep the model's defaults."""
    from curation.config import validate

    return validate(model, {key: value for key, value in values.items() if value is not None}, where)


def absolute_places(places: list[str] | None) -> list[str]:
    """Places as absolute paths or URIs; none where the option was left out."""
    from curation.storage import absolute

    return [absolute(place) for place in places or []]


def format_of(style: str) -> "Format":
    """The format that --format names. Raises ConfigError."""
    from cli.output import Format
    from curation.errors import ConfigError

    try:
        return Format(style)
    except ValueError:
        raise ConfigError(f"--format {style}: one of {', '.join(Format)} is needed") from None


def complete_stage(incomplete: str) -> list[str]:
    """Names of stages, for shell completion."""
    from pipelines.run import STAGES

    return [stage for stage in STAGES if stage.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Names of recipes that ship, for shell completion."""
    from pipelines.recipe import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


def complete_preset(incomplete: str) -> list[str]:
    """Names of the trainer's presets, for shell completion."""
    from trainer.config import shipped

    return [name for name in shipped() if name.startswith(incomplete)]

"""Options that several commands share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.executor import Executor
    from pipelines.progress import Progress

Workers = Annotated[
    int | None, typer.Option("--workers", "-w", help="Tasks at once; default: the processors there are.")
]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster, such as auto or host:6379.")]
Local = Annotated[bool, typer.Option("--local", help="Everything in this process, without Ray.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Make again what was made from something else.")]
Out = Annotated[str, typer.Option("--out", "-o", help="Where the result goes; any URI fsspec opens.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe's key, such as dedup.threshold=0.7.")]
RunPlace = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or any URI fsspec opens.")]


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


def complete_stage(incomplete: str) -> list[str]:
    """Names of stages, for shell completion."""
    from pipelines.run import STAGES

    return [stage for stage in STAGES if stage.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Names of recipes that ship, for shell completion."""
    from pipelines.recipe import shipped

    return [name for name in shipped() if name.startswith(incomplete)]

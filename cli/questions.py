"""Commands that answer questions about a run's images: audit, explain."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from cli.options import Address, RunPlace, workplace

Places = Annotated[
    list[str], typer.Argument(metavar="IMAGES...", help="Image files, folders, Parquet files with image bytes.")
]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write everything there as JSON.")]


def audit(
    place: RunPlace,
    images: Places,
    k: Annotated[int, typer.Option("--k", min=1, help="Images told of for each, in the set and outside.")] = 5,
    threshold: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="Least cosine of a near-copy; default: the lowest that dedup used."),
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column of image bytes in Parquet files.")] = "image",
    json_file: Json = None,
    parquet: Annotated[
        str | None, typer.Option("--parquet", metavar="FILE", help="Write everything there, one row a finding.")
    ] = None,
    work: Annotated[
        str | None,
        typer.Option(help="An empty or resumed directory for the images' vectors; default: a temporary one."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", help="Tasks at once, on Ray; default: one, without Ray.")
    ] = None,
    address: Address = None,
) -> None:
    """Tell whether images, near-copies of them or what looks alike are in the set, and what dropped them.

    \b
    Examples:
      lvd audit run flowers
      lvd audit run photos.parquet --json audit.json --parquet audit.parquet
    """
    from cli.output import Format, print_tables
    from pipelines.audit import audit as find
    from pipelines.audit_report import tables, write_json, write_parquet

    with (
        _working_place(work, workers, address) as kept,
        workplace(workers, address, local=workers is None and address is None) as (executor, progress),
    ):
        found = find(place, images, kept, executor, progress, k=k, threshold=threshold, image_column=image_column)
    if json_file is not None:
        write_json(found, place, json_file)
    if parquet is not None:
        write_parquet(found, parquet)
    for note in found.notes:
        print(f"note: {note}")
    print_tables(tables(found), Format.table)


@contextmanager
def _working_place(work: str | None, workers: int | None, address: str | None) -> Iterator[str]:
    """The given place, or a temporary directory, which workers on other machines would not reach (ConfigError)."""
    import tempfile

    from curation.errors import ConfigError

    if work is not None:
        yield work
        return
    if address or (workers and os.environ.get("RAY_ADDRESS")):
        raise ConfigError("workers on a cluster need a place that all of them reach: give --work")
    with tempfile.TemporaryDirectory(prefix="lvd-audit-") as temporary:
        yield temporary


def explain(
    place: RunPlace,
    cluster: Annotated[str, typer.Argument(metavar="CLUSTER", help="A number, of level 1, or LEVEL:NUMBER.")],
    members: Annotated[int, typer.Option(min=1, help="Members shown, nearest and farthest.")] = 5,
    json_file: Json = None,
) -> None:
    """Tell what a cluster holds: size, selection, query sets that hit it, neighbors, typical and outlying members.

    \b
    Examples:
      lvd explain run 3
      lvd explain run 1:0 --members 3 --json cluster.json
    """
    from cli.output import Format, print_tables
    from pipelines.explain import explain as tell
    from pipelines.explain import tables, write_json

    found = tell(place, cluster, members)
    if json_file is not None:
        write_json(found, json_file)
    print_tables(tables(found), Format.table)


COMMANDS = (audit, explain)

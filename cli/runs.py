"""Commands on whole runs: run, plan, stats, sql, verify, show, demo."""

from typing import Annotated

import typer

from cli.options import (
    Address,
    Local,
    Overwrite,
    RunPlace,
    Set,
    Style,
    Workers,
    complete_recipe,
    complete_stage,
    format_of,
    workplace,
)

Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a recipe that ships.", autocompletion=complete_recipe
    ),
]


def run(
    recipe: Recipe,
    out: Annotated[str, typer.Option("--out", "-o", metavar="RUN", help="The run's directory; any URI fsspec opens.")],
    start: Annotated[
        str | None,
        typer.Option(
            "--from", help="Begin with this stage; take earlier ones as they are.", autocompletion=complete_stage
        ),
    ] = None,
    assignments: Set = None,
    overwrite: Overwrite = False,
    workers: Workers = None,
    address: Address = None,
    local: Local = False,
) -> None:
    """Run all stages of a recipe; what is done is skipped, so the same command resumes.

    \b
    Examples:
      lvd run recipe.yaml --out run
      lvd run recipe.yaml --out run --from rebalance --set seed=1 --overwrite
      lvd run recipe.yaml --out local-run --local
    """
    from pipelines.recipe import load_recipe
    from pipelines.run import run as run_recipe

    loaded = load_recipe(recipe, assignments)
    with workplace(workers, address, local) as (executor, progress):
        run_recipe(loaded, out, executor, progress, overwrite=overwrite, start=start)


def plan(
    recipe: Recipe,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="RUN", help="Show what is done there.")] = None,
    assignments: Set = None,
    style: Style = "table",
) -> None:
    """Show stages, tasks, rows and bytes of a recipe, and what is done, without running anything.

    \b
    Examples:
      lvd plan lvd142m
      lvd plan recipe.yaml --out run
    """
    from cli.output import print_tables
    from pipelines.plan import plan_tables
    from pipelines.recipe import load_recipe

    print_tables(plan_tables(load_recipe(recipe, assignments), out), format_of(style))


def stats(place: RunPlace, style: Style = "table") -> None:
    """Show a run's funnel, rejects, sources, query sets and balance.

    \b
    Examples:
      lvd stats run
      lvd stats run --format json
    """
    from cli.output import print_tables
    from pipelines.stats import report

    print_tables(report(place), format_of(style))


def sql(
    place: RunPlace,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="A SELECT; each set of the run is a view.")],
    style: Style = "table",
) -> None:
    """Query a run with DuckDB: images, filtered, duplicates, clusters, retrieved, selection, shards, rejects, sets.

    \b
    Examples:
      lvd sql run "SELECT name, rows, rejects FROM sets"
      lvd sql run "SELECT source, count(*) AS images FROM shards GROUP BY source" --format csv
      lvd sql run "SELECT reason, count(*) AS rows FROM rejects GROUP BY reason" --format markdown
    """
    from cli.output import arrow_table, print_table
    from pipelines.catalog import query as run_query

    print_table(arrow_table(run_query(place, query)), format_of(style))


def verify(place: RunPlace, workers: Workers = None, address: Address = None, local: Local = False) -> None:
    """Prove a run: checksums, fingerprints, and that no row was lost, swapped or changed between any two sets.

    \b
    Examples:
      lvd verify run
      lvd verify run --local
    """
    from curation.errors import LvdError
    from pipelines.verify import verify as find_problems

    with workplace(workers, address, local) as (executor, progress):
        count = 0
        for name, problem in find_problems(place, executor, progress):
            count += 1
            print(f"{name}: {problem}")
    if count:
        raise LvdError(f"{place} is not what it says: {count} problem{'s' if count > 1 else ''}")
    print(f"{place}: all sets are whole, and all equations between them hold")


def show(
    place: RunPlace, image_id: Annotated[str, typer.Argument(metavar="IMAGE_ID", help="32 hexadecimal digits.")]
) -> None:
    """Show one image's way through every stage.

    \b
    Examples:
      lvd show run 0123456789abcdef0123456789abcdef
    """
    from pipelines.show import show as way

    for name, values in way(place, image_id):
        print(name)
        for key, value in values.items():
            if value is not None and key != "image_id":
                print(f"  {key:<22}{value}")


def demo(
    out: Annotated[str, typer.Option("--out", "-o", metavar="RUN", help="Where the demo's run goes.")] = "lvd-demo",
    images: Annotated[int, typer.Option(help="Images of the web it draws.")] = 3000,
    overwrite: Overwrite = False,
    workers: Workers = None,
    local: Local = False,
) -> None:
    """Draw a small web, serve it on this machine, and curate it: the whole pipeline, offline, in minutes.

    \b
    Examples:
      lvd demo
      lvd demo --out small-demo --images 400
    """
    from cli.output import Format, print_tables
    from pipelines.demo import run_demo

    with workplace(workers, None, local) as (executor, progress):
        tables, hints = run_demo(out, images, executor, progress, overwrite)
    print_tables(tables, Format.table)
    for hint in hints:
        print(hint)


COMMANDS = (run, plan, stats, sql, verify, show, demo)

"""What a recipe would do, before anything runs: tasks, rows, bytes, what is already there, and what its products cost.

Figures of sets that exist are exact; others are estimated from what the recipe declares, or from Parquet footers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyarrow.parquet as pq

from curation import storage
from curation.errors import LvdError
from curation.shards import ReadableParquet, ShardSet
from pipelines.catalog import place_of
from pipelines.filter import BUCKET_ROWS
from pipelines.levels import levels_of
from pipelines.price import Cost, size_text
from pipelines.price_clusters import cluster_price_tables
from pipelines.price_dedup import chosen_engine, dedup_price_tables
from pipelines.price_retrieval import retrieval_price_tables, sample_costs
from pipelines.raw import find_files, find_images
from pipelines.recipe import PartSettings, Recipe, SourceSettings
from pipelines.retrieve_engine import resolve
from pipelines.run import Plan
from pipelines.stats import Table

IMAGE_BYTES = 100_000
"""Mean size of a web photograph, where none has been fetched yet."""
VECTOR_BYTES = 2 * 512


@dataclass(frozen=True)
class Line:
    """One set of the plan; None is unknown."""

    stage: str
    name: str
    tasks: int | None
    rows: int | None
    bytes: int | None
    state: str


def plan_tables(recipe: Recipe, run: str | None) -> list[Table]:
    """The plan as tables: sets to make, the parts of the final set with their nominal sizes, and what stages cost."""
    counted = {name: count_rows(source) for name, source in recipe.sources.items()}
    recipe = recipe.model_copy(update={"parts": [_sized(part, counted) for part in recipe.parts]})
    lines = list(_lines(recipe, run, counted))
    rows = [[line.stage, line.name, line.tasks, line.rows, size_text(line.bytes), line.state] for line in lines]
    known = sum(line.bytes or 0 for line in lines)
    rows.append(["", "all", sum(line.tasks or 0 for line in lines), None, size_text(known), ""])
    tables = [Table("Stages", ["stage", "set", "tasks", "rows at most", "bytes about", "state"], rows)]
    parts: list[list[str | int | None]] = [[part.title, part.nominal] for part in recipe.parts]
    parts.append(["total of those known", nominal_total(recipe)])
    tables.append(Table("Parts of the final set", ["part", "images (nominal)"], parts))
    return [*tables, *_prices(recipe, run, lines)]


def _prices(recipe: Recipe, run: str | None, lines: list[Line]) -> list[Table]:
    """What dedup, clustering and retrieval cost, as far as rows are known."""
    plan, tables = Plan(recipe, run or "run"), list[Table]()
    count, dim = _vectors(plan, run, lines, recipe.dedup.embedder, plan.pools)
    if count is not None:
        tables += dedup_price_tables(recipe.dedup, count, dim)
    embedder = recipe.cluster.embedder
    count, dim = _vectors(plan, run, lines, embedder, plan.pools)
    if not count:
        return tables
    if plan.needs_clusters:
        tables += cluster_price_tables(recipe.cluster, count, dim, recipe.rows_per_part)
    costs: list[Cost] = []
    for part in recipe.parts:
        if part.retrieved:
            asked, _ = _vectors(plan, run, lines, embedder, [part.retrieved])
            if asked and part.mode == "sample":
                costs += sample_costs(part.retrieved, recipe.retrieve, asked, count, dim)
    return [*tables, *retrieval_price_tables(costs, count, dim)]


def _vectors(
    plan: Plan, run: str | None, lines: list[Line], embedder: str, sources: list[str]
) -> tuple[int | None, int]:
    """How many vectors sources have, exactly where they are embedded, else at most, if known; and of how many numbers.

    Of nothing that is embedded the number is a guess.
    """
    names = [f"embeddings/{embedder}/{source}" for source in sources]
    rows = [line.rows for line in lines if line.name in names]
    made = [ShardSet(plan.place(*name.split("/"))) for name in names] if run else []
    dims = [int(shard_set.manifest["info"]["dim"]) for shard_set in made if shard_set.is_complete]
    return None if None in rows else sum(count or 0 for count in rows), (dims or [VECTOR_BYTES // 2])[0]


def nominal_total(recipe: Recipe) -> int:
    """Images of the final set as the recipe's own figures have it (paper, Table 15). Unknown parts count nothing."""
    return sum(part.nominal or 0 for part in recipe.parts)


def count_rows(source: SourceSettings) -> int | None:
    """Rows of a source: from Parquet footers and listings where it is at hand, else as declared; text is not read."""
    try:
        if source.folder:
            return len(find_images(source.folder))
        files = find_files(source.urls or source.images or "")
        if all(name.endswith(".parquet") for name in files):
            return sum(_footer_rows(name) for name in files)
    except (LvdError, OSError):
        return source.rows
    return source.rows


def _footer_rows(uri: str) -> int:
    with storage.open_input(uri) as file, ReadableParquet(uri):
        return int(pq.ParquetFile(file).metadata.num_rows)


def _sized(part: PartSettings, rows: dict[str, int | None]) -> PartSettings:
    """A part with the number of its images, if the recipe does not say it but the source is at hand."""
    if part.images is not None or part.balanced:
        return part
    return part.model_copy(update={"images": rows[part.as_is or part.retrieved or ""]})


def _lines(recipe: Recipe, run: str | None, rows: dict[str, int | None]) -> Iterator[Line]:
    plan = Plan(recipe, run or "run")
    for stage, name, count, row_bytes, tasks in _expected(recipe, plan, rows):
        if tasks is None and count is not None:
            tasks = -(-count // recipe.rows_per_part)
        size = None if count is None else int(count * row_bytes)
        line = Line(stage, name, tasks, count, size, "to do")
        yield _found(line, ShardSet(place_of(plan.run, name))) if run else line


def _expected(
    recipe: Recipe, plan: Plan, rows: dict[str, int | None]
) -> Iterator[tuple[str, str, int | None, float, int | None]]:
    """(stage, set, rows, bytes a row, tasks where they do not follow from the rows) of every set."""
    for name, source in recipe.sources.items():
        if source.urls:
            yield "download", f"urls/{name}", rows[name], 60, None
        yield "download", f"images/{name}", rows[name], IMAGE_BYTES, None
    for name in recipe.sources:
        yield "filter", f"index/{name}", rows[name], 40, -(-(rows[name] or 1) // BUCKET_ROWS)
        yield "filter", f"filtered/{name}", rows[name], 36, None
    for unit in plan.embed():
        source_name = unit.out.rpartition("/")[2]
        yield "embed", f"embeddings/{unit.name}/{source_name}", rows[source_name], VECTOR_BYTES + 32, None
    for name in plan.pools:
        yield "dedup", f"duplicates/{name}", rows[name], 80, None
    pool_rows = None if None in [rows[name] for name in plan.pools] else sum(rows[name] or 0 for name in plan.pools)
    yield "dedup", "forest", pool_rows, 20, 1
    if pool_rows is not None and chosen_engine(recipe.dedup, pool_rows) in ("partitioned", "faiss"):
        yield "dedup", "recall", 1, 400, 1
    if plan.needs_clusters:
        levels = levels_of(recipe.cluster, pool_rows or 1) if pool_rows or not recipe.cluster.preset else ()
        yield "cluster", "centroids", sum(x.num_clusters for x in levels) or None, 2 * VECTOR_BYTES, 1
        for name in plan.pools:
            yield "cluster", f"clusters/{name}", rows[name], 40, None
    for name in plan.retrieved_for:
        nominal = [part.nominal for part in recipe.parts if part.retrieved == name]
        count = None if None in nominal else sum(n or 0 for n in nominal)
        modes = [part.mode for part in recipe.parts if part.retrieved == name]
        asked = _tasks(recipe, [rows[name]] if "sample" in modes else [])
        tasks = None if asked is None else asked + modes.count("cluster")
        yield "retrieve", f"retrieved/{name}", count, 80, tasks
        sides = None if pool_rows is None or rows[name] is None else (rows[name] or 0, pool_rows)
        if "sample" in modes and sides and resolve(recipe.retrieve, *sides, 1).name != "exact":
            yield "retrieve", f"retrieval_recall/{name}", 1, 100, 1
    total = nominal_total(recipe) or None
    yield "rebalance", "selection", total, 60, _tasks(recipe, [rows[name] for name in plan.contributors])
    yield "shard", "shards", total, IMAGE_BYTES, max(1, round((total or 0) * IMAGE_BYTES / recipe.shard.shard_bytes))


def _tasks(recipe: Recipe, rows: list[int | None]) -> int | None:
    """Parts of sources with so many rows each, if all are known."""
    return None if None in rows else sum(-(-(count or 0) // recipe.rows_per_part) for count in rows)


def _found(line: Line, shard_set: ShardSet) -> Line:
    """The line with exact figures, as far as the set is there."""
    if shard_set.is_complete:
        manifest = shard_set.manifest
        return Line(line.stage, line.name, shard_set.num_parts, manifest["rows"], manifest["bytes"], "done")
    if committed := len(shard_set.committed()):
        return replace(line, state=f"{committed} parts done")
    return line

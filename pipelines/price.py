"""What dedup of so many vectors would cost, in operations, hours, bytes and memory: arithmetic, nothing is run.

Operations are those on int8: a product of two vectors of d numbers is 2 d. Of the two rates that turn them into hours,
the core's is that of a whole exact join (docs/benchmarks.md), the accelerator's is an assumption. Priced are the pools
among themselves; what they and the references cost in the relative step is of the same kind, and less, since only
representatives take part.
"""

from dataclasses import dataclass

from curation.quantizer import default_num_coarse
from pipelines.engine import EXACT_AT_MOST, OPERATIONS_PER_SECOND, Engine, resolve
from pipelines.join import block_rows
from pipelines.partitioned import LISTS_RANKED
from pipelines.recipe import DedupSettings
from pipelines.semdedup import SEMDEDUP_ENGINE, semdedup_engine
from pipelines.stats import Table

ACCELERATOR_OPERATIONS_PER_SECOND = 5e14
"""Of one data-center accelerator, sustained: an assumption."""
COPIES = 10
"""Partitions that a vector travels to under one quantizer: an assumption, since it depends on the vectors."""
PARTITION_BYTES = 8
"""A worker's memory for each number of a vector of its partition: about 4 kB a vector of 512 (docs/benchmarks.md)."""
EXACT_NODE_BYTES, IMAGE_BYTES = 128, 110
"""Bytes an image: of the forest in each worker of the exact join; of the one task that finds components."""


@dataclass(frozen=True)
class Cost:
    """One step of an engine: int8 operations, bytes that travel to workers, bytes that one holds; None is unknown."""

    engine: str
    step: str
    operations: float | None = 0
    moved: float | None = 0
    held: float | None = None


def chosen_engine(settings: DedupSettings, num_images: int) -> str:
    """The engine that joins so many images of the pools."""
    if settings.preset == "semdedup":
        return SEMDEDUP_ENGINE
    is_open = settings.join.engine == "auto"
    return resolve(settings.join, num_images, 1).name if is_open else settings.join.engine


def dedup_costs(settings: DedupSettings, num_images: int, dim: int) -> list[Cost]:
    """The exact join and the one in partitions (SemDeDup's, where the preset asks for it), step by step."""
    exact = Cost("exact", "join", num_images**2 * dim, 0, _exact_bytes(num_images, dim))
    components = Cost("any", "components", 0, 0, IMAGE_BYTES * num_images)
    if settings.preset == "semdedup":
        return [*_partitioned(semdedup_engine(settings.join, num_images), num_images, dim), components]
    join = settings.join.model_copy(update={"engine": "partitioned"})
    audit = Cost("partitioned", "recall", min(settings.join.recall_sample, num_images) * num_images * 2 * dim)
    return [exact, *_partitioned(resolve(join, num_images, dim), num_images, dim), audit, components]


def _exact_bytes(num_images: int, dim: int) -> int:
    """Two blocks of vectors with their codes, and the forest."""
    return 2 * min(block_rows(num_images), num_images) * 3 * dim + EXACT_NODE_BYTES * num_images


def _partitioned(engine: Engine, num_images: int, dim: int) -> list[Cost]:
    """Lists, scatter and joins of a partitioned engine, all quantizers together."""
    num_lists = engine.values["num_lists"]
    quantizers, joined = engine.values.get("quantizers", 1), engine.values.get("lists_joined", 1)
    visits = num_images * quantizers
    num_coarse = default_num_coarse(num_lists)
    ranked = min(num_lists, max(num_lists / 8, num_lists / num_coarse, LISTS_RANKED * joined))
    rows = engine.values["partition_rows"]
    moved = visits * min(COPIES, joined) * 2 * dim if num_images > rows else 0
    return [
        Cost(engine.name, "lists", visits * (num_coarse + ranked) * 2 * dim),
        Cost(engine.name, "scatter", 0, moved),
        Cost(
            engine.name,
            "joins",
            visits * joined * num_images / num_lists * 2 * dim,
            0,
            min(num_images, rows) * PARTITION_BYTES * dim,
        ),
    ]


def price_tables(settings: DedupSettings, num_images: int, dim: int) -> list[Table]:
    """`dedup_costs` as a table in which the engine that the recipe runs is marked, and what the figures rest on."""
    costs = dedup_costs(settings, num_images, dim)
    chosen = chosen_engine(settings, num_images)
    if chosen == "faiss":
        costs.append(Cost("faiss", "index and search", None, None))
    marks = {chosen: " (chosen)"} | ({"exact": " (too many)"} if num_images > EXACT_AT_MOST else {})
    columns = ["engine", "step", "int8 operations", "core hours", "accelerator hours", "bytes moved", "a worker holds"]
    rows = [[cost.engine + marks.get(cost.engine, ""), *_cells(cost)] for cost in costs]
    rates: list[list[str]] = [
        ["images", f"{num_images:,}", "rows at most, as long as they are not embedded"],
        ["numbers of a vector", str(dim), "512, as long as images are not embedded"],
        ["int8 operations a second, one core", f"{OPERATIONS_PER_SECOND:.2g}", "measured, a whole exact join"],
        ["int8 operations a second, one accelerator", f"{ACCELERATOR_OPERATIONS_PER_SECOND:.2g}", "assumed"],
        ["partitions that a vector travels to", str(COPIES), "assumed"],
    ]
    return [
        Table("Cost of dedup", columns, rows),
        Table("What the cost of dedup rests on", ["figure", "value", "where from"], rates),
    ]


def _cells(cost: Cost) -> list[str | None]:
    operations = cost.operations
    if operations is None:
        return [cost.step, "?", "?", "?", "?", "?"]
    hours = [_hours(operations / rate) for rate in (OPERATIONS_PER_SECOND, ACCELERATOR_OPERATIONS_PER_SECOND)]
    sizes = [size_text(size) if size else None for size in (cost.moved, cost.held)]
    return [cost.step, f"{operations:.1e}" if operations else None, *hours, *sizes]


def _hours(seconds: float) -> str | None:
    """Two digits, in hours; None for no work."""
    hours = seconds / 3600
    if hours < 0.001:
        return "< 0.001" if hours else None
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def size_text(count: float | None) -> str:
    """Bytes for a reader; unknown ones as `?`."""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} PB"

"""What dedup of so many vectors would cost, step by step, under each engine.

Priced are the pools among themselves; what they and the references cost in the relative step is of the same kind, and
less, since only representatives take part.
"""

from curation.signs import BITS
from pipelines.engine import EXACT_AT_MOST, OPERATIONS_PER_SECOND, Engine, resolve
from pipelines.join import PIECE_ROWS, block_rows
from pipelines.price import COST_COLUMNS, REST_COLUMNS, Cost, centroids_ranked, cost_cells, rate_rows, vector_rows
from pipelines.recipe import DedupSettings
from pipelines.semdedup import SEMDEDUP_ENGINE, semdedup_engine
from pipelines.stats import Table

COPIES = 12
"""Partitions of a million that a vector of ten million travels to under one quantizer, with 24 lists joined
(docs/benchmarks.md). More where partitions hold fewer lists."""
PARTITION_BYTES = 8
"""A worker's memory for each number of a vector of its partition: about 4 kB a vector of 512 (docs/benchmarks.md)."""
PAIRS_PER_SECOND = 8e8
"""That one core compares where they meet in lists, sieve and all: pairs over the CPU seconds of step `pairs` of a
million vectors with 64 lists joined (docs/benchmarks.md). An accelerator multiplies in place of counting bits."""
EXACT_NODE_BYTES, IMAGE_BYTES = 128, 110
"""Bytes an image: of the forest in each worker of the exact join; of the one task that finds components."""


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
    """A block of vectors with their codes, a piece of another, and the forest."""
    rows = min(block_rows(num_images), num_images) + min(PIECE_ROWS, num_images)
    return rows * 3 * dim + EXACT_NODE_BYTES * num_images


def _partitioned(engine: Engine, num_images: int, dim: int) -> list[Cost]:
    """Lists, scatter and joins of a partitioned engine, all quantizers together."""
    num_lists = engine.values["num_lists"]
    quantizers, joined = engine.values.get("quantizers", 1), engine.values.get("lists_joined", 1)
    visits = num_images * quantizers
    rows = engine.values["partition_rows"]
    moved = visits * min(COPIES, joined) * 2 * dim if num_images > rows else 0
    pairs = visits * joined * num_images / num_lists
    seconds = pairs / PAIRS_PER_SECOND if dim >= BITS else None
    return [
        Cost(engine.name, "lists", visits * centroids_ranked(num_lists, joined) * 2 * dim),
        Cost(engine.name, "scatter", 0, moved),
        Cost(
            engine.name,
            "joins",
            pairs * 2 * dim,
            0,
            min(num_images, rows) * PARTITION_BYTES * dim,
            seconds,
        ),
    ]


def dedup_price_tables(settings: DedupSettings, num_images: int, dim: int) -> list[Table]:
    """`dedup_costs` as a table in which the engine that the recipe runs is marked, and what the figures rest on."""
    costs = dedup_costs(settings, num_images, dim)
    chosen = chosen_engine(settings, num_images)
    if chosen == "faiss":
        costs.append(Cost("faiss", "index and search", None, None))
    marks = {chosen: " (chosen)"} | ({"exact": " (too many)"} if num_images > EXACT_AT_MOST else {})
    rows = [[cost.of + marks.get(cost.of, ""), *cost_cells(cost)] for cost in costs]
    known = [*vector_rows(num_images, dim), *rate_rows(OPERATIONS_PER_SECOND, "a whole exact join")]
    known.append(["partitions that a vector travels to", str(COPIES), "measured on ten million"])
    return [
        Table("Cost of dedup", ["engine", *COST_COLUMNS], rows),
        Table("What the cost of dedup rests on", REST_COLUMNS, known),
    ]

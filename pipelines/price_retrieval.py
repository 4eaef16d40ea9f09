"""What sample-based retrieval would cost: each query set against the pools, all pairs or by lists.

Cluster-based retrieval is not priced: it compares its queries with the centroids, far fewer than clustering compares.
"""

from pipelines.engine import OPERATIONS_PER_SECOND
from pipelines.price import COST_COLUMNS, REST_COLUMNS, Cost, centroids_ranked, cost_cells, rate_rows, vector_rows
from pipelines.recipe import RetrieveSettings
from pipelines.retrieve_engine import resolve
from pipelines.stats import Table

LIST_BYTES = 4
"""A worker's memory for each number of a pool image of its range of lists."""


def sample_costs(name: str, settings: RetrieveSettings, num_queries: int, num_images: int, dim: int) -> list[Cost]:
    """One query set's nearest pool images, by the engine that the recipe chooses; `of` is the query set."""
    engine = resolve(settings, num_queries, num_images, dim)
    if engine.name == "exact":
        return [Cost(name, "all pairs", num_queries * num_images * 2 * dim)]
    num_lists, joined, quantizers = (engine.values[key] for key in ("num_lists", "lists_joined", "quantizers"))
    stored, visiting = num_images * centroids_ranked(num_lists, 1), num_queries * centroids_ranked(num_lists, joined)
    met = num_queries * joined * num_images / num_lists
    ranges = -(-num_images // engine.values["partition_rows"])
    moved = quantizers * (num_images + num_queries * min(joined, ranges)) * 2 * dim
    held = min(num_images, engine.values["partition_rows"]) * LIST_BYTES * dim
    audit = min(engine.values["recall_sample"], num_queries) * num_images
    return [
        Cost(name, "lists", quantizers * (stored + visiting) * 2 * dim, moved),
        Cost(name, "pairs that meet", quantizers * met * 2 * dim, 0, held),
        Cost(name, "recall", audit * 2 * dim),
    ]


def retrieval_price_tables(costs: list[Cost], num_images: int, dim: int) -> list[Table]:
    """Costs as a table, and what the figures rest on; none where nothing is retrieved."""
    if not costs:
        return []
    known = [*vector_rows(num_images, dim), *rate_rows(OPERATIONS_PER_SECOND, "a whole exact join")]
    return [
        Table("Cost of retrieval", ["query set", *COST_COLUMNS], [[cost.of, *cost_cells(cost)] for cost in costs]),
        Table("What the cost of retrieval rests on", REST_COLUMNS, known),
    ]

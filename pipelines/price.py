"""What a stage would cost, in operations, hours, bytes and memory: the rates, and how a table tells it.

Operations are those on int8: a product of two vectors of d numbers is 2 d. A core's rates are those of whole pieces of
work that a benchmark timed; the accelerator's is an assumption. What is priced is arithmetic, nothing is run.
"""

from dataclasses import dataclass

from curation.quantizer import SEARCHED, default_num_coarse
from pipelines.engine import OPERATIONS_PER_SECOND
from pipelines.partitioned import LEAST_RANKED, LISTS_RANKED

ACCELERATOR_OPERATIONS_PER_SECOND = 5e14
"""Of one data-center accelerator, sustained: an assumption."""
KMEANS_OPERATIONS_PER_SECOND = 3.6e11
"""Of one core: 2 n k d over the CPU seconds of a round of k-means, 500,000 vectors of 256 numbers and 1,000 clusters
(`python -m benchmarks.cluster --k 1000`)."""


@dataclass(frozen=True)
class Cost:
    """One step: what it is of, int8 operations, bytes that travel to workers, bytes that one holds; None is unknown.

    A core's seconds follow from the operations, unless the step does something else on processors: then they are given.
    """

    of: str
    step: str
    operations: float | None = 0
    moved: float | None = 0
    held: float | None = None
    core_seconds: float | None = None


COST_COLUMNS = ["step", "int8 operations", "core hours", "accelerator hours", "bytes moved", "a worker holds"]
REST_COLUMNS = ["figure", "value", "where from"]


def centroids_ranked(num_lists: int, lists_joined: int) -> float:
    """Centroids that a vector is compared with under one quantizer, to find the lists nearest to it."""
    num_coarse = default_num_coarse(num_lists)
    ranked = min(
        num_lists, max(num_lists / SEARCHED, num_lists / num_coarse, LISTS_RANKED * lists_joined, LEAST_RANKED)
    )
    return ranked if ranked == num_lists else num_coarse + ranked


def cost_cells(cost: Cost, rate: float = OPERATIONS_PER_SECOND) -> list[str | None]:
    """A cost under COST_COLUMNS, where a core does `rate` operations a second."""
    operations = cost.operations
    if operations is None:
        return [cost.step, "?", "?", "?", "?", "?"]
    core_seconds = operations / rate if cost.core_seconds is None else cost.core_seconds
    hours = [_hours(seconds) for seconds in (core_seconds, operations / ACCELERATOR_OPERATIONS_PER_SECOND)]
    sizes = [size_text(size) if size else None for size in (cost.moved, cost.held)]
    return [cost.step, f"{operations:.1e}" if operations else None, *hours, *sizes]


def rate_rows(rate: float, measured_on: str) -> list[list[str]]:
    """The rates that hours rest on, as rows of figure, value and origin."""
    return [
        ["int8 operations a second, one core", f"{rate:.2g}", f"measured, {measured_on}"],
        ["int8 operations a second, one accelerator", f"{ACCELERATOR_OPERATIONS_PER_SECOND:.2g}", "assumed"],
    ]


def vector_rows(num_images: int, dim: int) -> list[list[str]]:
    """How many vectors of the pools are priced, and of how many numbers, as rows of figure, value and origin."""
    return [
        ["images", f"{num_images:,}", "rows at most, as long as they are not embedded"],
        ["numbers of a vector", str(dim), "512, as long as images are not embedded"],
    ]


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

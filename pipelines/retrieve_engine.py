"""How sample-based retrieval searches: which engine, with which settings, what it costs, and its steps."""

import math
from dataclasses import dataclass
from typing import Any

from curation import storage
from pipelines.engine import MAX_LISTS, OPERATIONS_PER_SECOND, Engine, spoken_time
from pipelines.join import SampleStep
from pipelines.near import CompareStep, KeptNodes
from pipelines.near_lists import MeetStep, Ranges, TravelStep
from pipelines.nodes import Nodes
from pipelines.partitioned import POINTS_PER_LIST, ListsStep, QuantizersStep
from pipelines.recipe import RetrieveSettings
from pipelines.retrieve_recall import RetrievalRecallStep
from pipelines.unit import Step

EXACT_PAIRS = 10**12
"""Queries times pool images up to which `auto` compares all: at dimension 512 three quarters of an hour of one core.

Neighbors that are no near-copies lie in many lists: to find 99 % of them can take most, and then all cost less."""
LISTS_PER_ROOT = 12
"""Lists for each root of the number of pool images."""
PAIRS_PER_SECOND = OPERATIONS_PER_SECOND / 2
"""Pairs that one core compares, times dimension: a join of n vectors compares half of n**2."""


def resolve(settings: RetrieveSettings, num_queries: int, num_pool: int, dim: int) -> Engine:
    """The engine for so many queries and pool images of so many numbers; `why` says what comparing all would cost."""
    pairs, name = num_queries * num_pool, settings.engine
    seconds = pairs * dim / PAIRS_PER_SECOND
    told = f"{num_queries:,} queries x {num_pool:,} pool images (all pairs take one core about "
    told += spoken_time(seconds)
    if name == "auto":
        name = "exact" if pairs <= EXACT_PAIRS else "partitioned"
        told += f"; auto compares all up to {EXACT_PAIRS:,} pairs"
    if name == "exact":
        return Engine(name, {}, f"exact search of {told})", settings.device, seconds=seconds)
    near = 2 ** round(math.log2(max(1, LISTS_PER_ROOT * math.sqrt(num_pool))))
    num_lists = settings.num_lists or min(max(1, near), MAX_LISTS)
    values = {
        "num_lists": num_lists,
        "lists_joined": min(settings.lists_joined, num_lists),
        "quantizers": settings.quantizers,
        "partition_rows": settings.partition_rows,
        "recall_sample": settings.recall_sample,
    }
    how = "{quantizers} quantizers of {num_lists:,} lists, {lists_joined} visited".format(**values)
    return Engine(name, values, f"partitioned search, {how}, of {told})", settings.device, seconds=seconds)


@dataclass(frozen=True)
class Search:
    """One query set against the pools.

    Attributes:
        queries: its embeddings.
        pool: the kept images of the pools.
        k: neighbors of each query.
        out: where working sets lie; `prefix` begins their names.
    """

    queries: str
    pool: KeptNodes
    k: int
    seed: int
    out: str
    prefix: str

    def _at(self, name: str) -> tuple[str, str, dict[str, Any], bool]:
        return storage.join(self.out, f"_{self.prefix}{name}"), name.replace("_", " "), {}, False

    def plan(self, engine: Engine) -> tuple[list[Step], str]:
        """The steps of a search, and where what it finds lies: a set of `near.NEAR`."""
        if engine.name == "exact":
            compared = CompareStep(*self._at("compared"), self.queries, self.pool, self.k, None, engine.resolved_device)
            return [compared], compared.out
        values, device = engine.values, engine.resolved_device
        m, asked = values["lists_joined"], Nodes([self.queries], [])
        size = max(POINTS_PER_LIST * values["num_lists"] * values["quantizers"], 1)
        sample = SampleStep(*self._at("sample"), self.pool, size, self.seed, "retrieve")
        fitted = QuantizersStep(
            *self._at("quantizers"), sample.out, values["num_lists"], values["quantizers"], self.seed
        )
        home = ListsStep(*self._at("lists_stored"), self.pool, fitted.out, 1, device)
        near = ListsStep(*self._at("lists_visited"), asked, fitted.out, m, device)
        ranges = Ranges(fitted.out, max(1, -(-len(self.pool) // values["partition_rows"])))
        stored = TravelStep(*self._at("stored"), self.pool, home.out, 1, ranges, True)
        visits = TravelStep(*self._at("visits"), asked, near.out, m, ranges, False)
        met = MeetStep(*self._at("met"), self.queries, stored.out, visits.out, ranges, self.k, device)
        return [sample, fitted, home, near, stored, visits, met], met.out

    def audit(self, engine: Engine, found: str, recall: str, labels: dict[str, Any], target: float) -> list[Step]:
        """The steps that measure the recall of what lies at `found`; the figures are kept at `recall`."""
        values = engine.values
        asked = Nodes([self.queries], [])
        sample = SampleStep(*self._at("recall_sample"), asked, values["recall_sample"], self.seed, "retrieval recall")
        truth = CompareStep(*self._at("truth"), self.queries, self.pool, self.k, sample.out, engine.resolved_device)
        shape = self.k, values["quantizers"], values["lists_joined"], target, self.seed
        figures = RetrievalRecallStep(recall, "retrieval_recall", labels, True, self.queries, found, truth.out, *shape)
        return [sample, truth, figures]

"""A recipe as a run: which units there are, where their sets lie, and doing all of them in order.

This file reads like the paper's section 3: download, filter, embed, dedup, cluster, retrieve, rebalance, shard.
"""

import time
from collections.abc import Iterator

import yaml

from curation import storage
from curation.errors import ConfigError
from curation.faiss_setup import require_faiss
from curation.shards import ShardSet
from pipelines.card import write_card
from pipelines.cluster import ClusterUnit
from pipelines.dedup import DedupUnit
from pipelines.download import DownloadUnit
from pipelines.embed import EmbedUnit
from pipelines.executor import Executor
from pipelines.filter import FilterUnit
from pipelines.progress import Progress
from pipelines.rebalance import RebalanceUnit
from pipelines.recipe import Recipe
from pipelines.retrieve import RetrieveUnit
from pipelines.retrieve_clusters import ClusterRule
from pipelines.shard import ShardUnit
from pipelines.unit import Unit, run_unit

STAGES = ("download", "filter", "embed", "dedup", "cluster", "retrieve", "rebalance", "shard")
RECIPE = "recipe.yaml"


class Plan:
    """The units of a recipe at a place."""

    def __init__(self, recipe: Recipe, run: str) -> None:
        self.recipe, self.run = recipe, storage.absolute(run)
        self.pools, self.queries, self.references = (recipe.of_role(r) for r in ("pool", "query", "reference"))

    def place(self, *names: str) -> str:
        """Where a set lies."""
        return storage.join(self.run, *names)

    def _each(self, kind: str, sources: list[str]) -> list[str]:
        return [self.place(*kind.split("/"), source) for source in sources]

    def units(self) -> Iterator[Unit]:
        """All units in order."""
        yield from self.download()
        yield from self.filter()
        yield from self.embed()
        yield self.dedup()
        if self.needs_clusters:
            yield self.cluster()
        yield from self.retrieve()
        yield self.rebalance()
        yield self.shard()

    def download(self) -> Iterator[Unit]:
        recipe = self.recipe
        for name, source in recipe.sources.items():
            places = (self.place("urls", name), self.place("images", name))
            yield DownloadUnit(name, source, recipe.download, recipe.rows_per_part, *places)

    def filter(self) -> Iterator[Unit]:
        for name in self.recipe.sources:
            places = (self.place("filtered", name), self.place("index", name))
            yield FilterUnit(self.place("images", name), self.recipe.filter, self.recipe.download.max_pixels, *places)

    def embed(self) -> Iterator[EmbedUnit]:
        """Each source through the models that later stages compare it by."""
        semantic = [*self.pools, *self.retrieved_for] if self.needs_clusters or self.retrieved_for else []
        needed = [(self.recipe.dedup.embedder, source) for source in [*self.pools, *self.references]]
        needed += [(self.recipe.cluster.embedder, source) for source in semantic]
        for name, source in dict.fromkeys(needed):
            images, filtered = self.place("images", source), self.place("filtered", source)
            out = self.place("embeddings", name, source)
            yield EmbedUnit(name, self.recipe.embedders[name], images, filtered, out)

    def dedup(self) -> Unit:
        settings, kind = self.recipe.dedup, f"embeddings/{self.recipe.dedup.embedder}"
        return DedupUnit(
            self._each(kind, self.pools),
            self._each("images", self.pools),
            self._each(kind, self.references),
            settings,
            self.recipe.seed,
            self.place("duplicates"),
            self.place("forest"),
            self.place("recall"),
        )

    @property
    def needs_clusters(self) -> bool:
        """Whether a part of the recipe asks for clusters."""
        return any(part.mode == "cluster" or part.balanced for part in self.recipe.parts)

    def _semantic(self, sources: list[str]) -> list[str]:
        return self._each(f"embeddings/{self.recipe.cluster.embedder}", sources)

    def cluster(self) -> Unit:
        duplicates, settings = self._each("duplicates", self.pools), self.recipe.cluster
        places = (self.place("centroids"), self.place("clusters"))
        return ClusterUnit(self._semantic(self.pools), duplicates, settings, self.recipe.seed, *places)

    @property
    def retrieved_for(self) -> list[str]:
        """Query sets that something is retrieved for."""
        return list(dict.fromkeys(part.retrieved for part in self.recipe.parts if part.retrieved))

    def retrieve(self) -> Iterator[Unit]:
        for name in self.retrieved_for:
            parts = [part for part in self.recipe.parts if part.retrieved == name]
            k = next((part.k for part in parts if part.mode == "sample"), None)
            rules = [
                ClusterRule(p.images_per_cluster, p.min_hits, p.cap, "closest" if p.strategy == "closest" else "random")
                for p in parts
                if p.images_per_cluster
            ]
            yield RetrieveUnit(
                self._semantic([name])[0],
                self._semantic(self.pools),
                self._each("duplicates", self.pools),
                self._each("clusters", self.pools),
                self.place("centroids"),
                k,
                rules[0] if rules else None,
                self.recipe.seed,
                self.place("retrieved"),
                self.recipe.retrieve,
            )

    @property
    def contributors(self) -> list[str]:
        """Sources that images of the final set may come from: pools, then what goes in as it is."""
        as_is = [part.as_is for part in self.recipe.parts if part.as_is]
        return list(dict.fromkeys([*self.pools, *as_is]))

    def rebalance(self) -> Unit:
        retrieved = {name: self.place("retrieved", name) for name in self.retrieved_for}
        filtered = self._each("filtered", self.contributors)
        clusters = self._each("clusters", self.pools)
        return RebalanceUnit(
            self.recipe.parts,
            filtered,
            retrieved,
            clusters,
            self.recipe.seed,
            self.place("selection"),
            self._semantic(self.pools),
            self.recipe.mixture.target if self.recipe.mixture else None,
        )

    def shard(self) -> Unit:
        clusters = {pool: self.place("clusters", pool) for pool in self.pools} if self.needs_clusters else {}
        return ShardUnit(
            self.place("selection"),
            self._each("images", self.contributors),
            clusters,
            {pool: self.place("duplicates", pool) for pool in self.pools},
            self.recipe.shard,
            self.recipe.seed,
            self.place("shards"),
        )


def run(
    recipe: Recipe,
    out: str,
    executor: Executor,
    progress: Progress,
    *,
    overwrite: bool = False,
    start: str | None = None,
) -> None:
    """Do what is not done yet, from the stage `start` on; earlier stages are then taken as they are.

    Raises ConfigError, LvdError or PartialError; what is done is kept, and the same call resumes.
    """
    if start is not None and start not in STAGES:
        raise ConfigError(f"--from {start}: no such stage; there are {', '.join(STAGES)}")
    out = storage.absolute(out)
    check_place(out)
    require_faiss()  # dedup needs it, which comes after hours of fetching
    if not storage.exists(storage.join(out, RECIPE)):
        _write_recipe(recipe, out)
    first = STAGES.index(start) if start else 0
    for unit in Plan(recipe, out).units():
        if STAGES.index(unit.stage) >= first:
            make(unit, executor, progress, overwrite)
    _write_recipe(recipe, out)
    write_card(out)


def _write_recipe(recipe: Recipe, out: str) -> None:
    """Keep the resolved recipe with the run: at first, so that an empty place is known as ours, and once it is done."""
    text = yaml.safe_dump(recipe.model_dump(exclude_none=True, exclude_defaults=True), sort_keys=False)
    storage.write_bytes(storage.join(out, RECIPE), text.encode())


def check_place(out: str) -> None:
    """Refuse (ConfigError) a directory that holds something else than a run."""
    present = set(storage.names(out))
    known = {RECIPE, "urls", "images", "web"}
    if present and not present & known:
        raise ConfigError(f"{out} is not empty and holds no run; choose another place")


def make(unit: Unit, executor: Executor, progress: Progress, overwrite: bool) -> None:
    """Bring one unit up to date and say in one line what came of it."""
    began = time.monotonic()
    if not run_unit(unit, executor, progress, overwrite):
        progress.say(f"{unit.title}: up to date")
        return
    sets = [ShardSet(step.out).manifest for step in unit.steps() if step.keep]
    rows = sum(m["rows"] for m in sets if m["kind"] == sets[-1]["kind"])
    rejects = sum(m["rejects"] for m in sets)
    progress.say(f"{unit.title}: {rows:,} rows, {rejects:,} rejected, {time.monotonic() - began:,.1f} s")

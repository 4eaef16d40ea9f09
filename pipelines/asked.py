"""What a run can answer of questions about images: its complete sets, embedders, thresholds, and what it lacks.

Facts come from manifests, which tell what was done; the run's recipe stands in for stages that are still to come.
"""

from functools import cached_property
from typing import Any

from curation import storage
from curation.shards import ShardSet
from pipelines.catalog import complete_sets
from pipelines.chains import pool_names
from pipelines.coverage import Spread
from pipelines.lookalikes import Selected
from pipelines.recipe import DownloadSettings, Recipe, load_recipe
from pipelines.run import RECIPE


class Asked:
    """What a run can answer: its complete sets, embedders, thresholds and limits, and notes on what it lacks."""

    def __init__(self, run: str) -> None:
        """Raises ConfigError where there is no run."""
        self.run = run
        self.sets = complete_sets(run)
        self.notes: list[str] = []

    def of_kind(self, kind: str) -> dict[str, ShardSet]:
        """Complete sets of a kind by name."""
        return {name: found for name, found in self.sets.items() if name.split("/")[0] == kind}

    @cached_property
    def recipe(self) -> Recipe | None:
        """The run's own, if it has one: single stages have not."""
        place = storage.join(storage.absolute(self.run), RECIPE)
        return load_recipe(place) if storage.exists(place) else None

    @cached_property
    def pools(self) -> list[str]:
        """Sources of the pool."""
        names = [found.source for found in self.of_kind("images").values() if found.labels.get("role") == "pool"]
        return names or (self.recipe.of_role("pool") if self.recipe is not None else [])

    @cached_property
    def copies(self) -> str | None:
        """The embedder that dedup compares."""
        for found in self.of_kind("duplicates").values():
            return pool_names(found.manifest)[0].split("/")[1]
        return self.recipe.dedup.embedder if self.recipe is not None else self._only_embedder()

    @cached_property
    def meaning(self) -> str | None:
        """The embedder that clusters and retrieval compare."""
        if "centroids" in self.sets:
            return str(self.sets["centroids"].labels["embedder"])
        for found in self.of_kind("retrieved").values():
            names = (str(record["name"]) for record in found.manifest["inputs"])
            return next(name.split("/")[1] for name in names if name.startswith("embeddings/"))
        return self.recipe.cluster.embedder if self.recipe is not None else self._only_embedder()

    def _only_embedder(self) -> str | None:
        names = {name.split("/")[1] for name in self.of_kind("embeddings")}
        return names.pop() if len(names) == 1 else None

    @cached_property
    def selected(self) -> Selected | None:
        """The selection, if it and the sets that number its parts are there."""
        if "selection" not in self.sets:
            self.notes.append("there is no selection yet: nothing is told of the final set")
            return None
        inputs = [record["name"] for record in self.sets["selection"].manifest["inputs"]]
        names = [name for name in inputs if name.startswith("filtered/")]
        if missing := [name for name in names if name not in self.sets]:
            self.notes.append(f"the selection refers to {', '.join(missing)}, not there: nothing is told of the set")
            return None
        return Selected(self.sets["selection"].uri, tuple(self.sets[name].uri for name in names))

    @cached_property
    def contributors(self) -> list[str]:
        """Sources that images of the final set may come from."""
        return list(self.selected.slots.begins) if self.selected is not None else self.pools

    @cached_property
    def spread(self) -> Spread | None:
        """The clusters of all pools, once they are made."""
        clusters = list(self.of_kind("clusters").values())
        if "centroids" not in self.sets or not clusters or len(clusters) < len(self.pools):
            return None
        return Spread(self.sets["centroids"], clusters, self.selected)

    @cached_property
    def queries(self) -> list[ShardSet]:
        """Vectors of the query sets by the embedder of clusters."""
        return [s for s in self._embeddings(self.meaning).values() if s.labels.get("role") == "query"]

    def own_thresholds(self) -> dict[str, float]:
        """Cosines above which dedup takes two images for copies: as used, else as the recipe says, else the model's."""
        told: dict[str, Any] = {}
        for found in self.of_kind("duplicates").values():
            told = found.manifest["config"]
        if not told and self.recipe is not None:
            told = self.recipe.dedup.model_dump(include={"threshold", "reference_threshold"})
        stated: dict[str, Any] = {}
        for found in self._embeddings(self.copies).values():
            stated = found.manifest["info"]["copy_thresholds"] or {}
        chosen = {"dedup": told.get("threshold"), "reference": told.get("reference_threshold")}
        for name, key in (("dedup", "self_dedup"), ("reference", "reference")):
            if chosen[name] is None:
                chosen[name] = stated.get(key)
        return {name: float(value) for name, value in chosen.items() if value is not None}

    def _embeddings(self, embedder: str | None) -> dict[str, ShardSet]:
        return {name: s for name, s in self.of_kind("embeddings").items() if name.split("/")[1] == embedder}

    def searched(self, embedder: str | None, what: str) -> list[ShardSet]:
        """Vectors by an embedder of all sources that give images to the set; notes those that have none."""
        names = [f"embeddings/{embedder}/{source}" for source in self.contributors]
        if missing := [name.split("/")[-1] for name in names if name not in self.sets]:
            self.notes.append(f"{what} in {', '.join(missing)} are not searched: no vectors by embedder {embedder}")
        found = [self.sets[name] for name in names if name in self.sets]
        return [s for s in found if f"images/{s.source}" in self.sets]

    def limits(self) -> DownloadSettings:
        """The largest bytes and pixels of an image that any source allows."""
        told = [s.manifest["config"].get("download", {}) for s in self.of_kind("images").values()]
        known = {key: [t[key] for t in told if key in t] for key in ("max_bytes", "max_pixels")}
        return DownloadSettings(**{key: max(values) for key, values in known.items() if values})

    def note_open_stages(self) -> None:
        """Note the pools whose filter or dedup is not done, so that fates are still open."""
        for kind in ("filtered", "duplicates"):
            if missing := [name for name in self.pools if f"{kind}/{name}" not in self.sets]:
                stage = {"filtered": "filter", "duplicates": "dedup"}[kind]
                self.notes.append(f"what {stage} drops of {', '.join(missing)} is not known yet: it is not done")

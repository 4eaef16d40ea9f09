"""Recipes: what to build, as one YAML file. The models here are the documentation of its keys."""

import os
from importlib import resources
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from curation import storage
from curation.config import Settings, load_yaml, override, suggest, validate
from curation.errors import ConfigError
from embedders.base import EmbedderError
from embedders.specs import with_places

Role = Literal["pool", "query", "reference"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Positive = Annotated[int, Field(gt=0)]
Cosine = Annotated[float, Field(ge=-1, le=1)]


class SourceSettings(Settings):
    """Where images come from: exactly one of `urls` (a list to fetch), `folder` and `images` (Parquet files).

    Each of the three is a path or any URI that fsspec opens; `urls` and `images` may be glob patterns.
    """

    role: Role
    urls: str | None = None
    folder: str | None = None
    images: str | None = None
    url_column: str | None = None
    image_column: str = "image"
    alt_column: str | None = None
    page_url_column: str | None = None
    label_column: str | None = None
    rows: Positive | None = None
    """How many are expected; used by `plan` alone, where the input is not at hand."""

    @model_validator(mode="after")
    def _one_place(self) -> "SourceSettings":
        if sum(place is not None for place in (self.urls, self.folder, self.images)) != 1:
            raise ValueError("exactly one of urls, folder and images must be given")
        return self


class DownloadSettings(Settings):
    """How URLs are fetched. `allow_private` lets requests reach loopback and private addresses."""

    user_agent: str | None = None
    timeout: Annotated[float, Field(gt=0)] = 10.0
    max_seconds: Annotated[float, Field(gt=0)] = 30.0
    max_bytes: Positive = 20_000_000
    max_pixels: Annotated[int, Field(gt=0, le=100_000_000)] = 100_000_000
    retries: Annotated[int, Field(ge=0, le=10)] = 1
    threads: Annotated[int, Field(gt=0, le=1024)] = 32
    allow_private: bool = False


class FilterSettings(Settings):
    """Rules that need no model: `min_side` in pixels, `max_aspect_ratio` as longer over shorter side."""

    min_side: Annotated[int, Field(ge=1)] = 64
    max_aspect_ratio: Annotated[float, Field(ge=1)] = 4.0


class EmbedderSettings(Settings):
    """A model, as docs/embedders.md lists them, and how it runs. What is left out is chosen for the device."""

    model: str = "dct"
    batch_size: Positive | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Positive = 1
    compile: Literal["auto"] | bool = "auto"
    decode_threads: Positive | None = None


class JoinSettings(Settings):
    """How near-copies are searched for: `auto` joins exactly up to a million images, in partitions beyond.

    Partitioned: each of `quantizers` keeps every image in the nearest of `num_lists` lists and compares it with what
    lies in the `lists_joined` nearest: `in_place` on a machine whose memory caches the vectors, else in partitions of
    about `partition_rows` images that they travel to. Its recall is measured on `recall_sample` images and must reach
    `min_recall`. FAISS: the `k` nearest in the index `index`, whose codes may
    under-estimate a similarity by `slack`.
    """

    engine: Literal["auto", "exact", "partitioned", "faiss"] = "auto"
    num_lists: Positive | None = None
    lists_joined: Positive | None = None
    quantizers: Positive | None = None
    in_place: bool | None = None
    partition_rows: Positive = 1_000_000
    recall_sample: Positive = 4_000
    min_recall: Annotated[float, Field(ge=0, le=1)] = 0.99
    index: str = "IVF4096,PQ64"
    nprobe: Positive | None = None
    k: Positive = 64
    slack: Annotated[float, Field(ge=0, le=1)] = 0.2
    device: Literal["auto", "cpu", "cuda"] = "auto"


class DedupSettings(Settings):
    """Copy detection. Thresholds left out are the embedder's own; `rule` says what a reference image takes with it.

    Presets: `paper` is DINOv2's; `precise` takes the embedder's threshold of 90 % precision for both, and rule direct;
    `semdedup` drops an image for its likeness (0.97) to any of its cluster that lies farther from the center.
    `max_component` cuts components of more images at their weakest edges.
    """

    embedder: Name = "default"
    preset: Literal["paper", "precise", "semdedup"] = "paper"
    threshold: Cosine | None = None
    reference_threshold: Cosine | None = None
    rule: Literal["component", "direct"] | None = None
    max_component: Positive | None = None
    join: JoinSettings = JoinSettings()


class ClusterSettings(Settings):
    """Spherical k-means, fitted on the `sample` images of lowest keyed hash, and levels of clusters above.

    `init` is by default a subsample, and clusters within clusters from 100,000 on; with levels, k-means||, as these
    need a start that is spread out. Rounds end early once the objective falls by at most `tolerance` of it. At most
    `memory_rows` images are fitted in memory; a larger sample is streamed.

    `levels` are numbers of clusters, of level 2 first; `preset` has those of a publication, `num_clusters` included, at
    `fraction` finest clusters an image, by default its own. A level is fitted `fits` times, the finest `finest_fits`:
    first on all, then on the points nearest to its centroids.
    """

    embedder: Name = "default"
    num_clusters: Positive = 1000
    iterations: Positive = 20
    sample: Positive = 1_000_000
    threads: Positive = 1
    init: Literal["subsample", "k-means++", "k-means||"] | None = None
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    memory_rows: Positive = 4_000_000
    levels: list[Positive] = Field(default_factory=list)
    preset: Literal["vo4", "dinov3"] | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    fits: Positive = 10
    finest_fits: Positive = 1

    @model_validator(mode="after")
    def _one_hierarchy(self) -> "ClusterSettings":
        if self.preset and (self.levels or "num_clusters" in self.model_fields_set):
            raise ValueError("preset says how many clusters each level has: leave out levels and num_clusters")
        if self.fraction is not None and not self.preset:
            raise ValueError("fraction goes with preset, and with nothing else")
        for below, above in pairwise((self.num_clusters, *self.levels)):
            if above > below:
                raise ValueError(f"levels: {above:,} clusters cannot lie above {below:,}; each level has fewer")
        return self


class RetrieveSettings(Settings):
    """How the nearest images are searched for: `auto` compares all up to 10**12 pairs, beyond by lists.

    Partitioned: each of `quantizers` keeps every pool image in the nearest of `num_lists` lists, and every query image
    is compared with what lies in the `lists_joined` nearest; a task holds about `partition_rows` pool images. Its
    recall is measured on `recall_sample` query images and must reach `min_recall`.
    """

    engine: Literal["auto", "exact", "partitioned"] = "auto"
    num_lists: Positive | None = None
    lists_joined: Positive = 256
    quantizers: Positive = 6
    partition_rows: Positive = 250_000
    recall_sample: Positive = 1_000
    min_recall: Annotated[float, Field(ge=0, le=1)] = 0.99
    device: Literal["auto", "cpu", "cuda"] = "auto"


class MixtureSettings(Settings):
    """A set of exactly `target` images, shared out to the parts by their `ratio`."""

    target: Positive


class PartSettings(Settings):
    """One part of the final set: exactly one of `as_is`, `retrieved` (names of sources) and `balanced`.

    A balanced part takes exactly `target` images, from clusters in equal shares: top-down over all `levels`, or over
    the finest alone. Within one it takes `random` ones, the `closest` to the centroid, or ones `spread` over it; the
    first two also say what cluster-based retrieval takes. `ratio` is the part's weight in a mixture.

    `images` and `clusters_hit` are what is expected, for `plan`, where the data is not at hand.
    """

    name: str | None = None
    as_is: Name | None = None
    retrieved: Name | None = None
    balanced: Literal["pool"] | None = None
    mode: Literal["sample", "cluster"] | None = None
    k: Positive | None = None
    images_per_cluster: Positive | None = None
    min_hits: Positive = 4
    cap: Positive | None = None
    target: Positive | None = None
    max_copies: Positive = 1
    levels: bool = True
    strategy: Literal["random", "closest", "spread"] = "random"
    ratio: Annotated[float, Field(gt=0)] | None = None
    images: Positive | None = None
    clusters_hit: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "PartSettings":
        if sum(kind is not None for kind in (self.as_is, self.retrieved, self.balanced)) != 1:
            raise ValueError("exactly one of as_is, retrieved and balanced must be given")
        if (self.retrieved is not None) != (self.mode is not None):
            raise ValueError("mode (sample or cluster) goes with retrieved, and with nothing else")
        if (self.mode == "sample") != (self.k is not None):
            raise ValueError("k goes with mode sample, and with nothing else")
        if (self.mode == "cluster") != (self.images_per_cluster is not None):
            raise ValueError("images_per_cluster goes with mode cluster, and with nothing else")
        if (self.balanced is not None) != (self.target is not None):
            raise ValueError("target goes with balanced, and with nothing else")
        if self.balanced is None and "levels" in self.model_fields_set:
            raise ValueError("levels goes with balanced, and with nothing else")
        if self.balanced is None and self.mode != "cluster" and "strategy" in self.model_fields_set:
            raise ValueError("strategy goes with balanced and with mode cluster, and with nothing else")
        if self.mode == "cluster" and self.strategy == "spread":
            raise ValueError("mode cluster takes random images or the closest; spread goes with balanced")
        return self

    @property
    def title(self) -> str:
        """Its name in reasons and reports: as given, else told by what it is."""
        if self.name:
            return self.name
        if self.as_is:
            return f"{self.as_is} as is"
        if self.mode == "sample":
            return f"{self.retrieved} sample k={self.k}"
        return f"{self.retrieved} cluster" if self.retrieved else f"balanced {self.target}"

    @property
    def nominal(self) -> int | None:
        """Images this part is expected to bring, from `images` and `clusters_hit` alone (paper, Table 15)."""
        if self.balanced:
            return self.target
        if self.mode == "cluster":
            if self.clusters_hit is None or self.images_per_cluster is None:
                return None
            taken = self.clusters_hit * self.images_per_cluster
            return min(taken, self.cap) if self.cap else taken
        return None if self.images is None else self.images * (self.k or 1)


class ShardSettings(Settings):
    """The final shards: `shard_bytes` is their size aimed at; two levels of shuffling above `max_fan_out` shards."""

    shard_bytes: Positive = 384_000_000
    max_fan_out: Annotated[int, Field(ge=2)] = 64
    slice_bytes: Positive = 256_000_000


class Recipe(Settings):
    """A whole build."""

    name: str = "unnamed"
    description: str = ""
    seed: int = 0
    rows_per_part: Positive = 2000
    sources: Annotated[dict[Name, SourceSettings], Field(min_length=1)]
    embedders: dict[Name, EmbedderSettings] = Field(default_factory=lambda: {"default": EmbedderSettings()})
    download: DownloadSettings = DownloadSettings()
    filter: FilterSettings = FilterSettings()
    dedup: DedupSettings = DedupSettings()
    cluster: ClusterSettings = ClusterSettings()
    retrieve: RetrieveSettings = RetrieveSettings()
    parts: Annotated[list[PartSettings], Field(min_length=1)]
    mixture: MixtureSettings | None = None
    shard: ShardSettings = ShardSettings()

    @model_validator(mode="after")
    def _names(self) -> "Recipe":
        for where, embedder in (("dedup", self.dedup.embedder), ("cluster", self.cluster.embedder)):
            if embedder not in self.embedders:
                raise ValueError(
                    f"{where}.embedder: no embedder {embedder!r}{suggest(embedder, sorted(self.embedders))}"
                )
        if not self.of_role("pool"):
            raise ValueError("sources: at least one needs the role pool")
        for number, part in enumerate(self.parts):
            self._check_part(number, part)
        titles = [part.title for part in self.parts]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"parts: two are called {title!r}; give one a name of its own")
        pairs = [(part.retrieved, part.mode) for part in self.parts if part.retrieved]
        for name, mode in pairs:
            if pairs.count((name, mode)) > 1:
                raise ValueError(f"parts: {name} is retrieved twice with mode {mode}; once is enough")
        return self

    @model_validator(mode="after")
    def _ratios(self) -> "Recipe":
        for number, part in enumerate(self.parts):
            if self.mixture is None and part.ratio is not None:
                raise ValueError(f"parts.{number}: ratio goes with a mixture; set mixture.target")
            if self.mixture is not None and part.ratio is None:
                raise ValueError(f"parts.{number}: {part.title} needs a ratio, since mixture.target is shared out")
        return self

    def _check_part(self, number: int, part: PartSettings) -> None:
        name = part.as_is or part.retrieved
        if name is None:
            return
        if name not in self.sources:
            raise ValueError(f"parts.{number}: no source {name!r}{suggest(name, sorted(self.sources))}")
        if part.retrieved and self.sources[name].role != "query":
            raise ValueError(
                f"parts.{number}: {name} has the role {self.sources[name].role}, only query sets are retrieved for"
            )

    def of_role(self, role: Role) -> list[str]:
        """Names of the sources of a role, in the recipe's order."""
        return [name for name, source in self.sources.items() if source.role == role]


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(item.name.removesuffix(".yaml") for item in _folder().iterdir() if item.name.endswith(".yaml"))


def _folder() -> Any:
    return resources.files("pipelines") / "recipes"


def load_recipe(place: str, assignments: list[str] | None = None) -> Recipe:
    """A recipe from a YAML file anywhere, or one that ships by its name, with overrides. Raises ConfigError.

    Local paths in it are relative to the recipe's own directory; in one that ships, to the working directory.
    """
    uri = place
    if place in shipped():
        uri = str(_folder() / f"{place}.yaml")
    elif not place.endswith((".yaml", ".yml")):
        raise ConfigError(f"no recipe {place!r}: give a YAML file or one of {', '.join(shipped())}")
    recipe = validate(Recipe, override(load_yaml(uri), assignments or []), place)
    base = storage.absolute(".") if place in shipped() else storage.absolute(uri).rpartition("/")[0]
    sources = {name: _located(source, base) for name, source in recipe.sources.items()}
    embedders = {name: _located_model(embedder, base) for name, embedder in recipe.embedders.items()}
    return recipe.model_copy(update={"sources": sources, "embedders": embedders})


def _located_model(embedder: EmbedderSettings, base: str) -> EmbedderSettings:
    """A model file or directory found from the recipe's place; names on a hub stay as they are."""
    try:
        model = with_places(embedder.model, lambda place: storage.resolve(place, base), os.path.isdir)
    except EmbedderError as error:
        raise ConfigError(str(error)) from None
    return embedder.model_copy(update={"model": model})


def _located(source: SourceSettings, base: str) -> SourceSettings:
    places = {key: getattr(source, key) for key in ("urls", "folder", "images")}
    found = {key: storage.resolve(place, base) for key, place in places.items() if place is not None}
    return source.model_copy(update=found)

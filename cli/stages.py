"""Commands for single stages, each with explicit inputs and outputs."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Address, Local, Out, Overwrite, Workers, workplace

if TYPE_CHECKING:
    from pipelines.unit import Unit

Seed = Annotated[int, typer.Option(help="Seed of the draws.")]
Pools = Annotated[list[str], typer.Argument(metavar="EMBEDDINGS...", help="Embeddings of the pools.")]
Duplicates = Annotated[list[str], typer.Option("--duplicates", help="Dedup's verdicts, one set for each pool.")]


def _run(unit: "Unit", overwrite: bool, workers: int | None, address: str | None, local: bool) -> None:
    from pipelines.run import make

    with workplace(workers, address, local) as (executor, progress):
        make(unit, executor, progress, overwrite)


def _settings(model: Any, where: str, /, **values: Any) -> Any:
    """Settings from options; those left out keep the model's defaults."""
    from curation.config import validate

    return validate(model, {key: value for key, value in values.items() if value is not None}, where)


def _absolute(places: list[str] | None) -> list[str]:
    from curation.storage import absolute

    return [absolute(place) for place in places or []]


def download(
    out: Out,
    source: Annotated[str, typer.Option(help="The source's name.")],
    role: Annotated[str, typer.Option(help="pool, query or reference.")] = "pool",
    urls: Annotated[str | None, typer.Option(help="URL lists: Parquet, CSV or txt.")] = None,
    folder: Annotated[str | None, typer.Option(help="A folder of image files.")] = None,
    images: Annotated[str | None, typer.Option(help="Parquet files with a column of image bytes.")] = None,
    url_column: Annotated[str | None, typer.Option(help="Column of URLs; default url.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of image bytes; default image.")] = None,
    alt_column: Annotated[str | None, typer.Option(help="Column of alternative texts.")] = None,
    page_url_column: Annotated[str | None, typer.Option(help="Column of the pages' URLs.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of labels.")] = None,
    user_agent: Annotated[str | None, typer.Option(help="How requests introduce themselves.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for one socket operation.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Limit on one image's bytes.")] = None,
    allow_private: Annotated[bool, typer.Option(help="Allow loopback and private addresses.")] = False,
    rows_per_part: Annotated[int, typer.Option(help="Rows of one part.")] = 2000,
    overwrite: Overwrite = False,
    workers: Workers = None,
    address: Address = None,
    local: Local = False,
) -> None:
    """Fetch URL lists, or take folders and Parquet files, into OUT/urls/SOURCE and OUT/images/SOURCE.

    \b
    Examples:
      lvd download --images photos.parquet --label-column label --source web --out steps
      lvd download --folder flowers --source flowers --role query --out steps
      lvd download --urls urls.csv --source crawl --out steps
    """
    from curation.storage import absolute, join
    from pipelines.download import DownloadUnit
    from pipelines.recipe import DownloadSettings, SourceSettings

    columns = {"alt_column": alt_column, "page_url_column": page_url_column, "label_column": label_column}
    columns |= {"url_column": url_column, "image_column": image_column}
    places = {k: absolute(v) for k, v in (("urls", urls), ("folder", folder), ("images", images)) if v is not None}
    settings = _settings(SourceSettings, "download", role=role, **places, **columns)
    limits = {"user_agent": user_agent, "timeout": timeout, "max_bytes": max_bytes, "allow_private": allow_private}
    fetching = _settings(DownloadSettings, "download", **limits)
    out = absolute(out)
    unit = DownloadUnit(
        source, settings, fetching, rows_per_part, join(out, "urls", source), join(out, "images", source)
    )
    _run(unit, overwrite, workers, address, local)


def filter_images(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="An images set.")],
    out: Out,
    index: Annotated[str, typer.Option(help="Where the index by image_id goes.")],
    min_side: Annotated[int | None, typer.Option(help="Least width and height in pixels.")] = None,
    max_aspect_ratio: Annotated[float | None, typer.Option(help="Longer over shorter side, at most.")] = None,
    overwrite: Overwrite = False,
    workers: Workers = None,
    address: Address = None,
    local: Local = False,
) -> None:
    """Decide which images stay: decodable, large enough, not too elongated, the first with their bytes.

    \b
    Examples:
      lvd filter steps/images/web --out steps/filtered/web --index steps/index/web
      lvd filter steps/images/flowers --out steps/filtered/flowers --index steps/index/flowers --min-side 32
    """
    from curation.storage import absolute
    from pipelines.filter import FilterUnit
    from pipelines.recipe import DownloadSettings, FilterSettings

    settings = _settings(FilterSettings, "filter", min_side=min_side, max_aspect_ratio=max_aspect_ratio)
    places = (absolute(out), absolute(index))
    unit = FilterUnit(absolute(images), settings, DownloadSettings().max_pixels, *places)
    _run(unit, overwrite, workers, address, local)


def embed(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="An images set.")],
    filtered: Annotated[str, typer.Option(help="The filter's verdicts on it.")],
    out: Out,
    model: Annotated[
        str, typer.Option(help="dct, dinov2_*, hf:PLACE, vit:FILE, sscd_*; see docs/embedders.md.")
    ] = "dct",
    name: Annotated[str, typer.Option(help="The embedder's name in the set.")] = "default",
    batch_size: Annotated[int | None, typer.Option(help="Images of a batch; default 16, on a GPU 128.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    threads: Annotated[int | None, typer.Option(help="Cores of one worker for the model; default 1.")] = None,
    compile_model: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Whether to compile the model; default: a ViT of ours."),
    ] = None,
    decode_threads: Annotated[int | None, typer.Option(help="Threads of one worker that decode images.")] = None,
    overwrite: Overwrite = False,
    workers: Workers = None,
    address: Address = None,
    local: Local = False,
) -> None:
    """Turn the kept images of a source into vectors.

    \b
    Examples:
      lvd embed steps/images/web --filtered steps/filtered/web --out steps/embeddings/default/web
      lvd embed steps/images/flowers --filtered steps/filtered/flowers --out steps/embeddings/default/flowers
    """
    from curation.storage import absolute
    from pipelines.embed import EmbedUnit
    from pipelines.recipe import EmbedderSettings

    options = {"model": model, "batch_size": batch_size, "device": device, "precision": precision}
    options |= {"threads": threads, "compile": compile_model, "decode_threads": decode_threads}
    settings = _settings(EmbedderSettings, "embed", **options)
    unit = EmbedUnit(name, settings, absolute(images), absolute(filtered), absolute(out))
    _run(unit, overwrite, workers, address, local)


def dedup(
    pools: Pools,
    images: Annotated[list[str], typer.Option(help="Images of the pools, one set for each.")],
    out: Out,
    references: Annotated[list[str] | None, typer.Option("--reference", help="Embeddings of a reference set.")] = None,
    preset: Annotated[str, typer.Option(help="paper, precise or semdedup.")] = "paper",
    threshold: Annotated[float | None, typer.Option(help="Cosine above which two are copies.")] = None,
    reference_threshold: Annotated[float | None, typer.Option(help="The same against references.")] = None,
    rule: Annotated[str | None, typer.Option(help="What a reference takes along: component or direct.")] = None,
    max_component: Annotated[int | None, typer.Option(help="Cut larger components at their weakest edges.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, exact, partitioned or faiss.")] = None,
    join: Annotated[list[str] | None, typer.Option(help="A key of dedup.join, such as quantizers=3.")] = None,
    forest: Annotated[str | None, typer.Option(help="Where the forest of edges goes; default OUT/_forest.")] = None,
    recall: Annotated[str | None, typer.Option(help="Where the measured recall goes; default OUT/_recall.")] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Show what higher thresholds would keep, and the largest components.")
    ] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    workers: Workers = None,
    address: Address = None,
    local: Local = False,
) -> None:
    """Find near-copies among the pools and of the references; verdicts go to OUT/SOURCE.

    \b
    Examples:
      lvd dedup steps/embeddings/default/web --images steps/images/web --out steps/duplicates
      lvd dedup steps/embeddings/default/web --images steps/images/web --threshold 0.9 --out strict
      lvd dedup steps/embeddings/default/web --images steps/images/web --out steps/duplicates --curve
    """
    from curation.config import override
    from curation.storage import absolute
    from curation.storage import join as place
    from pipelines.chains import check_curve
    from pipelines.dedup import DedupUnit
    from pipelines.recipe import DedupSettings, JoinSettings

    chosen = override({} if engine is None else {"engine": engine}, join or [])
    options = {"threshold": threshold, "reference_threshold": reference_threshold, "max_component": max_component}
    settings = _settings(
        DedupSettings,
        "dedup",
        preset=preset,
        rule=rule,
        join=_settings(JoinSettings, "dedup.join", **chosen),
        **options,
    )
    if curve:
        check_curve(settings.preset)  # before the work, which may take hours
    sets = (_absolute(pools), _absolute(images), _absolute(references))
    out = absolute(out)
    kept = (absolute(forest or place(out, "_forest")), absolute(recall or place(out, "_recall")))
    _run(DedupUnit(*sets, settings, seed, out, *kept), overwrite, workers, address, local)
    if curve:
        _print_chains(kept[0], out)


def _print_chains(forest: str, out: str) -> None:
    """What dedup's forest and its verdicts, at OUT/SOURCE, tell of thresholds and chains."""
    from cli.output import Format, print_tables
    from curation.shards import ShardSet
    from curation.storage import join
    from pipelines.chains import pool_sources
    from pipelines.stats import chain_tables

    edges = ShardSet(forest)
    duplicates = [ShardSet(join(out, source)) for source in pool_sources(edges.manifest)]
    print_tables([table for table in chain_tables(edges, duplicates) if table.rows], Format.table)


def cluster(
    pools: Pools,
    duplicates: Duplicates,
    out: Out,
    centroids: Annotated[str, typer.Option(help="Where the centroids go.")],
    num_clusters: Annotated[int | None, typer.Option(help="k of k-means.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Rounds of k-means.")] = None,
    sample: Annotated[int | None, typer.Option(help="Images it is fitted on.")] = None,
    level: Annotated[list[int] | None, typer.Option(help="Clusters of a level above, level 2 first.")] = None,
    preset: Annotated[str | None, typer.Option(help="Levels as published: vo4 or dinov3.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Preset: finest clusters an image.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    workers: Workers = None,
    address: Address = None,
    local: Local = False,
) -> None:
    """Cluster what dedup kept with spherical k-means, in levels if wanted; assignments go to OUT/SOURCE.

    \b
    Examples:
      lvd cluster steps/embeddings/default/web --duplicates steps/duplicates/web \\
        --num-clusters 8 --centroids steps/centroids --out steps/clusters
      lvd cluster steps/embeddings/default/web --duplicates steps/duplicates/web \\
        --num-clusters 16 --level 6 --level 3 --centroids level-centroids \\
        --out levels
    """
    from curation.storage import absolute
    from pipelines.cluster import ClusterUnit
    from pipelines.recipe import ClusterSettings

    options: dict[str, Any] = {"num_clusters": num_clusters, "iterations": iterations, "sample": sample}
    options |= {"levels": level, "preset": preset, "fraction": fraction}
    settings = _settings(ClusterSettings, "cluster", **options)
    places = (absolute(centroids), absolute(out))
    unit = ClusterUnit(_absolute(pools), _absolute(duplicates), settings, seed, *places)
    _run(unit, overwrite, workers, address, local)


def retrieve(
    queries: Annotated[str, typer.Argument(metavar="QUERIES", help="Embeddings of a query set.")],
    pools: Annotated[list[str], typer.Option("--pool", help="Embeddings of a pool.")],
    duplicates: Duplicates,
    out: Out,
    k: Annotated[int | None, typer.Option(help="Sample-based: neighbors of each query image.")] = None,
    images_per_cluster: Annotated[int | None, typer.Option(help="Cluster-based: images of each cluster hit.")] = None,
    min_hits: Annotated[int, typer.Option(help="Query images that make a cluster hit.")] = 4,
    cap: Annotated[int | None, typer.Option(help="Cluster-based: images in all, at most.")] = None,
    strategy: Annotated[str, typer.Option(help="Cluster-based: random or closest of a cluster.")] = "random",
    engine: Annotated[str | None, typer.Option(help="Sample-based: auto, exact or partitioned.")] = None,
    search: Annotated[list[str] | None, typer.Option(help="A key of retrieve, such as lists_joined=64.")] = None,
    clusters: Annotated[list[str] | None, typer.Option(help="Clusters of the pools, one set for each.")] = None,
    centroids: Annotated[str | None, typer.Option(help="The clusters' centroids.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    workers: Workers = None,
    address: Address = None,
    local: Local = False,
) -> None:
    """Retrieve pool images that resemble a query set; they go to OUT/SOURCE.

    Tells what was found, how many images of it are unique, and what smaller k would have brought.

    \b
    Examples:
      lvd retrieve steps/embeddings/default/flowers --pool steps/embeddings/default/web \\
        --duplicates steps/duplicates/web --k 4 --out steps/retrieved
      lvd retrieve steps/embeddings/default/flowers --pool steps/embeddings/default/web \\
        --duplicates steps/duplicates/web --images-per-cluster 5 \\
        --min-hits 2 --clusters steps/clusters/web --centroids steps/centroids \\
        --out by-cluster
    """
    from cli.output import Format, print_tables
    from curation.config import override
    from curation.errors import ConfigError
    from curation.shards import ShardSet
    from curation.storage import absolute
    from curation.storage import join as place
    from pipelines.recipe import RetrieveSettings
    from pipelines.retrieval_tables import tables_of
    from pipelines.retrieve import RetrieveUnit
    from pipelines.retrieve_clusters import ClusterRule

    if images_per_cluster is not None and (not clusters or centroids is None):
        raise ConfigError("--images-per-cluster needs --clusters and --centroids")
    if strategy not in ("random", "closest"):
        raise ConfigError(f"--strategy {strategy}: give random or closest")
    rule = None
    if images_per_cluster is not None:
        rule = ClusterRule(images_per_cluster, min_hits, cap, "closest" if strategy == "closest" else "random")
    chosen = override({} if engine is None else {"engine": engine}, search or [])
    settings = _settings(RetrieveSettings, "retrieve", **chosen)
    sets = (absolute(queries), _absolute(pools), _absolute(duplicates), _absolute(clusters))
    unit = RetrieveUnit(*sets, absolute(centroids) if centroids else "", k, rule, seed, absolute(out), settings)
    _run(unit, overwrite, workers, address, local)
    print_tables(tables_of(place(absolute(out), ShardSet(absolute(queries)).source)), Format.table)


def rebalance(
    filtered: Annotated[
        list[str], typer.Option(help="Verdicts of every source that gives images, in order of precedence.")
    ],
    out: Out,
    as_is: Annotated[list[str] | None, typer.Option(help="Name of a source that goes in whole.")] = None,
    retrieved: Annotated[list[str] | None, typer.Option(help="A retrieved set.")] = None,
    target: Annotated[int | None, typer.Option(help="Images to draw evenly from the pools' clusters.")] = None,
    max_copies: Annotated[int, typer.Option(help="How often one image may be drawn.")] = 1,
    strategy: Annotated[str, typer.Option(help="What is drawn of a cluster: random, closest or spread.")] = "random",
    embeddings: Annotated[list[str] | None, typer.Option(help="For spread: what the clusters were made from.")] = None,
    clusters: Annotated[list[str] | None, typer.Option(help="Clusters of the pools, one set for each.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    workers: Workers = None,
    address: Address = None,
    local: Local = False,
) -> None:
    """Select the final set: sources as they are, what was retrieved, an even draw over clusters; unique by image_id.

    \b
    Examples:
      lvd rebalance --filtered steps/filtered/web --retrieved steps/retrieved/flowers --out steps/selection
      lvd rebalance --filtered steps/filtered/web --filtered steps/filtered/flowers \\
        --as-is flowers --retrieved steps/retrieved/flowers --target 20 \\
        --clusters steps/clusters/web --out even
    """
    from curation.errors import ConfigError
    from curation.storage import absolute
    from pipelines.rebalance import RebalanceUnit, parts_from_sets

    places = _absolute(retrieved)
    if strategy not in ("random", "closest", "spread"):
        raise ConfigError(f"--strategy {strategy}: give random, closest or spread")
    parts = parts_from_sets(as_is or [], places, target, max_copies, strategy)
    if not parts:
        raise ConfigError("nothing to select: give --as-is, --retrieved or --target")
    if target is not None and not clusters:
        raise ConfigError("--target needs --clusters")
    by_name = {place.rpartition("/")[2]: place for place in places}
    sets = (_absolute(filtered), by_name, _absolute(clusters))
    unit = RebalanceUnit(parts, *sets, seed, absolute(out), _absolute(embeddings))
    _run(unit, overwrite, workers, address, local)


def shard(
    selection: Annotated[str, typer.Argument(metavar="SELECTION", help="The selection.")],
    images: Annotated[
        list[str], typer.Option(help="Images of every source, in the order the selection was made with.")
    ],
    out: Out,
    clusters: Annotated[list[str] | None, typer.Option(help="Clusters of the pools, one set for each.")] = None,
    duplicates: Annotated[list[str] | None, typer.Option(help="Dedup's verdicts, one set for each pool.")] = None,
    shard_bytes: Annotated[int | None, typer.Option(help="Size of a shard aimed at.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    workers: Workers = None,
    address: Address = None,
    local: Local = False,
) -> None:
    """Write the final shards, shuffled across the whole set, with every image's provenance.

    \b
    Examples:
      lvd shard steps/selection --images steps/images/web --clusters steps/clusters/web \\
        --duplicates steps/duplicates/web --out steps/shards
    """
    from curation.shards import ShardSet
    from curation.storage import absolute
    from pipelines.recipe import ShardSettings
    from pipelines.shard import ShardUnit

    settings = _settings(ShardSettings, "shard", shard_bytes=shard_bytes)
    told, found = ({ShardSet(p).source: p for p in _absolute(places)} for places in (clusters, duplicates))
    unit = ShardUnit(absolute(selection), _absolute(images), told, found, settings, seed, absolute(out))
    _run(unit, overwrite, workers, address, local)


filter_images.__name__ = "filter"

COMMANDS = (download, filter_images, embed, dedup, cluster, retrieve, rebalance, shard)

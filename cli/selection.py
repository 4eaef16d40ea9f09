"""Commands for the stages that choose images and write them out, each with explicit inputs and outputs."""

from typing import Annotated, Any

import typer

from cli.options import Address, Local, Out, Overwrite, Pools, Seed, Workers, absolute_places, run_stage, settings_of

Duplicates = Annotated[list[str], typer.Option("--duplicates", help="Dedup's verdicts, one set for each pool.")]


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
    settings = settings_of(ClusterSettings, "cluster", **options)
    places = (absolute(centroids), absolute(out))
    unit = ClusterUnit(absolute_places(pools), absolute_places(duplicates), settings, seed, *places)
    run_stage(unit, overwrite, workers, address, local)


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
    settings = settings_of(RetrieveSettings, "retrieve", **chosen)
    sets = (absolute(queries), absolute_places(pools), absolute_places(duplicates), absolute_places(clusters))
    unit = RetrieveUnit(*sets, absolute(centroids) if centroids else "", k, rule, seed, absolute(out), settings)
    run_stage(unit, overwrite, workers, address, local)
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

    places = absolute_places(retrieved)
    if strategy not in ("random", "closest", "spread"):
        raise ConfigError(f"--strategy {strategy}: give random, closest or spread")
    parts = parts_from_sets(as_is or [], places, target, max_copies, strategy)
    if not parts:
        raise ConfigError("nothing to select: give --as-is, --retrieved or --target")
    if target is not None and not clusters:
        raise ConfigError("--target needs --clusters")
    by_name = {place.rpartition("/")[2]: place for place in places}
    sets = (absolute_places(filtered), by_name, absolute_places(clusters))
    unit = RebalanceUnit(parts, *sets, seed, absolute(out), absolute_places(embeddings))
    run_stage(unit, overwrite, workers, address, local)


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

    settings = settings_of(ShardSettings, "shard", shard_bytes=shard_bytes)
    told, found = ({ShardSet(p).source: p for p in absolute_places(places)} for places in (clusters, duplicates))
    unit = ShardUnit(absolute(selection), absolute_places(images), told, found, settings, seed, absolute(out))
    run_stage(unit, overwrite, workers, address, local)


COMMANDS = (cluster, retrieve, rebalance, shard)

"""Commands for the stages that make vectors of images and find near-copies, each with explicit inputs and outputs."""

from typing import Annotated

import typer

from cli.options import (
    Address,
    Device,
    Local,
    Out,
    Overwrite,
    Pools,
    Precision,
    Seed,
    Workers,
    absolute_places,
    run_stage,
    settings_of,
)


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
    settings = settings_of(SourceSettings, "download", role=role, **places, **columns)
    limits = {"user_agent": user_agent, "timeout": timeout, "max_bytes": max_bytes, "allow_private": allow_private}
    fetching = settings_of(DownloadSettings, "download", **limits)
    out = absolute(out)
    unit = DownloadUnit(
        source, settings, fetching, rows_per_part, join(out, "urls", source), join(out, "images", source)
    )
    run_stage(unit, overwrite, workers, address, local)


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

    settings = settings_of(FilterSettings, "filter", min_side=min_side, max_aspect_ratio=max_aspect_ratio)
    places = (absolute(out), absolute(index))
    unit = FilterUnit(absolute(images), settings, DownloadSettings().max_pixels, *places)
    run_stage(unit, overwrite, workers, address, local)


def embed(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="An images set.")],
    filtered: Annotated[str, typer.Option(help="The filter's verdicts on it.")],
    out: Out,
    model: Annotated[
        str, typer.Option(help="dct, dinov2_*, hf:PLACE, vit:FILE, sscd_*; see docs/embedders.md.")
    ] = "dct",
    name: Annotated[str, typer.Option(help="The embedder's name in the set.")] = "default",
    batch_size: Annotated[int | None, typer.Option(help="Images of a batch; default 16, on a GPU 128.")] = None,
    device: Device = None,
    precision: Precision = None,
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
    settings = settings_of(EmbedderSettings, "embed", **options)
    unit = EmbedUnit(name, settings, absolute(images), absolute(filtered), absolute(out))
    run_stage(unit, overwrite, workers, address, local)


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
    settings = settings_of(
        DedupSettings,
        "dedup",
        preset=preset,
        rule=rule,
        join=settings_of(JoinSettings, "dedup.join", **chosen),
        **options,
    )
    if curve:
        check_curve(settings.preset)  # before the work, which may take hours
    sets = (absolute_places(pools), absolute_places(images), absolute_places(references))
    out = absolute(out)
    kept = (absolute(forest or place(out, "_forest")), absolute(recall or place(out, "_recall")))
    run_stage(DedupUnit(*sets, settings, seed, out, *kept), overwrite, workers, address, local)
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


filter_images.__name__ = "filter"

COMMANDS = (download, filter_images, embed, dedup)

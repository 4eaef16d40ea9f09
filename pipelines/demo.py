"""The demo: a small web drawn, served on loopback and curated by the real pipeline, and how well that went."""

import shutil
import sys

from curation import storage
from curation.errors import ConfigError
from pipelines import demo_web
from pipelines.catalog import complete_sets, open_catalog
from pipelines.cluster_tables import balance_tables
from pipelines.executor import Executor
from pipelines.planted import label_balance, planted_copies, wrongly_dropped
from pipelines.progress import Progress
from pipelines.recipe import Recipe, load_recipe
from pipelines.run import check_place, run
from pipelines.stats import Table, funnel, rejects

SOURCE = "web"


def demo_recipe(web: demo_web.DemoWeb, target: int) -> Recipe:
    """The demo's recipe for a web that was built; `target` images are drawn evenly from it."""
    places = {
        f"{SOURCE}.urls": web.pool_urls,
        "balloons.folder": web.query_folder,
        "flower.images": web.query_images,
        "benchmark.urls": web.reference_urls,
    }
    settings = [f"sources.{key}={place}" for key, place in places.items()]
    return load_recipe("demo", [*settings, f"parts.4.target={target}"])


def run_demo(
    out: str, num_images: int, executor: Executor, progress: Progress, overwrite: bool = False
) -> tuple[list[Table], list[str]]:
    """Build the web under `out`/web, curate it, and report: tables, and lines on where to look next.

    A third of the photographs are drawn evenly over the clusters. Run again in the same place, it resumes or does
    nothing; another number of images, or a port of the server that is taken, need `overwrite`. Raises ConfigError for a
    place that is not on this machine, or holds something else.
    """
    given, out = out, storage.absolute(out)
    if not storage.is_local(out):
        raise ConfigError(f"the demo needs a directory on this machine, not {given}")
    check_place(out)
    progress.say(f"drawing a web of {num_images:,} photographs and their copies under {out}/web")
    web = demo_web.build(storage.join(out, "web"), num_images, progress=progress)
    with demo_web.serve(web) as url:
        progress.say(f"serving it at {url}")
        run(demo_recipe(web, num_images // 3), out, executor, progress, overwrite=overwrite)
    return _tables(out, web), _hints(given)


def _tables(out: str, web: demo_web.DemoWeb) -> list[Table]:
    sets, connection = complete_sets(out), open_catalog(out)
    wrong, looked = wrongly_dropped(out, SOURCE, web.truth)
    planted = planted_copies(out, SOURCE, web.truth)
    mistakes = Table(
        "Dropped wrongly",
        ["images compared", "dropped as copies of others", "share"],
        [[looked, wrong, wrong / looked]],
    )
    labels = label_balance(out, SOURCE)
    return [funnel(sets, connection), rejects(sets), planted, mistakes, labels, *balance_tables(out)]


def _hints(out: str) -> list[str]:
    sql = "SELECT image_id FROM duplicates WHERE component_size > 1 ORDER BY component_size DESC, image_id LIMIT 1"
    found = open_catalog(out).execute(sql).fetchone()
    lvd = "lvd" if shutil.which("lvd") else sys.argv[0]  # in an environment that is not activated, by its path
    hints = [
        "Where to look next:",
        f"  {lvd} stats {out}",
        f'  {lvd} sql {out} "SELECT label, count(*) AS images FROM shards GROUP BY label ORDER BY images DESC"',
        f"  {lvd} verify {out}",
        f"  less {out}/shards/README.md",
    ]
    return [*hints, f"  {lvd} show {out} {found[0]}"] if found else hints

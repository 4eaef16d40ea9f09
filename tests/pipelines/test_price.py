"""What clustering and retrieval are said to cost, against the products that they make."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import clustering, kmeans_init, kmeans_rounds
from curation.assignment import Nearest
from curation.distances import Points, Space
from pipelines import price_clusters
from pipelines.plan import plan_tables
from pipelines.price import ACCELERATOR_OPERATIONS_PER_SECOND, KMEANS_OPERATIONS_PER_SECOND, Cost
from pipelines.price_clusters import cluster_costs, cluster_price_tables
from pipelines.price_retrieval import sample_costs
from pipelines.recipe import ClusterSettings, RetrieveSettings, load_recipe
from pipelines.stats import markdown
from tests.builders import cut, execute, random_ids, write_embeddings
from tests.pipelines.test_levels import SIZES, unit
from tests.vectors import write_verdicts

ROOT = Path(__file__).parents[2]
DIM, ROWS_PER_PART = 4, 30


def made_and_priced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> tuple[int, float]:
    """Products that clustering two pools makes, of which dedup kept everything, and those that its price has."""
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        ids, x = random_ids(rng, size), rng.standard_normal((size, DIM)).astype(np.float16)
        parts = cut(range(size), [*range(ROWS_PER_PART, size, ROWS_PER_PART)])
        write_embeddings(tmp_path / "e" / name, name, [([ids[i] for i in part], x[list(part)]) for part in parts])
        write_verdicts(tmp_path / "d" / name, name, ids, np.ones(size, np.bool_), parts)
    products, search, to_one = [0], Nearest._search, kmeans_init._distance_to_one

    def counted(nearest: Nearest, points: Points, centroids: Points, space: Space, scored: bool) -> Any:
        products[0] += len(points) * len(centroids)
        return search(nearest, points, centroids, space, scored)

    def counted_one(points: Points, other: Any, metric: Any) -> Any:
        products[0] += len(points)
        return to_one(points, other, metric)

    monkeypatch.setattr(Nearest, "_search", counted)
    monkeypatch.setattr(kmeans_init, "_distance_to_one", counted_one)
    monkeypatch.setattr(kmeans_rounds, "has_converged", lambda *args: False)
    made = unit(tmp_path, **values)
    execute(made)
    costs = cluster_costs(made.settings, sum(SIZES.values()), DIM, ROWS_PER_PART)
    return products[0], sum(cost.operations or 0 for cost in costs) / (2 * DIM)


@pytest.mark.parametrize(
    "values",
    [{}, {"sample": 60}, {"init": "k-means++"}, {"sample": 100, "memory_rows": 40}],
    ids=["all", "sample", "k-means++", "streamed"],
)
def test_one_level_is_priced_by_its_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    made, priced = made_and_priced(tmp_path, monkeypatch, num_clusters=6, **values)
    assert made == priced


@pytest.mark.parametrize("init", [None, "k-means||"])
def test_a_start_of_two_levels_is_priced_by_its_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: Any
) -> None:
    """About: coarse clusters are taken to be equal, and as many candidates to be drawn as are expected."""
    for module in (clustering, price_clusters):
        for name in ("TWO_LEVELS", "TWO_LEVELS_SPREAD"):
            monkeypatch.setattr(module, name, 20)
        monkeypatch.setattr(module, "POLISH", 2)
        monkeypatch.setattr(module, "POINTS_PER_COARSE", 8)
    made, priced = made_and_priced(tmp_path, monkeypatch, num_clusters=25, init=init)
    assert 0.8 < made / priced < 1.25, (made, priced)


def test_levels_are_priced_by_their_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"num_clusters": 16, "levels": [6, 2], "fits": 4, "finest_fits": 3}
    made, priced = made_and_priced(tmp_path, monkeypatch, **values)
    assert 0.8 < made / priced < 1.25, (made, priced)


def test_a_streamed_fit_tells_what_travels_and_what_is_held() -> None:
    settings = ClusterSettings(num_clusters=10, iterations=3, sample=500, memory_rows=200)
    fit, rounds, every = cluster_costs(settings, 1000, 7, 60)
    assert [fit.step, rounds.step, every.step] == ["fit on 200", "3 rounds on 500, streamed", "assignment"]
    assert (fit.moved, rounds.moved, every.moved) == (0, 3 * 16 * 8 * 7 * 10, 0)  # 17 parts are 16 groups
    assert cluster_costs(settings, 1000, 7, 500)[1].moved == 3 * 2 * 8 * 7 * 10
    assert fit.held == max(16 * 1000, 4 * 7 * 200 + 20 * 7 * 10)
    assert cluster_costs(settings, 500, 70, 60)[0].held == 4 * 70 * 200 + 20 * 70 * 10
    assert (rounds.held, every.held) == (24 * 7 * 10, 5 * 7 * 10 + 4 * 7 * 60)


def test_a_refit_moves_the_images_that_it_takes_and_of_one_image_a_cluster_there_is_none() -> None:
    settings = ClusterSettings(num_clusters=10, finest_fits=3, memory_rows=50, sample=50)
    refits = cluster_costs(settings, 100_000, 7, 1000)[1]
    assert (refits.step, refits.moved) == (
        "2 refits",
        2 * 16 * 5 * 10 * 16,
    )  # groups, a cluster, bytes
    again = cluster_costs(ClusterSettings(num_clusters=50, finest_fits=3, memory_rows=50, sample=50), 100, 7, 1000)[1]
    assert again.operations == 2 * 100 * 50 * 2 * 7


def test_744_million_images_and_100_000_clusters_cost_what_the_documents_say() -> None:
    recipe = load_recipe("lvd142m", ["sources.web.rows=744000000"])
    tables = {table.title: table for table in plan_tables(recipe, None)}
    found = tables["Cost of clustering"]
    assert markdown(found) in (ROOT / "docs/scale.md").read_text()
    every = 744e6 * 1e5 * 2 * 512
    hours = [every / rate / 3600 for rate in (KMEANS_OPERATIONS_PER_SECOND, ACCELERATOR_OPERATIONS_PER_SECOND)]
    assert found.rows[-1][:5] == ["all", "assignment", f"{every:.1e}", f"{hours[0]:,.0f}", f"{hours[1]:.2g}"]
    assert found.rows[1][5] == f"{5 * 16 * 8 * 512 * 1e5 / 1e9:.1f} GB"
    assert tables["What the cost of clustering rests on"].rows[2][1] == "100,000"
    assert {row[0] for row in tables["Cost of retrieval"].rows} == {"imagenet22k", "imagenet1k", "gldv2"}


def test_levels_are_told_finest_first() -> None:
    costs, rests = cluster_price_tables(ClusterSettings(num_clusters=20, levels=[5, 2]), 1000, 8, 100)
    assert [row[:2] for row in costs.rows] == [
        ["1", "fit on 1,000"],
        ["2", "10 fits"],
        ["3", "10 fits"],
        ["all", "assignment"],
    ]
    assert rests.rows[2][1] == "20 / 5 / 2"


def test_what_needs_no_clusters_or_retrieves_nothing_has_no_price_of_it(tiny_recipe: Path) -> None:
    def titles(*changes: str) -> set[str]:
        return {table.title for table in plan_tables(load_recipe(str(tiny_recipe), list(changes)), None)}

    prices = {"Cost of clustering", "Cost of retrieval"}
    assert titles() & prices == prices
    assert titles("parts=[{as_is: birds}]") & prices == set()
    assert titles("parts=[{retrieved: birds, mode: sample, k: 2}]") & prices == {"Cost of retrieval"}
    assert titles("parts=[{balanced: pool, target: 5}]") & prices == {"Cost of clustering"}


def test_retrieval_is_priced_by_the_pairs_that_its_engine_compares() -> None:
    (exact,) = sample_costs("birds", RetrieveSettings(), 1000, 5000, 10)
    assert exact == Cost("birds", "all pairs", 1000 * 5000 * 20)
    shape: dict[str, Any] = {"num_lists": 16, "lists_joined": 2, "quantizers": 3, "partition_rows": 400}
    search = RetrieveSettings(engine="partitioned", recall_sample=50, **shape)
    lists, met, recall = sample_costs("birds", search, 1000, 1600, 10)
    assert lists.operations == 3 * (1_600 + 1_000) * 16 * 20  # so few lists are all ranked
    assert lists.moved == 3 * (1600 + 1000 * 2) * 20
    assert (met.operations, met.held) == (3 * 1000 * 2 * 100 * 20, 400 * 4 * 10)
    assert recall.operations == 50 * 1600 * 20

"""Recipes: what they may say, what is told when they say something else, and where their paths lead."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from curation.errors import ConfigError
from pipelines.recipe import PartSettings, Recipe, load_recipe, shipped

SMALL: dict[str, Any] = {
    "sources": {
        "web": {"role": "pool", "urls": "urls/*.parquet"},
        "birds": {"role": "query", "folder": "birds"},
        "bench": {"role": "reference", "images": "s3://bucket/bench.parquet"},
    },
    "parts": [{"as_is": "birds"}, {"retrieved": "birds", "mode": "sample", "k": 4}],
}


def load(tmp_path: Path, values: dict[str, Any], *assignments: str) -> Recipe:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_recipe(str(path), list(assignments))


def test_a_small_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL)
    assert recipe.of_role("pool") == ["web"]
    assert recipe.of_role("query") == ["birds"]
    assert recipe.embedders["default"].model == "dct"
    assert [part.title for part in recipe.parts] == ["birds as is", "birds sample k=4"]


def test_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    sources = load(tmp_path, SMALL).sources
    assert sources["web"].urls == f"{tmp_path}/urls/*.parquet"
    assert sources["birds"].folder == f"{tmp_path}/birds"
    assert sources["bench"].images == "s3://bucket/bench.parquet"
    absolute = load(tmp_path, SMALL, "sources.web.urls=/data/x.csv", "sources.birds.folder=../birds").sources
    assert absolute["web"].urls == "/data/x.csv"
    assert absolute["birds"].folder == f"{tmp_path.parent}/birds"


def test_overrides(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL, "dedup.threshold=0.7", "parts.1.k=9", "embedders.default.model=hf:x", "seed=5")
    assert (recipe.dedup.threshold, recipe.parts[1].k, recipe.seed) == (0.7, 9, 5)
    assert recipe.embedders["default"].model == "hf:x"


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["dedup.treshold=0.7"], r"unknown key dedup\.treshold \(did you mean threshold\?\)"),
        (["sead=1"], r"unknown key sead \(did you mean seed\?\)"),
        (["dedup.threshold=7"], r"dedup\.threshold: .*less than or equal to 1"),
        (["dedup.embedder=defualt"], r"dedup\.embedder: no embedder 'defualt' \(did you mean default\?\)"),
        (["cluster.embedder=x"], r"cluster\.embedder: no embedder 'x'"),
        (["sources.web.role=query"], "at least one needs the role pool"),
        (["sources.web.role=pole"], r"sources\.web\.role: .*'pool', 'query' or 'reference'"),
        (["sources.web.folder=x"], r"sources\.web: exactly one of urls, folder and images"),
        (["sources.birds.folder=null"], r"sources\.birds: exactly one of urls, folder and images"),
        (["parts.0.as_is=bird"], r"parts\.0: no source 'bird' \(did you mean birds\?\)"),
        (["parts.1.retrieved=web"], r"parts\.1: web has the role pool, only query sets are retrieved for"),
        (["parts.1.k=null"], r"parts\.1: k goes with mode sample"),
        (["parts.1.mode=cluster"], r"parts\.1: k goes with mode sample"),
        (["parts.1.mode=null"], r"parts\.1: mode \(sample or cluster\) goes with retrieved"),
        (["parts.0.target=5"], r"parts\.0: target goes with balanced"),
        (["parts.0.balanced=pool"], r"parts\.0: exactly one of as_is, retrieved and balanced"),
        (["parts=[]"], "parts: .*at least 1 item"),
        (["sources={}"], "sources: .*at least 1 item"),
        (["parts.1.name=birds as is"], "two are called 'birds as is'"),
        (["sources.web/x={role: pool, urls: x}"], r"sources\.web/x"),
        (["rows_per_part=0"], "rows_per_part: .*greater than 0"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path: Path, assignments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path, SMALL, *assignments)
    assert "\n" not in str(error.value)
    assert "small.yaml" in str(error.value)


def test_retrieving_twice_in_one_mode_is_refused(tmp_path: Path) -> None:
    again = {"retrieved": "birds", "mode": "sample", "k": 5}
    with pytest.raises(ConfigError, match="birds is retrieved twice with mode sample"):
        load(tmp_path, {**SMALL, "parts": [*SMALL["parts"], again]})
    by_cluster = {"retrieved": "birds", "mode": "cluster", "images_per_cluster": 5}
    assert len(load(tmp_path, {**SMALL, "parts": [*SMALL["parts"], by_cluster]}).parts) == 3


BY_CLUSTER = {"retrieved": "a", "mode": "cluster", "images_per_cluster": 10}


@pytest.mark.parametrize(
    ("values", "title", "nominal"),
    [
        ({"as_is": "a", "images": 7}, "a as is", 7),
        ({"as_is": "a"}, "a as is", None),
        ({"retrieved": "a", "mode": "sample", "k": 4, "images": 7}, "a sample k=4", 28),
        ({"retrieved": "a", "mode": "cluster", "images_per_cluster": 10, "clusters_hit": 3}, "a cluster", 30),
        (
            {"retrieved": "a", "mode": "cluster", "images_per_cluster": 10, "clusters_hit": 3, "cap": 20},
            "a cluster",
            20,
        ),
        ({"retrieved": "a", "mode": "cluster", "images_per_cluster": 10}, "a cluster", None),
        ({"balanced": "pool", "target": 9, "name": "even"}, "even", 9),
    ],
)
def test_parts_know_their_names_and_sizes(values: dict[str, Any], title: str, nominal: int | None) -> None:
    part = PartSettings(**values)
    assert (part.title, part.nominal) == (title, nominal)


def test_recipes_that_ship_can_be_loaded() -> None:
    assert "lvd142m" in shipped()
    for name in shipped():
        assert load_recipe(name).name == name


@pytest.mark.parametrize(
    ("place", "message"),
    [("lvd142", "no recipe 'lvd142': give a YAML file or one of .*lvd142m"), ("/none.yaml", "/none.yaml does not")],
)
def test_recipes_that_are_not_there(place: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(place)

"""Final shards: every selected image as often as its copies say, in an order that only the seed decides."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation import schemas
from curation.errors import ConfigError
from curation.hashing import bucket_of, id_words, image_id, keyed_hash
from curation.shards import IMAGE_GROUP_ROWS, ShardSet
from pipelines import shard
from pipelines.recipe import ShardSettings
from pipelines.shard import ShardUnit, plan_layout
from tests.builders import cut, execute, fingerprints, rows_of, table, write_set

SOURCES = ("web", "birds")
REASON = {"part": "p", "query_set": "q", "mode": "sample", "rank": 1, "similarity": 0.5}


class World:
    """A pool with clusters and duplicates, a query set without, and a selection of both."""

    def __init__(self, tmp_path: Path, seed: int, size: int = 60) -> None:
        rng = np.random.default_rng(seed)
        self.path = tmp_path
        self.copies: dict[str, int] = {}
        self.images: dict[str, dict[str, Any]] = {}
        selection = []
        for name in SOURCES:
            pictures = [name.encode() + rng.bytes(int(rng.integers(100, 400))) for _ in range(size)]
            pictures[9] = pictures[2]  # fetched twice, in one part or in two
            parts = cut(list(enumerate(pictures)), [0, size // 3, size // 3])
            selection += [self._source_part(rng, name, part) for part in parts]
            self._write(rng, name, parts)
        write_set(tmp_path / "selection", "selection", selection)

    def _source_part(self, rng: np.random.Generator, name: str, part: list[tuple[int, bytes]]) -> Any:
        names = [image_id(data) for row, data in part if row != 9 and rng.random() < 0.6]
        copies = [int(c) for c in rng.choice([1, 1, 2, 5], len(names))]
        self.copies |= dict(zip(names, copies, strict=True))
        columns = {"source": [name] * len(names), "copies": copies, "reasons": [[REASON]] * len(names)}
        return table(schemas.SELECTION, image_id=names, **columns)

    def _write(self, rng: np.random.Generator, name: str, parts: list[list[tuple[int, bytes]]]) -> None:
        common = {"source": name, "role": "pool" if name == "web" else "query"}
        tables, clusters, duplicates = [], [], []
        for part in parts:
            rows, data = [r for r, _ in part], [d for _, d in part]
            ids, n = [image_id(d) for d in data], len(part)
            columns = {"width": rng.integers(1, 9, n), "height": rng.integers(1, 9, n), "url": [f"u{r}" for r in rows]}
            tables.append(table(schemas.IMAGES, image_id=ids, row=rows, image=data, label=[name] * n, **columns))
            unique = list(dict.fromkeys(ids))
            numbers = rng.integers(0, 5, len(unique)).tolist()
            sizes = rng.integers(1, 4, len(unique)).tolist()
            some = slice(0, None, 2)
            clusters.append(
                table(
                    schemas.CLUSTERS, image_id=unique[some], cluster_1=numbers[some], distance=[0.0] * len(unique[some])
                )
            )
            duplicates.append(
                table(
                    schemas.DUPLICATES,
                    image_id=unique,
                    component=sizes,
                    component_size=sizes,
                    kept=[True] * len(unique),
                )
            )
            for row in reversed(tables[-1].to_pylist()):
                del row["row"]
                at = unique.index(row["image_id"])
                more = {"source": name, "reasons": [REASON], "clusters": None, "component_size": None}
                if name == "web":
                    more |= {"clusters": None if at % 2 else [numbers[at]], "component_size": sizes[at]}
                self.images[row["image_id"]] = row | more
        write_set(self.path / "images" / name, "images", tables, **common)
        if name == "web":
            write_set(self.path / "clusters" / name, "clusters", clusters, **common)
            write_set(self.path / "duplicates" / name, "duplicates", duplicates, **common)

    def unit(self, out: str = "out", seed: int = 1, **settings: int) -> ShardUnit:
        images = [str(self.path / "images" / name) for name in SOURCES]
        extra = [{"web": str(self.path / kind / "web")} for kind in ("clusters", "duplicates")]
        where = (str(self.path / "selection"), images, *extra)
        return ShardUnit(*where, ShardSettings(**settings), seed, str(self.path / out))


LAYOUTS = {
    "one shard": {},
    "one level": {"shard_bytes": 4000},
    "two levels": {"shard_bytes": 2500, "max_fan_out": 2},
    "two levels in slices": {"shard_bytes": 2500, "max_fan_out": 2, "slice_bytes": 3000},
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("which", LAYOUTS)
@pytest.mark.parametrize("buffer_bytes", [500, 64_000_000])
def test_shards_hold_what_was_selected_in_order_of_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, seed: int, buffer_bytes: int
) -> None:
    monkeypatch.setattr(shard, "BUFFER_BYTES", buffer_bytes)
    world = World(tmp_path, seed)
    unit = world.unit(**LAYOUTS[which])
    layout = unit.layout
    assert (layout.num_shards > 1, layout.per_group > 1, layout.slices > 1) == {
        "one shard": (False, False, False),
        "one level": (True, False, False),
        "two levels": (True, True, False),
        "two levels in slices": (True, True, True),
    }[which]
    execute(unit)
    made = ShardSet(str(tmp_path / "out"))
    assert made.num_parts == layout.num_shards

    keys = {
        (name, copy): int(keyed_hash(1, "shuffle", id_words([name]), copy)[0])
        for name, copies in world.copies.items()
        for copy in range(copies)
    }
    expected = sorted(keys, key=lambda item: keys[item])
    found = rows_of(made)
    assert [row["image_id"] for row in found] == [name for name, _ in expected]
    assert Counter(row["image_id"] for row in found) == Counter(world.copies)
    for row in found:
        assert row == world.images[row["image_id"]]
        assert image_id(row["image"]) == row["image_id"]
    shards = bucket_of(np.array([keys[item] for item in expected], np.uint64), layout.num_shards)
    assert made.rows_per_part.tolist() == np.bincount(shards, minlength=layout.num_shards).tolist()


def test_all_layouts_hold_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    world = World(tmp_path, 3)
    orders = []
    for which, settings in LAYOUTS.items():
        execute(world.unit(which, **settings))
        orders.append([row["image_id"] for row in rows_of(tmp_path / which)])
    assert orders[1:] == orders[:1] * 3


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    world = World(tmp_path, 4)
    for out, seed in (("one", 1), ("again", 1), ("other", 2)):
        execute(world.unit(out, seed, **LAYOUTS["two levels"]))
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "again")
    one, other = ([row["image_id"] for row in rows_of(tmp_path / out)] for out in ("one", "other"))
    assert one != other
    assert sorted(one) == sorted(other)


def test_row_groups_are_small_and_images_plain(tmp_path: Path) -> None:
    world = World(tmp_path, 5, size=150)
    execute(world.unit())
    metadata = pq.ParquetFile(ShardSet(str(tmp_path / "out")).part_uri(0)).metadata
    sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    assert len(sizes) > 2
    assert sizes == [IMAGE_GROUP_ROWS] * (len(sizes) - 1) + [sizes[-1]]
    columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    assert {c.path_in_schema: c.compression for c in columns}["image"] == "UNCOMPRESSED"
    assert not [p for p in (tmp_path / "out").iterdir() if p.name in ("_scattered", "_rescattered")]


def test_images_that_are_not_there_are_told(tmp_path: Path) -> None:
    world = World(tmp_path, 6)
    unit = world.unit()
    unit.images.reverse()
    with pytest.raises(ConfigError, match=r"image [0-9a-f]{32} is selected but not in"):
        execute(unit)
    with pytest.raises(ConfigError, match="was made from other images than"):
        ShardUnit(**{**vars(world.unit()), "images": unit.images[:1]}).steps()


@pytest.mark.parametrize("total", [0, 1, 999, 10**6, 10**9])
@pytest.mark.parametrize("num_parts", [0, 1, 3, 1000])
@pytest.mark.parametrize(
    "settings", [ShardSettings(), ShardSettings(shard_bytes=1000, max_fan_out=4, slice_bytes=5000)]
)
def test_layouts_reach_every_shard_by_small_steps(total: int, num_parts: int, settings: ShardSettings) -> None:
    layout = plan_layout(total, num_parts, settings)
    assert layout.num_shards == max(1, round(total / settings.shard_bytes))
    assert (layout.num_groups - 1) * layout.per_group < layout.num_shards <= layout.num_groups * layout.per_group
    if layout.num_shards <= settings.max_fan_out:
        assert (layout.per_group, layout.slices) == (1, 1)
    else:
        root = layout.num_shards**0.5
        assert layout.per_group <= root + 1
        assert layout.num_groups <= root + 1
        assert layout.slices * layout.slice_parts >= num_parts

"""One cluster of a run: how large, what of it is selected and why, who asks for it, what lies in it and beside it.

One pass over the clusters of all pools; parts with members are read in the images and the selection as well, and at
levels above the first, where no distance is stored, their vectors. Held: one part of each, the centroids of the level,
and the distinct labels of the members. The queries are compared with the finest centroids (`pipelines.coverage`).
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import storage
from curation.errors import ConfigError
from curation.partwise import matrix, positions_in
from curation.scoring import cosine_pairs
from curation.shards import ShardSet
from pipelines.asked import Asked
from pipelines.coverage import Spread
from pipelines.executor import LocalExecutor
from pipelines.fates import Fate, Fates, Wanted, look_up
from pipelines.levels import centroids_of
from pipelines.progress import quiet
from pipelines.shown import shown
from pipelines.stats import Table

NEIGHBORS = 5
SHOWN_LABELS = 10


@dataclass(frozen=True)
class Neighbor:
    """Another cluster of the level: the cosine between both centroids, and its images."""

    cluster: int
    cosine: float
    size: int


@dataclass(frozen=True)
class Member:
    """An image of the cluster, its distance to the centroid, and what became of it."""

    distance: float
    fate: Fate


@dataclass
class Explained:
    """A cluster.

    Attributes:
        level, cluster: which one.
        size, pool: images in it, and in all clusters of the level.
        selected, copies: images of it in the final set, and how often they are taken; None while there is no selection.
        parts: those images by part of the recipe; one may have several.
        queries: by query set, the queries that lie in it and those that were compared.
        neighbors: the nearest clusters.
        sources, labels: its images by source and label.
        typical, outlying: the images nearest to the centroid, and those farthest from it.
    """

    level: int
    cluster: int
    size: int = 0
    pool: int = 0
    selected: int | None = None
    copies: int | None = None
    parts: Counter[str] = field(default_factory=Counter)
    queries: dict[str, tuple[int, int]] = field(default_factory=dict)
    neighbors: list[Neighbor] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    typical: list[Member] = field(default_factory=list)
    outlying: list[Member] = field(default_factory=list)


_Entry = tuple[float, str, str, int]
"""Distance, image_id, source and part of a member."""


def explain(run: str, cluster: str, members: int = 5) -> Explained:
    """Explain a cluster.

    Args:
        run: its directory.
        cluster: a number, of level 1, or LEVEL:NUMBER.
        members: images to name, nearest and farthest.

    Raises:
        ConfigError: no clusters yet, or no such one.
    """
    asked = Asked(run)
    spread = asked.spread
    if spread is None:
        raise ConfigError(f"{run} has no clusters yet: they come with the stage cluster")
    level, number = _parse(cluster, spread)
    found = Explained(level, number, int(spread.sizes[level - 1][number]), int(spread.sizes[level - 1].sum()))
    if spread.selected is not None:
        found.selected, found.copies = 0, int(spread.taken[level - 1][number])
    centroids = centroids_of(spread.centroids, level)
    nearest: list[_Entry] = []
    farthest: list[_Entry] = []
    for shard_set, part, table in _members(spread, level, number):
        _count(asked, found, shard_set.source, part, table["image_id"].to_pylist())
        entries = _entries(asked, shard_set.source, part, table, centroids[number])
        nearest = sorted([*nearest, *entries])[:members]
        farthest = sorted([*farthest, *entries], key=lambda entry: (-entry[0], *entry[1:]))[:members]
    found.typical, found.outlying = _named(asked, nearest), _named(asked, farthest)
    found.neighbors = _neighbors(centroids, number, spread.sizes[level - 1])
    for queries in asked.queries:
        counts, compared = spread.query_counts(queries)
        found.queries[queries.source] = int(spread.lift(counts, level - 1)[number]), compared
    return found


def _parse(cluster: str, spread: Spread) -> tuple[int, int]:
    """Level and number. Raises ConfigError."""
    first, colon, last = cluster.partition(":")
    level, number = (first, last) if colon else ("1", first)
    if not (level.isascii() and level.isdigit() and number.isascii() and number.isdigit()):
        raise ConfigError(f"{cluster!r} names no cluster: give a number, or LEVEL:NUMBER")
    if not 1 <= int(level) <= len(spread.sizes):
        raise ConfigError(f"there is no level {level}: the clusters have {len(spread.sizes)}")
    count = len(spread.sizes[int(level) - 1])
    if int(number) >= count:
        raise ConfigError(f"there is no cluster {number} at level {level}: they are numbered 0 to {count - 1}")
    return int(level), int(number)


def _members(spread: Spread, level: int, number: int) -> Iterator[tuple[ShardSet, int, pa.Table]]:
    """The members in each part that has some."""
    column = f"cluster_{level}"
    for shard_set in spread.clusters:
        for part in range(shard_set.num_parts):
            table = shard_set.read(part, ["image_id", column, "distance"])
            table = table.filter(pa.array(table[column].to_numpy() == number))
            if table.num_rows:
                yield shard_set, part, table


def _count(asked: Asked, found: Explained, source: str, part: int, ids: list[str]) -> None:
    """Add the members of a part to what is counted."""
    found.sources[source] += len(ids)
    wanted = set(ids)
    images = asked.sets.get(f"images/{source}")
    if images is not None:
        told = images.read(part, ["image_id", "label"])
        names = dict(zip(told["image_id"].to_pylist(), told["label"].to_pylist(), strict=True))
        found.labels.update(names[name] for name in ids if names.get(name) is not None)
    table = asked.selected.part(source, part, ["image_id", "reasons"]) if asked.selected is not None else None
    for row in table.to_pylist() if table is not None else []:
        if row["image_id"] in wanted and found.selected is not None:
            found.selected += 1
            found.parts.update(sorted({reason["part"] for reason in row["reasons"]}))


def _entries(asked: Asked, source: str, part: int, table: pa.Table, centroid: npt.NDArray[np.float32]) -> list[_Entry]:
    """Members with their distance to the centroid: as stored for the finest level, 1 - cosine for others."""
    ids = table["image_id"].to_pylist()
    distance = table["distance"].to_numpy()
    if "cluster_1" not in table.column_names:
        embeddings = asked.sets.get(f"embeddings/{asked.meaning}/{source}")
        if embeddings is None:
            raise ConfigError(f"the vectors of {source} by embedder {asked.meaning} are needed, and not there")
        whole = embeddings.read(part)
        rows = positions_in(ids, whole["image_id"].to_pylist(), embeddings.part_uri(part))
        distance = np.float32(1) - cosine_pairs(matrix(whole), rows, centroid[None], np.zeros(len(rows), np.int64))
    return [(value, name, source, part) for value, name in zip(distance.tolist(), ids, strict=True)]


def _named(asked: Asked, entries: list[_Entry]) -> list[Member]:
    """Members with row, URL and fate, in the order given."""
    wanted: Wanted = {}
    for _, name, source, part in entries:
        if f"images/{source}" in asked.sets:
            wanted.setdefault((source, part), set()).add(name)
    fates = look_up(Fates(asked.sets, asked.selected, wanted), LocalExecutor(), quiet())
    found = []
    for distance, name, source, part in entries:
        rows = fates.get((source, part, name))  # of rows with the same bytes the filter kept the first
        found.append(Member(distance, rows[0] if rows else Fate(source, "pool", part, -1, name, None, None, None)))
    return found


def _neighbors(centroids: npt.NDArray[np.float32], number: int, sizes: npt.NDArray[np.int64]) -> list[Neighbor]:
    """The nearest other clusters, ties to the lowest number."""
    count = len(centroids)
    cosine = cosine_pairs(centroids, np.full(count, number), centroids, np.arange(count))
    order = [c for c in np.argsort(-cosine, kind="stable").tolist() if c != number]
    return [Neighbor(c, float(cosine[c]), int(sizes[c])) for c in order[:NEIGHBORS]]


def tables(found: Explained) -> list[Table]:
    """What was found, for people; text from data is escaped."""
    share = f"{100 * found.size / found.pool:.2f} %" if found.pool else ""
    facts: list[list[Any]] = [["images", found.size], ["share of the pool", share]]
    facts += [["selected", found.selected], ["copies of them", found.copies]] if found.selected is not None else []
    queries = [[name, hits, of] for name, (hits, of) in found.queries.items()]
    members = [
        *(["typical", *_shown(member)] for member in found.typical),
        *(["outlying", *_shown(member)] for member in found.outlying),
    ]
    made = [
        Table(f"Cluster {found.cluster} of level {found.level}", ["what", "value"], facts),
        Table("Selected by", ["part of the recipe", "images"], _counted(found.parts)),
        Table("Queries in it", ["query set", "queries", "of"], queries),
        Table("Sources", ["source", "images"], _counted(found.sources)),
        Table("Labels", ["label", "images"], _counted(found.labels)[:SHOWN_LABELS]),
        Table(
            "Nearest clusters",
            ["cluster", "cosine", "images"],
            [[str(n.cluster), n.cosine, n.size] for n in found.neighbors],
        ),
        Table(
            "Members", ["member", "distance", "source", "row", "image_id", "label", "what became of it", "url"], members
        ),
    ]
    return [table for table in made if table.rows]


def _counted(counts: Counter[str]) -> list[list[Any]]:
    return [[shown(name), count] for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _shown(member: Member) -> list[Any]:
    fate = member.fate
    texts = [shown(text) for text in (fate.label or "", fate.text, fate.url or "")]
    return [member.distance, fate.source, str(fate.row), fate.image_id, *texts]


def write_json(found: Explained, uri: str) -> None:
    """All of it as one JSON object."""
    members = {key: [asdict(member) for member in getattr(found, key)] for key in ("typical", "outlying")}
    value = {**vars(found), **members, "neighbors": [asdict(neighbor) for neighbor in found.neighbors]}
    storage.write_bytes(uri, json.dumps(value, indent=1).encode())

"""Whether given images, near-copies of them or things that look alike are in a run's final set or in its pool.

Exact copies are looked up by id in the index of every source. Near-copies are the nearest by the embedder that dedup
compares, as far as they pass a threshold of the run; what looks alike are the k nearest by the embedder that clusters
and retrieval compare. Both searches are exact. Whatever was found is told with its fate (`pipelines.fates`).

Held: the given vectors, and about 1 kB for each given image and neighbor, nothing that grows with the pool. Time: one
pass over the given images for each model; given images times pool images for each search, one where both embedders are
the same; and one reading of the parts that hold what was found.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from curation.partwise import ids_of
from curation.shards import ShardSet
from pipelines.asked import Asked
from pipelines.chains import thresholds as rising
from pipelines.executor import Executor
from pipelines.fates import Fate, Fates, Wanted, find_ids, look_up
from pipelines.given import find_given, lacks_gpu, make_sets, read_sets, vectors_of
from pipelines.lookalikes import Nearest, find_nearest
from pipelines.progress import Progress
from pipelines.vectors import Vectors

Where = Literal["set", "pool", "other"]
PLACES: tuple[Where, ...] = ("set", "pool", "other")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something of the run that a given image is: `relation` is exact, near_copy or alike (with a cosine)."""

    relation: str
    similarity: float | None
    fate: Fate

    def lies(self, where: Where) -> bool:
        """Whether it is in the final set, else in the pool, else in another source."""
        if self.fate.in_set:
            return where == "set"
        return where == ("pool" if self.fate.role == "pool" else "other")


@dataclass(slots=True)
class Audited:
    """One given image: its name (any characters), id, what is wrong with it, and what was found, best first."""

    name: str
    image_id: str | None = None
    problem: str | None = None
    findings: list[Finding] = field(default_factory=list)

    def best(self, relation: str, where: Where) -> float | None:
        """The cosine of the best finding of that kind there; 1 for exact copies, None without."""
        found = (f for f in self.findings if f.relation == relation and f.lies(where))
        return max((1.0 if f.similarity is None else f.similarity for f in found), default=None)

    @property
    def verdict(self) -> str:
        """The closest copy: the set before the pool, the pool before sources that give nothing to the set."""
        if self.problem is not None:
            return f"unreadable: {self.problem}"
        for where in PLACES:
            for relation, what in (("exact", "exact copy"), ("near_copy", "near-copy")):
                copies = [f.fate for f in self.findings if f.relation == relation and f.lies(where)]
                if copies and where == "pool":
                    return f"{what} in the pool" + ("" if copies[0].in_set is None else ", not in the set")
                if copies:
                    return f"{what} in the set" if where == "set" else f"{what} only in {copies[0].source}"
        return "no copy found"


@dataclass
class Audit:
    """What was asked and found.

    Attributes:
        images: the given ones, in order.
        thresholds: cosines of near-copies, the most precise first; empty where near-copies were not searched.
        own: those of them that dedup used, by name.
        notes: what could not be answered and why, one line each.
        has_set: whether there is a selection.
    """

    images: list[Audited]
    thresholds: list[float]
    own: dict[str, float]
    notes: list[str]
    has_set: bool


@dataclass(frozen=True)
class _Search:
    """One search: the sets of the run and of the given images, and the relation that neighbors stand in."""

    relation: str
    embedder: str
    sets: list[ShardSet]


def audit(
    run: str,
    places: list[str],
    work: str,
    executor: Executor,
    progress: Progress,
    *,
    k: int = 5,
    threshold: float | None = None,
    image_column: str = "image",
) -> Audit:
    """Find given images in a run.

    Args:
        run: its directory; at whatever stage it is.
        places: image files, folders, Parquet files with images.
        work: an empty directory that all workers reach; holds the given images' bytes and vectors.
        executor, progress: where work runs and is shown.
        k: neighbors told of for each image and relation, in the set and again outside it.
        threshold: least cosine of near-copies; None takes the run's lowest.
        image_column: of Parquet files.

    Raises:
        ConfigError: no run, nothing at a place, or a model that is not at hand.
        LvdError: a search failed.
    """
    asked = Asked(run)
    given = find_given(places)
    own = asked.own_thresholds()
    at = levels(own, threshold)
    searches = _searches(asked, at)
    models = {search.embedder: search.sets[0] for search in searches}
    make_sets(given, work, image_column, asked.limits(), models, executor, progress)
    if others := [name for name, like in models.items() if lacks_gpu(like)]:
        asked.notes.append(
            f"vectors by {', '.join(others)} were made on a GPU, those of the given images on a CPU in float32: "
            "cosines may be off by the difference"
        )
    read = read_sets(given, work, list(models))
    images = [Audited(image.name, image.image_id, image.problem) for image in read]
    found = _exact(asked, {image.image_id for image in images if image.image_id is not None})
    own_ids = len(asked.of_kind("images"))  # an image itself may lie in each source, and is no neighbor of its own
    nearest: dict[str, tuple[Nearest, Nearest]] = {}
    for search in searches:
        if search.embedder not in nearest:
            where = (vectors_of(given, work, search.embedder), [s.uri for s in search.sets], asked.selected)
            title = f"search {search.embedder}"
            nearest[search.embedder] = find_nearest(*where, k + own_ids, executor, progress, title)
    for search in searches:
        limit = at[-1] if search.relation == "near_copy" else -np.inf
        queries = vectors_of(given, work, search.embedder)
        _neighbors(found, search, queries, nearest[search.embedder], k, limit)
    asked.note_open_stages()
    _judge(images, found, asked, executor, progress)
    return Audit(images, at, own, asked.notes, asked.selected is not None)


def levels(own: dict[str, float], threshold: float | None) -> list[float]:
    """Cosines to report near-copies at, descending: the run's own, or the given one, and round ones above."""
    base = threshold if threshold is not None else min(own.values(), default=None)
    if base is None:
        return []
    return sorted({*rising(base), *(value for value in own.values() if value >= base)}, reverse=True)


def _searches(asked: Asked, thresholds: list[float]) -> list[_Search]:
    """What can be searched; the run's notes tell of the rest."""
    found = []
    for relation, embedder, what in (
        ("near_copy", asked.copies, "near-copies"),
        ("alike", asked.meaning, "images that look alike"),
    ):
        if embedder is None:
            asked.notes.append(f"{what} are not searched: the run does not tell by which embedder")
        elif relation == "near_copy" and not thresholds:
            asked.notes.append(f"{what} are not searched: embedder {embedder} states no threshold; give --threshold")
        elif sets := asked.searched(embedder, what):
            found.append(_Search(relation, embedder, sets))
    return found


Place = tuple[str, int, str]
"""Source, part and image_id of what was found."""
Found = dict[str, list[tuple[str, float | None, Place]]]
"""By id of the given image: relation, cosine and place of all that was found, in the order to tell it in."""


def _exact(asked: Asked, ids: set[str]) -> Found:
    """Where the very images lie, in sources of every role."""
    found: Found = {}
    known = asked.of_kind("index")
    if missing := [name for name in asked.contributors if f"index/{name}" not in known]:
        asked.notes.append(f"exact copies in {', '.join(missing)} are not looked up: the filter stage is not done")
    for index in known.values():
        if f"images/{index.source}" in asked.sets:
            for part, name in dict.fromkeys(find_ids(index, ids)):
                found.setdefault(name, []).append(("exact", None, (index.source, part, name)))
    return found


def _neighbors(
    found: Found, search: _Search, queries: list[str], nearest: tuple[Nearest, Nearest], k: int, limit: float
) -> None:
    """Add the k best neighbors above `limit` of every given image, in the set and outside, but for itself."""
    given, pool = Vectors(queries), Vectors([s.uri for s in search.sets])
    names = ids_of(given.words(0, len(given))).to_pylist()
    done: set[str] = set()
    for number, name in enumerate(names):
        if name in done:  # the same bytes were given in two places
            continue
        done.add(name)
        for side in nearest:
            ids = ids_of(side.words[number]).to_pylist()
            above = side.similarity[number] > np.float32(limit)
            others = [at for at in np.flatnonzero(above).tolist() if ids[at] != name][:k]
            slots = np.searchsorted(pool.offsets, side.numbers[number], side="right") - 1
            for at in others:
                shard_set, part = pool.places[slots[at]]
                place = (shard_set.source, part, ids[at])
                found.setdefault(name, []).append((search.relation, float(side.similarity[number, at]), place))


def _judge(images: list[Audited], found: Found, asked: Asked, executor: Executor, progress: Progress) -> None:
    """Give every image its findings with their fates."""
    wanted: Wanted = {}
    for entries in found.values():
        for _, _, (source, part, name) in entries:
            wanted.setdefault((source, part), set()).add(name)
    fates = look_up(Fates(asked.sets, asked.selected, wanted), executor, progress)
    for image in images:
        for relation, similarity, place in found.get(image.image_id or "", []):
            rows = fates.get(place, [])
            if relation != "exact":  # vectors are of the row that the filter kept, the first
                rows = rows[:1]
            image.findings += [Finding(relation, similarity, fate) for fate in rows]

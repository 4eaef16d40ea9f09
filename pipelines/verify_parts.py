"""What must hold of each part of a set: its files are those committed, and its rows agree with the other sets'.

Rows in = rows out + rejects, named by id and in order; every image that is referred to is there; edges are those of a
forest of near-copies. Sums of ids and copies go to `verify`, which compares whole sets.
A worker holds one part of each of the sets it compares.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from curation import storage
from curation.errors import ConfigError, LvdError
from curation.hashing import id_sum, id_words, image_id
from curation.manifest import Commit, part_name
from curation.partwise import kept_ids
from curation.shards import GROUP_ROWS, IMAGE_GROUP_ROWS, ShardSet
from pipelines.chains import num_components, pool_names, pool_sources
from pipelines.join import EDGES


@dataclass
class PartReport:
    """What checking one part found: problems, and sums of ids (modulo 2**128) and of copies over its rows."""

    problems: list[str] = field(default_factory=list)
    ids: int = 0
    copies: int = 0


@dataclass(frozen=True)
class PartCheck:
    """Checks one part of the set `name`; `places` are the URIs of all sets of the run."""

    name: str
    places: dict[str, str]

    def __call__(self, part: int) -> PartReport:
        shard_set = self.set(self.name)
        report = PartReport()
        commit = shard_set.commit(part)
        if commit is None:
            report.problems.append(f"{part_name(part)} has no commit")
            return report
        report.problems += _check_files(shard_set, part, commit)
        if not report.problems:
            try:
                if check := _CHECKS.get(self.name.split("/")[0]):
                    check(self, shard_set, part, report)
            except (LvdError, FileNotFoundError) as error:
                report.problems.append(f"{part_name(part)}: {error}")
        report.problems = [p if p.startswith("part-") else f"{part_name(part)}: {p}" for p in report.problems]
        return report

    def set(self, name: str) -> ShardSet:
        """Another set of the run. Raises ConfigError when it is not there."""
        if name not in self.places:
            raise ConfigError(f"{name}, which it refers to, is not there")
        return ShardSet(self.places[name])

    def input(self, shard_set: ShardSet, kind: str) -> ShardSet:
        """The set of that kind that `shard_set` was made from."""
        source = shard_set.labels.get("source")
        names = [i["name"] for i in shard_set.manifest["inputs"] if i["name"].split("/")[0] == kind]
        own = [name for name in names if source is None or name.split("/")[-1] == source]
        return self.set((own or names or [kind])[0])


def _check_files(shard_set: ShardSet, part: int, commit: Commit) -> Iterator[str]:
    files = [(shard_set.part_uri(part), commit.bytes, commit.sha256, commit.rows)]
    if commit.rejects_sha256:
        files.append((shard_set.rejects_uri(part), commit.rejects_bytes, commit.rejects_sha256, commit.rejects))
    elif storage.exists(shard_set.rejects_uri(part)):
        yield f"rejects/{part_name(part)} is there, but its commit tells of no rejects"
    for uri, size, sha256, rows in files:
        label = storage.relative(uri, shard_set.uri)
        try:
            found = _digest(uri)
        except FileNotFoundError:
            yield f"{label} is missing"
            continue
        if found != (size, sha256):
            yield f"{label} is damaged: sha256 {found[1][:12]}, committed was {sha256[:12]}"
            continue
        with storage.open_input(uri) as file:
            in_file = pq.ParquetFile(file).metadata.num_rows
        if in_file != rows:
            yield f"{label} holds {in_file} rows, its commit says {rows}"


def _digest(uri: str) -> tuple[int, str]:
    whole, size = hashlib.sha256(), 0
    with storage.open_input(uri) as file:
        while block := file.read(1 << 20):
            whole.update(block)
            size += len(block)
    return size, whole.hexdigest()


def _ids(shard_set: ShardSet, part: int) -> list[str]:
    return [str(name) for name in shard_set.read(part, ["image_id"])["image_id"].to_pylist()]


def _rejected(shard_set: ShardSet, part: int, column: str) -> list[Any]:
    commit = shard_set.commit(part)
    if commit is None or not commit.rejects:
        return []
    with storage.open_input(shard_set.rejects_uri(part)) as file:
        return list(pq.ParquetFile(file).read(columns=[column])[column].to_pylist())


def _same(report: PartReport, got: list[Any], wanted: list[Any], what: str, origin: ShardSet) -> None:
    """`got` must equal `wanted`, element by element; say how it does not."""
    if got == wanted:
        return
    where = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    kind = "are swapped or out of order" if sorted(map(str, got)) == sorted(map(str, wanted)) else "do not match"
    report.problems.append(
        f"rows {kind}: {len(got)} {what} against {len(wanted)} in {origin.uri.rpartition('/')[0].rpartition('/')[2]}"
        f"/{origin.uri.rpartition('/')[2]}, first difference at row {where}"
    )


def _check_images(check: PartCheck, images: ShardSet, part: int, report: PartReport) -> None:
    rows: list[int] = []
    words: list[str] = []
    for table in images.stream(part, ["image_id", "row", "image"], IMAGE_GROUP_ROWS):
        names = table["image_id"].to_pylist()
        rows += table["row"].to_pylist()
        words += names
        for name, data in zip(names, table["image"].to_pylist(), strict=True):
            if image_id(data) != name:
                report.problems.append(f"image {name} is not the hash of its bytes")
    report.ids = id_sum(id_words(words))
    if any(b <= a for a, b in pairwise(rows)):
        report.problems.append("rows are swapped or out of order")
    both = sorted([*rows, *_rejected(images, part, "row")])
    name = f"urls/{images.labels['source']}"
    if name in check.places:
        urls = check.set(name)
        _same(report, both, urls.read(part, ["row"])["row"].to_pylist(), "rows and rejects", urls)
    elif both != list(range(both[0], both[0] + len(both)) if both else []):
        report.problems.append("rows and rejects together do not number the input through")


def _check_filtered(check: PartCheck, filtered: ShardSet, part: int, report: PartReport) -> None:
    images = check.input(filtered, "images")
    _same(report, _ids(filtered, part), _ids(images, part), "verdicts", images)


def _check_index(check: PartCheck, index: ShardSet, part: int, report: PartReport) -> None:
    names = _ids(index, part)
    report.ids = id_sum(id_words(names))
    if names != sorted(names):
        report.problems.append("rows are swapped or out of order")


def _check_embeddings(check: PartCheck, embeddings: ShardSet, part: int, report: PartReport) -> None:
    filtered = check.input(embeddings, "filtered")
    rejected = set(_rejected(embeddings, part, "image_id"))
    kept = kept_ids(filtered.read(part, ["image_id", "kept"]))
    if len(rejected) != len([name for name in kept if name in rejected]):
        report.problems.append("rejects name images that were not kept")
    _same(report, _ids(embeddings, part), [n for n in kept if n not in rejected], "vectors", filtered)


def _check_duplicates(check: PartCheck, duplicates: ShardSet, part: int, report: PartReport) -> None:
    embeddings = check.input(duplicates, "embeddings")
    _same(report, _ids(duplicates, part), _ids(embeddings, part), "verdicts", embeddings)
    table = duplicates.read(part, ["image_id", "component_size", "reason", "representative_id"])
    stands = np.array([reason != "near_duplicate" for reason in table["reason"].to_pylist()], dtype=bool)
    own, named = (id_words(table[name].to_pylist()) for name in ("image_id", "representative_id"))
    strangers = int((own != named).any(axis=1)[stands].sum())
    if strangers:
        report.problems.append(f"{strangers} images are no near-duplicates, but others stand for them")
    # Each image that stands for its component is named by as many as that has: over all pools this is 0.
    sizes = table["component_size"].to_numpy()
    told = sum(id_sum(own[stands & (sizes == size)]) * size for size in np.unique(sizes[stands]).tolist())
    report.ids = (id_sum(named) - told) % (1 << 128)


def _check_forest(check: PartCheck, forest: ShardSet, part: int, report: PartReport) -> None:
    """Edges as dedup's config says, and as many as a forest of the components in the verdicts has."""
    config = forest.manifest["config"]
    num_images = sum(check.set(name).num_rows for name in pool_names(forest.manifest))
    wrong: Counter[str] = Counter()
    last = np.float32(np.inf)
    for table in forest.stream(part, rows=GROUP_ROWS):
        a, b, similarity = (table[name].to_numpy() for name in EDGES.names)
        low, high = np.minimum(a, b), np.maximum(a, b)
        is_directed = config["preset"] == "semdedup"  # from the image that stays to the one that is dropped
        wrong["do not lead from a lower number to a higher"] += int((a == b if is_directed else a >= b).sum())
        wrong[f"name images that are none of the {num_images}"] += int(((low < 0) | (high >= num_images)).sum())
        wrong[f"are not above the threshold {config['threshold']}"] += int(
            (~(similarity > np.float32(config["threshold"]))).sum()
        )
        if not is_directed:
            wrong["are stronger than the one before"] += int((np.append(last, similarity[:-1]) < similarity).sum())
            last = similarity[-1]
    report.problems += [f"{count} edges {what}" for what, count in wrong.items() if count]
    report.problems += _uncounted(check, forest, num_images)


def _uncounted(check: PartCheck, forest: ShardSet, num_images: int) -> Iterator[str]:
    """A forest has as many edges as images less components; where components were cut, more edges."""
    verdicts = [f"duplicates/{source}" for source in pool_sources(forest.manifest)]
    if not set(verdicts) <= set(check.places):
        return  # what is missing is told of by its name
    joined = num_images - num_components([check.set(name) for name in verdicts])
    is_cut = forest.manifest["config"]["max_component"] is not None
    if forest.num_rows < joined or (forest.num_rows > joined and not is_cut):
        yield f"{forest.num_rows} edges cannot join {num_images} images to the components of the verdicts: {joined} can"


def _check_recall(check: PartCheck, recall: ShardSet, part: int, report: PartReport) -> None:
    table = recall.read(part)
    if table.num_rows != 1 or recall.num_parts != 1:
        report.problems.append(f"{recall.num_rows} rows of figures, where one is needed")
    for name in (name for name in table.schema.names if name.startswith("recall")):
        values = table[name].combine_chunks()
        flat = values.flatten() if name == "recall_joined_at" else values
        wrong = [value for value in flat.drop_null().to_pylist() if not 0 <= value <= 1]
        if wrong:
            report.problems.append(f"{name} is {wrong[0]}, which is no share")


def _check_clusters(check: PartCheck, clusters: ShardSet, part: int, report: PartReport) -> None:
    embeddings, duplicates = check.input(clusters, "embeddings"), check.input(clusters, "duplicates")
    kept = set(kept_ids(duplicates.read(part, ["image_id", "kept"])))
    wanted = [name for name in _ids(embeddings, part) if name in kept]
    _same(report, _ids(clusters, part), wanted, "assignments", embeddings)


def _check_retrieved(check: PartCheck, retrieved: ShardSet, part: int, report: PartReport) -> None:
    table = retrieved.read(part, ["query_image_id", "image_id", "source", "part"])
    by_part: dict[tuple[str, int], set[str]] = {}
    for name, source, at in zip(*(table[c].to_pylist() for c in ("image_id", "source", "part")), strict=True):
        by_part.setdefault((source, at), set()).add(name)
    for (source, at), names in by_part.items():
        missing = names - set(kept_ids(check.set(f"duplicates/{source}").read(at, ["image_id", "kept"])))
        if missing:
            report.problems.append(f"{len(missing)} images are not kept in duplicates/{source}, {min(missing)} is one")
    asked = {name for name in table["query_image_id"].to_pylist() if name is not None}
    if asked and (missing := asked - set(_ids(check.input(retrieved, "embeddings"), part))):
        report.problems.append(f"{len(missing)} query images are not in the query set, {min(missing)} is one")


def _check_selection(check: PartCheck, selection: ShardSet, part: int, report: PartReport) -> None:
    place = part
    for name in (i["name"] for i in selection.manifest["inputs"] if i["name"].startswith("filtered/")):
        filtered = check.set(name)
        if place < filtered.num_parts:
            break
        place -= filtered.num_parts
    rows = selection.read(part, ["image_id", "source", "copies"]).to_pylist()
    names = [row["image_id"] for row in rows]
    chosen = set(names)
    kept = [n for n in kept_ids(filtered.read(place, ["image_id", "kept"])) if n in chosen]
    _same(report, names, kept, "selected", filtered)
    words = id_words(names)
    report.copies = sum(row["copies"] for row in rows)
    report.ids = sum(id_sum(words[i : i + 1]) * row["copies"] for i, row in enumerate(rows)) % (1 << 128)
    if any(row["source"] != filtered.source for row in rows):
        report.problems.append(f"rows of {filtered.source} are said to come from elsewhere")


def _check_shards(check: PartCheck, shards: ShardSet, part: int, report: PartReport) -> None:
    for table in shards.stream(part, ["image_id", "image"], IMAGE_GROUP_ROWS):
        names = table["image_id"].to_pylist()
        report.copies += len(names)
        report.ids += id_sum(id_words(names))
        for name, data in zip(names, table["image"].to_pylist(), strict=True):
            if image_id(data) != name:
                report.problems.append(f"image {name} is not the hash of its bytes")
    report.ids %= 1 << 128


_CHECKS: dict[str, Callable[[PartCheck, ShardSet, int, PartReport], None]] = {
    "images": _check_images,
    "filtered": _check_filtered,
    "index": _check_index,
    "embeddings": _check_embeddings,
    "duplicates": _check_duplicates,
    "forest": _check_forest,
    "recall": _check_recall,
    "clusters": _check_clusters,
    "retrieved": _check_retrieved,
    "retrieval_recall": _check_recall,
    "selection": _check_selection,
    "shards": _check_shards,
}

"""Where images of a run ended: in the final set, or which stage dropped them and why; with source, row and URL.

A part is looked at once for all images wanted of it: work grows with the parts that hold them, and a task holds the
texts of one part.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.hashing import bucket_of, id_words
from curation.shards import GROUP_ROWS, ShardSet
from pipelines.executor import Executor, Needs
from pipelines.lookalikes import Selected, result
from pipelines.progress import Progress

MAX_ROWS = 20
"""Rows of one source that are told of for one image: a placeholder may have millions."""

Wanted = dict[tuple[str, int], set[str]]
"""Ids of the images wanted, by source and part."""


@dataclass(frozen=True, slots=True)
class Fate:
    """One row of a source and what became of it.

    Attributes:
        source, role, part, row, image_id, url, label: which row it is; `url` and `label` as the source gave them.
        in_set: whether it is in the final set; None while there is no selection.
        stage, reason: what dropped it and why; None where nothing has.
        of, of_source, similarity: the image it was dropped for, that one's source where it is a reference set, and the
            cosine: to the reference, or of its strongest edge in its component.
        parts: of the recipe that it was selected by.
    """

    source: str
    role: str
    part: int
    row: int
    image_id: str
    url: str | None
    label: str | None
    in_set: bool | None
    stage: str | None = None
    reason: str | None = None
    of: str | None = None
    of_source: str | None = None
    similarity: float | None = None
    parts: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """In a few words."""
        if self.in_set:
            return f"in the set ({', '.join(self.parts)})"
        if self.stage is None:
            return "kept so far"
        same = f"of {self.of}" if self.of else ""
        near = f"({', '.join(filter(None, [self.of_source, f'{self.similarity:.3f}']))})" if self.similarity else ""
        return " ".join(filter(None, [f"{self.stage}: {self.reason}", same, near]))


def find_ids(index: ShardSet, ids: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(part, image_id) of the first MAX_ROWS rows with each of those ids; reads the ranges of ids that they lie in."""
    wanted = sorted(set(ids))
    if not wanted or not index.num_parts:
        return
    buckets = bucket_of(id_words(wanted)[:, 0], index.num_parts)
    for bucket in np.unique(buckets).tolist():
        own = pa.array([name for name, at in zip(wanted, buckets, strict=True) if at == bucket])
        seen: dict[str, int] = {}
        for table in index.stream(bucket, ["image_id", "part"], GROUP_ROWS):
            found = table.filter(pc.is_in(table["image_id"], value_set=own))
            for name, part in zip(found["image_id"].to_pylist(), found["part"].to_pylist(), strict=True):
                seen[name] = seen.get(name, 0) + 1
                if seen[name] <= MAX_ROWS:
                    yield part, name


class Fates:
    """Looks up rows of a run's sets, one part a call; what is not there yet leaves the question open."""

    def __init__(self, sets: dict[str, ShardSet], selected: Selected | None, wanted: Wanted) -> None:
        self._sets, self._selected = sets, selected
        self._wanted = sorted(wanted.items())
        self._has_balance = False
        if selected is not None:
            parts = ShardSet(selected.selection).manifest["config"].get("parts", {})
            self._has_balance = any("balanced" in part for part in parts.values())

    def __len__(self) -> int:
        return len(self._wanted)

    def __call__(self, number: int) -> list[Fate]:
        """All rows with the wanted ids in the part of that number, in order."""
        (source, part), ids = self._wanted[number]
        return list(self._part(source, part, ids))

    def _part(self, source: str, part: int, ids: set[str]) -> Iterator[Fate]:
        images = self._sets[f"images/{source}"]
        verdicts = {row["row"]: row for row in self._rows("filtered", source, part, ids)}
        duplicates = {row["image_id"]: row for row in self._rows("duplicates", source, part, ids)}
        selected = self._selection(source, part, ids)
        columns = ["image_id", "row", "url", "label"]
        for row in _chosen(images.read(part, columns), ids):
            verdict, name = verdicts.get(row["row"]), row["image_id"]
            is_kept = verdict is not None and verdict["kept"]
            reasons = selected.get(name) if selected is not None and is_kept else None
            in_set = None if self._selected is None else reasons is not None
            told: dict[str, Any] = {"parts": tuple(reasons)} if reasons is not None else {}
            if verdict is not None and reasons is None:
                told = self._dropped(source, verdict, duplicates.get(name), selected is not None)
            role = str(images.labels["role"])
            yield Fate(source, role, part, row["row"], name, row["url"], row["label"], in_set, **told)

    def _rows(self, kind: str, source: str, part: int, ids: set[str]) -> Iterator[dict[str, Any]]:
        shard_set = self._sets.get(f"{kind}/{source}")
        return _chosen(shard_set.read(part), ids) if shard_set is not None else iter(())

    def _selection(self, source: str, part: int, ids: set[str]) -> dict[str, list[str]] | None:
        """Parts of the recipe by id; None where the source gives nothing to the selection, or there is none."""
        table = self._selected.part(source, part, ["image_id", "reasons"]) if self._selected is not None else None
        if table is None:
            return None
        return {row["image_id"]: [reason["part"] for reason in row["reasons"]] for row in _chosen(table, ids)}

    def _dropped(
        self, source: str, verdict: dict[str, Any], duplicate: dict[str, Any] | None, gives: bool
    ) -> dict[str, Any]:
        """Stage, reason and what else is known of a row that is not in the set; nothing while all is open.

        `gives` says whether the selection takes images of the source.
        """
        if not verdict["kept"]:
            return {"stage": "filter", "reason": verdict["reason"]}
        role = self._sets[f"images/{source}"].labels["role"]
        if role != "pool":
            if self._selected is None or gives:
                return {}
            return {"stage": "rebalance", "reason": f"{role}_set"}
        if f"duplicates/{source}" in self._sets:
            if duplicate is None:
                return {"stage": "embed", "reason": "no_vector"}
            if not duplicate["kept"]:
                return _duplicate_of(duplicate)
        if self._selected is None:
            return {}
        if self._has_balance:
            return {"stage": "rebalance", "reason": "not_selected"}
        return {"stage": "retrieve", "reason": "not_retrieved"}


def _duplicate_of(row: dict[str, Any]) -> dict[str, Any]:
    if row["reason"] == "near_duplicate":
        own = {"of": row["representative_id"], "similarity": row["similarity"]}
    else:
        own = {"of": row["reference"], "of_source": row["reference_source"], "similarity": row["reference_similarity"]}
    return {"stage": "dedup", "reason": row["reason"], **own}


def _chosen(table: pa.Table, ids: set[str]) -> Iterator[dict[str, Any]]:
    """The rows with those ids."""
    chosen = table.filter(pc.is_in(table["image_id"], value_set=pa.array(sorted(ids), pa.string())))
    return iter(chosen.to_pylist())


def look_up(fates: Fates, executor: Executor, progress: Progress) -> dict[tuple[str, int, str], list[Fate]]:
    """All rows with the wanted ids, in order, by (source, part, image_id). Raises LvdError where a part is damaged."""
    found: dict[tuple[str, int, str], list[Fate]] = {}
    progress.begin("look up", len(fates), 0)
    try:
        for _, outcome in executor.map(fates, range(len(fates)), Needs(resident=True)):
            for fate in result(outcome, "looking up images"):
                found.setdefault((fate.source, fate.part, fate.image_id), []).append(fate)
            progress.advance(len(outcome))
    finally:
        progress.end()
    return found

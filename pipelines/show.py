"""One image's way through every stage of a run."""

from typing import Any

from curation.errors import ConfigError
from curation.hashing import ID_HEX, bucket_of, id_words
from curation.shards import ShardSet
from pipelines.catalog import complete_sets


def show(run: str, name: str) -> list[tuple[str, dict[str, Any]]]:
    """What each set says of an image, as (set, values), in the order of the stages. Raises ConfigError if none does.

    The index leads to the one part of each source that the image lies in; nothing else is read but `retrieved`
    and, for its place, the final shards' column of ids.
    """
    name = name.lower()
    if len(name) != ID_HEX or not set(name) <= set("0123456789abcdef"):
        raise ConfigError(f"{name!r} is no image_id: {ID_HEX} hexadecimal digits are")
    sets = complete_sets(run)
    found: list[tuple[str, dict[str, Any]]] = []
    for label, index in sets.items():
        if label.split("/")[0] == "index":
            for place in _places(index, name):
                found += _in_part(sets, label.split("/")[1], place, name)
    if not found:
        raise ConfigError(f"image {name} is in no index of {run}")
    for label, shard_set in sets.items():
        if label.split("/")[0] in ("retrieved", "shards"):
            found += [(label, row) for row in _scan(shard_set, name)]
    return found


def _places(index: ShardSet, name: str) -> list[dict[str, Any]]:
    bucket = int(bucket_of(id_words([name])[:, 0], index.num_parts)[0])
    return [row for table in index.lookup("image_id", name, [bucket]) for row in table.to_pylist()]


def _in_part(
    sets: dict[str, ShardSet], source: str, place: dict[str, Any], name: str
) -> list[tuple[str, dict[str, Any]]]:
    """What the sets of the image's source say in the part where it lies; of several rows with its bytes, each."""
    part, row = place["part"], place["row"]
    found: list[tuple[str, dict[str, Any]]] = []
    per_source = [f"{kind}/{source}" for kind in ("images", "filtered", "duplicates", "clusters")]
    for label in [label for label in per_source if label in sets]:
        columns = [c for c in sets[label].read_rows(part, 0, 0).schema.names if c != "image"]
        table = sets[label].read(part, columns)
        for values in table.to_pylist():
            mine = values["image_id"] == name and values.get("row", row) == row
            if mine and (place["reason"] is None or "row" in values):
                found.append((label, {"part": part, **values}))
    if place["reason"] is None and "selection" in sets:
        found += [("selection", row) for row in _selected(sets, source, part, name)]
    return found


def _selected(sets: dict[str, ShardSet], source: str, part: int, name: str) -> list[dict[str, Any]]:
    slot = part
    for known in sets["selection"].manifest["inputs"]:
        if known["name"] == f"filtered/{source}":
            return [row for row in sets["selection"].read(slot).to_pylist() if row["image_id"] == name]
        if known["name"].startswith("filtered/"):
            slot += sets[known["name"]].num_parts
    return []


def _scan(shard_set: ShardSet, name: str) -> list[dict[str, Any]]:
    found = []
    for part in range(shard_set.num_parts):
        ids = shard_set.read(part, ["image_id"])["image_id"].to_pylist()
        for row in [i for i, other in enumerate(ids) if other == name]:
            if shard_set.manifest["kind"] == "retrieved":
                found.append({"part": part, **shard_set.read_rows(part, row, row + 1).to_pylist()[0]})
            else:
                found.append({"part": part, "row_in_part": row})
    return found

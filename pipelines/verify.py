"""Proof that a run is what it says: checksums, fingerprints, contents, and the equations between its sets.

For every set: the manifest is as written, its figures follow from the commits, every file is the one committed, and
what it was made from is what lies there now. Between sets: rows in = rows out + rejects, named by id and in order;
every image that is referred to is there; near-copies' components are those of a forest, and one image stands for each;
the final shards hold each selected image as often as it was selected. What concerns single parts is in `verify_parts`.
A worker holds one part of each of the sets it compares; the driver one number a part.
"""

from collections import Counter
from collections.abc import Iterator

from curation import storage
from curation.errors import ConfigError
from curation.manifest import Origin, checksum, part_name, totals
from curation.shards import MANIFEST, ShardSet, part_number
from pipelines.catalog import find_sets
from pipelines.chains import pool_sources
from pipelines.executor import Executor, Needs
from pipelines.progress import Progress
from pipelines.verify_parts import PartCheck, PartReport


def check_manifest(shard_set: ShardSet) -> Iterator[str]:
    """Problems of a set's manifest: edited, not following from its commits, or made from what has changed since."""
    manifest = shard_set.manifest
    if manifest["checksum"] != checksum(manifest):
        yield f"{MANIFEST} was edited after it was written"
        return
    if Origin.from_record(manifest).fingerprint != manifest["fingerprint"]:
        yield f"{MANIFEST}: the fingerprint does not follow from its settings and inputs"
    extra = sorted(number for number in _present(shard_set) if number >= shard_set.num_parts)
    if extra:
        yield f"{part_name(extra[0])} is there, but the set has {shard_set.num_parts} parts"
    missing = [part for part in range(shard_set.num_parts) if part not in shard_set.committed()]
    if missing:
        return
    stray = [part for part in range(shard_set.num_parts) if _fingerprint(shard_set, part) != manifest["fingerprint"]]
    if stray:
        yield f"{part_name(stray[0])} was made from something else than the set"
    for key, value in totals(shard_set.uri, shard_set.num_parts, shard_set.commit).items():
        if manifest[key] != value:
            yield f"{MANIFEST}: {key} does not follow from the commits"


def _fingerprint(shard_set: ShardSet, part: int) -> str | None:
    commit = shard_set.commit(part)
    return commit.fingerprint if commit else None


def _present(shard_set: ShardSet) -> set[int]:
    numbers = (part_number(name) for name in storage.names(shard_set.uri))
    return {number for number in numbers if number is not None}


def check_inputs(shard_set: ShardSet) -> Iterator[str]:
    """Whether the sets a set was made from lie where they did, with the same content."""
    for known in shard_set.manifest["inputs"]:
        if not known["uri"]:
            continue
        upstream = ShardSet(storage.resolve(known["uri"], shard_set.uri))
        if not upstream.is_complete:
            yield f"{known['name']}, from which it was made, is not there or not complete"
        elif upstream.content != known["content"]:
            yield f"is stale: {known['name']} has changed since it was made from it"


def verify(run: str, executor: Executor, progress: Progress) -> Iterator[tuple[str, str]]:
    """All that is wrong with a run, as (set, problem); nothing where all equations hold."""
    sets = find_sets(run)
    places = {name: shard_set.uri for name, shard_set in sets.items() if shard_set.is_complete}
    ids: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    summed: set[str] = set()
    for name, shard_set in sets.items():
        if name not in places:
            yield name, "is not complete: run again to resume"
            continue
        try:
            problems = [*check_manifest(shard_set), *check_inputs(shard_set)]
            rows = shard_set.rows_per_part
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            yield name, f"{MANIFEST} cannot be read: {error}"
            continue
        for problem in problems:
            yield name, problem
        progress.begin(f"verify {name}", len(rows), 0)
        summed.add(name)
        try:
            for part, outcome in executor.map(PartCheck(name, places), range(len(rows)), Needs()):
                progress.advance(int(rows[part]))
                if isinstance(outcome, Exception):
                    outcome = PartReport([f"{part_name(part)} could not be checked: {outcome}"])
                for problem in outcome.problems:
                    summed.discard(name)
                    yield name, problem
                ids[name] = (ids[name] + outcome.ids) % (1 << 128)
                copies[name] += outcome.copies
        finally:
            progress.end()
    yield from _check_sums(summed, ids, copies)
    yield from _check_representatives({name: sets[name] for name in summed}, ids)


def _check_representatives(summed: dict[str, ShardSet], ids: Counter[str]) -> Iterator[tuple[str, str]]:
    """Whether the images that near-duplicates name are those that stand for their components, in whatever pool."""
    made = [s.manifest for name, s in summed.items() if name.split("/")[0] == "duplicates"]
    for sources in sorted({tuple(pool_sources(manifest)) for manifest in made}):
        names = [f"duplicates/{source}" for source in sources]
        if set(names) <= set(summed) and sum(ids[name] for name in names) % (1 << 128):
            yield names[0], "near-duplicates name images that do not stand for their components: the sums of ids differ"


def _check_sums(summed: set[str], ids: Counter[str], copies: Counter[str]) -> Iterator[tuple[str, str]]:
    """Equations between whole sets, of those whose parts are all well: elsewhere sums say nothing."""
    for name in sorted(summed):
        kind, _, source = name.partition("/")
        if kind == "index" and f"images/{source}" in summed and ids[name] != ids[f"images/{source}"]:
            yield name, f"does not list the images of images/{source}: the sums of ids differ"
    if {"shards", "selection"} <= summed:
        if copies["shards"] != copies["selection"]:
            yield "shards", f"hold {copies['shards']} images, but {copies['selection']} copies are selected"
        elif ids["shards"] != ids["selection"]:
            yield "shards", "do not hold the images that are selected: the sums of ids differ"

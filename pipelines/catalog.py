"""The sets of a run, and a DuckDB database in which each of them is a view."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from curation import schemas, storage
from curation.errors import ConfigError
from curation.shards import ShardSet

DEPTHS = {
    "urls": 1,
    "images": 1,
    "filtered": 1,
    "index": 1,
    "embeddings": 2,
    "duplicates": 1,
    "forest": 0,
    "recall": 0,
    "centroids": 0,
    "clusters": 1,
    "retrieved": 1,
    "retrieval_recall": 1,
    "selection": 0,
    "shards": 0,
}
"""Kinds of sets, in the order of the stages, and how many names follow the kind: directories of a run and below it."""
BESIDE = {"retrieval_recall": ("retrieved", "_recall_")}
"""Kinds that lie in another one's directory, under names that begin so: `retrieved/_recall_birds`."""


def place_of(run: str, name: str) -> str:
    """Where the set of that name lies in a run."""
    kind, *below = name.split("/")
    if kind not in BESIDE:
        return storage.join(run, name)
    folder, prefix = BESIDE[kind]
    return storage.join(run, folder, prefix + below[0])


def _names(run: str, kind: str) -> list[str]:
    """Names of what may be sets of a kind."""
    if kind in BESIDE:
        folder, prefix = BESIDE[kind]
        below = (name for name in storage.names(storage.join(run, folder)) if name.startswith(prefix))
        return [f"{kind}/{name.removeprefix(prefix)}" for name in below]
    names = [kind]
    for _ in range(DEPTHS[kind]):
        names = [f"{n}/{below}" for n in names for below in storage.names(storage.join(run, n)) if below[0] not in "._"]
    return names


def find_sets(run: str) -> dict[str, ShardSet]:
    """The sets of a run, complete or begun, by name (`images/web`). Raises ConfigError where there is none."""
    found: dict[str, ShardSet] = {}
    for kind in DEPTHS:
        for name in _names(run, kind):
            shard_set = ShardSet(place_of(run, name))
            if _is_set(shard_set, kind):
                found[name] = shard_set
    if not found:
        raise ConfigError(f"{run} holds no run" if storage.exists(run) else f"{run} does not exist")
    return found


def _is_set(shard_set: ShardSet, kind: str) -> bool:
    """Whether there is a set, complete or begun, and where it lies among working sets, one of that kind."""
    if kind in BESIDE:
        return (shard_set.begun() or {}).get("kind") == kind
    return shard_set.is_complete or shard_set.begun() is not None


def complete_sets(run: str) -> dict[str, ShardSet]:
    """Those of `find_sets` that are complete."""
    return {name: shard_set for name, shard_set in find_sets(run).items() if shard_set.is_complete}


def open_catalog(run: str) -> Any:
    """A DuckDB connection to an in-memory database with views over the complete sets of a run.

    `images_web` is the set images/web; `images` all sets of that kind, with a column that tells them apart (`source`,
    for embeddings also `embedder`, for what is retrieved and its recall `query_set`); `rejects` all rejects; `sets`
    one row a set.
    """
    import duckdb

    run = storage.absolute(run)
    connection = duckdb.connect()
    connection.execute("SET enable_progress_bar = false")
    if not storage.is_local(run):
        connection.register_filesystem(storage.filesystem(run)[0])
    sets = complete_sets(run)
    views = _view_names(sets)
    with one_line_errors():
        for name, shard_set in sets.items():
            _create(connection, views[name], shard_set)
        for kind, depth in DEPTHS.items():
            own = {name: view for name, view in views.items() if name.split("/")[0] == kind}
            if depth and own:
                _unite(connection, kind, own)
        _unite_rejects(connection, sets)
    _list_sets(connection, sets, views)
    return connection


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what DuckDB says of a wrong statement or a damaged file into its first line, as a ConfigError."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        raise ConfigError(str(error).splitlines()[0]) from None


def _view_names(sets: dict[str, ShardSet]) -> dict[str, str]:
    """The view of each set: `images_web` of images/web; of names that become one, the later are numbered."""
    views: dict[str, str] = {}
    for name in sets:
        plain = view = re.sub("[/-]", "_", name)
        number = 1
        while view in views.values():
            number += 1
            view = f"{plain}_{number}"
        views[name] = view
    return views


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _files(shard_set: ShardSet, folder: str = "") -> str:
    """The parts of a set as a literal pattern, in which nothing of the set's own place is a wildcard."""
    place = re.sub(r"([*?\[])", r"[\1]", storage.join(shard_set.uri, folder).rstrip("/"))
    return _literal(f"{place}/part-*.parquet")


def _create(connection: Any, view: str, shard_set: ShardSet) -> None:
    if shard_set.num_parts:
        connection.execute(f'CREATE VIEW "{view}" AS SELECT * FROM read_parquet({_files(shard_set)})')
        return
    connection.register(view, _columns(shard_set.manifest["kind"]).empty_table())


def _columns(kind: str) -> Any:
    """The schema of sets of a kind."""
    from pipelines.join import EDGES
    from pipelines.recall import RECALL
    from pipelines.retrieve_recall import RETRIEVAL_RECALL

    own = {"forest": EDGES, "recall": RECALL, "retrieval_recall": RETRIEVAL_RECALL}
    return own[kind] if kind in own else getattr(schemas, kind.upper())


def _unite(connection: Any, kind: str, views: dict[str, str]) -> None:
    """One view over all sets of a kind, with what tells them apart."""
    named = {"embeddings": ["embedder", "source"], "retrieved": ["query_set"], "retrieval_recall": ["query_set"]}
    keys, selects = named.get(kind, ["source"]), []
    for name, view in views.items():
        values = ", ".join(f"{_literal(v)} AS {k}" for k, v in zip(keys, name.split("/")[1:], strict=True))
        selects.append(f'SELECT {values}, * FROM "{view}"')
    connection.execute(f"CREATE VIEW {kind} AS {' UNION ALL BY NAME '.join(selects)}")


def _unite_rejects(connection: Any, sets: dict[str, ShardSet]) -> None:
    selects = []
    for name, shard_set in sets.items():
        if shard_set.manifest["rejects"]:
            selects.append(f"SELECT {_literal(name)} AS of, * FROM read_parquet({_files(shard_set, 'rejects')})")
    if not selects:
        connection.register("no_rejects", schemas.REJECTS.empty_table())
        selects = ["SELECT '' AS of, * FROM no_rejects"]
    connection.execute(f"CREATE VIEW rejects AS {' UNION ALL BY NAME '.join(selects)}")


def _list_sets(connection: Any, sets: dict[str, ShardSet], views: dict[str, str]) -> None:
    import pyarrow as pa

    rows = []
    for name, shard_set in sets.items():
        manifest = shard_set.manifest
        row = {"name": name, "view": views[name], "kind": manifest["kind"], "parts": shard_set.num_parts}
        row |= {key: manifest["labels"].get(key) for key in ("source", "role", "embedder")}
        keys = ("rows", "rejects", "retryable", "bytes", "seconds", "stage", "fingerprint", "content")
        rows.append(row | {key: manifest[key] for key in keys})
    connection.register("sets_table", pa.Table.from_pylist(rows))
    connection.execute("CREATE VIEW sets AS SELECT * FROM sets_table")


def query(run: str, sql: str) -> Any:
    """The result of a query over a run as an Arrow table. Raises ConfigError with DuckDB's first line."""
    connection = open_catalog(run)
    with one_line_errors():
        relation = connection.sql(sql)
        if relation is None:
            raise ConfigError("the statement returns no rows; give a SELECT")
        return relation.to_arrow_table()

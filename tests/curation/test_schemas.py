"""Columns of shard sets, and that every one of them can be written and read back as it is."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import schemas
from curation.schemas import storage_options

ALL = {
    "urls": schemas.URLS,
    "images": schemas.IMAGES,
    "filtered": schemas.FILTERED,
    "index": schemas.INDEX,
    "embeddings": schemas.embeddings(3),
    "duplicates": schemas.DUPLICATES,
    "clusters": schemas.CLUSTERS,
    "centroids": schemas.centroids(3),
    "retrieved": schemas.RETRIEVED,
    "selection": schemas.SELECTION,
    "shards": schemas.SHARDS,
    "rejects": schemas.REJECTS,
}


def sample(kind: pa.DataType) -> Any:
    if pa.types.is_fixed_size_list(kind):
        return [0.5] * kind.list_size
    if pa.types.is_list(kind):
        return [sample(kind.value_type), sample(kind.value_type)]
    if pa.types.is_struct(kind):
        return {child.name: sample(child.type) for child in kind}
    return {"string": "text", "binary": b"\0\xff", "bool": True}.get(str(kind), 1)


@pytest.mark.parametrize("name", ALL)
def test_every_schema_is_written_and_read_back(tmp_path: Path, name: str) -> None:
    schema = ALL[name]
    full = {field.name: sample(field.type) for field in schema}
    sparse = {field.name: None if field.nullable else sample(field.type) for field in schema}
    written = pa.Table.from_pylist([full, sparse, full], schema)
    path = tmp_path / "x.parquet"
    pq.write_table(written, path, **storage_options(schema))
    assert pq.read_table(path).equals(written)
    assert pq.read_schema(path).remove_metadata() == schema


@pytest.mark.parametrize("name", ALL)
def test_every_leaf_is_told_how_it_is_stored(tmp_path: Path, name: str) -> None:
    """Names of nested columns must be those of the file, else the writer passes them over in silence."""
    schema = ALL[name]
    options = storage_options(schema)
    path = tmp_path / "x.parquet"
    row = {field.name: sample(field.type) for field in schema}
    pq.write_table(pa.Table.from_pylist([row], schema), path, **options)
    metadata = pq.ParquetFile(path).metadata
    assert {metadata.schema.column(i).path for i in range(metadata.num_columns)} == set(options["compression"])
    for i in range(metadata.num_columns):
        column = metadata.row_group(0).column(i)
        plain = column.path_in_schema.split(".")[0] in ("image", "embedding", "centroid")
        assert column.compression == ("UNCOMPRESSED" if plain else "ZSTD")
        assert column.is_stats_set != plain


def test_ids_are_never_null() -> None:
    for schema in [s for name, s in ALL.items() if name not in ("urls", "centroids", "rejects")]:
        assert not schema.field("image_id").nullable

"""The columns of every shard set, and how each column is stored."""

from typing import Any

import pyarrow as pa

ID = pa.field("image_id", pa.string(), nullable=False)
ROW = pa.field("row", pa.int64(), nullable=False)


def _strings(*names: str) -> list[pa.Field]:
    return [pa.field(name, pa.string()) for name in names]


URLS = pa.schema([ROW, *_strings("url", "alt", "page_url", "label")])

IMAGES = pa.schema(
    [
        ID,
        ROW,
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        *_strings("format", "url", "final_url", "alt", "page_url", "label"),
    ]
)

FILTERED = pa.schema([ROW, ID, pa.field("kept", pa.bool_(), nullable=False), pa.field("reason", pa.string())])

INDEX = pa.schema(
    [
        ID,
        ROW,
        pa.field("part", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)
"""Where each fetched row lies in its images set, sorted by (image_id, row); reason is the filter's verdict."""


def embeddings(dim: int) -> pa.Schema:
    """The schema of embeddings of `dim` numbers."""
    return pa.schema([ID, pa.field("embedding", pa.list_(pa.field("item", pa.float16(), nullable=False), dim))])


DUPLICATES = pa.schema(
    [
        ID,
        pa.field("component", pa.int64(), nullable=False),
        pa.field("component_size", pa.int64(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        *_strings("reason", "representative_id"),
        pa.field("similarity", pa.float32()),
        *_strings("reference", "reference_source"),
        pa.field("reference_similarity", pa.float32()),
    ]
)


def clusters(levels: int) -> pa.Schema:
    """The schema of the clusters that images lie in, of so many levels; level 1 is the finest."""
    columns = [pa.field(f"cluster_{level}", pa.int32(), nullable=False) for level in range(1, levels + 1)]
    return pa.schema([ID, *columns, pa.field("distance", pa.float32(), nullable=False)])


CLUSTERS = clusters(1)


def centroids(dim: int) -> pa.Schema:
    """The schema of centroids of `dim` numbers, finest level first, in the order of their numbers."""
    item = pa.field("item", pa.float32(), nullable=False)
    return pa.schema(
        [
            pa.field("level", pa.int32(), nullable=False),
            pa.field("cluster", pa.int32(), nullable=False),
            pa.field("centroid", pa.list_(item, dim)),
            pa.field("parent", pa.int32()),
        ]
    )


RETRIEVED = pa.schema(
    [
        *_strings("query_image_id"),
        ID,
        pa.field("source", pa.string(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("mode", pa.string(), nullable=False),
        pa.field("rank", pa.int32()),
        pa.field("similarity", pa.float32()),
        pa.field("cluster", pa.int32()),
    ]
)

REASON = pa.struct(
    [
        pa.field("part", pa.string()),
        pa.field("query_set", pa.string()),
        pa.field("mode", pa.string()),
        pa.field("rank", pa.int32()),
        pa.field("similarity", pa.float32()),
    ]
)
"""Why an image was selected: the part of the recipe, and for retrieved images the query set, mode, rank and cosine."""

SELECTION = pa.schema(
    [
        ID,
        pa.field("source", pa.string(), nullable=False),
        pa.field("copies", pa.int32(), nullable=False),
        pa.field("reasons", pa.list_(REASON), nullable=False),
    ]
)

SHARDS = pa.schema(
    [
        ID,
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        *_strings("format", "url", "final_url", "alt", "page_url", "label"),
        pa.field("source", pa.string(), nullable=False),
        pa.field("reasons", pa.list_(REASON), nullable=False),
        pa.field("clusters", pa.list_(pa.int32())),
        pa.field("component_size", pa.int64()),
    ]
)


REJECTS = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("image_id", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
        pa.field("retryable", pa.bool_(), nullable=False),
        pa.field("url", pa.string()),
    ]
)
"""Rows that could not be processed. Of `row` and `image_id` the one that names rows of the set's input is filled."""


def storage_options(schema: pa.Schema) -> dict[str, Any]:
    """How pyarrow is to write `schema`: images and vectors plain, as they do not compress."""
    plain = {"image", "embedding", "centroid", "vector", "piece", "sum"}
    unique = {"image_id", "query_image_id", "representative_id", "url", "final_url"}
    compression = {path: "none" if path.split(".")[0] in plain else "zstd" for path in _leaves(schema)}
    strings = [f.name for f in schema if pa.types.is_string(f.type) and f.name not in unique]
    return {
        "compression": compression,
        "use_dictionary": strings or False,
        "write_statistics": _statistics(schema, plain),
    }


def _statistics(schema: pa.Schema, plain: set[str]) -> list[str]:
    return [path for path in _leaves(schema) if path.split(".")[0] not in plain]


def _leaves(schema: pa.Schema) -> list[str]:
    """Parquet's paths of all leaf columns, such as `reasons.list.element.mode`."""
    found: list[str] = []
    for field in schema:
        found.extend(_leaves_of(field.name, field.type))
    return found


def _leaves_of(path: str, kind: pa.DataType) -> list[str]:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return _leaves_of(f"{path}.list.element", kind.value_type)
    if pa.types.is_struct(kind):
        return [leaf for child in kind for leaf in _leaves_of(f"{path}.{child.name}", child.type)]
    return [path]

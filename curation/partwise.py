"""Joins between equal-numbered parts of sets that hold subsets of one images set in its order."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.errors import ConfigError
from curation.hashing import ID_HEX, id_words


def positions_in(ids: list[str], whole: list[str], where: str) -> npt.NDArray[np.int64]:
    """Where each of `ids` stands in `whole`, int64 [len(ids)].

    An image fetched twice within one part is known by its first row. Raises ConfigError, naming `where`, when `ids`
    is no subset of `whole` in its order: one of the two is not what the other was made with.
    """
    if ids == whole and len(set(ids)) == len(ids):
        return np.arange(len(ids))
    places: dict[str, int] = {}
    for position, name in enumerate(whole):
        places.setdefault(name, position)
    try:
        found = np.fromiter((places[name] for name in ids), dtype=np.int64, count=len(ids))
    except KeyError as error:
        raise ConfigError(f"{where}: image {error.args[0]} is not in the set it was made from") from None
    if np.any(found[1:] <= found[:-1]):
        raise ConfigError(f"{where}: rows are not in the order of the set it was made from")
    return found


def kept_ids(table: pa.Table) -> list[str]:
    """The image ids of the rows with kept = true."""
    return [name for name, kept in zip(table["image_id"].to_pylist(), table["kept"].to_pylist(), strict=True) if kept]


def matrix(table: pa.Table, column: str = "embedding") -> npt.NDArray[Any]:
    """A fixed-size list column as a matrix [rows, dim], in the column's own dtype."""
    values = table[column].combine_chunks()
    flat: npt.NDArray[Any] = values.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(values), values.type.list_size)


def words_of(ids: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """A column of image ids as `hashing.id_words` gives them, uint64 [n, 2], without a Python string for each."""
    pieces = [np.zeros((0, 2), np.uint64)]
    for chunk in ids.chunks:
        offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        text = chunk.buffers()[2]
        if len(chunk) and (chunk.null_count or (np.diff(offsets) != ID_HEX).any()):
            raise ValueError(f"an image_id has not {ID_HEX} characters")
        if len(chunk):
            pieces.append(id_words([str(memoryview(text)[offsets[0] : offsets[-1]], "ascii")]))
    return np.concatenate(pieces)


def ids_of(words: npt.NDArray[np.uint64]) -> pa.StringArray:
    """The inverse of `words_of`: image ids of uint64 [n, 2]."""
    text = np.ascontiguousarray(words, dtype=">u8").tobytes().hex().encode()
    offsets = np.arange(0, ID_HEX * len(words) + 1, ID_HEX, dtype=np.int32)
    return pa.StringArray.from_buffers(len(words), pa.py_buffer(offsets), pa.py_buffer(text))


def fixed_size_lists(values: npt.NDArray[np.generic], kind: pa.DataType) -> pa.FixedSizeListArray:
    """The inverse of `matrix`: [rows, dim] as a column of type `kind`."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)


def packed(vectors: npt.NDArray[np.float16]) -> pa.FixedSizeBinaryArray:
    """Stored vectors float16 [rows, dim] as a column of 2 dim bytes a row, which needs no copy."""
    plain = pa.py_buffer(np.ascontiguousarray(vectors))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(vectors.shape[1] * 2), len(vectors), [None, plain])


def unpacked(table: pa.Table, column: str = "vector") -> npt.NDArray[np.float16]:
    """The inverse of `packed`: float16 [rows, dim]."""
    values = table[column].combine_chunks()
    dim = values.type.byte_width // 2
    flat = np.frombuffer(values.buffers()[1], np.float16)[values.offset * dim :][: len(values) * dim]
    return flat.reshape(len(values), dim)

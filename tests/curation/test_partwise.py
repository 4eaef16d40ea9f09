"""Joins between equal-numbered parts, against looking every id up."""

import numpy as np
import pyarrow as pa
import pytest

from curation.errors import ConfigError
from curation.hashing import id_words
from curation.partwise import fixed_size_lists, ids_of, kept_ids, matrix, packed, positions_in, unpacked, words_of
from tests.builders import random_ids


@pytest.mark.parametrize("seed", range(6))
def test_positions_of_a_subset(seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = random_ids(rng, 40)
    whole += [whole[i] for i in rng.integers(0, 40, 5)]  # fetched twice: known by the first row
    chosen = np.flatnonzero(rng.random(40) < 0.5)
    found = positions_in([whole[i] for i in chosen], whole, "here")
    assert found.dtype == np.int64
    assert found.tolist() == chosen.tolist()


def test_positions_of_nothing() -> None:
    assert positions_in([], ["a"], "here").tolist() == []
    assert positions_in([], [], "here").tolist() == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "x"], "here: image x is not in the set"),
        (["b", "a"], "here: rows are not in the order"),
        (["a", "a"], "here: rows are not in the order"),
    ],
)
def test_what_is_no_subset_in_order_is_refused(ids: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        positions_in(ids, ["a", "b", "c"], "here")


def test_kept_ids() -> None:
    assert kept_ids(pa.table({"image_id": ["a", "b", "c"], "kept": [True, False, True]})) == ["a", "c"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_matrices_become_columns_and_come_back(dtype: type, count: int) -> None:
    values = np.random.default_rng(0).standard_normal((count, 3)).astype(dtype)
    kind = pa.list_(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False), 3)
    table = pa.table({"embedding": fixed_size_lists(values, kind)})
    found = matrix(table)
    assert found.dtype == dtype
    assert found.shape == (count, 3)
    assert np.array_equal(found, values)


def test_matrix_of_slices_and_chunks() -> None:
    values = np.arange(30, dtype=np.float16).reshape(10, 3)
    kind = pa.list_(pa.field("item", pa.float16(), nullable=False), 3)
    table = pa.table({"embedding": fixed_size_lists(values, kind)})
    pieces = pa.concat_tables([table.slice(2, 3), table.slice(0, 0), table.slice(7)])
    assert np.array_equal(matrix(pieces), values[[2, 3, 4, 7, 8, 9]])
    assert np.array_equal(matrix(table.slice(4, 2)), values[4:6])


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_vectors_are_packed_and_come_back(dim: int) -> None:
    values = np.random.default_rng(dim).standard_normal((10, dim)).astype(np.float16)
    table = pa.table({"vector": packed(values[::-1])})  # not contiguous
    assert table["vector"].to_pylist() == [row.tobytes() for row in values[::-1]]
    for some, rows in ((table, slice(None)), (table.slice(4, 2), slice(4, 6)), (table.slice(3, 0), slice(3, 3))):
        found = unpacked(some)
        assert (found.dtype, found.shape) == (np.float16, (some.num_rows, dim))
        np.testing.assert_array_equal(found, values[::-1][rows])
    pieces = pa.concat_tables([table.slice(7), table.slice(0, 0), table.slice(2, 3)])
    np.testing.assert_array_equal(unpacked(pieces), values[::-1][[7, 8, 9, 2, 3, 4]])


@pytest.mark.parametrize("seed", range(3))
def test_ids_become_numbers_and_come_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = random_ids(rng, 30)
    column = pa.chunked_array([pa.array(ids[:11]), pa.array([], pa.string()), pa.array(ids).slice(11, 16)])
    found = words_of(column)
    assert (found.dtype, found.shape) == (np.uint64, (27, 2))
    assert found.tolist() == id_words(ids[:27]).tolist()
    assert ids_of(found).to_pylist() == ids[:27]
    assert ids_of(found[:0]).to_pylist() == [] and words_of(column.slice(0, 0)).shape == (0, 2)


@pytest.mark.parametrize("odd", ["ab" * 15, "ab" * 17, "", None])
def test_ids_of_another_length_are_refused(odd: str | None) -> None:
    with pytest.raises(ValueError, match="has not 32 characters"):
        words_of(pa.chunked_array([pa.array(["ab" * 16, odd])]))

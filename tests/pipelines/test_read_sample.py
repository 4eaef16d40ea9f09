"""Reading a sample in pieces: any share of its rows, the same as of the whole."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation import schemas
from curation.partwise import fixed_size_lists
from pipelines import join
from pipelines.join import read_sample
from tests.builders import write_set

DIM = 4


@pytest.mark.parametrize("count", [0, 1, 7, 64])
@pytest.mark.parametrize(("first", "every"), [(0, 1), (0, 3), (2, 3), (4, 5), (9, 10)])
def test_a_share_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, first: int, every: int
) -> None:
    monkeypatch.setattr(join, "SAMPLE_PIECE", 7)
    rng = np.random.default_rng(count)
    numbers, values = rng.permutation(1000)[:count], rng.standard_normal((count, DIM)).astype(np.float16)
    schema = pa.schema([("number", pa.int64()), schemas.embeddings(DIM).field("embedding")])
    table = pa.table([pa.array(numbers, pa.int64()), fixed_size_lists(values, schema.field(1).type)], schema=schema)
    uri = write_set(tmp_path / "sample", "sample", [table]).uri
    found, vectors = read_sample(uri, first, every)
    np.testing.assert_array_equal(found, numbers[first::every])
    np.testing.assert_array_equal(vectors, values[first::every])
    assert vectors.shape == (len(found), DIM) and vectors.dtype == np.float16

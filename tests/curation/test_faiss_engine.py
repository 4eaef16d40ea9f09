from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from curation.errors import ConfigError, LvdError
from curation.faiss_engine import Proposals, add, build_index, deserialize, pairs_from_index, rerank, serialize, to_gpu
from curation.faiss_setup import require_faiss
from curation.scoring import search_margin
from tests.vectors import all_cosines

Edges = dict[tuple[int, int], float]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other over tiny blocks are slow on a busy machine."""
    before = require_faiss().omp_get_max_threads()
    require_faiss(threads=1)
    yield
    require_faiss(threads=before)


def vectors(rng: np.random.Generator, num_rows: int, dim: int, noise: float = 0.9) -> np.ndarray:
    """Groups of about four at all distances up to `noise` from their center, with exact copies and zeros."""
    centers = rng.standard_normal((max(num_rows // 4, 1), dim))
    away = rng.standard_normal((num_rows, dim)) * rng.uniform(0, noise, (num_rows, 1))
    x = (centers[rng.integers(0, len(centers), num_rows)] + away).astype(np.float16)
    copied = rng.random(num_rows) < 0.1
    x[copied] = x[rng.permutation(num_rows)][copied]
    x[rng.random(num_rows) < 0.03] = 0
    return x


def true_edges(queries: np.ndarray, x: np.ndarray, threshold: float) -> Edges:
    cosine = all_cosines(queries, x)
    pairs = np.argwhere(cosine > np.float32(threshold)).tolist()
    return {(i, j): float(cosine[i, j]) for i, j in pairs}


def filled(x: np.ndarray, factory: str, *, nprobe: int | None = None, cuts: tuple[int, ...] = ()) -> Any:
    index = build_index(x, factory, threads=1, nprobe=nprobe)
    for block in np.split(x, cuts):
        add(index, block)
    assert index.ntotal == len(x)
    return index


def reranked(queries: np.ndarray, x: np.ndarray, proposals: Proposals, threshold: float) -> Edges:
    """What re-ranking leaves, by blocks of `x` as a caller goes who reads them from disk."""
    kept: Edges = {}
    for start in range(0, len(x), 37):
        block = x[start : start + 37]
        i, j = proposals.within(start, start + len(block))
        i, j, similarity = rerank(queries, i, block, j, threshold)
        assert (i.dtype, j.dtype, similarity.dtype) == (np.int64, np.int64, np.float32)
        found = {(a, b + start): s for a, b, s in zip(i.tolist(), j.tolist(), similarity.tolist(), strict=True)}
        assert len(found) == len(i) and not found.keys() & kept.keys()
        kept |= found
    return kept


def columns(proposals: Proposals) -> tuple[list[int], list[int], int]:
    return proposals.i.tolist(), proposals.j.tolist(), proposals.num_full


@pytest.mark.parametrize("dim", [3, 16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_a_flat_index_with_large_k_finds_every_pair(seed: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    x, queries = vectors(rng, 150, dim), vectors(rng, 40, dim)
    queries[:20] = x[:20]
    index = filled(x, "Flat", cuts=(13, 13, 90))
    for threshold in (-2.0, -0.1, 0.0, 0.45, 0.6, 0.99, 1.0):
        expected = true_edges(queries, x, threshold)
        for k in (150, 1000):
            proposals = pairs_from_index(index, queries, threshold, k, slack=search_margin(dim))
            assert reranked(queries, x, proposals, threshold) == expected
            assert proposals.num_full == 0
        assert bool(expected) == (threshold < 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_proposals_are_sorted_and_cut_at_the_lowered_threshold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = vectors(rng, 120, 8)
    index, cosine = filled(x, "Flat"), all_cosines(x, x)
    proposals = pairs_from_index(index, x, 0.6, 120, slack=0.25)
    assert sorted(zip(proposals.j, proposals.i, strict=True)) == list(zip(proposals.j, proposals.i, strict=True))
    proposed = np.zeros(cosine.shape, dtype=bool)
    proposed[proposals.i, proposals.j] = True
    clear = np.abs(cosine - 0.35) > 1e-5
    np.testing.assert_array_equal(proposed[clear], (cosine > 0.35)[clear])


@pytest.mark.parametrize("k", [1, 2, 5, 20])
@pytest.mark.parametrize("seed", range(2))
def test_full_lists_are_counted(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    x = vectors(rng, 100, 6)
    x[:30] = x[30]  # more copies than k
    index, cosine = filled(x, "Flat"), all_cosines(x, x)
    for threshold, slack in ((0.6, 0.0), (0.7, 0.1), (-np.inf, 0.0)):
        near = (cosine > threshold - slack).sum(axis=1)
        proposals = pairs_from_index(index, x, threshold, k, slack=slack)
        assert proposals.num_full == (near >= k).sum() > 0
        np.testing.assert_array_equal(np.bincount(proposals.i, minlength=len(x)), np.minimum(near, k))
    full = (cosine > 0.6).sum(axis=1) >= 20
    assert full.any() and not full.all()  # the data tell the two apart


@pytest.mark.parametrize(("num_rows", "k", "num_full"), [(4, 3, 2), (4, 4, 0), (4, 5, 0), (4, 0, 0), (0, 3, 0)])
def test_a_list_that_names_the_whole_index_was_not_too_short(num_rows: int, k: int, num_full: int) -> None:
    x = np.ones((num_rows, 4), dtype=np.float16)
    index = build_index(np.ones((2, 4), dtype=np.float16), "Flat", threads=1, nprobe=None)
    add(index, x)
    proposals = pairs_from_index(index, np.ones((2, 4), dtype=np.float16), 0.5, k, slack=0.0)
    assert (len(proposals.i), len(proposals.j), proposals.num_full) == (2 * min(k, num_rows),) * 2 + (num_full,)
    assert len(pairs_from_index(index, x[:0], 0.5, k, slack=0.0).i) == 0


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16_HNSW4,Flat", "L2norm,IVF16,Flat"])
def test_lists_that_are_all_probed_find_what_flat_finds(factory: str) -> None:
    x = vectors(np.random.default_rng(1), 300, 16)
    flat = pairs_from_index(filled(x, "Flat"), x, 0.6, 300, slack=0.01)
    every = pairs_from_index(filled(x, factory, nprobe=16, cuts=(100,)), x, 0.6, 300, slack=0.01)
    expected = true_edges(x, x, 0.6)
    assert reranked(x, x, flat, 0.6) == reranked(x, x, every, 0.6) == expected
    few = reranked(x, x, pairs_from_index(filled(x, factory), x, 0.6, 300, slack=0.01), 0.6)
    assert few.items() < expected.items()


def test_places_that_no_list_fills_are_dropped() -> None:
    x = vectors(np.random.default_rng(2), 100, 8)
    found = pairs_from_index(filled(x, "IVF10,Flat", nprobe=1), x, -np.inf, 99, slack=0.0)
    assert found.j.min() >= 0
    assert 0 < len(found.j) < 99 * len(x) and found.num_full == 0


@pytest.mark.parametrize(
    ("factory", "slack"),
    [("IVF8,PQ16x4", 0.3), ("OPQ8,IVF8,PQ8x4", 0.4), ("PQ16x4", 0.3), ("IVF8,SQ8", 0.02), ("HNSW16", 0.001)],
)
def test_codes_propose_and_exact_scores_decide(factory: str, slack: float) -> None:
    x = vectors(np.random.default_rng(3), 400, 32, noise=0.5)
    index = filled(x, factory, nprobe=8 if "IVF" in factory else None)
    expected = true_edges(x, x, 0.6)
    found = reranked(x, x, pairs_from_index(index, x, 0.6, 64, slack=slack), 0.6)
    assert found.items() <= expected.items()
    assert len(found) > 0.9 * len(expected) > 0


def test_without_slack_codes_lose_pairs() -> None:
    x = vectors(np.random.default_rng(4), 400, 32)
    index = filled(x, "IVF4,PQ8x4", nprobe=4)
    counts = [
        len(reranked(x, x, pairs_from_index(index, x, 0.6, 400, slack=slack), 0.6)) for slack in (0.0, 0.1, 0.3, 3.0)
    ]
    assert counts == sorted(set(counts))
    assert counts[-1] == len(true_edges(x, x, 0.6))


def test_a_pair_exactly_at_the_threshold_is_not_above_it() -> None:
    x = np.array([[3, 4], [1, 0], [0, 1]], dtype=np.float16)  # cosines of exactly 0.6 and 0.8
    rows = np.array([0, 0])
    assert rerank(x, rows, x, np.array([1, 2]), 0.6)[1].tolist() == [2]
    assert rerank(x, rows, x, np.array([1, 2]), 0.8)[1].tolist() == []
    proposals = pairs_from_index(filled(x, "Flat"), x, 0.6, 3, slack=search_margin(2))
    assert set(reranked(x, x, proposals, 0.6)) == {(0, 0), (1, 1), (2, 2), (0, 2), (2, 0)}


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,PQ4x4", "OPQ4,IVF8,PQ4x4", "HNSW8", "IVF8,PQ4x4,RFlat"])
def test_an_index_is_the_same_each_time_and_after_storage(factory: str) -> None:
    x = vectors(np.random.default_rng(5), 300, 16)
    nprobe = 3 if "IVF" in factory else None
    index = filled(x, factory, nprobe=nprobe, cuts=(64, 128))
    data = serialize(index)
    np.testing.assert_array_equal(data, serialize(filled(x, factory, nprobe=nprobe, cuts=(64, 128))))
    expected = columns(pairs_from_index(index, x, 0.6, 20, slack=0.1))
    assert expected[0]
    for stored in (data, data.tobytes(), memoryview(data.tobytes())):
        restored = deserialize(stored)
        assert columns(pairs_from_index(restored, x, 0.6, 20, slack=0.1)) == expected
    add(restored, x[:5])
    assert restored.ntotal == 305


@pytest.mark.parametrize("data", [b"", b"no index", bytes(1000)])
def test_what_is_no_index_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"no FAISS index .*: build it again"):
        deserialize(data)


def test_zero_vectors_train_nothing() -> None:
    x = vectors(np.random.default_rng(6), 200, 8)
    x = x[x.any(axis=1)]
    padded = np.concatenate((np.zeros((300, 8), dtype=np.float16), x))
    trained = [serialize(build_index(sample, "IVF8,Flat", threads=1, nprobe=2)) for sample in (x, padded)]
    np.testing.assert_array_equal(*trained)
    with pytest.raises(ConfigError, match="on 0 usable vectors"):
        build_index(np.zeros((300, 8), dtype=np.float16), "IVF8,Flat", threads=1, nprobe=2)


@pytest.mark.parametrize(
    ("factory", "nprobe", "message"),
    [
        ("nonsense", None, "cannot build the index 'nonsense' for vectors of 16 numbers .*could not parse"),
        ("", None, "cannot build the index ''"),
        ("IVF99999999999999999999,Flat", None, "cannot build the index 'IVF9"),
        ("IVF8,PQ5", None, "cannot build the index 'IVF8,PQ5' .*multiple of the number of subquantizers"),
        ("LSH", None, "cannot build the index 'LSH'"),
        ("IVF500,Flat", None, r"train the index 'IVF500,Flat' on 100 usable .*\(100\).*\(500\).*larger sample"),
        ("IVF8,PQ4", None, r"train the index 'IVF8,PQ4' on 100 .*\(256\)"),
        ("PCA32,Flat", None, "train the index 'PCA32,Flat' .*cannot output 32 dimensions"),
        ("IDMap,Flat", None, "'IDMap,Flat' block by block .*add_with_ids"),
        ("NSG8", None, "'NSG8' block by block"),
        ("HNSW8,PQ4x4", None, "'HNSW8,PQ4x4' for distances only"),
        ("IVF0,Flat", None, "'IVF0,Flat' has too small a number"),
        ("PQ4x0", None, "'PQ4x0' has too small a number"),
        ("HNSW0", None, "'HNSW0' has too small a number"),
        ("HNSW1", None, "'HNSW1' has too small a number"),
        ("Flat", 4, "'Flat' has no lists to probe: unset nprobe"),
        ("HNSW8", 4, "'HNSW8' has no lists to probe"),
        ("IVF8,Flat", 0, "nprobe 0 does not fit 'IVF8,Flat': set it from 1 to its 8 lists"),
        ("IVF8,Flat", 9, "nprobe 9 does not fit"),
    ],
)
def test_an_index_that_cannot_be_is_refused_in_one_line(factory: str, nprobe: int | None, message: str) -> None:
    x = np.random.default_rng(7).standard_normal((100, 16)).astype(np.float16)
    with pytest.raises(ConfigError, match=message) as error:
        build_index(x, factory, threads=1, nprobe=nprobe)
    assert not any(part in str(error.value) for part in ("\n", ".cpp", "' failed: "))
    assert any(f": {remedy}" in str(error.value) for remedy in ("take ", "raise ", "unset ", "set "))


def test_a_graph_is_built_by_one_thread() -> None:
    x = np.ones((5, 4), dtype=np.float16)
    for factory in ("HNSW8", "IVF2_HNSW8,Flat"):
        with pytest.raises(ConfigError, match="differently each time with 2 threads: set 1 thread"):
            build_index(x, factory, threads=2, nprobe=None)


def test_threads_and_nprobe_are_set() -> None:
    x = np.random.default_rng(8).standard_normal((100, 8)).astype(np.float16)
    index = build_index(x, "L2norm,IVF4,Flat", threads=2, nprobe=3)
    assert require_faiss().omp_get_max_threads() == 2
    assert require_faiss().extract_index_ivf(index).nprobe == 3
    assert index.ntotal == 0
    assert require_faiss().extract_index_ivf(build_index(x, "IVF4,Flat", threads=1, nprobe=None)).nprobe == 1


def test_vectors_that_do_not_fit_are_refused() -> None:
    x, other = np.ones((5, 4), dtype=np.float16), np.ones((5, 3), dtype=np.float16)
    index = filled(x, "Flat")
    with pytest.raises(LvdError, match="3 and 4 numbers"):
        add(index, other)
    with pytest.raises(LvdError, match="3 and 4 numbers"):
        pairs_from_index(index, other, 0.6, 2, slack=0.0)
    bad = x.copy()
    bad[3, 1] = np.nan
    for call in (lambda: add(index, bad), lambda: pairs_from_index(index, bad, 0.6, 2, slack=0.0)):
        with pytest.raises(LvdError, match="vector in row 3"):
            call()
    assert index.ntotal == 5


class Gpus:
    """FAISS as it is with GPUs, as far as the engine asks it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.moved: list[tuple[Any, bool]] = []
        faiss = require_faiss()
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: number)
        monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", self.move)
        monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda wrapped: wrapped.index, raising=False)
        options = lambda: SimpleNamespace(useFloat16=False)  # noqa: E731
        monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", options, raising=False)

    def move(self, index: Any, co: Any) -> Any:
        if "HNSW" in type(index).__name__:
            raise RuntimeError(
                "Error in virtual faiss::Index* clone(int, x) at /a/GpuCloner.cpp:9: This index type is not here."
            )
        self.moved.append((index, co.useFloat16))
        return SimpleNamespace(index=index)


def test_without_a_gpu_the_index_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, 0)
    index = filled(vectors(np.random.default_rng(9), 50, 8), "Flat")
    assert to_gpu(index) is index
    assert gpus.moved == []
    assert len(serialize(index))


def test_with_gpus_the_index_goes_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, 2)
    x = vectors(np.random.default_rng(9), 300, 8)
    for factory, half_tables in (("Flat", False), ("IVF4,SQ8", False), ("IVF4,PQ4x4", True), ("OPQ4,IVF4,PQ4x4", True)):
        index = filled(x, factory)
        there = to_gpu(index)
        assert there.index is index
        assert gpus.moved.pop() == (index, half_tables)
        np.testing.assert_array_equal(serialize(there), require_faiss().serialize_index(index))
    with pytest.raises(ConfigError, match=r"to the GPU \(This index type is not here\.\): take another index"):
        to_gpu(filled(x, "HNSW8"))

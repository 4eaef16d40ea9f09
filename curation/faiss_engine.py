"""Near-copies the paper's way: a FAISS index proposes the k nearest, exact scores decide (DINOv2, appendix A.3).

The paper takes k = 64 from "inverted file indices with product quantization codes", such as `IVF65536,PQ64`. A proposal
is a pair of rows whose approximate product comes near the threshold; `rerank` keeps those that `scoring` puts above it,
so every pair kept is a pair of `neighbors.pairs_above`, and what can be lost is recall. A caller builds, adds, searches
by blocks of queries, and re-ranks by blocks of stored vectors (`Proposals.within`).

FAISS's range search would do without a k, but its GPU indices do not have it, and the paper did not use it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.errors import ConfigError
from curation.faiss_setup import require_faiss
from curation.scoring import Vectors, check_comparable, cosine_pairs, norms, to_unit

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Proposals:
    """Candidate pairs for `rerank`, sorted by (j, i), and whether k may have cut them.

    Attributes:
        i: rows of the queries, int64 [m].
        j: rows of the index (vectors count from 0 in the order they were added), int64 [m].
        num_full: queries whose k nearest all became candidates though the index holds more than k vectors. 0 means
            that k cut nothing off. Of these queries, the ones that keep k pairs after `rerank` (`np.bincount` of its i)
            surely had too short a k; the others may have.
    """

    i: Int64
    j: Int64
    num_full: int

    def within(self, start: int, stop: int) -> tuple[Int64, Int64]:
        """The pairs with indexed rows start .. stop-1, as (i, j - start): rows of a block of stored vectors."""
        first, last = np.searchsorted(self.j, (start, stop))
        return self.i[first:last], self.j[first:last] - start


def build_index(sample: Vectors, factory: str, *, threads: int, nprobe: int | None) -> Any:
    """An empty FAISS index for inner products of unit vectors, trained on `sample` if it needs training.

    The same for the same sample, factory, threads and matrix kernel, and so are its contents when vectors are added in
    the same blocks. Holds 4 d bytes a sampled vector; vectors of length zero have no direction and train nothing.

    Args:
        sample: stored vectors [n, d]; k-means inside FAISS draws from it at most 256 vectors a centroid.
        factory: what FAISS's `index_factory` reads: "Flat", "IVF4096,PQ64", "OPQ64,IVF4096,PQ64", "HNSW32".
        threads: FAISS uses as many in this process from now on.
        nprobe: lists searched for each query; None leaves FAISS's own (1).

    Raises:
        ConfigError: a factory string that FAISS cannot read, build for d numbers and inner products, or train on so few
            vectors; one that takes no vectors by blocks; a graph with several threads; an nprobe that does not fit it.
    """
    _check_factory(factory, threads)
    faiss = require_faiss(threads)
    with _explained(f"FAISS cannot build the index {factory!r} for vectors of {sample.shape[1]} numbers"):
        index = faiss.index_factory(sample.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ConfigError(f"FAISS builds {factory!r} for distances only, not for inner products: take an IVF index")
    _set_nprobe(faiss, index, factory, nprobe)
    if not index.is_trained:
        points = to_unit(sample[norms(sample) > 0])
        what = f"FAISS cannot train the index {factory!r} on {len(points):,} usable vectors"
        with _explained(what, "take a larger sample or an index with fewer centroids"):
            index.train(points)
    _try_out(index, factory)
    return index


def add(index: Any, x: Vectors) -> None:
    """Append stored vectors [n, d] to an index: their rows go on from those it holds. Holds a float32 copy of `x`.

    Uses the threads that `build_index` or `require_faiss` set last; a graph (HNSW) needs one to come out the same.
    Raises LvdError where the vectors do not fit the index or are not finite.
    """
    check_comparable(x, _no_vectors(index))
    with _explained(f"FAISS cannot add {len(x):,} vectors to an index of {index.ntotal:,}"):
        index.add(to_unit(x))


def to_gpu(index: Any) -> Any:
    """The index on every GPU that FAISS sees, each holding all of it; where FAISS sees none, the index as it is.

    Raises ConfigError for an index that FAISS has no GPU version of.
    """
    faiss = require_faiss()
    if faiss.get_num_gpus() == 0:  # moving it would give an empty index without a word
        return index
    options = faiss.GpuMultipleClonerOptions()
    lists = faiss.try_extract_index_ivf(index)
    # 64-byte codes need half-size tables to fit a GPU's shared memory; for other kinds it would round the vectors.
    options.useFloat16 = lists is not None and isinstance(faiss.downcast_index(lists), faiss.IndexIVFPQ)
    with _explained("FAISS cannot move this index to the GPU", "take another index or unset CUDA_VISIBLE_DEVICES"):
        return faiss.index_cpu_to_all_gpus(index, co=options)


def serialize(index: Any) -> npt.NDArray[np.uint8]:
    """The index as bytes, uint8 [size], from the CPU or the GPU. Holds the index up to three times."""
    faiss = require_faiss()
    if faiss.get_num_gpus() > 0:
        index = faiss.index_gpu_to_cpu(index)
    data: npt.NDArray[np.uint8] = faiss.serialize_index(index)
    return data


def deserialize(data: bytes | memoryview | npt.NDArray[np.uint8]) -> Any:
    """The index that `serialize` gave, on the CPU, with its nprobe. Raises ConfigError for anything else."""
    with _explained("this is no FAISS index", "build it again"):
        return require_faiss().deserialize_index(np.frombuffer(data, dtype=np.uint8))


def pairs_from_index(index: Any, queries: Vectors, threshold: float, k: int, *, slack: float) -> Proposals:
    """The k nearest of each query by the index whose approximate product is at least threshold - slack.

    A query that is in the index proposes itself, which takes one of its k; and a pair of two such queries may be
    proposed by both, by one or by none. Holds 4 d bytes a query and at most 64 k.

    With a threshold of -inf these are simply the k nearest: candidates for retrieval, where k over-fetches.

    Args:
        index: on CPU or GPU; may be empty.
        queries: stored vectors [n, d]; FAISS's products depend on the block in the last bits, so choose fixed blocks.
        threshold: of the cosine that decides.
        k: neighbors per query; FAISS's GPU indices give at most 2,048.
        slack: how far the product may fall below the cosine of a pair that is to be found. Codes see near vectors as
            farther apart than they are: 0.15 to 0.2 did for 64 bytes for 512 numbers, while 32 bytes lost most pairs
            even with 0.25 (synthetic vectors, untuned). An index of whole vectors needs only `scoring.search_margin`.
            Too wide a slack costs re-ranking and raises `num_full`; it never gives a wrong pair.

    Raises:
        LvdError: vectors of another length than the indexed ones, or not finite; ConfigError: FAISS refuses the search.
    """
    check_comparable(queries, _no_vectors(index))
    longest = min(k, index.ntotal)
    if longest == 0:
        return Proposals(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), 0)
    with _explained(f"FAISS cannot search the {k:,} nearest", "take a smaller k or another index"):
        product, row = index.search(to_unit(queries), longest)
    near = (row >= 0) & (product >= np.float32(threshold - slack))
    i, column = np.nonzero(near)
    j = row[i, column]
    order = np.lexsort((i, j))
    num_full = int(near.all(axis=1).sum()) if longest < index.ntotal else 0
    return Proposals(i[order], j[order], num_full)


def rerank(queries: Vectors, i: Int64, vectors: Vectors, j: Int64, threshold: float) -> tuple[Int64, Int64, Float32]:
    """The candidate pairs whose cosine similarity is above `threshold` (strictly, both as float32), in their order.

    Where the stored vectors lie on disk, one block of them at a time::

        i, j = proposals.within(start, start + len(block))
        i, j, similarity = rerank(queries, i, block, j, threshold)  # j + start is the row in the index

    Args:
        queries, vectors: stored vectors [n, d] and [m, d].
        i, j: rows of `queries` and of `vectors`, int64 [c] each.

    Returns:
        i int64 [p], j int64 [p], similarity float32 [p].
    """
    similarity = cosine_pairs(queries, i, vectors, j)
    above = similarity > np.float32(threshold)
    return i[above], j[above], similarity[above]


def _check_factory(factory: str, threads: int) -> None:
    """Refuse what FAISS answers by ending or hanging the process, and graphs whose links depend on timing."""
    if re.search(r"(?<![\d.])0+(?![\d.])|HNSW0*1(?!\d)", factory):
        raise ConfigError(f"the index {factory!r} has too small a number in it: raise it")
    if "HNSW" in factory and threads > 1:
        raise ConfigError(
            f"FAISS builds the graph of {factory!r} differently each time with {threads} threads: "
            "set 1 thread, or take an index without HNSW"
        )


def _set_nprobe(faiss: ModuleType, index: Any, factory: str, nprobe: int | None) -> None:
    if nprobe is None:
        return
    lists = faiss.try_extract_index_ivf(index)
    if lists is None:
        raise ConfigError(f"the index {factory!r} has no lists to probe: unset nprobe or take an IVF index")
    if not 1 <= nprobe <= lists.nlist:
        raise ConfigError(f"nprobe {nprobe:,} does not fit {factory!r}: set it from 1 to its {lists.nlist:,} lists")
    lists.nprobe = nprobe


def _try_out(index: Any, factory: str) -> None:
    """Add two blocks and search, then forget them: some kinds refuse that, and should before hours of work."""
    one: Float32 = np.full((1, index.d), index.d**-0.5, dtype=np.float32)
    with _explained(f"FAISS cannot use the index {factory!r} block by block"):
        index.add(one)
        index.add(one)
        index.search(one, 1)
        index.reset()


def _no_vectors(index: Any) -> Float32:
    return np.empty((0, index.d), dtype=np.float32)


@contextmanager
def _explained(what: str, remedy: str = "take another index") -> Iterator[None]:
    """Turn FAISS's RuntimeError, which names C++ functions and conditions, into one line of what it means."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"(?s)^Error in .* at \S+:\d+: (Error: '.*' failed: )?", "", str(error))
        raise ConfigError(f"{what} ({' '.join(reason.split())}): {remedy}") from error

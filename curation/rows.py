"""Vectors that a task holds, as a join sees them: names, lengths, codes and signs beside what is stored."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from curation.codes import Codes, encode
from curation.scoring import Vectors, norms
from curation.signs import helps, sketches

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Names = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Rows:
    """Some of the vectors that a task holds, as a join sees them.

    Attributes:
        nodes: what the reductions call them, int [n].
        at: where each lies in `vectors` and `norms`, int64 [n].
        vectors: stored, [k, d]; norms: their lengths, float64 [k]. Not copied by `take`.
        codes: of these rows.
        ball: hub that each lies in, int32 [n]; -1 for none. Members of one hub are not compared.
        sketches: uint64 [n, WORDS] where pairs go through a sieve (`sieve`), else None.
    """

    nodes: Names
    at: Int64
    vectors: Vectors
    norms: npt.NDArray[np.float64]
    codes: Codes
    ball: Int32
    sketches: npt.NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return len(self.nodes)

    def take(self, rows: npt.NDArray[np.integer] | slice) -> "Rows":
        """Some of the rows: codes are copied for an array of rows, viewed for a slice."""
        codes, taken = self.codes.take(rows), None if self.sketches is None else self.sketches[rows]
        return Rows(self.nodes[rows], self.at[rows], self.vectors, self.norms, codes, self.ball[rows], taken)

    def sketched(self, threshold: float) -> "Rows":
        """These rows with sketches, where a sieve helps at this threshold: for joins that are not exact."""
        if not helps(threshold, self.codes.values.shape[1]):
            return self
        return replace(self, sketches=sketches(self.codes.values))


def rows_of(nodes: Int64, vectors: Vectors, ball: Int32 | None = None) -> Rows:
    """Rows of stored vectors [n, d]. Raises LvdError where one is not finite."""
    ball = np.full(len(nodes), -1, dtype=np.int32) if ball is None else ball
    return Rows(nodes, np.arange(len(nodes)), vectors, norms(vectors), encode(vectors), ball)


def all_rows(vectors: Vectors) -> Rows:
    """`rows_of` under their own numbers, in no hub."""
    return rows_of(np.arange(len(vectors)), vectors)

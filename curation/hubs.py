"""Hubs: many equal or nearly equal vectors, such as placeholder pictures, whose pairs would be quadratic in number.

Equal vectors collapse to one. A **ball** is what lies within a small angle of a **pivot**, a vector in a dense place:
if every member's cosine to the pivot is at least sqrt((1 + tau) / 2), the cosine of half the angle whose cosine is tau,
any two members have a cosine of at least tau. So members need edges to the pivot only, and components at every
threshold below tau stay exact; with what lies outside the ball they are compared like all others.
"""

import math

import numpy as np
import numpy.typing as npt

from curation.codes import Codes, allowances, cutoffs, encode
from curation.products import Multiplier
from curation.scoring import Vectors, compiled, cosine_pairs, norms, readable

Int64 = npt.NDArray[np.int64]

TAU = 0.98
"""Two members of one ball are at least this similar."""
BALL = math.sqrt((1.0 + TAU) / 2.0) + 1e-6
"""Least cosine to the pivot, with room for rounding."""
LEAST_MATES = 16
"""A pivot has this many of the sample near it; what is rarer is joined pair by pair."""
TRIALS, CHUNK = 4096, 256


@compiled
def _hash_loop(x: npt.NDArray[np.generic], out: npt.NDArray[np.uint64]) -> None:
    for row in range(x.shape[0]):
        state = np.uint64(0x9E3779B97F4A7C15)
        for t in range(x.shape[1]):
            state = (state ^ np.uint64(x[row, t])) * np.uint64(0xBF58476D1CE4E5B9)
            state ^= state >> np.uint64(29)
        out[row] = state


def content_hash(x: Vectors) -> npt.NDArray[np.uint64]:
    """A hash of each row's stored values [n, d], uint64 [n]: equal for equal rows."""
    out = np.empty(len(x), dtype=np.uint64)
    _hash_loop(readable(x), out)
    return out


def leaders(x: Vectors, hashes: npt.NDArray[np.uint64]) -> Int64:
    """The first row with the same stored values as each row of `x` [n, d], int64 [n]. Holds 24 bytes a row."""
    order = np.argsort(hashes, kind="stable")
    first = np.flatnonzero(np.concatenate([[True], hashes[order][1:] != hashes[order][:-1]])[: len(order)])
    lead = np.arange(len(x))
    lead[order] = np.repeat(order[first], np.diff(np.append(first, len(order))))
    followers = np.flatnonzero(lead != np.arange(len(x)))
    stored = readable(x)
    odd = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(followers), 65_536):
        rows = followers[start : start + 65_536]
        same = (stored[rows] == stored[lead[rows]]).all(axis=1)
        odd.append(rows[~same])
    others = np.concatenate(odd)  # unequal rows of equal hash: they may equal each other
    if len(others):
        lead[others] = others[leaders(x[others], hashes[others])]
    return lead


def find_pivots(sample: Vectors, multiplier: Multiplier) -> Int64:
    """Rows of `sample` [n, d] that are pivots: greedily, those with most of the sample in their ball.

    Looks at TRIALS rows, CHUNK at a time: which vectors are pivots changes what a join costs, never what it finds. Time
    grows with TRIALS * n.

    Returns:
        int64 [p], distinct, in the order found; no pivot lies in the ball of another one before it.
    """
    codes = encode(sample)
    largest = float(codes.error.max(initial=0.0))
    cutoff, allowance = cutoffs(BALL, codes), allowances(codes, largest)
    free: npt.NDArray[np.bool_] = np.asarray(codes.values.any(axis=1))
    pivots: list[int] = []
    lengths = norms(sample)
    for start in range(0, min(TRIALS, len(sample)), CHUNK):
        trials = start + np.flatnonzero(free[start : min(start + CHUNK, TRIALS)])
        near = np.zeros((len(trials), len(sample)), dtype=np.bool_)
        for i, j, _ in multiplier.candidates(codes.values[trials], codes.values, cutoff[trials], allowance):
            inside = cosine_pairs(sample, trials[i], sample, j, lengths, lengths) >= BALL
            near[i[inside], j[inside]] = True
        while len(trials):
            mates = np.where(free[trials], (near & free).sum(axis=1), 0)  # not in another pivot's ball
            best = int(mates.argmax())
            if mates[best] < LEAST_MATES:
                break
            pivots.append(int(trials[best]))
            free &= ~near[best]
    return np.asarray(pivots, dtype=np.int64)


def balls(
    x: Vectors, pivots: Vectors, multiplier: Multiplier, codes: Codes | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The ball that each row lies in.

    Args:
        x: stored vectors [n, d]; pivots: stored vectors [p, d].
        multiplier: that proposes.
        codes: of `x`, if they are known.

    Returns:
        ball int32 [n], the pivot of highest similarity (the first of equals) with at least BALL, else -1; and the
        similarity to it, float32 [n].
    """
    ball = np.full(len(x), -1, dtype=np.int32)
    similarity = np.zeros(len(x), dtype=np.float32)
    if not len(pivots) or not len(x):
        return ball, similarity
    rows, centers = encode(x) if codes is None else codes, encode(pivots)
    allowance = allowances(centers, float(rows.error.max()))
    lengths, center_lengths = norms(x), norms(pivots)
    for i, j, _ in multiplier.candidates(rows.values, centers.values, cutoffs(BALL, rows), allowance):
        score = cosine_pairs(x, i, pivots, j, lengths, center_lengths)
        inside = score >= BALL
        i, j, score = i[inside], j[inside], score[inside]
        order = np.lexsort((j, -score, i))
        i, j, score = i[order], j[order], score[order]
        first = np.concatenate([[True], i[1:] != i[:-1]])[: len(i)]
        i, j, score = i[first], j[first], score[first]
        better = (ball[i] < 0) | (score > similarity[i]) | ((score == similarity[i]) & (j < ball[i]))
        ball[i[better]], similarity[i[better]] = j[better], score[better]
    return ball, similarity

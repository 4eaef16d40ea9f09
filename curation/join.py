"""Joins of vectors held in memory: what one task compares, and what it keeps of the pairs found.

Codes propose (`codes`, `products`), the scoring function decides, and a reduction keeps what later stages need: a
maximum spanning forest for components, the best reference of each image for cross joins. Pairs that cannot change the
reduction are never scored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from curation.codes import allowances, at_most, cutoffs
from curation.forest import Edges, Forest
from curation.hubs import TAU, balls, content_hash, leaders
from curation.products import Found, Multiplier
from curation.rows import Rows
from curation.scoring import Vectors, compiled, cosine_pairs, norms
from curation.sieve import Sieve
from curation.signs import most_bits, passes

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Names = npt.NDArray[np.integer]


class Reduction(Protocol):
    """Keeps what matters of a stream of pairs of nodes."""

    def undecided(self, a: Names, b: Names, bound: Float32) -> Bool:
        """Which pairs could matter if they score at most `bound`."""
        ...

    def add(self, a: Names, b: Names, similarity: Float32) -> None:
        """Take pairs above the threshold with their scores."""
        ...


class Best:
    """The best partner of each node: highest similarity, then lowest rank.

    Pairs are (image, reference), as nodes. Holds 12 bytes a node.
    """

    def __init__(self, num_nodes: int, base: float, is_reference: Bool, rank: Int64) -> None:
        """`is_reference` and `rank` are of each node, bool and int64 [num_nodes]; ranks are distinct."""
        self._is_reference, self._rank = is_reference, rank
        self._partner = np.full(num_nodes, -1, dtype=np.int64)
        self._similarity = np.full(num_nodes, np.float32(base))

    def undecided(self, a: Names, b: Names, bound: Float32) -> Bool:
        image = np.where(self._is_reference[a], b, a)
        mixed: Bool = self._is_reference[a] != self._is_reference[b]
        return mixed & (bound >= self._similarity[image])

    def add(self, a: Names, b: Names, similarity: Float32) -> None:
        mixed = self._is_reference[a] != self._is_reference[b]
        a, b, similarity = a[mixed], b[mixed], similarity[mixed]
        turned = self._is_reference[a]
        keep_best(
            self._partner, self._similarity, np.where(turned, b, a), np.where(turned, a, b), similarity, self._rank
        )

    def edges(self) -> Edges:
        """(image, reference, similarity) of each node that has one, int64 [f] twice and float32 [f]."""
        found = np.flatnonzero(self._partner >= 0)
        return found, self._partner[found], self._similarity[found]


def keep_best(
    best: Int64, best_similarity: Float32, nodes: Names, partners: Names, similarity: Float32, rank: Int64
) -> None:
    """Update each node's best partner in place: highest similarity, then lowest rank."""
    order = np.lexsort((rank[partners], -similarity, nodes))
    nodes, partners, similarity = nodes[order], partners[order], similarity[order]
    first = np.concatenate([[True], nodes[1:] != nodes[:-1]])[: len(nodes)]
    nodes, partners, similarity = nodes[first], partners[first], similarity[first]
    known = best[nodes] >= 0
    tied = known & (similarity == best_similarity[nodes]) & (rank[partners] < rank[best[nodes]])
    chosen = (similarity > best_similarity[nodes]) | tied
    best[nodes[chosen]], best_similarity[nodes[chosen]] = partners[chosen], similarity[chosen]


class Join:
    """Compares rows with rows and hands what lies above the threshold to reductions."""

    def __init__(self, threshold: float, reductions: Sequence[Reduction], multiplier: Multiplier) -> None:
        self.threshold, self._reductions, self.multiplier = float(np.float32(threshold)), reductions, multiplier
        self.most_bits = most_bits(self.threshold)

    def among(self, x: Rows) -> None:
        """All pairs of rows of `x`, except within hubs. Time grows with n**2 / 2, less what lies within hubs."""
        pieces = list(_by_ball(x))
        for at, piece in enumerate(pieces):
            if len(piece) and piece.ball[0] < 0:
                self._compare(piece, piece, upper=True)
            for other in pieces[at + 1 :]:
                self._compare(piece, other)

    def between(self, x: Rows, y: Rows) -> None:
        """All pairs of a row of `x` and a row of `y`, except within hubs."""
        if (x.ball < 0).all() or (y.ball < 0).all():
            self._compare(x, y)
            return
        others = list(_by_ball(y))
        for piece in _by_ball(x):
            for other in others:
                if piece.ball[0] < 0 or piece.ball[0] != other.ball[0]:
                    self._compare(piece, other)

    def _compare(self, x: Rows, y: Rows, upper: bool = False) -> None:
        if not len(x) or not len(y):
            return
        cutoff = cutoffs(self.threshold, x.codes)
        allowance = allowances(y.codes, float(x.codes.error.max()))
        for found in self.multiplier.candidates(x.codes.values, y.codes.values, cutoff, allowance, upper):
            self.offer(x, y, *self.sifted(x, y, found))

    def sifted(self, x: Rows, y: Rows, found: Found) -> Found:
        """Of candidates those that pass the sieve, if there is one."""
        i, j, product = found
        if x.sketches is None or y.sketches is None:
            return found
        passed = passes(x.sketches[i], y.sketches[j], self.most_bits)
        return i[passed], j[passed], product[passed]

    def sieve(self, x: Rows, cutoff: Int32, allowance: Int32) -> Sieve | None:
        """What compares rows of `x`, if they have sketches and are compared on the CPU."""
        if x.sketches is None or self.multiplier.device.type != "cpu":
            return None
        lone = self._reductions[0] if len(self._reductions) == 1 else None
        forest = lone if isinstance(lone, Forest) else None
        return Sieve(x, self.threshold, self.most_bits, cutoff, allowance, forest)

    def offer(self, x: Rows, y: Rows, i: Int32, j: Int32, product: Int32) -> None:
        """Score candidates (row of `x`, row of `y`) with these products of codes, as far as reductions want it.

        The most alike first: what connects a group is then known before the many weaker pairs within it are looked at.
        """
        i, j, product = self._undecided(x, y, i, j, product)
        order = np.argsort(-product)
        for start in range(0, len(order), OFFERED):
            some = order[start : start + OFFERED]
            self._score(x, y, i[some], j[some], product[some])

    def _undecided(self, x: Rows, y: Rows, i: Int32, j: Int32, product: Int32) -> Found:
        """Those candidates that could matter to some reduction."""
        a, b = x.nodes[i], y.nodes[j]
        bound = at_most(product, x.codes.error[i], y.codes.error[j], x.codes.scale)
        left = np.zeros(len(i), dtype=np.bool_)
        for reduction in self._reductions:
            left |= reduction.undecided(a, b, bound)
        return i[left], j[left], product[left]

    def _score(self, x: Rows, y: Rows, i: Int32, j: Int32, product: Int32) -> None:
        i, j, _ = self._undecided(x, y, i, j, product)
        a, b = x.nodes[i], y.nodes[j]
        similarity = cosine_pairs(x.vectors, x.at[i], y.vectors, y.at[j], x.norms, y.norms)
        above = similarity > np.float32(self.threshold)
        for reduction in self._reductions:
            reduction.add(a[above], b[above], similarity[above])


def _by_ball(x: Rows) -> Iterator[Rows]:
    """`x` in pieces of one hub each, what lies in none first."""
    if not len(x) or (x.ball < 0).all():
        yield x
        return
    order = np.argsort(x.ball, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], x.ball[order][1:] != x.ball[order][:-1]]))
    for start, stop in zip(starts, np.append(starts[1:], len(order)), strict=True):
        yield x.take(order[start:stop])


@dataclass(frozen=True)
class Unique:
    """A block of vectors without what need not be compared, and the edges that stand for what was left out.

    Attributes:
        rows: positions in the block that take part in the join, int64 [u].
        ball: hub of each, int32 [u].
        equal: edges (first position, position, similarity) of equal vectors; the later ones take no part.
        hub: edges (pivot's number, position, similarity) of the hubs' members.
    """

    rows: Int64
    ball: Int32
    equal: Edges
    hub: Edges


def unique(
    x: Vectors,
    pivots: Vectors,
    threshold: float,
    multiplier: Multiplier,
    hashes: npt.NDArray[np.uint64] | None = None,
) -> Unique:
    """Collapse equal vectors and find the hubs' members; linear in time and memory.

    Args:
        x: stored vectors [n, d].
        pivots: stored vectors [p, d], as `hubs.find_pivots` chose them; unused if the threshold is not below TAU.
        threshold: of the join.
        multiplier: that proposes.
        hashes: what `content_hash` says of `x`, if that is known.
    """
    lead = leaders(x, content_hash(x) if hashes is None else hashes)
    equal = np.flatnonzero(lead != np.arange(len(x)))
    similarity = cosine_pairs(x, lead[equal], x, equal)
    copies = similarity > np.float32(threshold)  # not so where zero vectors are equal
    equal, similarity = equal[copies], similarity[copies]
    stays = comparable(x, threshold)
    stays[equal] = False
    rows = np.flatnonzero(stays)
    ball, near = np.full(len(rows), -1, dtype=np.int32), np.zeros(len(rows), dtype=np.float32)
    for start in range(0, len(rows) if len(pivots) and threshold < TAU else 0, 65_536):
        some = slice(start, start + 65_536)
        ball[some], near[some] = balls(x[rows[some]], pivots, multiplier)
    inside = np.flatnonzero(ball >= 0)
    hub = (ball[inside].astype(np.int64), rows[inside], near[inside])
    return Unique(rows, ball, (lead[equal], equal, similarity), hub)


def comparable(x: Vectors, threshold: float) -> Bool:
    """Which rows of `x` [n, d] can score above the threshold at all, bool [n]: zero vectors score 0."""
    return norms(x) > 0 if threshold >= 0 else np.ones(len(x), dtype=np.bool_)


@compiled
def _visit_loop(
    lists: Int32, first: Int64, cells: Int64, wanted: Bool, home: Int64, place: Int64, visitors: Int32
) -> None:
    """Write each row to the next place of each cell it visits; without room in `visitors`, only count."""
    for row in range(lists.shape[0]):
        for k in range(lists.shape[1]):
            if lists[row, k] < 0:
                continue
            for cell in range(first[lists[row, k]], first[lists[row, k]] + cells[lists[row, k]]):
                if wanted[cell] and cell != home[row]:
                    if visitors.shape[0] > 0:
                        visitors[place[cell]] = row
                    place[cell] += 1


@dataclass(frozen=True)
class Members:
    """Rows by cell: rows[offsets[c] : offsets[c + 1]] are those of cell c; int64 [cells + 1] and int32."""

    offsets: Int64
    rows: Int32

    def of(self, cell: int | np.integer) -> Int32:
        """The rows of one cell."""
        return self.rows[self.offsets[cell] : self.offsets[cell + 1]]


def visitors(lists: Int32, home: Int64, first_cell: Int64, num_cells: Int64, wanted: Bool) -> Members:
    """Which rows visit which cells.

    Args:
        lists: that each row is compared with, int32 [n, m]; -1 for none.
        home: cell that each row is stored in, int64 [n].
        first_cell, num_cells: of each list, int64 [c]; see `layout.Layout`.
        wanted: cells that matter, bool [number of cells].

    Returns:
        The rows that visit each cell, ascending; those at home there are left out.
    """
    counts = np.zeros(len(wanted), dtype=np.int64)
    _visit_loop(lists, first_cell, num_cells, wanted, home, counts, np.empty(0, dtype=np.int32))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    rows = np.empty(int(offsets[-1]), dtype=np.int32)
    _visit_loop(lists, first_cell, num_cells, wanted, home, offsets[:-1].copy(), rows)
    return Members(offsets, rows)


OFFERED = 1 << 13
"""Candidates that are scored before reductions are asked again which of the others they want."""
SMALL_CELL = 1024
"""A cell of up to this many rows is compared with itself along with its visitors: half in vain, but in one go."""
BATCH = 1 << 16
"""Candidates that are offered at once, from as many cells as it takes."""


def join_cells(join: Join, x: Rows, stored: Members, visiting: Members, among: bool = True) -> None:
    """Join inside cells: what is stored in each with itself and with its visitors.

    Args:
        join: that compares.
        x: rows, nodes 0 .. n-1; those of one cell are gathered from wherever they lie.
        stored, visiting: rows of `x` stored in each cell, and rows that visit it.
        among: whether what is stored in a cell is compared with itself, too.
    """
    with_hubs = bool((x.ball >= 0).any())
    cutoff = cutoffs(join.threshold, x.codes)
    allowance = allowances(x.codes, float(x.codes.error.max(initial=0.0)))
    sieve = join.sieve(x, cutoff, allowance)
    batch: list[Found] = []
    held = 0
    for cell in np.flatnonzero(np.diff(stored.offsets)):
        own, guests = stored.of(cell), visiting.of(cell)
        if with_hubs and (x.ball[own] >= 0).any():
            at_home = x.take(own)
            join.between(x.take(guests), at_home)
            if among:
                join.among(at_home)
            continue
        met = sieve.met(guests, own, among) if sieve else _met(join, x, guests, own, cutoff, allowance, among)
        for found in met:
            batch.append(found)
            held += len(found[0])
            if held >= BATCH:
                _offer_batch(join, x, batch)
                batch, held = [], 0
    _offer_batch(join, x, batch)


def _met(
    join: Join, x: Rows, guests: Int32, own: Int32, cutoff: Int32, allowance: Int32, among: bool
) -> Iterator[Found]:
    """Candidates of one cell without hubs, all its products multiplied: rows of `x` and products of codes."""
    if among and len(own) <= SMALL_CELL:
        guests = np.concatenate([guests, own])
    elif among:
        join.among(x.take(own))
    for found in join.multiplier.gathered(x.codes.values, guests, own, cutoff, allowance):
        yield join.sifted(x, x, found)


def _offer_batch(join: Join, x: Rows, batch: list[Found]) -> None:
    if batch:
        i, j, product = (np.concatenate(column) for column in zip(*batch, strict=True))
        apart = i != j
        join.offer(x, x, i[apart], j[apart], product[apart])

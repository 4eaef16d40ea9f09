"""Products of int8 codes as exact integers, and the pairs among them that reach a cutoff.

torch multiplies, at the rate the hardware has for int8 (VNNI, AMX, tensor cores), or else for float32; what reaches no
cutoff is dropped while its tile is in the cache. The same code serves CPU and CUDA tensors.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from curation.scoring import compiled

if TYPE_CHECKING:
    import torch

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Found = tuple[Int32, Int32, Int32]

TILE_ROWS = 512
TILE_COLUMNS = 512
GPU_TILE = 16_384
"""A tile's products are scanned while they lie in a core's cache; a GPU wants larger ones."""
CHUNK = 256
"""Products that are looked at at once."""
STEP_ROWS, STEP_COLUMNS = 256, 16
"""Sides of tiles are multiples of these: the library prepares a kernel for each shape that it meets."""


FLOAT_LENGTH = 1024
"""So many products of codes add up to less than 2**24, up to which float32 holds every integer."""
TIMED = 5
"""Products of each form that are timed, by turns: under a millisecond each in hardware, 45 in a plain loop."""
UNDOUBTED = 2
"""Float32 must be so many times as fast, on a machine that may be busy with other things."""


@functools.cache
def takes_int8() -> bool:
    """Whether this CPU's int8 products are exact, and not far slower than float32's; both forms give the same integers.

    Without VNNI instructions neither is certain: sums of two may saturate at 16 bits, and where torch has no kernel a
    plain loop multiplies, at a twentieth of the rate of float32.
    """
    import torch

    left = torch.full((STEP_ROWS, 512), 127, dtype=torch.int8)
    right = left.t()  # large enough that what a call costs does not count
    if not (torch._int_mm(left, right) == 512 * 127**2).all():
        return False
    forms = torch._int_mm, _float_products
    seconds = [[_seconds(form, left, right) for form in forms] for _ in range(1 + TIMED)][1:]  # the first warms up
    int8, float32 = (min(taken) for taken in zip(*seconds, strict=True))
    return bool(int8 < UNDOUBTED * float32)


def _seconds(multiply: Callable[..., object], *sides: "torch.Tensor") -> float:
    start = time.perf_counter()
    multiply(*sides)
    return time.perf_counter() - start


def _float_products(block: "torch.Tensor", right: "torch.Tensor") -> "torch.Tensor":
    """Products of int8 codes [n, k] and [k, m], int32 [n, m], by sums in float32 that are exact."""
    parts = range(0, block.shape[1], FLOAT_LENGTH)
    pairs = [(block[:, s : s + FLOAT_LENGTH], right[s : s + FLOAT_LENGTH]) for s in parts]
    product = (pairs[0][0].float() @ pairs[0][1].float()).int()
    for left, other in pairs[1:]:
        product += (left.float() @ other.float()).int()
    return product


@compiled
def _scan(product: Int32, cutoff: Int32, allowance: Int32, row: Int32, column: Int32, value: Int32) -> int:
    """Collect the products that, with their column's allowance, reach their row's cutoff; returns how many."""
    found, columns = 0, allowance.shape[0]
    for i in range(cutoff.shape[0]):
        least = cutoff[i]
        for start in range(0, columns, CHUNK):
            stop = min(start + CHUNK, columns)
            line, allowed, left = product[i, start:stop], allowance[start:stop], 0
            for j in range(line.shape[0]):  # a count has no branches: many at once
                left += np.int32(line[j] + allowed[j]) >= least
            j = 0
            while left:
                if np.int32(line[j] + allowed[j]) >= least:
                    row[found], column[found], value[found] = i, start + j, line[j]
                    found, left = found + 1, left - 1
                j += 1
    return found


class Multiplier:
    """Multiplies codes on one device; holds its tiles between calls, so one serves one thread.

    Attributes:
        device: `cpu` or `cuda`.
    """

    def __init__(self, device: str = "cpu") -> None:
        import torch

        self.device = torch.device(device)
        self._torch = torch
        self._rows, self._columns = (GPU_TILE,) * 2 if self.device.type == "cuda" else (TILE_ROWS, TILE_COLUMNS)
        self._room: dict[str, torch.Tensor] = {}

    def tiles(self, x: Int8, y: Int8) -> Iterator[tuple[slice, slice, Int32]]:
        """All products of rows, tile by tile, each valid until the next is asked for.

        Args:
            x, y: codes, int8 [n, k] and [m, k]; k is a multiple of 8.

        Yields:
            slices of the rows of x and of y, and their products, int32, with more lines and columns than those.
        """
        for rows, columns, tile in self._tiles(x, y):
            yield rows, columns, tile.cpu().numpy()

    def taken(self, values: Int8, rows: Int32, y: Int8) -> Iterator[tuple[slice, slice, Int32]]:
        """Products of chosen rows of `values` with `y`, tile by tile, each valid until the next is asked for.

        Args:
            values: codes, int8 [n, k]; y: codes, int8 [m, k].
            rows: int32 [t].

        Yields:
            slices of `rows` and of the rows of y, and their products, int32, with more lines and columns than those.
        """
        for left in range(0, len(y), self._columns):
            columns = slice(left, min(left + self._columns, len(y)))
            right = self._pad("y", y[columns], STEP_COLUMNS, self._columns).t()
            for top in range(0, len(rows), self._rows):
                some = slice(top, min(top + self._rows, len(rows)))
                block = self._taken("x", values, rows[some], STEP_ROWS, self._rows)
                yield some, columns, self._multiplied(block, right).cpu().numpy()

    def candidates(self, x: Int8, y: Int8, cutoff: Int32, allowance: Int32, upper: bool = False) -> Iterator[Found]:
        """Pairs (i, j) of rows of x and y with product + allowance[j] >= cutoff[i], tile by tile.

        Args:
            x, y: codes, int8 [n, k] and [m, k]; k is a multiple of 8.
            cutoff: int32 [n]; read when its rows' turn comes, so a caller may raise it between tiles.
            allowance: int32 [m].
            upper: only pairs with i < j, for x compared with itself: half the work.

        Yields:
            i int32 [t], j int32 [t] and product int32 [t] of each tile that has some, by (i, j) within the tile.
        """
        scan = self._scan_gpu if self.device.type == "cuda" else self._scan_cpu
        for rows, columns, tile in self._tiles(x, y, upper):
            i, j, value = scan(tile, cutoff[rows], allowance[columns])
            i, j = i + np.int32(rows.start), j + np.int32(columns.start)
            if upper and rows.stop > columns.start:
                below = i < j
                i, j, value = (part[below] for part in (i, j, value))
            if len(i):
                yield i, j, value

    def gathered(self, values: Int8, rows: Int32, others: Int32, cutoff: Int32, allowance: Int32) -> Iterator[Found]:
        """`candidates` of chosen rows of `values` with other chosen rows of it.

        Args:
            values: codes, int8 [n, k]; `cutoff` and `allowance` are of all of them, int32 [n].
            rows, others: int32 [t] and int32 [u].

        Yields:
            i, j and product of each tile, int32; i and j are rows of `values`.
        """
        scan = self._scan_gpu if self.device.type == "cuda" else self._scan_cpu
        for left in range(0, len(others), self._columns):
            right = others[left : left + self._columns]
            columns = self._taken("y", values, right, STEP_COLUMNS, self._columns).t()
            for top in range(0, len(rows), self._rows):
                some = rows[top : top + self._rows]
                tile = self._multiplied(self._taken("x", values, some, STEP_ROWS, self._rows), columns)
                i, j, product = scan(tile, cutoff[some], allowance[right])
                if len(i):
                    yield some[i], right[j], product

    def _taken(self, name: str, values: Int8, rows: Int32, step: int, most: int) -> "torch.Tensor":
        """Rows of `values` on the device, with rows added up to a multiple of `step`, whose products nobody reads."""
        if self.device.type != "cpu":
            return self._pad(name, values.take(rows, axis=0), step, most)
        padded = self._buffer(name, min(-(-len(rows) // step) * step, most), values.shape[1], self._torch.int8)
        # Without bounds checks, straight to where it is multiplied.
        np.take(values, rows, axis=0, out=padded.numpy()[: len(rows)], mode="clip")
        return padded

    def _multiplied(self, block: "torch.Tensor", right: "torch.Tensor") -> "torch.Tensor":
        if self.device.type == "cpu" and not takes_int8():
            return _float_products(block, right)
        out = self._buffer("product", block.shape[0], right.shape[1], self._torch.int32)
        return self._torch._int_mm(block, right, out=out)

    def _tiles(self, x: Int8, y: Int8, upper: bool = False) -> Iterator[tuple[slice, slice, "torch.Tensor"]]:
        for left in range(0, len(y), self._columns):
            columns = slice(left, min(left + self._columns, len(y)))
            right = self._pad("y", y[columns], STEP_COLUMNS, self._columns).t()
            for top in range(0, min(len(x), columns.stop) if upper else len(x), self._rows):
                rows = slice(top, min(top + self._rows, len(x)))
                block = self._pad("x", x[rows], STEP_ROWS, self._rows)
                yield rows, columns, self._multiplied(block, right)

    def _pad(self, name: str, block: Int8, step: int, most: int) -> "torch.Tensor":
        """A block of rows on the device, with rows added up to a multiple of `step`, whose products nobody reads."""
        height = min(-(-len(block) // step) * step, most)
        if height == len(block) and self.device.type == "cpu" and block.flags.c_contiguous and block.flags.writeable:
            return self._torch.from_numpy(block)
        padded = self._buffer(name, height, block.shape[1], self._torch.int8)
        target: Any = padded.numpy() if self.device.type == "cpu" else None
        if target is not None:
            target[: len(block)] = block
        else:
            padded[: len(block)].copy_(self._torch.from_numpy(np.ascontiguousarray(block)))
        return padded

    def _buffer(self, name: str, height: int, width: int, kind: Any) -> "torch.Tensor":
        """Room for a tile; all of one name share it, whatever their shape."""
        if name not in self._room or self._room[name].numel() < height * width:
            self._room[name] = self._torch.zeros(height * width, dtype=kind, device=self.device)
        return self._room[name][: height * width].view(height, width)

    def _scan_cpu(self, tile: "torch.Tensor", cutoff: Int32, allowance: Int32) -> Found:
        if not hasattr(self, "_found"):
            self._found = tuple(np.empty(TILE_ROWS * TILE_COLUMNS, dtype=np.int32) for _ in range(3))
        count = _scan(tile.numpy(), cutoff, allowance, *self._found)
        row, column, value = (part[:count].copy() for part in self._found)
        return row, column, value

    def _scan_gpu(self, tile: "torch.Tensor", cutoff: Int32, allowance: Int32) -> Found:
        kept = tile[: len(cutoff), : len(allowance)]
        least, allowed = (self._torch.from_numpy(np.ascontiguousarray(a)).to(tile.device) for a in (cutoff, allowance))
        row, column = self._torch.nonzero(kept + allowed >= least[:, None], as_tuple=True)
        value = kept[row, column]
        i, j, product = (part.to("cpu", self._torch.int32).numpy() for part in (row, column, value))
        return i, j, product

"""Which patches the student does not see: block masks as published, for all crops of a batch at once.

Block-wise masking of BEiT (arXiv 2106.08254) with the ratios of iBOT (2111.07832) as DINOv2 draws them: half of the
global crops are masked, each by another ratio, with rectangles that are added until the number of patches is reached.
A mask may end a patch or two below that number, when ten rectangles in a row did not fit.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from curation.errors import ConfigError
from trainer.batch import Masks
from trainer.draws import Key, Purpose, generator

MIN_BLOCK = 4
"""Least area of a rectangle in patches, as drawn; less only where less is missing."""
MAX_BLOCK = 0.5
"""Most patches that a rectangle adds, as a share of the crop's."""
ASPECT = 0.3
"""Height through width of a rectangle is log-uniform between this and 1 / this."""
TRIES = 10
"""Rectangles drawn in a row that do not fit before a mask is left as it is."""

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MaskSettings:
    """How much is masked.

    Attributes:
        share: of the global crops that are masked.
        ratio: least and most of their patches, as a share of a crop's.

    Raises:
        ConfigError: a value outside its range.
    """

    share: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"masks: share {self.share} is not between 0 and 1")
        if not 0 <= self.ratio[0] <= self.ratio[1] <= 1:
            raise ConfigError(f"masks: ratio {self.ratio} is not a least and a most between 0 and 1")


def max_masked(num_crops: int, grid: tuple[int, int], settings: MaskSettings) -> int:
    """M, the most patches that `block_masks` can mask: the sum of what each masked crop's bin of ratios allows."""
    bins = _bins(num_crops, settings)
    return int(_patches(bins[1:], grid).sum())


def block_masks(num_crops: int, grid: tuple[int, int], settings: MaskSettings, key: Key) -> Masks:
    """Masks of the 2B = `num_crops` global crops of a batch, of which exactly int(2B x share) are masked.

    Their ratios are stratified: `ratio` is cut into as many bins as there are masked crops, one ratio is drawn from
    each, and the crops are shuffled.

    Args:
        num_crops: 2B.
        grid: patches of a global crop, (rows, columns).
        settings: how much is masked.
        key: (seed, place of the batch); batches of different ranks have different places.
    """
    random = generator(key, Purpose.MASKS)
    bins = _bins(num_crops, settings)
    ratios = bins[:-1] + np.diff(bins) * random.random(len(bins) - 1)
    crops = random.random(num_crops).argsort()[: len(ratios)]
    mask = np.zeros((num_crops, *grid), dtype=np.bool_)
    mask[crops] = _blocks(_patches(ratios, grid), grid, random)
    return _padded(mask.reshape(num_crops, -1), max_masked(num_crops, grid, settings))


def all_patches(num_crops: int, grid: tuple[int, int]) -> Masks:
    """For distillation: nothing is masked, every patch of every global crop counts with weight 1 / N."""
    patches = grid[0] * grid[1]
    mask = torch.zeros(num_crops, patches, dtype=torch.bool)
    return Masks(mask, torch.arange(num_crops * patches), torch.full((num_crops * patches,), 1 / patches))


def _bins(num_crops: int, settings: MaskSettings) -> npt.NDArray[np.float64]:
    """Edges of the bins of ratios, one more than there are masked crops."""
    return np.linspace(*settings.ratio, int(num_crops * settings.share) + 1)


def _patches(ratios: npt.NDArray[np.float64], grid: tuple[int, int]) -> Ints:
    """Shares of a crop as whole patches."""
    return (grid[0] * grid[1] * ratios).astype(np.int64)


def _blocks(targets: Ints, grid: tuple[int, int], random: np.random.Generator) -> Bools:
    """Masks [n, rows, columns] of `targets` [n] patches each, or a little less.

    All masks try a rectangle in each round, until each has its patches or has failed too often. Numbers are drawn for
    all of them in all rounds, so that what one mask draws does not depend on the others.
    """
    masks = np.zeros((len(targets), *grid), dtype=np.bool_)
    missing, failures = targets.copy(), np.zeros_like(targets)
    largest = int(MAX_BLOCK * grid[0] * grid[1])
    while len(open_ := np.flatnonzero((missing > 0) & (failures < TRIES))):
        draws = random.random((len(targets), 4))[open_]
        most = np.minimum(missing[open_], largest)
        block, fits = _rectangles(draws, most, grid)
        block &= ~masks[open_]
        added = block.sum(axis=(1, 2))
        fits &= (added > 0) & (added <= most)
        changed = open_[fits]
        masks[changed] |= block[fits]
        missing[changed] -= added[fits]
        failures[open_] = np.where(fits, 0, failures[open_] + 1)
    return masks


def _rectangles(draws: npt.NDArray[np.float64], most: Ints, grid: tuple[int, int]) -> tuple[Bools, Bools]:
    """Rectangles [n, rows, columns] of about MIN_BLOCK to `most` patches, and whether they fit in the grid, [n].

    Args:
        draws: uniform over [0, 1), [n, 4]: area, shape, top, left.
    """
    area = MIN_BLOCK + (most - MIN_BLOCK) * draws[:, 0]
    shape = np.exp(math.log(ASPECT) * (1 - 2 * draws[:, 1]))
    high, wide = np.rint(np.sqrt(area * shape)), np.rint(np.sqrt(area / shape))
    top, left = np.floor(draws[:, 2] * (grid[0] - high + 1)), np.floor(draws[:, 3] * (grid[1] - wide + 1))
    inside_rows, inside_columns = _between(grid[0], top, high), _between(grid[1], left, wide)
    return inside_rows[:, :, None] & inside_columns[:, None, :], (high < grid[0]) & (wide < grid[1])


def _between(length: int, first: npt.NDArray[np.float64], count: npt.NDArray[np.float64]) -> Bools:
    """Which of `length` places lie in a range, bool [n, length]."""
    places = np.arange(length)
    return (places >= first[:, None]) & (places < (first + count)[:, None])


def _padded(mask: Bools, length: int) -> Masks:
    """Masks [2B, N] with their places and weights, padded to a constant length."""
    at = np.flatnonzero(mask)
    places, weights = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.float32)
    places[: len(at)] = at
    weights[: len(at)] = 1 / mask.sum(axis=1)[at // mask.shape[1]]
    return Masks(torch.from_numpy(mask), torch.from_numpy(places), torch.from_numpy(weights))

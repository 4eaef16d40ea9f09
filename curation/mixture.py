"""Mixtures: how many images each part of a set gives, so that the parts stand in given ratios."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from curation.errors import ConfigError

Int64 = npt.NDArray[np.int64]


def mixture_counts(sizes: Sequence[int], ratios: Sequence[float], target: int, titles: Sequence[str]) -> Int64:
    """Images of each part, int64 [p], that add up to `target` exactly and stand in the given ratios.

    Shares are rounded down, and what is missing goes to the largest remainders, of equal ones to the first part. A part
    with too few images is an error, not a shorter set.

    Args:
        sizes: images that each part has.
        ratios: weight of each part, above 0; their sum is of no matter.
        target: images in all.
        titles: of the parts, for the error.

    Raises:
        ConfigError: a part has fewer images than its share; names it, and the largest target that can be reached.
    """
    weight = np.asarray(ratios, dtype=np.float64)
    share = target * weight / weight.sum()
    counts: Int64 = np.floor(share).astype(np.int64)
    missing = target - int(counts.sum())
    counts[np.argsort(counts - share, kind="stable")[:missing]] += 1
    short = np.flatnonzero(counts > np.asarray(sizes))
    if len(short):
        part = int(short[0])
        reachable = int(np.min(np.asarray(sizes) * weight.sum() / weight))
        raise ConfigError(
            f"mixture.target of {target:,} takes {counts[part]:,} images of {titles[part]}, which has {sizes[part]:,}: "
            f"with these ratios at most about {reachable:,} can be reached; lower the target or that part's ratio"
        )
    return counts

"""Random numbers of the data side, keyed: a function of (seed, place, purpose), never of a stream.

Philox is a counter-based generator (Salmon et al., SC 2011), so that the numbers of any sample or step are had at once,
by any worker, and a run that is resumed draws what it would have drawn.
"""

import enum

import numpy as np

Key = tuple[int, int]
"""(seed of the run, place: of a sample in the endless order, or of a batch)."""


class Purpose(enum.IntEnum):
    """What numbers are for; those of one key for different purposes are independent."""

    VIEWS = 0
    MASKS = 1


def generator(key: Key, purpose: Purpose) -> np.random.Generator:
    """The generator of a key, at its beginning. Use `random` alone: numpy may change what its other methods give."""
    seed, place = key
    words = np.array([seed % 2**64, place], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=np.array([0, 0, 0, purpose], dtype=np.uint64)))

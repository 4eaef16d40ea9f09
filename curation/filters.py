"""Rules that need no model: decodable, large enough, not too elongated, and the first of its byte copies."""

from typing import Any

import numpy as np
import numpy.typing as npt

FILTER_REASONS = ("undecodable", "too_small", "too_elongated", "exact_duplicate")


def rule_verdict(width: int, height: int, decodable: bool, min_side: int, max_aspect_ratio: float) -> str | None:
    """Why one image is dropped, the first of FILTER_REASONS that applies, or None if it stays.

    `width` and `height` in pixels are not looked at unless `decodable`. An image whose shorter side is `min_side`, or
    whose longer side is exactly `max_aspect_ratio` times the shorter, stays.
    """
    if not decodable:
        return "undecodable"
    short, long = sorted((width, height))
    if short < min_side:
        return "too_small"
    if long > max_aspect_ratio * short:
        return "too_elongated"
    return None


def repeated(words: npt.NDArray[np.uint64], row: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which images are byte copies of one with a lower row: exactly one of each id is not.

    Args:
        words: ids as `hashing.id_words` gives them, uint64 [n, 2].
        row: ordinal of each image in its source, int64 [n]; equal rows go by position.

    Returns:
        bool [n], the verdict `exact_duplicate`. Holds about 40 bytes an image.
    """
    order = np.lexsort((row, words[:, 1], words[:, 0]))
    ordered = words[order]
    result = np.zeros(len(order), dtype=np.bool_)
    result[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return result

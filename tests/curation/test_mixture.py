import numpy as np
import pytest

from curation.errors import ConfigError
from curation.mixture import mixture_counts


def counts(sizes: list[int], ratios: list[float], target: int) -> list[int]:
    found = mixture_counts(sizes, ratios, target, [f"part {i}" for i in range(len(sizes))])
    assert found.dtype == np.int64
    return found.tolist()


def test_shares_follow_the_ratios_exactly_where_they_can() -> None:
    assert counts([100, 100, 100], [1, 2, 1], 40) == [10, 20, 10]
    assert counts([100, 100], [0.1, 0.9], 10) == [1, 9]
    assert counts([7], [3.5], 7) == [7]


def test_what_is_missing_goes_to_the_largest_remainders_then_to_the_first() -> None:
    assert counts([100] * 3, [1, 1, 1], 10) == [4, 3, 3]
    assert counts([100] * 3, [1, 1, 1], 11) == [4, 4, 3]
    assert counts([100] * 2, [1, 3], 6) == [2, 4]  # 1.5 and 4.5: of equal remainders the first
    assert counts([100] * 2, [2, 5], 10) == [3, 7]  # 2.86 and 7.14


@pytest.mark.parametrize("seed", range(20))
def test_the_target_is_met_within_one_image_of_each_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ratios = rng.uniform(0.01, 5, int(rng.integers(1, 9))).tolist()
    target = int(rng.integers(0, 10_000))
    found = counts([10_000] * len(ratios), ratios, target)
    assert sum(found) == target
    assert np.abs(np.array(found) - target * np.array(ratios) / sum(ratios)).max() < 1


def test_a_part_with_too_few_images_is_named_with_what_can_be_reached() -> None:
    with pytest.raises(ConfigError, match=r"100 takes 50 images of part 1, which has 30: .* at most about 60 "):
        counts([500, 30], [1, 1], 100)
    assert counts([500, 30], [1, 1], 60) == [30, 30]

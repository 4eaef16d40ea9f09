import itertools
import math

import numpy as np
import pytest
import torch

from curation.errors import ConfigError
from trainer.draws import Purpose, generator
from trainer.masks import MaskSettings, all_patches, block_masks, max_masked

GRIDS = [(16, 16), (8, 8), (5, 9), (3, 3)]
CASES = [(8, MaskSettings()), (17, MaskSettings()), (6, MaskSettings(share=1.0, ratio=(0.3, 0.3)))]


def slow_mask(target: int, grid: tuple[int, int], draws: "itertools.Iterator[np.ndarray]") -> np.ndarray:
    """BEiT's block-wise masking with DINOv2's numbers, one mask; each try takes four numbers."""
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    count = 0
    while count < target:
        most = min(target - count, int(0.5 * height * width))
        added = 0
        for _ in range(10):
            area, shape, top, left = next(draws)
            area = 4 + (most - 4) * area
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * shape)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < width and h < height:
                top, left = int(top * (height - h + 1)), int(left * (width - w + 1))
                hidden = int(mask[top : top + h, left : left + w].sum())
                if 0 < h * w - hidden <= most:
                    mask[top : top + h, left : left + w] = True
                    added = h * w - hidden
                    break
        if added == 0:
            break
        count += added
    return mask


def slow_masks(crops: int, grid: tuple[int, int], settings: MaskSettings, key: tuple[int, int]) -> np.ndarray:
    random = generator(key, Purpose.MASKS)
    masked = int(crops * settings.share)
    edges = np.linspace(settings.ratio[0], settings.ratio[1], masked + 1)
    places = random.random(masked), random.random(crops).argsort()
    rounds = random.random((400, masked, 4))
    masks = np.zeros((crops, *grid), dtype=bool)
    for index in range(masked):
        ratio = edges[index] + (edges[index + 1] - edges[index]) * places[0][index]
        target = int(grid[0] * grid[1] * ratio)
        masks[places[1][index]] = slow_mask(target, grid, iter(rounds[:, index]))
    return masks.reshape(crops, -1)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("crops", "settings"), CASES)
def test_masks_are_those_of_the_loop_over_crops_and_rectangles(
    grid: tuple[int, int], crops: int, settings: MaskSettings
) -> None:
    for seed in range(5):
        found = block_masks(crops, grid, settings, (seed, 3)).mask
        np.testing.assert_array_equal(found.numpy(), slow_masks(crops, grid, settings, (seed, 3)))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("crops", "settings"), CASES)
def test_places_and_weights_are_those_of_the_mask_padded_to_the_bound(
    grid: tuple[int, int], crops: int, settings: MaskSettings
) -> None:
    for seed in range(5):
        mask, at, weight = block_masks(crops, grid, settings, (seed, 0))
        assert (mask.dtype, at.dtype, weight.dtype) == (torch.bool, torch.int64, torch.float32)
        assert mask.shape == (crops, grid[0] * grid[1])
        assert at.shape == weight.shape == (max_masked(crops, grid, settings),)
        used = int(mask.sum())
        assert at[:used].tolist() == mask.flatten().nonzero()[:, 0].tolist()
        assert not at[used:].any() and not weight[used:].any()
        for crop in mask.nonzero()[:, 0].unique():
            of_crop = (at // mask.shape[1] == crop) & (weight > 0)
            torch.testing.assert_close(weight[of_crop], torch.full((int(mask[crop].sum()),), 1 / int(mask[crop].sum())))


def test_the_bound_is_the_published_sum() -> None:
    edges = [0.1 + 0.4 * index / 64 for index in range(65)]
    assert max_masked(128, (16, 16), MaskSettings()) == sum(int(256 * edge + 1e-9) for edge in edges[1:])


@pytest.mark.parametrize("grid", [(16, 16), (37, 37)])
def test_exactly_half_of_the_crops_are_masked_and_ratios_fill_their_bins(grid: tuple[int, int]) -> None:
    """Sorted by count the masks stand in their bins, but for the patch or two that a mask may fall short by."""
    patches, short = grid[0] * grid[1], []
    for seed in range(8):
        counts = block_masks(25, grid, MaskSettings(), (seed, 1)).mask.sum(dim=1).numpy()
        assert (counts > 0).sum() == 12
        edges = np.linspace(0.1, 0.5, 13)
        counts = np.sort(counts[counts > 0])
        assert (counts <= patches * edges[1:]).all()
        assert (counts >= np.floor(patches * edges[:-1]) - 6).all()
        short.append(np.floor(patches * edges[:-1]) - counts)
    assert np.maximum(short, 0).mean() < 0.5


def test_masks_are_blocks() -> None:
    """Of two neighbours of masked patches, far more are masked than if patches were masked one by one."""
    mask = block_masks(64, (16, 16), MaskSettings(), (0, 0)).mask.view(64, 16, 16)
    mask = mask[mask.any(dim=2).any(dim=1)]
    beside = (mask[:, :, 1:] & mask[:, :, :-1]).sum() / mask[:, :, :-1].sum()
    below = (mask[:, 1:] & mask[:, :-1]).sum() / mask[:, :-1].sum()
    assert mask.float().mean() < 0.35 and beside > 0.6 and below > 0.6


def test_masks_are_a_function_of_the_key() -> None:
    def masks(seed: int, place: int) -> list[list[bool]]:
        return block_masks(16, (8, 8), MaskSettings(), (seed, place)).mask.tolist()

    assert masks(1, 2) == masks(1, 2)
    assert masks(1, 2) != masks(1, 3) and masks(1, 2) != masks(2, 2) and masks(1, 2) != masks(2, 1)


def test_which_crops_are_masked_has_nothing_to_do_with_their_place() -> None:
    counts = sum(block_masks(8, (6, 6), MaskSettings(), (0, place)).mask.sum(dim=1) for place in range(200))
    assert counts.min() > 0.6 * counts.max()


def test_nothing_is_masked_where_no_crop_is_to_be() -> None:
    mask, at, weight = block_masks(4, (8, 8), MaskSettings(share=0), (0, 0))
    assert not mask.any() and len(at) == len(weight) == 0


def test_all_patches_count_in_distillation() -> None:
    mask, at, weight = all_patches(6, (3, 5))
    assert mask.shape == (6, 15) and mask.dtype == torch.bool and not mask.any()
    assert at.tolist() == list(range(90))
    torch.testing.assert_close(weight, torch.full((90,), 1 / 15))


@pytest.mark.parametrize("values", [{"share": 1.1}, {"share": -0.1}, {"ratio": (0.5, 0.1)}, {"ratio": (0.1, 1.5)}])
def test_settings_outside_their_range_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match=rf"^masks: {next(iter(values))} "):
        MaskSettings(**values)

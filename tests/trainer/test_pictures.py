"""Pages: what is drawn where, in which colours; principal components against numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from embedders.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from tests.trainer.labelled_for_tests import network
from trainer import pictures
from trainer.batch import Batch, Masks, Photometric
from trainer.features import evaluation_preprocessing, normalized
from trainer.pictures import crops_page, page, pca_maps, pca_page, principal_components


def plain(count: int, solarize: bool = False) -> Photometric:
    """Colours left as they are, or inverted where they are light."""
    one = torch.ones(count)
    no = torch.zeros(count, dtype=torch.bool)
    return Photometric(one, one, one, 0 * one, torch.arange(4).expand(count, 4), no, 0 * one, no | solarize)


def batch(images: int, side: int = 16, local: int = 8, views: int = 3, masks: bool = True) -> Batch:
    """Crops of one colour each: the image is told by red, the crop by green."""

    def crops(count: int, size: int, blue: int) -> Tensor:
        colors = [(40 + 20 * image, 60 + 30 * view, blue) for view in range(count) for image in range(images)]
        return torch.tensor(colors, dtype=torch.uint8).view(-1, 3, 1, 1).repeat(1, 1, size, size)

    mask = torch.zeros(2 * images, 16, dtype=torch.bool)
    mask[0, 5], mask[images + 1, 14:] = True, True  # first crop of image 0, second of image 1
    made = Masks(mask, torch.zeros(3, dtype=torch.int64), torch.ones(3)) if masks else None
    ids = [f"{image:032x}" for image in range(images)]
    colors = plain(2 * images), plain(views * images, solarize=True)
    return Batch(ids, crops(2, side, 10), crops(views, local, 200), *colors, made)


def drawn(sheet: np.ndarray, row: int, column: int, y: float, x: float, left: int, cell: int) -> list[int]:
    """The pixel at (y, x), as shares of a cell."""
    top = pictures.GAP + pictures.TEXT_HEIGHT + row * (cell + pictures.GAP)
    return sheet[int(top + y * cell), int(left + column * (cell + pictures.GAP) + x * cell)].tolist()


def left_of(sheet: np.ndarray, columns: int, cell: int) -> int:
    return sheet.shape[1] - columns * (cell + pictures.GAP)


@pytest.mark.parametrize("masks", [True, False])
def test_each_crop_is_in_its_place_and_masked_patches_are_painted(masks: bool) -> None:
    cell = 112  # 16 pixels, seven times
    sheet = np.asarray(crops_page(batch(3, masks=masks), images=2))
    assert sheet.shape[0] == pictures.GAP + pictures.TEXT_HEIGHT + 2 * (cell + pictures.GAP)
    left = left_of(sheet, 5, cell)
    for image in range(2):
        for view in range(2):
            color = [40 + 20 * image, 60 + 30 * view, 10]
            found = drawn(sheet, image, view, 0.05, 0.05, left, cell)
            assert np.abs(np.subtract(found, color)).max() <= 1
        for view in range(3):  # local: half the size, and solarized, which turns the light blue round
            found = drawn(sheet, image, 2 + view, 0.4, 0.4, left, cell)
            assert np.abs(np.subtract(found, [40 + 20 * image, 60 + 30 * view, 55])).max() <= 1
            assert drawn(sheet, image, 2 + view, 0.6, 0.6, left, cell) == [215, 215, 215]
    for place, color in (((0, 0, 0.375, 0.375), [40, 60, 10]), ((1, 1, 0.875, 0.625), [60, 90, 10])):
        found = np.array(drawn(sheet, *place, left, cell))
        expected = 0.7 * np.array([255, 0, 140]) + 0.3 * np.array(color) if masks else np.array(color)
        assert np.abs(found - expected).max() <= 1
    for place in ((0, 0, 0.375, 0.625), (0, 1, 0.375, 0.375), (1, 0, 0.875, 0.625), (1, 1, 0.875, 0.375)):
        found = drawn(sheet, *place, left, cell)
        assert np.abs(np.subtract(found, [40 + 20 * place[0], 60 + 30 * place[1], 10])).max() <= 1


def test_a_page_of_all_images_and_of_no_local_crops() -> None:
    few = batch(2, views=0)
    sheet = np.asarray(crops_page(few, images=50))
    assert sheet.shape[0] == pictures.GAP + pictures.TEXT_HEIGHT + 2 * (112 + pictures.GAP)
    assert drawn(sheet, 1, 1, 0.1, 0.1, left_of(sheet, 2, 112), 112)[:2] == [60, 90]


def test_names_are_drawn() -> None:
    image = np.full((112, 112, 3), 215, dtype=np.uint8)
    blank = np.asarray(page([[image]], [""], [""]))
    assert (blank == 215).all()
    sheet = np.asarray(page([[image]], ["global 1"], ["abcdef"]))
    assert (sheet[: pictures.GAP + pictures.TEXT_HEIGHT] < 128).any()
    beside = sheet[pictures.GAP + pictures.TEXT_HEIGHT :, : left_of(sheet, 1, 112)]
    assert (beside < 128).any() and (sheet[-112 - pictures.GAP :, -112 - pictures.GAP :] == 215).all()


def test_small_images_are_enlarged_by_whole_factors() -> None:
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    sheet = np.asarray(page([[image]], [""], [""]))
    shown = sheet[-112 - pictures.GAP : -pictures.GAP, -112 - pictures.GAP : -pictures.GAP]
    assert np.array_equal(shown, image.repeat(28, axis=0).repeat(28, axis=1))


@pytest.mark.parametrize("seed", range(3))
def test_components_are_those_of_a_singular_value_decomposition(seed: int) -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, 8) + 3
    found = principal_components(rows, 3).numpy()
    centred = rows.double().numpy() - rows.double().numpy().mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    for place in range(3):
        expected = u[:, place] * s[place]
        sign = np.sign(expected @ found[:, place])
        np.testing.assert_allclose(sign * found[:, place], expected, atol=1e-4)
        weights = centred.T @ found[:, place]
        assert weights[np.abs(weights).argmax()] > 0
    assert principal_components(rows[:, :2], 3).shape == (50, 2)


def test_a_map_shows_components_from_quantile_to_quantile() -> None:
    patches = torch.randn(2, 5, 4, 9, generator=torch.Generator().manual_seed(0))
    found = pca_maps(patches)
    assert found.shape == (2, 5, 4, 3) and found.dtype == torch.uint8
    values = principal_components(patches.reshape(40, 9), 3).numpy()
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    expected = np.clip((values - low) / (high - low), 0, 1) * 255
    assert np.abs(found.reshape(40, 3).numpy() - expected).max() <= 1
    assert torch.equal(pca_maps(patches * 7), found)
    assert pca_maps(patches[..., :2])[..., 2].max() == 0
    assert pca_maps(torch.ones(1, 3, 3, 5)).max() == 0


def test_the_foreground_is_what_touches_fewer_edges() -> None:
    """A block in the middle, of two kinds, on a ground of another: the ground is black, the kinds differ."""
    draw = torch.Generator().manual_seed(0)
    ground, left, right = torch.eye(6)[:3] * 10
    patches = ground.repeat(2, 6, 6, 1)
    patches[:, 2:4, 2:3], patches[:, 2:4, 3:4] = left, right
    for sign in (1, -1):
        found = pca_maps(sign * patches + 0.01 * torch.randn(patches.shape, generator=draw), foreground=True).int()
        inside = torch.zeros(6, 6, dtype=torch.bool)
        inside[2:4, 2:4] = True
        assert found[:, ~inside].max() == 0
        assert (found[:, 2:4, 2] - found[:, 2:4, 3]).abs()[..., 0].min() > 200
    assert pca_maps(patches).flatten(0, 2).float().std(0).max() > 0


def test_a_page_shows_each_image_beside_its_map() -> None:
    prepared = evaluation_preprocessing(16, 16)
    images = torch.randint(0, 256, (2, 16, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = network().train()
    sheet = np.asarray(pca_page(model, images, prepared))
    assert model.training
    left = left_of(sheet, 2, 112)
    maps = pca_maps(model.eval()(normalized(images, prepared)).patches.detach().view(2, 4, 2, 24))
    for row in range(2):
        for y in range(16):
            for x in range(8):
                at = ((y + 0.5) / 16, (x + 0.5) / 16)
                assert drawn(sheet, row, 0, *at, left, 112) == images[row, y, x].tolist()
                found = drawn(sheet, row, 1, *at, left, 112)
                assert np.abs(np.subtract(found, maps[row, y // 4, x // 4].tolist())).max() <= 1


def test_pixels_come_back_from_the_inputs_of_the_network() -> None:
    crops = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    shown = pictures._colored(crops, plain(4))
    assert np.abs(shown.astype(int) - crops.permute(0, 2, 3, 1).numpy()).max() <= 1
    assert len(IMAGENET_MEAN) == len(IMAGENET_STD) == 3

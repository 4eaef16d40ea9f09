"""Labelled rows from Parquet, and features of them against one image at a time."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curation.errors import ConfigError, LvdError
from embedders.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from embedders.vit import ViTConfig
from tests.builders import photo, truncated
from tests.trainer.labelled_for_tests import TINY, network, write_labelled
from trainer.features import (
    RandomView,
    check_fit,
    evaluation_preprocessing,
    features_of,
    normalized,
    pixel_batches,
    pixels_of,
)
from trainer.labelled import Labelled, Row, class_numbers, held_out_rows, read

SMALL = evaluation_preprocessing(20, 16)


@pytest.fixture
def eleven(tmp_path: Path) -> str:
    """Rows whose label is their number in words; row groups of 3."""
    return write_labelled(
        tmp_path / "eleven.parquet", [photo(i, 24, 30) for i in range(11)], [f"l{i}" for i in range(11)]
    )


def numbers(source: Labelled) -> list[int]:
    skipped: list = []
    found = [row.number for row in read(source, skipped)]
    assert not skipped
    return found


def test_rows_come_in_order_with_their_places(eleven: str) -> None:
    rows = list(read(Labelled(eleven), []))
    assert [(row.number, row.label, row.data) for row in rows] == [(i, f"l{i}", photo(i, 24, 30)) for i in range(11)]
    assert rows[7].place == f"{eleven} row 7"


@pytest.mark.parametrize(("start", "stop"), [(0, None), (2, 5), (3, 6), (4, 5), (0, 100), (-3, None), (10, 11)])
def test_a_range_is_a_slice_of_the_rows(eleven: str, start: int, stop: int | None) -> None:
    assert numbers(Labelled(eleven, start=start, stop=stop)) == list(range(11))[start:stop]


def test_a_sample_is_drawn_by_its_seed_from_the_range(eleven: str) -> None:
    drawn = [numbers(Labelled(eleven, start=2, sample=4, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len({tuple(rows) for rows in drawn}) > 1
    for rows in drawn:
        assert len(set(rows)) == 4 and rows == sorted(rows) and set(rows) <= set(range(2, 11))
    assert numbers(Labelled(eleven, start=2, sample=40)) == list(range(2, 11))


def test_files_of_a_directory_or_pattern_are_one_set(tmp_path: Path) -> None:
    for name, first in (("b", 3), ("a", 0)):
        write_labelled(
            tmp_path / f"{name}.parquet", [photo(first + i) for i in range(3)], [first + i for i in range(3)]
        )
    (tmp_path / "notes.txt").write_text("no Parquet")
    for uri in (tmp_path, f"{tmp_path}/*.parquet", f"file://{tmp_path}/*.parquet"):
        rows = list(read(Labelled(str(uri), start=1, stop=5), []))
        assert [(row.number, row.label) for row in rows] == [(i, i) for i in range(1, 5)]
    assert rows[-1].place == f"file://{tmp_path}/b.parquet row 1"


def test_columns_have_any_name_and_the_types_that_people_have(tmp_path: Path) -> None:
    data = [photo(i) for i in range(3)]
    columns = {
        "plain": pa.array(data, pa.binary()),
        "large": pa.array(data, pa.large_binary()),
        "dataset": pa.array([{"bytes": value, "path": None} for value in data]),
        "label": pa.array([5, 0, 5], pa.int8()),
        "coded": pa.array(["x", "y", "x"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    for image in ("plain", "large", "dataset"):
        for label, values in (("label", [5, 0, 5]), ("coded", ["x", "y", "x"])):
            rows = list(read(Labelled(str(tmp_path / "all.parquet"), image, label), []))
            assert [row.data for row in rows] == data
            assert [row.label for row in rows] == values


def test_what_cannot_be_read_is_one_clear_line(eleven: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    (tmp_path / "empty").mkdir()
    for source, says in [
        (Labelled(str(tmp_path / "none.parquet")), "none.parquet does not exist"),
        (Labelled(f"{tmp_path}/x*.parquet"), "does not exist"),
        (Labelled(f"{tmp_path}/empty"), "empty holds no Parquet files"),
        (Labelled(str(broken)), "broken.parquet is not a readable Parquet file"),
        (Labelled(eleven, "picture"), "has no column 'picture'; set image_column to one of image, label"),
        (Labelled(eleven, label_column="class"), "has no column 'class'; set label_column to one of image, label"),
        (
            Labelled(eleven, "label"),
            "column 'label' holds string, not the bytes of images; set image_column to another",
        ),
        (Labelled(eleven, label_column="image"), "label_column 'image' holds binary, not strings or whole numbers"),
        (Labelled(eleven, start=11), r"has no rows in \[11, end\): it has 11 in all"),
        (Labelled(eleven, sample=0), "has no rows"),
    ]:
        with pytest.raises(ConfigError, match=says) as error:
            list(read(source, []))
        assert "\n" not in str(error.value)


def test_classes_are_numbered_in_their_order_and_must_be_those_of_training() -> None:
    classes, train, test = class_numbers(["b", "a", "c", "a"], ["c", "b"])
    assert classes == ["a", "b", "c"] and train.tolist() == [1, 0, 2, 0] and test.tolist() == [2, 1]
    assert class_numbers([10, 9, 10], [9])[0] == [9, 10]
    with pytest.raises(ConfigError, match="one class alone"):
        class_numbers(["a", "a"], ["a"])
    with pytest.raises(ConfigError, match="1 labels of the test rows, such as 3, are on no training row"):
        class_numbers(["1", "3"], [3])


def test_a_tenth_is_held_out() -> None:
    for rows in (10, 57, 200):
        kept, held = held_out_rows(rows, seed=3)
        assert len(held) == rows // 10 and sorted([*kept.tolist(), *held.tolist()]) == list(range(rows))
    assert not torch.equal(held, held_out_rows(200, seed=4)[1])
    with pytest.raises(ConfigError, match="too few"):
        held_out_rows(9, 0)


def test_features_are_those_of_one_image_at_a_time(tmp_path: Path) -> None:
    images = [photo(i, 20 + 3 * i, 40 - 2 * i) for i in range(7)] + [photo(8, 9, 7)]  # the last one grows
    source = Labelled(write_labelled(tmp_path / "a.parquet", images, list(range(8))))
    model = network().train()
    found = features_of(model, source, SMALL, blocks=4, patches=True, batch_size=3, workers=2)
    assert model.training
    assert found.cls.shape == (8, 4, 24) and found.patches is not None and found.labels == list(range(8))
    model.eval()
    for row, data in enumerate(images):
        pixels = torch.from_numpy(SMALL.pixels(data)).permute(2, 0, 1)[None] / 255
        inputs = (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
        blocks = model.intermediate(inputs, [1, 2, 3, 4])
        expected = torch.cat([features.cls for features in blocks])
        torch.testing.assert_close(found.cls[row], expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(found.patches[row], model(inputs).patches[0].mean(0), atol=2e-5, rtol=2e-5)
    alone = features_of(model, source, SMALL)
    assert alone.patches is None
    torch.testing.assert_close(alone.cls, found.cls[:, -1:], atol=2e-5, rtol=2e-5)


def test_a_network_of_few_blocks_gives_all_of_them(tmp_path: Path) -> None:
    source = Labelled(write_labelled(tmp_path / "a.parquet", [photo(0), photo(1)], [0, 1]))
    assert features_of(network(replace(TINY, depth=2)), source, SMALL, blocks=4).cls.shape == (2, 2, 24)


def test_reduced_precision_is_near(tmp_path: Path) -> None:
    source = Labelled(write_labelled(tmp_path / "a.parquet", [photo(i) for i in range(4)], [0, 1, 0, 1]))
    full, halves = (features_of(network(), source, SMALL, precision=name).cls for name in ("float32", "bfloat16"))
    assert halves.dtype == torch.float32 and not torch.equal(full, halves)
    assert torch.nn.functional.cosine_similarity(full, halves, dim=2).min() > 0.99


def test_unusable_rows_are_skipped_and_named(tmp_path: Path) -> None:
    images = [photo(0), truncated(1), None, photo(3), b"<html>", photo(5)]
    path = write_labelled(tmp_path / "a.parquet", images, ["x", "y", "x", None, "x", "y"])
    found = features_of(network(), Labelled(path), SMALL, batch_size=2)
    assert found.labels == ["x", "y"] and len(found.cls) == 2
    assert sorted((skip.place.removeprefix(path), skip.reason) for skip in found.skipped) == [
        (" row 1", "truncated"),
        (" row 2", "no image"),
        (" row 3", "no label"),
        (" row 4", "unknown image format"),
    ]
    pixels, skipped = pixels_of(Labelled(path), SMALL)
    assert pixels.labels == ["x", "y"] and sorted(skipped) == sorted(found.skipped)
    assert np.array_equal(pixels.images[1].numpy(), SMALL.pixels(photo(5)))


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    source = Labelled(write_labelled(tmp_path / "a.parquet", [truncated(1), b""], [0, 1]))
    with pytest.raises(ConfigError, match=r"none of 2 rows can be used; the first, .*a.parquet row 0: truncated"):
        features_of(network(), source, SMALL)
    with pytest.raises(ConfigError, match="none of 2 rows"):
        pixels_of(source, SMALL)


def test_a_broken_network_is_an_error(tmp_path: Path) -> None:
    source = Labelled(write_labelled(tmp_path / "a.parquet", [photo(0), photo(1)], [0, 1]))
    model = network()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(LvdError, match="not finite for 2 of 2 images"):
        features_of(model, source, SMALL)


def test_sizes_must_fit() -> None:
    assert evaluation_preprocessing().resize == 256 and evaluation_preprocessing().crop == (224, 224)
    with pytest.raises(ConfigError, match="set resize to 32 or more"):
        evaluation_preprocessing(30, 32)
    with pytest.raises(ConfigError, match="18 x 18 pixels do not divide into patches of 4; set crop to 16"):
        check_fit(network(), evaluation_preprocessing(20, 18))
    with pytest.raises(ConfigError, match="sizes of their own"):
        check_fit(network(), replace(SMALL, crop=None))
    check_fit(network(ViTConfig(dim=8, depth=1, heads=1, patch_size=3, image_size=9)), evaluation_preprocessing(20, 18))


def test_a_random_view_depends_on_seed_epoch_and_row_alone() -> None:
    def view(seed: int, epoch: int, number: int) -> bytes:
        pixels = RandomView(16, seed, epoch)(Row(number, "", photo(0), 0))
        assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
        return pixels.tobytes()

    assert view(1, 2, 3) == view(1, 2, 3)
    assert len({view(*key) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2))}) == 5


def test_random_views_show_parts_of_the_image_as_published() -> None:
    """Pixels that tell their place, which the view therefore shows: area, shape, and whether it is flipped."""
    height, width = 120, 200
    y, x = np.mgrid[:height, :width]
    image = np.stack([x, y, 0 * x], axis=2).astype(np.uint8)
    areas, ratios, flips = [], [], 0
    for number in range(300):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", compress_level=0) if number == 0 else None
        data = file.getvalue() if number == 0 else data  # noqa: F821
        pixels = RandomView(16, 0, 0)(Row(number, "", data, 0)).astype(float)
        across, down = pixels[8, -1, 0] - pixels[8, 0, 0], pixels[-1, 8, 1] - pixels[0, 8, 1]
        flips += across < 0
        assert down > 0
        wide, high = abs(across) * 16 / 15, down * 16 / 15
        areas.append(wide * high / (width * height))
        ratios.append(wide / high)
    assert 0.06 < min(areas) < 0.12 and 0.75 < max(areas) < 1.02
    assert 0.68 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.48
    assert 120 < flips < 180


def test_views_for_training_take_the_place_of_the_centre(eleven: str) -> None:
    view = RandomView(16, seed=0, epoch=1)
    found = features_of(network(), Labelled(eleven), SMALL, view=view, batch_size=4)
    pixels = torch.stack([torch.from_numpy(view(row)) for row in read(Labelled(eleven), [])])
    expected = network().eval().class_tokens(normalized(pixels, SMALL))
    torch.testing.assert_close(found.cls[:, 0], expected.detach(), atol=2e-5, rtol=2e-5)


def test_batches_are_in_order_whatever_the_threads(eleven: str) -> None:
    for workers in (1, 4):
        batches = list(pixel_batches(Labelled(eleven), lambda row: SMALL.pixels(row.data), [], 4, workers))
        assert [len(batch.labels) for batch in batches] == [4, 4, 3]
        assert [label for batch in batches for label in batch.labels] == [f"l{i}" for i in range(11)]
        whole = torch.cat([batch.images for batch in batches])
        assert all(np.array_equal(whole[i].numpy(), SMALL.pixels(photo(i, 24, 30))) for i in range(11))

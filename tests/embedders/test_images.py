import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from embedders.images import UndecodableImage, decode, image_size
from tests.embedders.images_for_tests import photo, saved

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))):
        parts += [struct.pack(">I", len(body)), name, body, struct.pack(">I", zlib.crc32(name + body))]
    return b"".join(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_common_formats_open(kind: str) -> None:
    data = saved(photo(1, 40, 24), kind)
    assert image_size(data) == (40, 24, kind.lower())
    image = decode(data)
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(photo(1, 40, 24), dtype=int))
    assert difference.mean() < (30 if kind == "GIF" else 12)


@pytest.mark.parametrize("kind", ["PCX", "PPM", "TGA", "ICO"])
def test_other_formats_are_refused(kind: str) -> None:
    data = saved(photo(1, 32, 32), kind)
    for read in (decode, image_size):
        with pytest.raises(UndecodableImage, match=r"^unknown image format$"):
            read(data)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"<html>not found</html>", b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP"]
)
def test_what_is_no_image_has_a_reason_without_addresses(data: bytes) -> None:
    for read in (decode, image_size):
        with pytest.raises(UndecodableImage) as caught:
            read(data)
        assert str(caught.value) in ("unknown image format", "truncated", "corrupt")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("min_side", [None, 8])
def test_truncated_files_are_refused(kind: str, min_side: int | None) -> None:
    data = saved(photo(2), kind)
    for keep in (0.3, 0.6, 0.9):
        with pytest.raises(UndecodableImage):
            decode(data[: int(len(data) * keep)], min_side)


def outcome(read: Callable[[bytes], object], data: bytes) -> str:
    try:
        read(data)
    except UndecodableImage as error:
        return str(error)
    return "decoded"


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_decode_or_are_refused(kind: str) -> None:
    data = saved(photo(3, 48, 36), kind)
    draw = np.random.default_rng(0)
    outcomes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(150):
            damaged = bytearray(data)
            for place in draw.integers(0, len(data) if draw.random() < 0.5 else min(len(data), 200), 4):
                damaged[place] = draw.integers(0, 256)
            for read in (image_size, lambda x: decode(x, 16, max_pixels=10**6)):
                outcomes.add(outcome(read, bytes(damaged)))
    assert {"decoded"} < outcomes <= {"decoded", "unknown image format", "truncated", "corrupt", "too many pixels"}


def test_pixels_are_limited_by_the_header() -> None:
    data = png_header(20_000, 6_000)
    assert image_size(data) == (20_000, 6_000, "png")
    with pytest.raises(UndecodableImage, match=r"^too many pixels$"):
        decode(data)
    with pytest.raises(UndecodableImage, match=r"^too many pixels$"):
        image_size(png_header(60_000, 60_000))
    image = saved(photo(1, 40, 25), "PNG")
    assert decode(image, max_pixels=1000).size == (40, 25)
    with pytest.raises(UndecodableImage, match=r"^too many pixels$"):
        decode(image, max_pixels=999)
    with pytest.raises(UndecodableImage, match=r"^too many pixels$"):  # the stored size counts, not the reduced one
        decode(saved(photo(1, 400, 300)), min_side=16, max_pixels=119_999)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (40, 24), "white")
    upright.paste("red", (0, 0, 20, 12))  # top left
    upright.paste("blue", (20, 12, 40, 24))  # bottom right
    upright.paste("black", (20, 0, 40, 12))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores the image as the tag says
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(saved(stored, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "WEBP") else {})))
    assert image.size == (40, 24)
    assert [tuple(c > 128 for c in image.getpixel(at)) for at in ((4, 4), (36, 20), (36, 4), (4, 20))] == [
        (True, False, False),
        (False, False, True),
        (False, False, False),
        (True, True, True),
    ]


def test_a_broken_exif_block_does_not_spoil_the_pixels() -> None:
    data = saved(photo(4), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert decode(data).size == (96, 72)


def test_transparency_is_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    for data in (saved(clear, "PNG"), saved(clear, "WEBP", lossless=True), saved(palette, "GIF", transparency=1)):
        image = decode(data)
        assert (image.getpixel((0, 0)), image.getpixel((7, 7))) == ((0, 0, 255), (255, 255, 255))


def test_modes_become_rgb() -> None:
    grey = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    deep = np.asarray(decode(saved(Image.fromarray(grey), "PNG")))
    assert (deep[..., 0] == grey >> 8).all() and (deep[..., 1] == deep[..., 2]).all()
    for mode in ("1", "L", "LA", "CMYK", "RGBA", "P"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert decode(saved(Image.new("RGB", (8, 8), "white").convert(mode), kind)).getpixel((3, 3)) == (255, 255, 255)


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        red, _, blue = decode(data).getpixel((8, 8))
        assert red > 200 and blue < 60


@pytest.mark.parametrize(
    ("min_side", "size"), [(None, (800, 600)), (601, (800, 600)), (150, (200, 150)), (64, (100, 75))]
)
def test_jpegs_are_reduced_while_decoding_but_not_below_the_side_wanted(min_side: int, size: tuple[int, int]) -> None:
    assert decode(saved(photo(5, 800, 600)), min_side).size == size


def test_several_pictures_in_one_jpeg_file_are_a_jpeg() -> None:
    file = io.BytesIO()
    photo(6).save(file, "MPO", save_all=True, append_images=[photo(7)])
    assert image_size(file.getvalue()) == (96, 72, "jpeg")
    assert decode(file.getvalue()).size == (96, 72)

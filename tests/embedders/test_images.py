import io
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from embedders import images
from embedders.images import UndecodableImage, decode, decode_picture, image_size
from tests.embedders.images_for_tests import (
    BLUE,
    GREEN,
    RED,
    cmyk_profile,
    exif,
    gif_file,
    gif_frame,
    grey_profile,
    photo,
    png_file,
    rgb_profile,
    saved,
    stored_as,
    tiff_file,
    turned_upright,
)

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
REASONS = {
    "unknown image format",
    "truncated",
    "corrupt",
    "too many pixels",
    "too many scans",
    "unsupported sample format",
}


def pixels(data: bytes, min_side: int | None = None) -> np.ndarray:
    return np.asarray(decode(data, min_side))


def outcome(read: Callable[[bytes], object], data: bytes) -> str:
    try:
        read(data)
    except UndecodableImage as error:
        return str(error)
    return "decoded"


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
    "data",
    [
        b"",
        b"\xff",
        b"<html>not found</html>",
        b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\0\0\0\0WEBP",
        b"II*\0",
        b"\0\0\0\x1cftypavif\0\0\0\0",
        np.random.default_rng(0).bytes(5000),
    ],
)
def test_what_is_no_image_has_a_reason_without_addresses(data: bytes) -> None:
    for read in (decode, image_size):
        with pytest.raises(UndecodableImage) as caught:
            read(data)
        assert str(caught.value) in ("unknown image format", "truncated", "corrupt")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("min_side", [None, 8])
def test_truncated_files_are_refused_wherever_they_end(kind: str, min_side: int | None) -> None:
    data = saved(photo(2), kind)
    whole = pixels(data, min_side)
    for percent in range(0, 100, 3):
        cut = data[: len(data) * percent // 100]
        assert outcome(lambda x: decode(x, min_side), cut) in REASONS, percent
    for missing in range(1, 9):  # what only ends the file may be missing, and no pixel changes
        cut = data[:-missing]
        assert outcome(lambda x: decode(x, min_side), cut) in REASONS or (pixels(cut, min_side) == whole).all()


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
    assert {"decoded"} < outcomes <= {"decoded"} | REASONS


def test_pixels_are_limited_by_the_header() -> None:
    data = png_file(20_000, 6_000, 8, 2)
    assert image_size(data) == (20_000, 6_000, "png")
    with pytest.raises(UndecodableImage, match=r"^too many pixels$"):
        decode(data)
    with pytest.raises(UndecodableImage, match=r"^too many pixels$"):
        image_size(png_file(60_000, 60_000, 8, 2))
    image = saved(photo(1, 40, 25), "PNG")
    assert decode(image, max_pixels=1000).size == (40, 25)
    with pytest.raises(UndecodableImage, match=r"^too many pixels$"):
        decode(image, max_pixels=999)
    with pytest.raises(UndecodableImage, match=r"^too many pixels$"):  # the stored size counts, not the reduced one
        decode(saved(photo(1, 400, 300)), min_side=16, max_pixels=119_999)


def huge_webp(side: int) -> bytes:
    size = struct.pack("<I", side - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + size + size
    body += b"VP8L" + struct.pack("<I", 20) + b"\x2f" + bytes(19)
    return b"RIFF" + struct.pack("<I", len(body)) + body


BLACK, DOT = bytes(6), gif_frame(0, 0, np.zeros((1, 1), np.uint8))
BOMBS = {
    "PNG": png_file(100_000, 100_000, 8, 2),
    "GIF": gif_file(65_535, 65_535, BLACK, DOT),
    "GIF by its frame": gif_file(1, 1, BLACK, gif_frame(65_000, 65_000, np.zeros((1, 1), np.uint8))),
    "WebP": huge_webp(16_383),
    "TIFF": tiff_file(100_000, 100_000, [8], 1, b""),
    "TIFF by its tiles": tiff_file(16, 16, [8], 1, b"", t322=[2**31], t323=[2**31]),
    "BMP": saved(photo(1, 8, 8), "BMP").replace(struct.pack("<ii", 8, 8), struct.pack("<ii", 100_000, 100_000)),
    "JPEG": saved(photo(1, 8, 8)).replace(b"\x00\x08\x00\x08", b"\xff\xdc\xff\xdc"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_files_that_claim_to_be_huge_are_refused(kind: str) -> None:
    with pytest.raises(UndecodableImage, match=r"^too many pixels$"):
        decode(BOMBS[kind])


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (65_535, 1), (1, 65_535)])
def test_very_small_and_very_long_images_decode(size: tuple[int, int]) -> None:
    stripes = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for kind in ("PNG", "TIFF", "BMP"):
        assert (pixels(saved(Image.fromarray(stripes), kind)) == stripes).all()
    if max(size) < 65_500:  # the most that a JPEG encoder takes
        assert decode(saved(Image.fromarray(stripes)), min_side=512).size == size


# --- PNG: every kind of sample, against arithmetic on the samples themselves


def packed(samples: np.ndarray, depth: int) -> list[bytes]:
    """Rows of samples [H, W, C] as PNG stores them."""
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in samples]
    shifts = depth * np.arange(8 // depth)[::-1]
    flat = samples.reshape(len(samples), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % (8 // depth))))
    return [(row.reshape(-1, 8 // depth) << shifts).sum(axis=1).astype(np.uint8).tobytes() for row in flat]


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colour [H, W, 3] of 0 to 255 where alpha [H, W, 1] of 0 to 255 lets it be seen, over a white page."""
    return np.rint((colour * alpha + 255.0 * (255 - alpha)) / 255).astype(int)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_grey_png_files(depth: int, transparent: bool) -> None:
    white = 2**depth - 1
    samples = np.random.default_rng(depth).integers(0, white + 1, (5, 13, 1))
    samples[0, :4, 0] = [0, white, white // 2, white // 3]
    clear = int(samples[0, 3, 0])
    chunks = [(b"tRNS", struct.pack(">H", clear))] if transparent else []
    grey = samples >> 8 if depth == 16 else samples * 255 // white
    expected = np.where(samples == clear, 255, grey) if transparent else grey
    found = pixels(png_file(13, 5, depth, 0, packed(samples, depth), chunks))
    np.testing.assert_array_equal(found, expected.repeat(3, axis=2))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour", [2, 4, 6])
def test_colour_and_alpha_png_files(depth: int, colour: int) -> None:
    bands = {2: 3, 4: 2, 6: 4}[colour]
    samples = np.random.default_rng(depth + colour).integers(0, 2**depth, (7, 9, bands))
    eight = samples >> (depth - 8)
    alpha = eight[..., -1:] if colour != 2 else np.full((7, 9, 1), 255)
    seen = eight[..., :1].repeat(3, axis=2) if colour == 4 else eight[..., :3]
    found = pixels(png_file(9, 7, depth, colour, packed(samples, depth)))
    np.testing.assert_array_equal(found, over_white(seen, alpha))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_of_png_files(depth: int) -> None:
    samples = np.random.default_rng(depth).integers(0, 2**depth, (4, 6, 3))
    chunk = (b"tRNS", struct.pack(">3H", *(int(v) for v in samples[2, 3])))
    expected = samples >> (depth - 8)
    expected[2, 3] = 255
    np.testing.assert_array_equal(pixels(png_file(6, 4, depth, 2, packed(samples, depth), [chunk])), expected)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("alphas", [0, 1, 2])
def test_palette_png_files(depth: int, alphas: int) -> None:
    draw = np.random.default_rng(depth)
    palette, alpha = draw.integers(0, 256, (2**depth, 3)), np.full(2**depth, 255)
    alpha[:alphas] = [0, 77][:alphas]
    samples = draw.integers(0, 2**depth, (6, 11, 1))
    chunks = [(b"PLTE", palette.astype(np.uint8).tobytes())]
    chunks += [(b"tRNS", alpha[:alphas].astype(np.uint8).tobytes())] if alphas else []
    found = pixels(png_file(11, 6, depth, 3, packed(samples, depth), chunks))
    np.testing.assert_array_equal(found, over_white(palette[samples[..., 0]], alpha[samples[..., 0], None]))


GREY_ROWS = [bytes([5, 50, 95])]
SWOLLEN = zlib.compress(bytes(80_000_000), 9)


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"comment\0\0" + SWOLLEN),
        (b"iTXt", b"comment\0\1\0\0\0" + SWOLLEN),
        (b"iCCP", b"profile\0\0" + SWOLLEN),
        (b"iCCP", b"profile\0\0broken"),
        (b"iCCP", b"profile"),
        (b"pHYs", b"1"),
        (b"gAMA", b"1"),
        (b"fcTL", b"1"),
        (b"eXIf", b"Exif" + bytes(100_000)),
        (b"prIv", bytes(100_000)),
    ],
)
def test_metadata_does_not_spoil_a_png(chunk: tuple[bytes, bytes]) -> None:
    for place in ("before", "after"):
        data = png_file(3, 1, 8, 0, GREY_ROWS, **{place: [chunk]})
        assert image_size(data) == (3, 1, "png")
        assert pixels(data)[0, :, 1].tolist() == [5, 50, 95], place


def test_broken_checksums_of_texts_do_not_spoil_a_png() -> None:
    data = png_file(3, 1, 8, 0, GREY_ROWS, [(b"tEXt", b"a\0bcd")])
    assert pixels(data.replace(b"\0bcd", b"\0bce"))[0, :, 1].tolist() == [5, 50, 95]


# --- TIFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff_file(2, 1, [16], 1, struct.pack("<2H", 0x1234, 0xFF00)), [[0x12] * 3, [0xFF] * 3]),
        (tiff_file(2, 1, [16], 1, struct.pack(">2H", 0x1234, 0xFF00), ">"), [[0x12] * 3, [0xFF] * 3]),
        (tiff_file(2, 1, [16], 0, struct.pack("<2H", 0x1234, 0xFF00)), [[0xED] * 3, [0] * 3]),
        (tiff_file(2, 1, [12], 1, bytes([0x12, 0x3F, 0xF0])), [[0x12] * 3, [0xFF] * 3]),
        (tiff_file(2, 1, [16] * 3, 2, struct.pack("<6H", 0x1234, 256, 255, 0xFFFF, 0, 1)), [[0x12, 1, 0], [255, 0, 0]]),
        (tiff_file(1, 1, [16] * 4, 5, struct.pack("<4H", 0x1234, 0x8000, 0xFF00, 0)), [[255 - 0x12, 127, 0]]),
        (tiff_file(2, 1, [8] * 2, 1, bytes([100, 255, 50, 128]), t338=[2]), [[100] * 3, [152] * 3]),
        (tiff_file(2, 1, [8] * 2, 1, bytes([100, 255, 50, 128]), t338=[1]), [[100] * 3, [177] * 3]),  # premultiplied
        (tiff_file(2, 1, [8] * 4, 2, bytes([9, 0, 0, 255, 50, 0, 0, 128]), t338=[1]), [[9, 0, 0], [177, 127, 127]]),
        (tiff_file(2, 1, [1], 1, b"\x40"), [[0] * 3, [255] * 3]),
    ],
)
def test_deep_and_transparent_tiff_files(data: bytes, expected: list[list[int]]) -> None:
    assert pixels(data)[0].tolist() == expected


@pytest.mark.parametrize(("bits", "kind"), [(32, 3), (32, 2), (32, 1), (16, 2)])
def test_tiff_files_without_a_known_white_are_refused(bits: int, kind: int) -> None:
    data = tiff_file(2, 1, [bits], 1, struct.pack("<2f", 0.5, 1.0), t339=[kind])
    with pytest.raises(UndecodableImage, match=r"^unsupported sample format$"):
        decode(data)


def test_tiff_tags_of_the_wrong_kind_are_refused_not_multiplied() -> None:
    with pytest.raises(UndecodableImage):
        decode(tiff_file(16, 16, [8], 1, bytes(256), t322=b"abcdefgh", t323=[2**32 - 1]))


# --- CMYK


def test_cmyk_jpegs_are_inverted_as_adobe_writes_them() -> None:
    draw = np.random.default_rng(0)
    for _ in range(5):
        c, m, y, k = (int(v) for v in draw.integers(0, 256, 4))
        data = saved(Image.new("CMYK", (16, 16), (c, m, y, k)), quality=100)
        expected = [(255 - ink) * (255 - k) / 255 for ink in (c, m, y)]
        np.testing.assert_allclose(pixels(data)[8, 8], expected, atol=2)


def test_ycck_jpegs() -> None:
    """The same file, said to hold luma and chroma of inverted CMY: Adobe's marker has 2 in place of 0."""
    luma, blue, red, k = 120, 100, 150, 200
    data = saved(Image.new("CMYK", (16, 16), tuple(255 - v for v in (luma, blue, red, k))), quality=100)
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    data = data[:place] + b"\x02" + data[place + 1 :]
    rgb = [luma + 1.402 * (red - 128), luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128)]
    rgb.append(luma + 1.772 * (blue - 128))
    np.testing.assert_allclose(pixels(data)[8, 8], [(255 - v) * k / 255 for v in rgb], atol=3)


# --- EXIF orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG", "AVIF"])
def test_exif_orientation_gives_the_pixels_of_the_turned_image(kind: str, orientation: int) -> None:
    upright = np.asarray(photo(orientation, 41, 23))
    stored = Image.fromarray(stored_as(upright, orientation))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 90} if kind in ("JPEG", "AVIF") else {}
    found = pixels(saved(stored, kind, exif=exif(orientation), **options))
    if kind in ("PNG", "WEBP", "TIFF"):
        np.testing.assert_array_equal(found, upright)
    else:  # exactly what the file without orientation holds, turned
        np.testing.assert_array_equal(turned_upright(pixels(saved(stored, kind, **options)), orientation), found)
        assert np.abs(found.astype(int) - upright).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(401, 307), (400, 304), (333, 511)])
def test_reduced_jpegs_are_turned_after_reducing(orientation: int, size: tuple[int, int]) -> None:
    image = photo(1, *size)
    plain, turned = saved(image), saved(image, exif=exif(orientation))
    for min_side in (40, 90, 170):
        np.testing.assert_array_equal(pixels(turned, min_side), turned_upright(pixels(plain, min_side), orientation))


def test_a_broken_exif_block_does_not_spoil_the_pixels() -> None:
    data = saved(photo(4), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert decode(data).size == (96, 72)


def test_orientation_in_xmp_is_ignored_as_by_browsers() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
    assert decode(saved(photo(4), "JPEG", xmp=xmp)).size == (96, 72)


def test_much_exif_is_no_trouble() -> None:
    data = saved(photo(4), "JPEG")
    segment = (b"\xff\xe1\xff\xf0Exif\0\0MM\0*\0\0\0\x08").ljust(2 + 0xFFF0, b"\0")
    assert decode(data[:2] + 40 * segment + data[2:]).size == (96, 72)


# --- transparency, frames


def test_transparency_is_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    for data in (
        saved(clear, "PNG"),
        saved(clear, "WEBP", lossless=True),
        saved(palette, "GIF", transparency=1),
        saved(clear, "AVIF", quality=100, subsampling="4:4:4"),
    ):
        image = np.asarray(decode(data), dtype=int)
        assert np.abs(image[[0, 7], [0, 7]] - [[0, 0, 255], [255, 255, 255]]).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_half_transparent_pixels_are_mixed_with_white(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = pixels(saved(Image.fromarray(values), kind, **options))
    np.testing.assert_array_equal(found, over_white(values[..., :3].astype(int), values[..., 3:].astype(int)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "RGBA", "P"])
def test_white_is_white_in_every_mode(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode(saved(Image.new("RGB", (8, 8), "white").convert(mode), kind)).getpixel((3, 3)) == (255, 255, 255)


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        red, _, blue = decode(data).getpixel((8, 8))
        assert red > 200 and blue < 60


PALETTE = np.array([[200, 0, 0], [0, 180, 0], [0, 0, 160], [90, 90, 90]], dtype=np.uint8)


@pytest.mark.parametrize("transparent", [None, 0, 2])
@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_first_gif_frames_that_fill_a_part_of_the_page(transparent: int | None, disposal: int) -> None:
    draw = np.random.default_rng(0)
    first, second = draw.integers(0, 4, (12, 20), dtype=np.uint8), draw.integers(0, 4, (30, 40), dtype=np.uint8)
    frame = gif_frame(7, 5, first, transparent, disposal)
    expected = np.full((30, 40, 3), 255)
    expected[5:17, 7:27] = np.where((first == transparent)[..., None], 255, PALETTE[first])
    for data in (
        gif_file(40, 30, PALETTE.tobytes(), frame),
        gif_file(40, 30, PALETTE.tobytes(), frame, gif_frame(0, 0, second)),
        gif_file(40, 30, bytes(12), gif_frame(7, 5, first, transparent, disposal, PALETTE.tobytes())),
    ):
        np.testing.assert_array_equal(pixels(data), expected)


def test_grey_gif_frames_that_fill_a_part_of_the_page() -> None:
    """A palette whose colours are their own indices is read in another mode."""
    grey = np.arange(4, dtype=np.uint8).repeat(3)
    data = gif_file(3, 1, grey.tobytes(), gif_frame(1, 0, np.array([[2]], np.uint8)))
    assert pixels(data).tolist() == [[[255] * 3, [2] * 3, [255] * 3]]


# --- colour profiles


def srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light of 0 to 1 to sRGB levels (IEC 61966-2-1)."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


WIDE_GREEN = (0.1851, 0.7169, 0.0471)
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def by_hand(levels: np.ndarray, curve: float, green: tuple[float, float, float] = GREEN) -> np.ndarray:
    """Levels [..., 3] under rgb_profile to sRGB: curve, to XYZ, to linear sRGB, clipped, curve."""
    to_xyz, from_xyz = np.array([RED, green, BLUE]), np.linalg.inv(np.array([RED, GREEN, BLUE]))
    return srgb(np.clip((levels / 255) ** curve @ to_xyz @ from_xyz, 0, 1))


@pytest.mark.parametrize(("curve", "green"), [(1.0, GREEN), (1.8, GREEN), (2.2, WIDE_GREEN)])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_colours_are_brought_to_srgb(kind: str, curve: float, green: tuple[float, float, float]) -> None:
    profile = rgb_profile(curve, green=green)
    options = {"lossless": True} if kind == "WEBP" else {}
    found = pixels(saved(Image.fromarray(COLOURS), kind, icc_profile=profile, **options))
    expected = by_hand(COLOURS, curve, green)
    assert np.abs(expected - COLOURS).mean() > 5
    np.testing.assert_allclose(found, expected, atol=2.5)


def test_profiles_of_jpeg_grey_and_transparent_images() -> None:
    profile = rgb_profile(1.0)
    plain, profiled = (saved(photo(1), quality=95, **o) for o in ({}, {"icc_profile": profile}))
    np.testing.assert_allclose(pixels(profiled), by_hand(pixels(plain), 1.0), atol=2.5)
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for each, curve in ((profile, 1.0), (grey_profile(1.8), 1.8)):
        found = pixels(saved(Image.fromarray(levels), "PNG", icc_profile=each))
        np.testing.assert_allclose(found, srgb((levels[..., None] / 255) ** curve).repeat(3, axis=2), atol=2.5)
    seen, alpha = COLOURS, np.random.default_rng(1).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    found = pixels(saved(Image.fromarray(np.dstack([seen, alpha])), "PNG", icc_profile=profile))
    np.testing.assert_allclose(found, over_white(by_hand(seen, 1.0), alpha.astype(int)), atol=2.5)


def test_profiles_of_printing_presses() -> None:
    """The inks of this press are all grey, which no arithmetic without the profile knows."""
    for inks in ((255, 0, 0, 0), (60, 90, 120, 90)):
        image = Image.new("CMYK", (16, 16), inks)
        lightness = 100 * (1 - sum(inks) / 1020)
        grey = srgb(np.array(((lightness + 16) / 116) ** 3))
        found = pixels(saved(image, quality=100, icc_profile=cmyk_profile()))
        np.testing.assert_allclose(found[8, 8], [grey] * 3, atol=2.5)
        assert np.ptp(pixels(saved(image, quality=100))[8, 8]) > 30


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    "profile",
    [
        srgb_profile(),
        b"",
        b"no profile",
        rgb_profile(1.0)[:200],
        np.random.default_rng(0).bytes(3000),
        cmyk_profile(),
        grey_profile(1.0),
        rgb_profile(1.0) + bytes(images.MAX_PROFILE_BYTES),
    ],
)
def test_profiles_that_are_srgb_broken_too_large_or_for_other_images_change_nothing(profile: bytes) -> None:
    data = saved(Image.fromarray(COLOURS), "TIFF", icc_profile=profile)
    np.testing.assert_array_equal(pixels(data), COLOURS)


def test_damaged_profiles_do_not_matter() -> None:
    draw = np.random.default_rng(0)
    for profile in (rgb_profile(1.0), cmyk_profile()):
        image = Image.fromarray(COLOURS).convert("CMYK" if profile == cmyk_profile() else "RGB")
        for _ in range(60):
            damaged = bytearray(profile)
            for place in draw.integers(0, len(profile) if draw.random() < 0.5 else 250, 4):
                damaged[place] = draw.integers(0, 256)
            assert pixels(saved(image, "TIFF", icc_profile=bytes(damaged))).shape == (8, 8, 3)


def test_threads_share_profiles() -> None:
    profile = rgb_profile(1.0)
    files = [saved(photo(n, 200, 150), icc_profile=profile) for n in range(12)]
    with ThreadPoolExecutor(4) as threads:
        for one, other in zip(threads.map(pixels, files), map(pixels, files), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("profile", [rgb_profile(1.0), cmyk_profile()])
def test_decoded_images_tell_of_no_other_profile_or_orientation(profile: bytes) -> None:
    image = decode(saved(photo(1), exif=exif(6), icc_profile=profile))
    assert image.size == (72, 96) and "exif" not in image.info
    np.testing.assert_array_equal(pixels(saved(image, "PNG")), np.asarray(image))


def test_colours_of_srgb_cost_nothing() -> None:
    for profile in (srgb_profile(), rgb_profile(1.0)):
        picture = decode_picture(saved(photo(1), icc_profile=profile))
        assert (picture.transform is None) == (profile == srgb_profile())


# --- JPEG


@pytest.mark.parametrize(
    ("min_side", "size"), [(None, (800, 600)), (601, (800, 600)), (150, (200, 150)), (64, (100, 75))]
)
def test_jpegs_are_reduced_while_decoding_but_not_below_the_side_wanted(min_side: int, size: tuple[int, int]) -> None:
    assert decode(saved(photo(5, 800, 600)), min_side).size == size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_box_of_a_reduced_jpeg_is_the_picture(orientation: int) -> None:
    """Its last column and row are the mean of less than 8 pixels and padding, wherever the turn brings them."""
    picture = decode_picture(saved(photo(5, 801, 604), exif=exif(orientation)), 64)
    width, height = (75.5, 100.125) if orientation >= 5 else (100.125, 75.5)
    left, top = (0.875 if orientation < 5 else 0.5), (0.5 if orientation < 5 else 0.875)
    left, top = left * (orientation in (2, 3, 6, 7)), top * (orientation in (3, 4, 7, 8))
    assert picture.image.size == ((76, 101) if orientation >= 5 else (101, 76))
    assert picture.box == (left, top, left + width, top + height)


def test_several_pictures_in_one_jpeg_file_are_a_jpeg() -> None:
    file = io.BytesIO()
    photo(6, 400, 300).save(file, "MPO", save_all=True, append_images=[photo(7)])
    assert image_size(file.getvalue()) == (400, 300, "jpeg")
    np.testing.assert_array_equal(pixels(file.getvalue()), pixels(saved(photo(6, 400, 300))))
    assert decode(file.getvalue(), min_side=64).size == (100, 75)


def test_jpegs_with_very_many_scans_are_refused() -> None:
    data = saved(photo(1), progressive=True)
    last = data.rindex(b"\xff\xda")
    more = [data[:-2] + count * data[last:-2] + data[-2:] for count in (80, 5000)]
    assert decode(more[0]).size == (96, 72)
    with pytest.raises(UndecodableImage, match=r"^too many scans$"):
        decode(more[1])


def test_restart_markers_are_no_trouble() -> None:
    data = saved(photo(1), restart_marker_blocks=1)
    np.testing.assert_array_equal(pixels(data), pixels(saved(photo(1))))
    place = data.index(b"\xff\xdd") + 4
    assert outcome(decode, data[:place] + b"\xff\xff" + data[place + 2 :]) in {"decoded"} | REASONS


# --- memory

PEAK = """
    import resource, sys
    from pathlib import Path
    from embedders.images import UndecodableImage, decode

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    pixels, warm, *files = sys.argv[1:]
    decode(Path(warm).read_bytes())
    before = peak()
    for file in files:
        try:
            decode(Path(file).read_bytes(), max_pixels=int(pixels))
        except UndecodableImage:
            pass
        print(Path(file).name, peak() - before)
"""


def tile_bomb(side: int) -> bytes:
    """16 x 16 pixels in a tile that inflates to side x side."""
    tile = zlib.compress(bytes(side * side * 4), 9)
    return tiff_file(
        16, 16, [8] * 4, 2, tile, t259=[8], t322=[side], t323=[side], t324=[4096], t325=[len(tile)], t338=[2]
    )


def test_memory_is_bounded_by_the_pixels_allowed(tmp_path: Path) -> None:
    """24 bytes a pixel, as the module promises; 20 megabytes are for what differs between two runs."""
    side = 2000
    noise = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 4), dtype=np.uint8)
    image = Image.fromarray(noise).resize((side, side))
    profile = rgb_profile(1.0)
    files = {
        "webp": saved(image, "WEBP", method=0, exif=exif(6), icc_profile=profile),
        "png": saved(image, "PNG", compress_level=1, exif=exif(6), icc_profile=profile),
        "jpeg": saved(image.convert("CMYK"), progressive=True, subsampling=0, exif=exif(6), icc_profile=cmyk_profile()),
        "gif": gif_file(side, side, BLACK, DOT),
        "tile": tile_bomb(side),
        "larger_tile": tile_bomb(10_000),
        "text": png_file(3, 1, 8, 0, GREY_ROWS, [(b"zTXt", b"a\0\0" + SWOLLEN)] * 20),
    }
    (tmp_path / "warm").write_bytes(saved(photo(1)))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    arguments = [str(side * side), *(str(tmp_path / name) for name in ("warm", *files))]
    command = [sys.executable, "-c", textwrap.dedent(PEAK), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = {name: int(peak) for name, peak in map(str.split, run.stdout.splitlines())}
    assert peaks.keys() == files.keys()
    for name, peak in peaks.items():
        assert peak < 24 * side * side + 20e6 + 2 * max(map(len, files.values())), name

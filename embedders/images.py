"""Decoding of hostile bytes with Pillow: size from the header, upright RGB pixels, one error for all that is wrong."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

DEFAULT_MAX_PIXELS = 100_000_000
"""Pixels an image may have; checked on the header, before any pixel is decoded."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns of broken metadata and of sizes below its own limit (an error from twice Image.MAX_IMAGE_PIXELS, 179 M,
# on): both are common on the web, and what matters becomes an UndecodableImage.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UndecodableImage(ValueError):  # noqa: N818 (reads as what it says of the image)
    """The bytes are not an image that can be used; the message is a short reason, the same for the same defect."""


class TooManyPixels(UndecodableImage):
    """The header states more pixels than are allowed."""


def image_size(data: bytes) -> tuple[int, int, str]:
    """Width, height (as stored, before EXIF orientation) and lower-case format, from the header only.

    Raises:
        UndecodableImage: not one of the common formats, a broken header, or more pixels than Pillow opens (179 M).
    """
    with _one_error(), _open(data) as image:
        # A multi-picture file (MPO) is a JPEG file with further pictures behind the first.
        kind = "jpeg" if image.format == "MPO" else str(image.format).lower()
        return image.width, image.height, kind


def decode(data: bytes, min_side: int | None = None, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """All pixels of an image (of an animation, the first frame) as RGB, upright by EXIF, transparency over white.

    White is what a page shows behind most transparent images, and what their invisible pixels hold is arbitrary.
    16-bit grey keeps its upper 8 bits.

    Args:
        data: bytes of a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file.
        min_side: if given, a JPEG may be decoded at 1/2, 1/4 or 1/8 as long as neither side falls below this many
            pixels: several times faster where only a small version is wanted.
        max_pixels: width x height allowed, as the header states them.

    Raises:
        UndecodableImage: unknown format, too many pixels, truncated or corrupt data.
    """
    with _one_error(), _open(data) as image:
        if image.width * image.height > max_pixels:
            raise TooManyPixels("too many pixels")
        if min_side is not None:
            image.draft("RGB", (min_side, min_side))
        image.load()
        return _to_rgb(_upright(image))


@contextmanager
def _one_error() -> Iterator[None]:
    """Everything that Pillow's parsers raise, as UndecodableImage. Running out of memory is not the image's fault."""
    try:
        yield
    except (UndecodableImage, MemoryError):
        raise
    except UnidentifiedImageError:  # its message holds the address of a buffer
        raise UndecodableImage("unknown image format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooManyPixels("too many pixels") from None
    except Exception as error:  # parsers also raise SyntaxError, struct.error, zlib.error, EOFError, KeyError, ...
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise UndecodableImage("truncated" if truncated else "corrupt") from None


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a broken EXIF block does not spoil the pixels
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")

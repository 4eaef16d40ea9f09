"""Decoding of hostile bytes with Pillow: size from the header, upright sRGB pixels, one error for all that is wrong.

The pixels are those that a browser shows on a white page. Known exceptions:
- of a file that ends too early nothing is shown, it is refused;
- brightness curves outside a colour profile (gAMA and cHRM of PNG, PQ and HLG of AVIF) are not applied;
- TIFF files, which few browsers show, are read if their samples have 1 to 16 bits; floats have no known white;
- of samples of 16 bits the upper 8 count.

Memory stays below 24 bytes for each of the `max_pixels` allowed (JPEG: 13) and 100 MB, beside the file itself. Only an
AVIF file that lies about its size can take more: up to 2 GB.
"""

import io
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import AvifImagePlugin, Image, ImageCms, ImageFile, UnidentifiedImageError

DEFAULT_MAX_PIXELS = 100_000_000
"""Pixels an image may have; checked on the header, before any pixel is decoded."""
MAX_SCANS = 100
"""Passes over its pixels that one JPEG file may ask for; encoders write about ten."""
MAX_PROFILE_BYTES = 2_000_000
"""Size up to which colour profiles are applied. Those of screens have a few kB, those of printing presses 1 MB."""
SAME_COLOUR = 2
"""A profile that moves no colour by more levels, of 255, is taken for sRGB."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"IDAT", b"IEND"}
_PNG_PROFILE_BYTES = 1_000_000  # Pillow refuses a PNG file for a profile that inflates to more than 2^20
_TIFF_BITS, _TIFF_MEANING, _TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 258, 262, 322, 323
_WHITE_IS_ZERO = 0

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

_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_PROFILED_MODES = {"RGB ": ("RGB", "RGBA"), "GRAY": ("L",), "CMYK": ("CMYK",)}

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # callers have threads of their own; one for each core and image is slower

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
    Colours are brought from an embedded profile to sRGB, as browsers do; a broken profile is ignored.

    Args:
        data: bytes of a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file.
        min_side: if given, a JPEG may be decoded at 1/2, 1/4 or 1/8 as long as neither side falls below this many
            pixels: several times faster where only a small version is wanted.
        max_pixels: width x height allowed, as the header states them.

    Raises:
        UndecodableImage: unknown format, too many pixels, truncated or corrupt data, samples of unknown meaning.
    """
    picture = decode_picture(data, min_side, max_pixels)
    return picture.in_srgb(picture.image)


def decode_picture(
    data: bytes, min_side: int | Callable[[int, int], int] | None = None, max_pixels: int = DEFAULT_MAX_PIXELS
) -> "Picture":
    """What `decode` gives, for those who resize it: with the exact box, and colours still to be brought to sRGB.

    Args:
        data, max_pixels: as for `decode`.
        min_side: as for `decode`, or what names it for the width and height of an image (of a JPEG, when upright).

    Raises:
        UndecodableImage: as `decode`.
    """
    with _one_error():
        image = _open(data)
        _refuse_bombs(image, data, max_pixels)
        upright = image.size if _orientation(image) < 5 else image.size[::-1]
    side = min_side(*upright) if callable(min_side) else min_side  # its errors are not the image's
    with _one_error(), image:
        frame = image.tile[0].extents if image.format == "GIF" else None
        whole = image.width
        reduced = image.draft("RGB", (side, side)) if side is not None else None
        width, height = reduced[1][2:] if reduced is not None else image.size
        image.load()
        orientation = _orientation(image)
        pixels, transform = _opaque(image)
        if frame not in (None, (0, 0, *image.size)):
            pixels = _framed(pixels, frame)
        pixels.info = {}  # tells of the file: its profile and orientation are no longer those of the pixels
        return Picture(*_upright(pixels, width, height, orientation), transform, round(whole / width))


@dataclass(frozen=True)
class Picture:
    """Upright, opaque pixels whose colours may still be those of an embedded profile.

    Attributes:
        image: RGB or L, or CMYK where a profile says what it means.
        box: where in the image the picture lies. Of 1001 pixels half size makes 501, of which the last holds one pixel
            and padding, so the picture is 500.5 wide. Who resizes the box and not the whole image shifts nothing.
        transform: from the profile to sRGB; None where the colours are those of sRGB.
        reduction: 1, 2, 4 or 8, pixels of the file that lie along a side of one of these.
    """

    image: Image.Image
    box: Box
    transform: ImageCms.ImageCmsTransform | None
    reduction: int

    def in_srgb(self, image: Image.Image) -> Image.Image:
        """RGB of an image made from this one. It takes longer than decoding, for each pixel, so resize before."""
        if self.transform is None:
            return _converted(image, "RGB")
        return self.transform.apply(_converted(image, self.transform.input_mode))


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


def _open(data: bytes) -> ImageFile.ImageFile:
    """The image by its header. PNG: without texts and animation, for whose defects and size Pillow refuses the file."""
    if data.startswith(_PNG_SIGNATURE):
        data = _still_png(data)
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.format == "PNG":
        _rescale_transparent_colour(image)
    return image


def _still_png(data: bytes) -> bytes:
    """A PNG file reduced to the chunks that decide its still image. What is no chunk stays, at the end."""
    view, at = memoryview(data), len(_PNG_SIGNATURE)
    kept = [view[:at]]
    while len(data) >= at + 12:
        end = at + 12 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        if name in _PNG_CHUNKS and (name != b"iCCP" or _inflates_little(data[at + 8 : end - 4])):
            kept.append(view[at:end])
        at = end
    return b"".join([*kept, view[at:]])


def _inflates_little(profile: bytes) -> bool:
    """Whether the body of an iCCP chunk (name, 0, 0, deflated profile) inflates, and to no more than is allowed."""
    _, _, body = profile.partition(b"\0")
    inflate = zlib.decompressobj()
    try:
        inflate.decompress(body[1:], _PNG_PROFILE_BYTES)
    except zlib.error:
        return False
    return body[:1] == b"\0" and not inflate.unconsumed_tail


def _rescale_transparent_colour(image: ImageFile.ImageFile) -> None:
    """Pillow leaves a PNG's transparent colour in the units of the file, but stretches or cuts samples to 8 bits."""
    colour, stored = image.info.get("transparency"), image.tile[0].args
    if colour is not None and stored == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif colour is not None and stored in ("L;2", "L;4"):
        white = 3 if stored == "L;2" else 15
        image.info["transparency"] = (colour & white) * (255 // white)


def _refuse_bombs(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Raises where decoding would take memory or time out of proportion to what is allowed."""
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(_TIFF_TILE_WIDTH, 0), tags.get(_TIFF_TILE_LENGTH, 0)
    if not all(isinstance(side, int) for side in tile):
        raise UndecodableImage("corrupt")
    if image.width * image.height > max_pixels or tile[0] * tile[1] > max_pixels:
        raise TooManyPixels("too many pixels")
    if image.format in ("JPEG", "MPO"):
        values = np.frombuffer(data, np.uint8)
        scans = np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA))  # never within compressed data
        if scans > MAX_SCANS:
            raise UndecodableImage("too many scans")


def _orientation(image: Image.Image) -> int:
    """From EXIF alone, as browsers do, not from XMP; 1 is upright. Pillow turns TIFF files itself."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        orientation = exif.get(_ORIENTATION_TAG)
        return int(orientation) if orientation in _UPRIGHT else 1
    except Exception:  # a broken EXIF block does not spoil the pixels
        return 1


def _upright(image: Image.Image, width: float, height: float, orientation: int) -> tuple[Image.Image, Box]:
    """The image turned, and where in it the picture lies that was `width` x `height` from its upper left corner."""
    if orientation == 1:
        return image, (0, 0, width, height)
    image = image.transpose(_UPRIGHT[orientation])
    if orientation >= 5:
        width, height = height, width
    left = image.width - width if orientation in (2, 3, 6, 7) else 0
    top = image.height - height if orientation in (3, 4, 7, 8) else 0
    return image, (left, top, left + width, top + height)


def _framed(image: Image.Image, frame: tuple[int, int, int, int]) -> Image.Image:
    """The part of a GIF's page that its first frame fills; nothing is drawn around it."""
    page = Image.new("RGB", image.size, "white")
    page.paste(image.crop(frame), frame[:2])
    return page


def _opaque(image: Image.Image) -> tuple[Image.Image, ImageCms.ImageCmsTransform | None]:
    """Pixels of any mode as a Picture has them, over white, and the transform of their colours to sRGB."""
    if image.mode in ("I", "F"):
        raise UndecodableImage("unsupported sample format")
    profile = image.info.get("icc_profile")
    image = _plain_mode(image)
    usable = isinstance(profile, bytes) and len(profile) <= MAX_PROFILE_BYTES
    transform = _to_srgb(profile, image.mode) if usable else None
    if image.mode == "RGBA":
        page = Image.new("RGB", image.size, "white")
        image = image if transform is None else transform.apply(image)
        page.paste(image, mask=image)
        return page, None
    if image.mode == "CMYK" and transform is None:
        image = image.convert("RGB")
    return image, transform


def _plain_mode(image: Image.Image) -> Image.Image:
    """The same colours in mode L, RGB, RGBA or CMYK."""
    if image.mode.startswith("I;16"):
        return _upper_bits(image)
    if image.mode == "La":  # converts to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        return _converted(image, "RGBA")
    return image if image.mode in ("L", "CMYK") else _converted(image, "RGB")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """convert() without a copy where there is nothing to convert."""
    return image if image.mode == mode else image.convert(mode)


def _upper_bits(image: Image.Image) -> Image.Image:
    """Grey of 12 or 16 bits to 8, over white; convert() would cut it off at 255."""
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image)
    grey = (values >> (tags.get(_TIFF_BITS, (16,))[0] - 8)).astype(np.uint8)
    if tags.get(_TIFF_MEANING) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


@lru_cache(maxsize=32)  # building one takes as long as applying it; a few profiles stand in most files
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the colours of an ICC profile to sRGB, for images of a mode; alpha stays.

    None where nothing is to be done: the profile is sRGB to SAME_COLOUR, or broken, or not for such images.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "L" and source.profile.xcolor_space == "RGB ":  # common: grey photographs with a screen's profile
            mode = "RGB"
        if mode not in _PROFILED_MODES.get(source.profile.xcolor_space, ()):
            return None
        transform = ImageCms.ImageCmsTransform(source, _SRGB, mode, "RGBA" if mode == "RGBA" else "RGB")
    except (OSError, TypeError, ValueError):
        return None
    colours = np.indices((9, 9, 9), dtype=np.float32).reshape(3, 27, 27).transpose(1, 2, 0) * (255 / 8)
    before = Image.fromarray(colours.astype(np.uint8)).convert(mode)
    after = transform.apply(before)
    moved = np.asarray(after.convert("RGB"), dtype=int) - np.asarray(before.convert("RGB"), dtype=int)
    return transform if np.abs(moved).max() > SAME_COLOUR else None

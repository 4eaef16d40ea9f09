"""Small synthetic photographs, and files that Pillow does not write: odd PNG, GIF and TIFF files, colour profiles."""

import io
import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image


def photo(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    """Smooth colour, shapes and texture, so that JPEG and crops treat it as a photograph."""
    draw = np.random.default_rng(seed)
    layers = []
    for side in (3, 8, 20):
        noise = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        layers.append(np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), dtype=float))
    return Image.fromarray(np.clip(0.5 * layers[0] + 0.35 * layers[1] + 0.15 * layers[2], 0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def stored_as(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """How a file with this EXIF orientation stores pixels [H, W, 3] that are to be seen upright.

    EXIF names the sides of the picture that the stored first row and first column show: 6 is right and top.
    """
    swapped = pixels.transpose(1, 0, 2) if orientation >= 5 else pixels  # 5: left, top
    turned = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}.get(orientation, (1, 1))
    return np.ascontiguousarray(swapped[:: turned[0], :: turned[1]])


def turned_upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """The inverse of stored_as: two of the turns undo each other, the others themselves."""
    return stored_as(stored, {6: 8, 8: 6}.get(orientation, orientation))


def png_file(
    width: int,
    height: int,
    depth: int,
    colour: int,
    rows: Iterable[bytes] = (),
    before: Sequence[tuple[bytes, bytes]] = (),
    after: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """A PNG of packed rows, with chunks before and after them. Without rows it only claims its size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *before, (b"IDAT", packed)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in [*chunks, *after, (b"IEND", b"")])


def gif_frame(
    left: int, top: int, pixels: np.ndarray, transparent: int | None = None, disposal: int = 0, palette: bytes = b""
) -> bytes:
    """One frame of palette indices [H, W]. LZW with codes of 8 bits that never grow: cleared every 100 pixels."""
    height, width = pixels.shape
    flags = disposal << 2 | (transparent is not None)
    control = struct.pack("<BBBBHBB", 0x21, 0xF9, 4, flags, 0, transparent or 0, 0)
    codes = b"".join(b"\x80" + pixels.tobytes()[k : k + 100] for k in range(0, pixels.size, 100)) + b"\x81"
    blocks = b"".join(bytes([len(codes[k : k + 255])]) + codes[k : k + 255] for k in range(0, len(codes), 255))
    local = 0x80 | (len(palette) // 3).bit_length() - 2 if palette else 0
    return control + struct.pack("<BHHHHB", 0x2C, left, top, width, height, local) + palette + b"\7" + blocks + b"\0"


def gif_file(width: int, height: int, palette: bytes, *frames: bytes) -> bytes:
    """A GIF with a palette of 2, 4, 8, ... colours, of which the first is its background."""
    size = (len(palette) // 3).bit_length() - 2
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80 | size, 0, 0) + palette + b"".join(frames) + b";"


def tiff_file(
    width: int, height: int, bits: Sequence[int], meaning: int, data: bytes, order: str = "<", **tags: Sequence[int]
) -> bytes:
    """A TIFF of one strip. Further tags are named t338 and so on; those given as bytes have type BYTE."""
    strip = 4096
    values: dict[int, Sequence[int]] = {256: [width], 257: [height], 258: bits, 259: [1], 262: [meaning], 273: [strip]}
    values |= {277: [len(bits)], 278: [height], 279: [len(data)]} | {int(name[1:]): tag for name, tag in tags.items()}
    end = 8 + 2 + 12 * len(values) + 4
    directory, beyond = b"", b""
    for tag, numbers in sorted(values.items()):
        kind, letter = (1, "B") if isinstance(numbers, bytes) else (4, "I")
        packed = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(packed) > 4:
            packed, beyond = struct.pack(order + "I", end + len(beyond)), beyond + packed
        directory += struct.pack(order + "HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(values))
    return (head + directory + bytes(4) + beyond).ljust(strip, b"\0") + data


# Columns of the matrix from linear sRGB to XYZ at D50, as ICC profiles hold them.
RED, GREEN, BLUE = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)


def icc_profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2, of a space such as b"RGB "."""
    table, body, begin = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", begin + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    target = b"Lab " if b"A2B0" in tags else b"XYZ "
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s", begin + len(body), b"none", 0x02400000, kind, space, target) + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))


def gamma(value: float) -> bytes:
    """A brightness curve: linear = stored ** value."""
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def rgb_profile(
    curve: float,
    red: tuple[float, float, float] = RED,
    green: tuple[float, float, float] = GREEN,
    blue: tuple[float, float, float] = BLUE,
) -> bytes:
    colours = {b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(curve))
    return icc_profile(b"RGB ", {b"wtpt": xyz((0.9642, 1, 0.8249)), **colours, **curves})


def grey_profile(curve: float) -> bytes:
    return icc_profile(b"GRAY", {b"wtpt": xyz((0.9642, 1, 0.8249)), b"kTRC": gamma(curve)})


def cmyk_profile() -> bytes:
    """A printing press whose inks are all grey: lightness falls with the sum of the four, to 0 at 400 %."""
    inks = np.indices((2, 2, 2, 2)).reshape(4, -1).sum(axis=0)
    lab = np.stack([255 * (4 - inks) / 4, np.full(16, 128), np.full(16, 128)], axis=1).round().astype(np.uint8)
    straight = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * v for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + straight * 4 + lab.tobytes() + straight * 3
    return icc_profile(b"CMYK", {b"wtpt": xyz((0.9642, 1, 0.8249)), b"A2B0": table})

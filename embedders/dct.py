"""The training-free descriptor for near-copies, `dct`: no network, no download, about a millisecond an image.

From a 32 x 32 thumbnail: low-frequency DCT coefficients of luma and chroma, and gradient-orientation statistics of both
at two scales over a 4 x 4 grid with soft borders. The features are centred and multiplied by one matrix, both shipped
in `data/dct.npz`: it whitens by what changes between copies (recompression, resizing, mild crops, brightness) and keeps
the directions in which different images differ most against that (linear discriminant analysis).

Good at near-copies, weak at meaning: two photographs of the same thing are far apart. Mirrored or rotated copies and
crops of more than about a fifth of each side are not found. `benchmarks/calibrate_descriptor.py` fits the constants and
sets the thresholds.
"""

import hashlib
import io
from functools import cached_property
from importlib import resources

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedders.base import CopyThresholds
from embedders.images import decode

SIDE = 32
"""Side of the thumbnail in pixels."""
GRID = 4
ORIENTATIONS = 8
LUMA_FREQUENCIES = 8
CHROMA_FREQUENCIES = 4
CODE_VERSION = 2
"""To be raised with every change that changes features."""
CONSTANTS = "data/dct.npz"

# Set by benchmarks/calibrate_descriptor.py; the measurements are in docs/calibration.md.
THRESHOLDS = CopyThresholds(self_dedup=0.82, reference=0.73)

Float32 = npt.NDArray[np.float32]


class DctEmbedder:
    """The descriptor as an `Embedder`. Holds 0.5 MB of constants."""

    name = "dct"
    copy_thresholds = THRESHOLDS
    fixed_shape = True

    def __init__(self) -> None:
        self._file = resources.files("embedders").joinpath(CONSTANTS).read_bytes()
        with np.load(io.BytesIO(self._file), allow_pickle=False) as constants:
            self._mean: Float32 = constants["mean"].astype(np.float32)
            self._projection: Float32 = constants["projection"].astype(np.float32)
        self.dim = int(self._projection.shape[1])

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"dct {CODE_VERSION} ".encode() + self._file).hexdigest()

    @cached_property
    def details(self) -> dict[str, object]:
        """The version of the code and the SHA-256 of the constants."""
        return {"model": self.name, "code": CODE_VERSION, "constants": hashlib.sha256(self._file).hexdigest()}

    def preprocess(self, data: bytes) -> npt.NDArray[np.uint8]:
        """Thumbnail uint8 [32, 32, 3] of an image file; raises UndecodableImage."""
        return thumbnail(data)

    def upload(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The batch as it is: all is done on the CPU."""
        return batch

    def embed(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        """Vectors float16 [B, dim] of thumbnails uint8 [B, 32, 32, 3]."""
        return project(features(batch), self._mean, self._projection)


def thumbnail(data: bytes) -> npt.NDArray[np.uint8]:
    """The whole image squeezed into a square, uint8 [32, 32, 3], RGB."""
    image = decode(data, min_side=2 * SIDE)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def project(x: Float32, mean: Float32, projection: Float32) -> npt.NDArray[np.float16]:
    """Features [B, F] centred, projected and scaled to length 1: float16 [B, dim].

    einsum and no BLAS product, here and below: BLAS kernels differ with the number of threads and the row's place.
    """
    y = np.einsum("nf,fd->nd", x - mean, projection)
    units: npt.NDArray[np.float16] = (y / np.sqrt(np.sum(y * y, axis=1, keepdims=True) + 1e-12)).astype(np.float16)
    return units


def features(thumbnails: npt.NDArray[np.uint8]) -> Float32:
    """Features before projection, float32 [B, F], of thumbnails uint8 [B, 32, 32, 3]."""
    luma, blue, red = _luma_chroma(thumbnails)
    fine = [luma, blue, red]
    coarse = [_half(plane) for plane in fine]
    parts = [_low_frequencies(luma, blue, red)]
    for planes in (fine, coarse):
        parts.append(_root(_orientations(planes[0])))
        parts.append(_root(np.concatenate([_orientations(planes[1]), _orientations(planes[2])], axis=1)))
    return np.concatenate(parts, axis=1)


def _luma_chroma(thumbnails: npt.NDArray[np.uint8]) -> tuple[Float32, Float32, Float32]:
    """Planes [B, 32, 32] of luma in 0..1 and of the two chroma differences (ITU-R BT.601)."""
    red, green, blue = (thumbnails[..., c].astype(np.float32) / np.float32(255) for c in range(3))
    luma = np.float32(0.299) * red + np.float32(0.587) * green + np.float32(0.114) * blue
    return luma, np.float32(0.564) * (blue - luma), np.float32(0.713) * (red - luma)


def _half(plane: Float32) -> Float32:
    """Means of 2 x 2 pixels."""
    return np.float32(0.25) * (plane[:, ::2, ::2] + plane[:, 1::2, ::2] + plane[:, ::2, 1::2] + plane[:, 1::2, 1::2])


def _low_frequencies(luma: Float32, blue: Float32, red: Float32) -> Float32:
    """The three means, then the other DCT coefficients scaled to length 1 together and with compressed range."""
    planes = [_dct(luma, LUMA_FREQUENCIES), _dct(blue, CHROMA_FREQUENCIES), _dct(red, CHROMA_FREQUENCIES)]
    means = np.concatenate([coefficients[:, :1] for coefficients in planes], axis=1)
    rest = np.concatenate([coefficients[:, 1:] for coefficients in planes], axis=1)
    return np.concatenate([means, np.sign(rest) * _root(np.abs(rest))], axis=1)


def _dct(plane: Float32, num: int) -> Float32:
    """The num x num lowest coefficients of the DCT-II, scaled so that the first one is the mean: [B, num * num]."""
    position = (np.arange(SIDE) + 0.5) / SIDE
    basis = np.cos(np.pi * np.arange(num)[:, None] * position) * np.sqrt(np.where(np.arange(num) > 0, 2, 1))[:, None]
    return _both_axes(plane, (basis / SIDE).astype(np.float32))


def _orientations(plane: Float32) -> Float32:
    """Gradient energy by direction and cell: [B, ORIENTATIONS * GRID * GRID], not negative.

    A gradient of length m at angle a counts m cos^3(a - b) towards each direction b less than 90 degrees away.
    """
    padded = np.pad(plane, ((0, 0), (1, 1), (1, 1)), mode="edge")
    gx, gy = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2], padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    square = gx * gx + gy * gy + np.float32(1e-12)
    weights = _cell_weights(plane.shape[1])
    parts = []
    for angle in 2 * np.pi * np.arange(ORIENTATIONS) / ORIENTATIONS:
        along = np.maximum(np.float32(np.cos(angle)) * gx + np.float32(np.sin(angle)) * gy, np.float32(0))
        lobe = (along * along * along / square).astype(np.float32, copy=False)
        parts.append(_both_axes(lobe, weights))
    return np.concatenate(parts, axis=1)


def _cell_weights(side: int) -> Float32:
    """How much each pixel of a row counts for each cell: [GRID, side], falling linearly to the neighbours' centres."""
    position = (np.arange(side) + 0.5) / side * GRID - 0.5
    weights: Float32 = np.maximum(0, 1 - np.abs(position - np.arange(GRID)[:, None])).astype(np.float32)
    return weights


def _both_axes(plane: Float32, weights: Float32) -> Float32:
    """weights @ plane @ weights.T for each plane [B, side, side], flattened: [B, k * k]."""
    rows = np.einsum("ki,nij->nkj", weights, plane)
    both: Float32 = np.einsum("nkj,lj->nkl", rows, weights).reshape(len(plane), -1)
    return both


def _root(x: Float32) -> Float32:
    """Square roots of rows, not negative, that are first scaled to length 1; rows near zero stay small."""
    root: Float32 = np.sqrt(x / np.sqrt(np.sum(x * x, axis=1, keepdims=True) + np.float32(1e-4)))
    return root

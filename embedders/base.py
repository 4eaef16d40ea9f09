"""What an embedder is: image bytes in, unit vectors out, known by a name and a fingerprint."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class EmbedderError(ValueError):
    """The model or its settings are not usable as given; the message is one line that says what to do."""


@dataclass(frozen=True)
class CopyThresholds:
    """Cosines above which two images count as near-copies (DINOv2, section 3: 0.6 and 0.45 with SSCD).

    Attributes:
        self_dedup: between two images of the pool.
        reference: between an image of the pool and one of a reference set.
    """

    self_dedup: float
    reference: float


class Embedder(Protocol):
    """A model with its preprocessing.

    Attributes:
        name: short and stable, such as "dct".
        dim: components of a vector.
        fingerprint: SHA-256 (hex) over weights, preprocessing and, for descriptors, the version of their code. Device
            and precision stay out: whoever stores vectors records them beside it (`load.resolve_device`).
        copy_thresholds: what a calibration found for this model, or None where it is not meant for copies.
    """

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def copy_thresholds(self) -> CopyThresholds | None: ...

    def preprocess(self, data: bytes) -> npt.NDArray[Any]:
        """An image file to the model's input, one shape and dtype for all images. Safe to call from several threads.

        Raises:
            UndecodableImage: the bytes are not an image that can be decoded.
        """
        ...

    def embed(self, batch: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
        """Inputs [B, ...] to vectors float16 [B, dim] of length 1.

        With the same B, a row's vector does not depend on the other rows.
        """
        ...

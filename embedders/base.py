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
        precise: where 90 % of the pairs above are copies, if that is known.
    """

    self_dedup: float
    reference: float
    precise: float | None = None


@dataclass(frozen=True)
class Runtime:
    """How a model runs; all of it may change the last bits of a vector, so whoever stores vectors records it.

    Attributes:
        device: "cpu" or "cuda".
        precision: of the products, "float32" or "bfloat16"; weights and sums stay float32.
        threads: of torch on the CPU.
        compiled: whether torch.compile makes one program of the network first.
    """

    device: str = "cpu"
    precision: str = "float32"
    threads: int = 1
    compiled: bool = False


class Embedder(Protocol):
    """A model with its preprocessing.

    Attributes:
        name: short and stable, such as "dct".
        dim: components of a vector.
        fingerprint: SHA-256 (hex) over weights, preprocessing and, for descriptors, the version of their code. The
            runtime stays out.
        details: what the fingerprint stands for, to be read: the specification with all defaults filled in.
        copy_thresholds: what a calibration found for this model, or None where it is not meant for copies.
        fixed_shape: whether all inputs have one shape; if not, images are embedded one at a time.
    """

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def details(self) -> dict[str, object]: ...

    @property
    def copy_thresholds(self) -> CopyThresholds | None: ...

    @property
    def fixed_shape(self) -> bool: ...

    def preprocess(self, data: bytes) -> npt.NDArray[Any]:
        """An image file to the model's input, of one dtype for all images. Safe to call from several threads.

        Raises:
            UndecodableImage: the bytes are not an image that can be decoded.
        """
        ...

    def upload(self, batch: npt.NDArray[Any]) -> Any:
        """Bring a batch [B, ...] to where `embed` wants it; may be called from another thread, ahead of `embed`."""
        ...

    def embed(self, batch: Any) -> npt.NDArray[np.float16]:
        """What `upload` gave for [B, ...] to vectors float16 [B, dim] of length 1.

        With the same B, a row's vector does not depend on the other rows.

        Raises:
            EmbedderError: the network cannot be opened or run; out of memory says which batch size to try.
        """
        ...

"""A torch network as an `Embedder`: batches to the device, forward pass, unit vectors back. Others load the network."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from embedders.base import CopyThresholds, EmbedderError
from embedders.preprocessing import Preprocessing

if TYPE_CHECKING:
    import torch

CODE_VERSION = 1
"""To be raised with every change in decoding, resizing or normalising."""


@dataclass
class TorchEmbedder:
    """Holds the network's weights and the activations of one batch.

    Attributes:
        forward: normalised images float32 [B, 3, H, W] to vectors [B, dim].
        precision: "float32", or "bfloat16" for the products of the forward pass (weights stay float32).
        threads: of torch on the CPU; torch has one number for the whole process, so it is set before each batch.
    """

    name: str
    fingerprint: str
    copy_thresholds: CopyThresholds | None
    preprocessing: Preprocessing
    forward: "Callable[[torch.Tensor], torch.Tensor]"
    device: str
    precision: str
    threads: int
    dim: int = field(init=False)

    def __post_init__(self) -> None:
        """Finds `dim` by one image. Raises EmbedderError where the network does not take it or gives no vectors."""
        try:
            output = self._run(np.zeros((1, *self.preprocessing.shape), dtype=np.uint8))
        except EmbedderError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = (str(error).strip() or "no reason given").splitlines()[-1]
            size = "{} x {}".format(*self.preprocessing.shape)
            raise EmbedderError(f"{self.name}: the model does not take images of {size} pixels: {reason}") from None
        if output.ndim != 2 or len(output) != 1:
            raise EmbedderError(f"{self.name}: the model gives shape {list(output.shape)} for an image, not a vector")
        self.dim = output.shape[1]

    def preprocess(self, data: bytes) -> npt.NDArray[np.uint8]:
        """RGB pixels, uint8 [H, W, 3], resized and cropped; raises UndecodableImage."""
        return self.preprocessing.pixels(data)

    def embed(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        """Vectors float16 [B, dim] of length 1 for pixels uint8 [B, H, W, 3]."""
        vectors = self._run(batch)
        norms = np.sqrt(np.sum(vectors * vectors, axis=1, keepdims=True))
        units: npt.NDArray[np.float16] = (vectors / np.maximum(norms, 1e-12)).astype(np.float16)
        return units

    def _run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        import torch

        torch.set_num_threads(self.threads)
        mean, std = (torch.tensor(v, device=self.device) for v in (self.preprocessing.mean, self.preprocessing.std))
        pixels = torch.tensor(batch, device=self.device)
        with torch.inference_mode():
            images = ((pixels.float() * self.preprocessing.scale - mean) / std).permute(0, 3, 1, 2).contiguous()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
                output = self.forward(images)
            if not isinstance(output, torch.Tensor):
                raise EmbedderError(f"{self.name}: the model gives a {type(output).__name__}, not a tensor of vectors")
            vectors: npt.NDArray[np.float32] = output.float().cpu().numpy()
        return vectors


def fingerprint(files: Iterable[Path], preprocessing: Preprocessing, output: str) -> str:
    """SHA-256 (hex) over what decides vectors: the files (name and content), preprocessing, and the output taken."""
    facts: dict[str, object] = {"code": CODE_VERSION, "preprocessing": asdict(preprocessing), "output": output}
    for path in sorted(files):
        with path.open("rb") as file:
            facts[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

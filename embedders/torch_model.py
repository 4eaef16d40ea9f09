"""A torch network as an `Embedder`: batches to the device, forward pass, unit vectors back. Others open the network."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from embedders.base import CopyThresholds, EmbedderError, Runtime
from embedders.preprocessing import Preprocessing

CODE_VERSION = 2
"""To be raised with every change in decoding, resizing or normalising."""


class TorchEmbedder:
    """Holds the network's weights and the activations of one batch, from the first `embed` on.

    Args:
        name: short and stable.
        fingerprint: of weights, preprocessing and output.
        dim: components of a vector; None to open the network and see.
        copy_thresholds: what a calibration found.
        preprocessing: from bytes to pixels, and the numbers to normalise with.
        details: what the fingerprint stands for.
        open_network: gives the network, in float32 on the CPU: images [B, 3, H, W], normalised, to vectors [B, dim].
        runtime: how it is to run.
    """

    def __init__(
        self,
        name: str,
        fingerprint: str,
        dim: int | None,
        copy_thresholds: CopyThresholds | None,
        preprocessing: Preprocessing,
        details: dict[str, object],
        open_network: Callable[[], nn.Module],
        runtime: Runtime,
    ) -> None:
        self.name, self.fingerprint, self.copy_thresholds = name, fingerprint, copy_thresholds
        self.preprocessing, self.details, self.runtime = preprocessing, details, runtime
        self._open_network = open_network
        self._dim = dim

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self._dim if self._dim is not None else self._measured_dim

    @cached_property
    def _measured_dim(self) -> int:
        """Found by one black image."""
        shape = self.preprocessing.shape or (288, 288, 3)
        return int(self._vectors(self.upload(np.zeros((1, *shape), dtype=np.uint8)), self._network).shape[1])

    @property
    def fixed_shape(self) -> bool:
        """Whether all images are brought to one shape."""
        return self.preprocessing.shape is not None

    def preprocess(self, data: bytes) -> npt.NDArray[np.uint8]:
        """RGB pixels, uint8 [H, W, 3], resized and cropped; raises UndecodableImage."""
        return self.preprocessing.pixels(data)

    def upload(self, batch: npt.NDArray[np.uint8]) -> Tensor:
        """Pixels uint8 [B, H, W, 3] on the device; on a GPU by way of pinned memory, so that the copy overlaps."""
        pixels = torch.from_numpy(batch)
        if self.runtime.device == "cpu":
            return pixels
        try:
            return pixels.pin_memory().to(self.runtime.device, non_blocking=True)
        except RuntimeError as error:
            raise self._explained(error, pixels) from error

    def embed(self, batch: Tensor) -> npt.NDArray[np.float16]:
        """Vectors float16 [B, dim] of length 1 for what `upload` gave. Raises EmbedderError."""
        vectors = self._vectors(batch, self._program)
        if self._dim is not None and vectors.shape[1] != self._dim:
            raise EmbedderError(f"{self.name}: vectors of {vectors.shape[1]} numbers, but its settings say {self._dim}")
        norms = np.sqrt(np.sum(vectors * vectors, axis=1, keepdims=True))
        units: npt.NDArray[np.float16] = (vectors / np.maximum(norms, 1e-12)).astype(np.float16)
        return units

    @cached_property
    def _network(self) -> nn.Module:
        """The network on its device, normalisation in front."""
        if self.runtime.device == "cuda" and not torch.cuda.is_available():
            raise EmbedderError(
                f"{self.name}: device cuda, but torch finds no GPU here; take device cpu, or a machine with a GPU"
            )
        network = _FromPixels(self._open_network(), self.preprocessing).eval().requires_grad_(False)
        try:
            return network.to(self.runtime.device)
        except torch.OutOfMemoryError:
            raise EmbedderError(f"{self.name}: the weights do not fit into {self.runtime.device}'s memory") from None

    @cached_property
    def _program(self) -> Callable[[Tensor], Tensor]:
        """The network, compiled if that was asked for; `dynamic=False` since batches have one shape."""
        if not self.runtime.compiled:
            return self._network
        compiled: Callable[[Tensor], Tensor] = torch.compile(self._network, dynamic=False)
        return _frozen(compiled) if self.runtime.device == "cpu" else compiled

    def _vectors(self, batch: Tensor, program: Callable[[Tensor], Tensor]) -> npt.NDArray[np.float32]:
        """float32 [B, dim], not normalised."""
        torch.set_num_threads(self.runtime.threads)  # torch has one number for the whole process
        with torch.inference_mode(), torch.autocast(self.runtime.device, torch.bfloat16, self._halves):
            try:
                output = program(batch)
            except (RuntimeError, ValueError, MemoryError) as error:
                raise self._explained(error, batch) from error
            if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(batch):
                shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise EmbedderError(f"{self.name}: the model gives {shape} for {len(batch)} images, not vectors")
            vectors: npt.NDArray[np.float32] = output.float().cpu().numpy()
        return vectors

    @property
    def _halves(self) -> bool:
        return self.runtime.precision == "bfloat16"

    def _explained(self, error: Exception, batch: Tensor) -> EmbedderError:
        """What went wrong in the forward pass, in one line."""
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        size, height, width = batch.shape[:3]
        if _out_of_memory(error):
            if size == 1:
                advice = "one image is too much for it: take a smaller model or image size"
            else:
                advice = f"set batch_size to {max(1, size // 2)}"
            return EmbedderError(f"{self.name}: {self.runtime.device} ran out of memory at batch_size {size}; {advice}")
        if type(error).__module__.startswith("torch._"):  # dynamo and inductor, or the compiler they call
            return EmbedderError(f"{self.name}: torch.compile failed: {reason}; set compile to false")
        return EmbedderError(f"{self.name}: the model does not take images of {height} x {width} pixels: {reason}")


def _out_of_memory(error: Exception) -> bool:
    """CUDA has an exception of its own; the CPU's allocator says it in words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _frozen(compiled: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A program whose weights are taken for constants and packed for the matrix kernels, which pays on processors.

    As an option of torch.compile this comes too late: it must hold while the network is traced, by the first call.
    """

    def run(batch: Tensor) -> Tensor:
        with torch._inductor.config.patch(freezing=True, compile_threads=1):
            return compiled(batch)

    return run


class _FromPixels(nn.Module):
    """A network that takes pixels: uint8 [B, H, W, 3], channels last in memory, as they come from decoding."""

    factor: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        # (pixel * scale - mean) / std, in one multiplication and one addition
        self.register_buffer("factor", (preprocessing.scale / std).view(3, 1, 1), persistent=False)
        self.register_buffer("offset", (-mean / std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        images = pixels.permute(0, 3, 1, 2) * self.factor + self.offset
        vectors: Tensor = self.network(images)
        return vectors


def fingerprint(preprocessing: Preprocessing, output: str, **facts: str) -> str:
    """SHA-256 (hex) over what decides vectors: preprocessing, the output taken, and facts such as hashes of files."""
    known = {"code": CODE_VERSION, "preprocessing": asdict(preprocessing), "output": output, **facts}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

"""TorchScript files: `torchscript:FILE`. Such a file contains code, which runs when it is opened and used.

So a file is opened as TorchScript only where the specification says `torchscript:`, or names a published SSCD model
(`embedders/sscd.py`), never because of what it looks like; one by URL needs its SHA-256.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from embedders.base import CopyThresholds, EmbedderError, Runtime
from embedders.network import ONE_FILE, network_embedder
from embedders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from embedders.specs import Spec
from embedders.torch_model import TorchEmbedder
from embedders.weights import basename, obtain

if TYPE_CHECKING:
    from torch import nn

# The two that SSCD's authors publish: bilinear, which without more words is Pillow's, free of aliasing.
PREPROCESSINGS = {
    "skew_320": Preprocessing(resize=(320, 320), crop=None, resample=2, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "small_288": Preprocessing(resize=288, crop=None, resample=2, mean=IMAGENET_MEAN, std=IMAGENET_STD),
}
"""The whole image squeezed into a square, in batches; or its shorter side to 288, one image at a time."""
DEFAULT_PREPROCESSING = "skew_320"

SSCD_THRESHOLDS = CopyThresholds(self_dedup=0.6, reference=0.45)
"""DINOv2, appendix A.3; for SSCD alone. (SSCD's own paper: 0.75 for 90 % precision on DISC.)"""


def load(spec: Spec, runtime: Runtime) -> TorchEmbedder:
    """The network of `torchscript:FILE`. Raises EmbedderError."""
    return script_embedder(f"torchscript:{basename(spec.place)}", spec.place, spec, None, runtime)


def script_embedder(name: str, place: str, spec: Spec, dim: int | None, runtime: Runtime) -> TorchEmbedder:
    """The TorchScript file at `place`, path or URL, which maps images float32 [B, 3, H, W] to vectors [B, dim].

    Models named sscd_disc_* bring the copy thresholds that DINOv2 used with SSCD (appendix A.3).

    Raises:
        EmbedderError: no such file, or one of another hash than the option `sha256` says.
    """
    path, sha256 = obtain(place, spec.options.get("sha256"), name)
    return network_embedder(
        name,
        {ONE_FILE: sha256},
        "vector",
        PREPROCESSINGS[spec.options.get("preprocessing", DEFAULT_PREPROCESSING)],
        dim,
        lambda: _open(path, name),
        runtime,
        SSCD_THRESHOLDS if name.removeprefix("torchscript:").startswith("sscd_disc_") else None,
        format="TorchScript, which contains code",
    )


def _open(path: Path, name: str) -> "nn.Module":
    import torch

    with warnings.catch_warnings():
        # torch advises against TorchScript; the published files are what they are.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
        try:
            network: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError):
            raise EmbedderError(f"{name}: {path} is not a TorchScript file; save one with torch.jit.save") from None
    return network

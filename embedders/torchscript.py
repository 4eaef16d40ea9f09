"""TorchScript files, such as SSCD's: `torchscript:FILE`. Opened only because the user named the file: it contains code.

Preprocessing is SSCD's for batches: the whole image squeezed to 320 x 320 (bilinear, without aliasing), ImageNet mean
and standard deviation. SSCD at 288 pixels on the short side gives somewhat other scores; the fingerprint tells.
"""

from pathlib import Path

from embedders.base import CopyThresholds, EmbedderError
from embedders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from embedders.torch_model import TorchEmbedder, fingerprint

SSCD_PREPROCESSING = Preprocessing(resize=(320, 320), crop=None, resample=2, mean=IMAGENET_MEAN, std=IMAGENET_STD)
SSCD_THRESHOLDS = CopyThresholds(self_dedup=0.6, reference=0.45)
"""DINOv2, appendix A.3; for SSCD alone. (SSCD's own paper: 0.75 for 90 % precision on DISC.)"""


def load(file: str, device: str, precision: str, threads: int) -> TorchEmbedder:
    """The network in `file` on a device; files named sscd_* bring SSCD's copy thresholds. Raises EmbedderError.

    The network takes float32 [B, 3, 320, 320] and gives [B, dim].
    """
    import torch

    path = Path(file)
    if not path.is_file():
        raise EmbedderError(f"torchscript:{file}: no such file; give the path of a TorchScript file")
    try:
        network = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError):
        raise EmbedderError(f"torchscript:{file}: not a TorchScript file; save one with torch.jit.save") from None
    return TorchEmbedder(
        name=f"torchscript:{path.name}",
        fingerprint=fingerprint([path], SSCD_PREPROCESSING, "vector"),
        copy_thresholds=SSCD_THRESHOLDS if path.name.startswith("sscd_") else None,
        preprocessing=SSCD_PREPROCESSING,
        forward=network,
        device=device,
        precision=precision,
        threads=threads,
    )

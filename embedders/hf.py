"""Vision models in transformers format, from a directory or a hub name: `hf:NAME_OR_DIR`. Weights as safetensors only.

The vector of an image is
- for CLIP and SigLIP, the vision tower's `pooler_output` (trained with the tower; before the projection to text);
- for models with a class token (ViT, DeiT, DINOv2, DINOv3, BEiT, ...), that token of `last_hidden_state`: their
  poolers are often untrained.
Other models are refused. No code from the hub is run.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedders.base import EmbedderError
from embedders.preprocessing import Preprocessing
from embedders.torch_model import TorchEmbedder, fingerprint

if TYPE_CHECKING:
    import torch

CONFIGS = ("config.json", "preprocessor_config.json")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
BICUBIC = 3


def load(model: str, device: str, precision: str, threads: int) -> TorchEmbedder:
    """The model `hf:model` on a device. Raises EmbedderError."""
    folder = _folder(model)
    preprocessing = _preprocessing(folder, model)
    network = _network(folder, model)
    tower, output = _tower(network, model)
    tower.eval().to(device)

    def forward(images: "torch.Tensor") -> "torch.Tensor":
        result = tower(pixel_values=images)
        vectors: torch.Tensor = result.pooler_output if output == "pooler_output" else result.last_hidden_state[:, 0]
        return vectors

    files = {path for pattern in (*CONFIGS, *WEIGHTS) for path in folder.glob(pattern)}
    return TorchEmbedder(
        name=f"hf:{os.path.basename(model.rstrip('/'))}",
        fingerprint=fingerprint(files, preprocessing, output),
        copy_thresholds=None,
        preprocessing=preprocessing,
        forward=forward,
        device=device,
        precision=precision,
        threads=threads,
    )


def _preprocessing(folder: Path, model: str) -> Preprocessing:
    config = _json(folder / "preprocessor_config.json", model)
    try:
        return read_preprocessing(config)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise EmbedderError(f"hf:{model}: preprocessor_config.json: {reason}") from None


def read_preprocessing(config: dict[str, Any]) -> Preprocessing:
    """What a `preprocessor_config.json` says, with the defaults that transformers' processors share.

    Raises:
        KeyError, TypeError, ValueError: a value is missing, of the wrong kind, or leaves images in several shapes.
    """
    crop = _pair(config["crop_size"]) if config.get("do_center_crop", False) else None
    resize = _resize(config["size"], crop) if config.get("do_resize", True) else None
    if resize is None or (crop is None and isinstance(resize, int)):
        raise ValueError("images are not brought to one fixed size (do_resize, size, do_center_crop, crop_size)")
    smallest = (resize, resize) if isinstance(resize, int) else resize
    if crop is not None and (crop[0] > smallest[0] or crop[1] > smallest[1]):
        raise ValueError(f"crops {list(crop)} from images of {list(smallest)}")
    normalize = config.get("do_normalize", True)
    return Preprocessing(
        resize=resize,
        crop=crop,
        resample=int(config.get("resample", BICUBIC)),
        mean=tuple(float(v) for v in config["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        std=tuple(float(v) for v in config["image_std"]) if normalize else (1.0, 1.0, 1.0),
        scale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
    )


def _resize(size: Any, crop: tuple[int, int] | None) -> tuple[int, int] | int:
    """A number means the shorter side where a crop follows, else a square."""
    if isinstance(size, int):
        return size if crop is not None else (size, size)
    if "shortest_edge" in size and "longest_edge" not in size:
        return int(size["shortest_edge"])
    return _pair(size)


def _pair(size: Any) -> tuple[int, int]:
    """(height, width) of a number or of a dictionary with both."""
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _folder(model: str) -> Path:
    """The directory that holds the model; a hub name is fetched, or found in the hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, allow_patterns=[*CONFIGS, *WEIGHTS]))
    except ImportError:
        raise EmbedderError(f"hf:{model}: transformers is not installed; install lvd-builder[hf]") from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise EmbedderError(
            f"hf:{model}: no such directory, and not found on the hub ({reason}); give the path of a directory with "
            "config.json, preprocessor_config.json and model.safetensors, or a hub name"
        ) from None


def _json(path: Path, model: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise EmbedderError(f"hf:{model}: {path.name} is missing or not JSON; the model's processor saves it")
    return content


def _network(folder: Path, model: str) -> Any:
    """The transformers model with all its weights, float32."""
    try:
        import torch
        from transformers import AutoModel
        from transformers.utils import logging
    except ImportError:
        raise EmbedderError(f"hf:{model}: transformers is not installed; install lvd-builder[hf]") from None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it reports missing tensors, as is done below
    _json(folder / "config.json", model)
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise EmbedderError(f"hf:{model}: no model.safetensors; other formats are not opened, save it as safetensors")
    try:
        network, found = AutoModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # safetensors and the many model classes each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EmbedderError(f"hf:{model}: transformers cannot load it: {reason}") from None
    # What is missing would be drawn at random. An absent pooler is common and not used, see above.
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise EmbedderError(f"hf:{model}: the weights lack {len(missing)} of its tensors, such as {missing[0]}")
    return network


def _tower(network: Any, model: str) -> tuple[Any, str]:
    """The part that sees images, and which of its outputs is the vector."""
    kind = str(network.config.model_type)
    if kind.startswith(("clip", "siglip")):
        return getattr(network, "vision_model", network), "pooler_output"
    if hasattr(getattr(network, "embeddings", None), "cls_token"):
        return network, "class token"
    raise EmbedderError(
        f"hf:{model}: no image vector is known for model type {kind}; take a ViT, DINOv2, CLIP or SigLIP"
    )

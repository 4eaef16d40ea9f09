"""Vision models in transformers format, from a directory or a hub name: `hf:NAME_OR_DIR`. Weights as safetensors only.

The vector of an image is either of two outputs, which the option `output` names and the details state:
- `cls`, the class token of `last_hidden_state`: for models that have one (ViT, DeiT, DINOv2, DINOv3, BEiT, ...), since
  their poolers are often untrained;
- `pooled`, `pooler_output`: for CLIP and SigLIP, whose vision towers were trained with it (it comes before the
  projection to text).
Other models are opened if the specification says which output to take. DINOv2 runs on `embedders/vit.py`, which gives
the same vectors faster. No code from the hub is run.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedders.base import EmbedderError, Runtime
from embedders.network import Picked, network_embedder
from embedders.preprocessing import Preprocessing
from embedders.specs import Spec
from embedders.torch_model import TorchEmbedder
from embedders.weights import file_sha256

if TYPE_CHECKING:
    from torch import Tensor

CONFIGS = ("config.json", "preprocessor_config.json")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
BICUBIC = 3

DINOV2 = ("dinov2", "dinov2_with_registers")
OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "clip": ("pooled", "cls"),
    "clip_vision_model": ("pooled", "cls"),
    "siglip": ("pooled",),
    "siglip_vision_model": ("pooled",),
    "vit": ("cls", "pooled"),
    "deit": ("cls", "pooled"),
    "beit": ("cls", "pooled"),
    "data2vec-vision": ("cls", "pooled"),
    "dinov3_vit": ("cls", "pooled"),
    **dict.fromkeys(DINOV2, ("cls", "pooled")),
}
"""Outputs by model type, the one to take first."""
CLASS_TOKENS = ("cls_token", "class_embedding")
"""What `embeddings` calls it: CLIP the second."""
MEANINGS = {"cls": "class token of last_hidden_state", "pooled": "pooler_output"}


def load(spec: Spec, runtime: Runtime) -> TorchEmbedder:
    """The model `hf:NAME_OR_DIR`. Raises EmbedderError.

    A model from the hub is fetched now; of its files only configurations are read, and all are hashed.
    """
    place = spec.place
    name = f"hf:{os.path.basename(place.rstrip('/')) if Path(place).is_dir() else place}"
    folder = _folder(place)
    preprocessing = _preprocessing(folder, place)
    kind = str(_json(folder / "config.json", place).get("model_type"))
    output = _output(kind, spec)
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    if not files:
        raise EmbedderError(f"hf:{place}: no model.safetensors; other formats are not opened, save it as safetensors")
    if kind in DINOV2:
        return _own_vit(name, folder, preprocessing, runtime)
    return network_embedder(
        name,
        {path.name: file_sha256(path) for path in [folder / "config.json", *files]},
        output,
        preprocessing,
        _dim(folder, kind, place),
        lambda: Picked(_tower(folder, output, place), _cls if output == "cls" else _pooled),
        runtime,
        vector=MEANINGS[output],
    )


def _own_vit(name: str, folder: Path, preprocessing: Preprocessing, runtime: Runtime) -> TorchEmbedder:
    """DINOv2 on our network, whose class token is also transformers' `pooler_output`."""
    from embedders.checkpoints import read_config
    from embedders.dinov2 import file_hashes, vit_embedder

    return vit_embedder(name, folder, read_config(folder), preprocessing, file_hashes(folder), runtime)


def _output(kind: str, spec: Spec) -> str:
    """The output asked for, or the model type's own."""
    asked, known = spec.options.get("output"), OUTPUTS.get(kind)
    if kind.startswith("siglip2"):
        raise EmbedderError(
            f"hf:{spec.place}: model type {kind} takes patches of images in many sizes; take a SigLIP 2 of one "
            "resolution, such as hf:google/siglip2-base-patch16-224"
        )
    if asked is None and known is None:
        raise EmbedderError(
            f"hf:{spec.place}: no image vector is known for model type {kind}; say which output to take, "
            "#output=pooled or #output=cls, or take a ViT, DINOv2, DINOv3, CLIP or SigLIP"
        )
    if asked is not None and known is not None and asked not in known:
        raise EmbedderError(f"hf:{spec.place}: model type {kind} has no output {asked}; take {' or '.join(known)}")
    return asked or (known or ())[0]


def _dim(folder: Path, kind: str, place: str) -> int | None:
    """Components of a vector, as the configuration says; None for model types that are not known to mean it so."""
    config = _config(folder, place)
    if getattr(config, "mask_ratio", 0):
        raise EmbedderError(f"hf:{place}: model type {kind} hides patches by chance, so that its vectors differ")
    vision = getattr(config, "vision_config", config)
    return int(vision.hidden_size) if kind in OUTPUTS else None


def _config(folder: Path, place: str) -> Any:
    """The configuration with transformers' defaults."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise EmbedderError(f"hf:{place}: transformers is not installed; install lvd-builder[hf]") from None
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the many configurations each raise their own
        raise EmbedderError(f"hf:{place}: transformers cannot read config.json: {_first_line(error)}") from None


def _preprocessing(folder: Path, place: str) -> Preprocessing:
    config = _json(folder / "preprocessor_config.json", place)
    try:
        return read_preprocessing(config)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise EmbedderError(f"hf:{place}: preprocessor_config.json: {reason}") from None


def read_preprocessing(config: dict[str, Any]) -> Preprocessing:
    """What a `preprocessor_config.json` says, with the defaults that transformers' processors share.

    Raises:
        KeyError, TypeError, ValueError: a value is missing, of the wrong kind, or leaves images in several shapes.
    """
    crop = _pair(config["crop_size"]) if config.get("do_center_crop", False) else None
    resize = _resize(config["size"], crop) if config.get("do_resize", True) else None
    if resize is None or (crop is None and isinstance(resize, int)):
        raise ValueError("images are not brought to one fixed size (do_resize, size, do_center_crop, crop_size)")
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


def _folder(place: str) -> Path:
    """The directory that holds the model; a hub name is fetched, or found in the hub's cache."""
    if Path(place).is_dir():
        return Path(place)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(place, allow_patterns=[*CONFIGS, *WEIGHTS]))
    except ImportError:
        raise EmbedderError(f"hf:{place}: transformers is not installed; install lvd-builder[hf]") from None
    except (OSError, ValueError) as error:
        raise EmbedderError(
            f"hf:{place}: no such directory, and not found on the hub ({_first_line(error).rstrip('.')}); give the "
            "path of a directory with config.json, preprocessor_config.json and model.safetensors, or a hub name"
        ) from None


def _json(path: Path, place: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise EmbedderError(f"hf:{place}: {path.name} is missing or not JSON; the model's processor saves it")
    return content


def _tower(folder: Path, output: str, place: str) -> Any:
    """The part of the model that sees images, with all its weights, float32."""
    network, missing = _network(folder, place)
    tower = getattr(network, "vision_model", network)
    # What is missing would be drawn at random. An absent pooler is common, and does not matter to the class token.
    lost = [key for key in missing if output == "pooled" or not key.startswith("pooler.")]
    if lost:
        advice = "; take #output=cls" if all(key.startswith("pooler.") for key in lost) else ""
        raise EmbedderError(f"hf:{place}: the weights lack {len(lost)} of its tensors, such as {lost[0]}{advice}")
    if output == "cls" and not any(hasattr(getattr(tower, "embeddings", None), key) for key in CLASS_TOKENS):
        raise EmbedderError(f"hf:{place}: the model has no class token; take #output=pooled")
    return tower


def _network(folder: Path, place: str) -> tuple[Any, list[str]]:
    """The whole model, and the names of its tensors that the files lack."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it reports missing tensors, as we do
    try:
        network, found = AutoModel.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors and the many model classes each raise their own
        raise EmbedderError(f"hf:{place}: transformers cannot load it: {_first_line(error)}") from None
    return network, sorted(found["missing_keys"])


def _cls(result: Any) -> "Tensor":
    vectors: Tensor = result.last_hidden_state[:, 0]
    return vectors


def _pooled(result: Any) -> "Tensor":
    """[B, dim]; convolutional networks give [B, dim, 1, 1]."""
    vectors: Tensor = result.pooler_output.flatten(1)
    return vectors


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""How checkpoints name and arrange the weights of a vision transformer: the published files' way, and transformers'.

Pure functions between state dicts, configurations and what `config.json` says; `embedders/checkpoints.py` reads and
writes the files. A ValueError says what is wrong and names the key, without the name of the file.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from embedders.preprocessing import Preprocessing
from embedders.vit import LAYER_NORM_EPS, Interpolation, ViTConfig

Weights = dict[str, Tensor]
ModelType = Literal["dinov2", "dinov2_with_registers"]

PUBLISHED_HEAD_DIM = 64
"""Width of an attention head in all published models; their files do not say it."""

ARCHITECTURES: dict[ModelType, str] = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}
INTERPOLATIONS: dict[ModelType, Interpolation] = {"dinov2": "hf", "dinov2_with_registers": "antialias"}
"""What transformers does with position embeddings, by model type."""

FIXED = {"num_channels": 3, "qkv_bias": True, "hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS}
"""Values in `config.json` that our network has built in; transformers' defaults too."""

TRANSFORMERS_NAMES = (
    ("blocks.", "encoder.layer."),
    ("attn.proj", "attention.output.dense"),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
    ("mlp.w12", "mlp.weights_in"),
    ("mlp.w3", "mlp.weights_out"),
    ("norm.", "layernorm."),  # the last norm alone; those of a block are norm1 and norm2
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"),
)
QKV = ("query", "key", "value")
MASK_TOKEN = "embeddings.mask_token"


def published_weights(content: object) -> Weights:
    """The network in what a torch file holds, by its plain names (`blocks.0.attn.qkv.weight`, ...).

    Takes a state dict, or a training checkpoint {"teacher": {"backbone.*": ..., heads}}; chunks of blocks
    (`blocks.CHUNK.BLOCK.*`) are dissolved. Raises ValueError.
    """
    if isinstance(content, dict) and isinstance(content.get("teacher"), dict):
        return _without_chunks(_backbone(_weights(content["teacher"])))
    return _without_chunks(_weights(content))


def _weights(content: object) -> Weights:
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a state dict")
    other = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if other or not content:
        raise ValueError(f"neither a state dict nor a training checkpoint with a teacher; it holds {_some(other)}")
    return {str(name): value for name, value in content.items()}


def _backbone(teacher: Weights) -> Weights:
    """The network without the heads beside it."""
    named = {name.removeprefix("module."): value for name, value in teacher.items()}
    found = {name.removeprefix("backbone."): value for name, value in named.items() if name.startswith("backbone.")}
    if not found:
        raise ValueError(f"the teacher has no keys that start with backbone.; it holds {_some(list(teacher))}")
    return found


def _without_chunks(weights: Weights) -> Weights:
    """`blocks.CHUNK.BLOCK.*` to `blocks.BLOCK.*`: blocks are numbered through all chunks."""
    found = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value for name, value in weights.items()}
    if len(found) < len(weights):
        raise ValueError("two chunks hold blocks of the same number")
    return found


def published_config(weights: Weights, interpolation: Interpolation | None = None) -> ViTConfig:
    """What network has these weights, by the shapes that every published file has. Raises ValueError."""
    for name, ndim in {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}.items():
        if name not in weights or weights[name].ndim != ndim:
            raise ValueError(f"{name} is missing or has no {ndim} dimensions; not a vision transformer as published")
    dim, positions = weights["cls_token"].shape[2], weights["pos_embed"].shape[1]
    if dim % PUBLISHED_HEAD_DIM:
        raise ValueError(f"cls_token is {dim} wide, which published heads of {PUBLISHED_HEAD_DIM} do not divide")
    patch_size = weights["patch_embed.proj.weight"].shape[3]
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    return ViTConfig(
        dim=dim,
        depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        heads=dim // PUBLISHED_HEAD_DIM,
        patch_size=patch_size,
        image_size=math.isqrt(max(positions - 1, 0)) * patch_size,
        registers=registers,
        ffn="swiglu" if "blocks.0.mlp.w12.weight" in weights else "mlp",
        interpolation=interpolation or ("antialias" if registers else "meta"),
    )


def transformers_config(says: Mapping[str, Any], interpolation: Interpolation | None = None) -> ViTConfig:
    """What a `config.json` of Dinov2Model or Dinov2WithRegistersModel describes.

    Raises:
        ValueError: another model, a missing value, or one that our network cannot have.
    """
    kind = model_type(says)
    for key, value in FIXED.items():
        if says.get(key, value) != value:
            raise ValueError(f"{key} is {says[key]!r}; only {value!r} can be opened")
    return ViTConfig(
        dim=_whole(says, "hidden_size"),
        depth=_whole(says, "num_hidden_layers"),
        heads=_whole(says, "num_attention_heads"),
        patch_size=_whole(says, "patch_size"),
        image_size=_whole(says, "image_size"),
        registers=_whole(says, "num_register_tokens") if kind == "dinov2_with_registers" else 0,
        ffn="swiglu" if says.get("use_swiglu_ffn", False) else "mlp",
        mlp_ratio=float(_whole(says, "mlp_ratio")),
        interpolation=interpolation or INTERPOLATIONS[kind],
    )


def model_type(says: Mapping[str, Any]) -> ModelType:
    """`model_type` of a `config.json`; ValueError where it is none of ours."""
    for known in ARCHITECTURES:
        if says.get("model_type") == known:
            return known
    raise ValueError(f"model_type is {says.get('model_type')!r}, not one of {', '.join(ARCHITECTURES)}")


def _whole(says: Mapping[str, Any], key: str) -> int:
    """A whole number, or a list that repeats it (sizes may be [height, width])."""
    value = says.get(key)
    if isinstance(value, list) and value and all(part == value[0] for part in value):
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{key} is {value!r}, not a whole number" if key in says else f"{key} is missing")
    return int(value)


def matching_model_type(config: ViTConfig) -> ModelType:
    """The class of transformers that can hold the weights and, of those, does the most alike."""
    return "dinov2_with_registers" if config.registers or config.interpolation == "antialias" else "dinov2"


def to_transformers_config(config: ViTConfig) -> dict[str, Any]:
    """`config.json` for `matching_model_type`. Raises ValueError where transformers has no such network."""
    if config.mlp_ratio != int(config.mlp_ratio):
        raise ValueError(f"mlp_ratio is {config.mlp_ratio}; transformers takes whole numbers alone")
    kind = matching_model_type(config)
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": "float32",
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "mlp_ratio": int(config.mlp_ratio),
        "use_swiglu_ffn": config.ffn == "swiglu",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        **FIXED,
        **({"num_register_tokens": config.registers} if kind == "dinov2_with_registers" else {"use_mask_token": True}),
    }


def to_transformers(weights: Mapping[str, Tensor], kind: ModelType) -> Weights:
    """A state dict of ours by the names, and in the pieces, of transformers' files (not of its modules)."""
    found: Weights = {}
    for name, value in weights.items():
        if ".qkv." in name:
            found |= dict(zip(_qkv_names(name), (part.clone() for part in value.chunk(3)), strict=True))
        else:
            found[_transformers_name(name)] = value
    if kind == "dinov2_with_registers" and "register_tokens" not in weights:
        found["embeddings.register_tokens"] = weights["cls_token"][:, :0].clone()  # there, if empty
    return found


def from_transformers(weights: Mapping[str, Tensor], names: list[str]) -> Weights:
    """The inverse: tensors for our `names`. A mask token that is not in the file (only training needs it) is zero."""
    found: Weights = {}
    for name in names:
        if ".qkv." in name:
            found[name] = torch.cat([weights[part] for part in _qkv_names(name)])
        elif name == "mask_token" and MASK_TOKEN not in weights:
            found[name] = torch.zeros_like(weights["embeddings.cls_token"][:, 0])
        else:
            found[name] = weights[_transformers_name(name)]
    return found


def _transformers_name(name: str) -> str:
    for ours, theirs in TRANSFORMERS_NAMES:
        name = name.replace(ours, theirs)
    return name


def _qkv_names(name: str) -> list[str]:
    return [_transformers_name(name).replace("attn.qkv", f"attention.attention.{part}") for part in QKV]


def check_keys(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """ValueError naming the first keys that are missing, unexpected or of another shape than in `expected`."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} {list(found[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    wrong = [("missing", missing), ("unexpected", unexpected), ("of a wrong shape", shapes)]
    complaints = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in wrong if keys]
    if complaints:
        raise ValueError(f"keys do not fit the network: {'; '.join(complaints)}")


def _some(keys: list[str]) -> str:
    """The first few of many."""
    return ", ".join(keys[:3] + ["..."] * (len(keys) > 3)) or "nothing"


def preprocessor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """`preprocessor_config.json` for transformers; `embedders.hf.read_preprocessing` is its inverse."""
    resize, crop = preprocessing.resize, preprocessing.crop
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resize} if isinstance(resize, int) else {"height": resize[0], "width": resize[1]},
        "resample": preprocessing.resample,
        "do_center_crop": crop is not None,
        **({"crop_size": {"height": crop[0], "width": crop[1]}} if crop is not None else {}),
        "do_rescale": True,
        "rescale_factor": preprocessing.scale,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }

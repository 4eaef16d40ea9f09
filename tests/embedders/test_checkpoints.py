"""Checkpoints of every kind, against transformers' own networks and a mapping of names written out here once more."""

import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)
from transformers import (
    ViTConfig as OtherConfig,
)
from transformers import (
    ViTModel as OtherModel,
)

from embedders import checkpoints, dinov2
from embedders.base import EmbedderError
from embedders.checkpoints import (
    checkpoint_files,
    load_vit,
    read_config,
    read_own_preprocessing,
    save_transformers,
    save_vit,
)
from embedders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from embedders.vit import VARIANTS, VisionTransformer, ViTConfig
from tests.embedders.images_for_tests import photo, saved

EVAL = Preprocessing(resize=256, crop=(224, 224), resample=3, mean=IMAGENET_MEAN, std=IMAGENET_STD)
TINY = ViTConfig(dim=64, depth=3, heads=2, image_size=84, interpolation="hf")
NETWORKS = {
    "small": replace(VARIANTS["small"], interpolation="hf"),
    "base": replace(VARIANTS["base"], image_size=224, interpolation="hf"),
    "tiny": TINY,
    "swiglu": replace(TINY, dim=96, ffn="swiglu", image_size=70),
    "registers": replace(TINY, registers=4, patch_size=16, image_size=80, interpolation="antialias"),
    "swiglu_registers": replace(TINY, ffn="swiglu", registers=3, mlp_ratio=3.0, interpolation="antialias"),
    "no_registers_antialiased": replace(TINY, interpolation="antialias"),
}


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And a folder of its own to work in, for what a file may do when it is opened."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights far from their initial values, so that every one of them counts."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            noise = torch.randn(value.shape, generator=draw)
            if value.ndim == 1:  # scales and biases: around 1 and 0
                value.add_(0.2 * noise)
            elif value.shape[0] == 1:  # tokens and positions
                value.copy_(0.5 * noise)
            else:
                value.copy_(noise / math.sqrt(value[0].numel()))


def transformers_model(config: ViTConfig, seed: int = 0) -> torch.nn.Module:
    """The same network in transformers, with random weights."""
    shared: dict[str, Any] = {
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "mlp_ratio": int(config.mlp_ratio),
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "use_swiglu_ffn": config.ffn == "swiglu",
    }
    torch.manual_seed(seed)
    model: torch.nn.Module
    if config.interpolation == "antialias":
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=config.registers, **shared))
    else:
        model = Dinov2Model(Dinov2Config(**shared))
    randomize(model, seed)
    return model.eval()


def our_model(config: ViTConfig, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(config, layer_scale=1.0)
    randomize(model, seed)
    return model.eval()


def images(height: int, width: int, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def ours(model: VisionTransformer, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
    """All tokens in transformers' order."""
    found = model(pixels, mask)
    return torch.cat([found.cls[:, None], found.registers, found.patches], dim=1)


@torch.inference_mode()
def theirs(model: Any, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
    tokens: Tensor = model(pixels, bool_masked_pos=mask).last_hidden_state
    return tokens


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.std() > 0.5  # the features are no constant
    return float((a - b).abs().max())


def other_sizes(config: ViTConfig) -> list[tuple[int, int]]:
    side = config.patch_size
    return [(5 * side, 5 * side), (3 * side, 8 * side), (9 * side, 4 * side)]  # 9 x 4 is as much as the tiny 6 x 6


def native(config: ViTConfig) -> Tensor:
    return images(config.image_size, config.image_size, count=1 if config.image_size > 200 else 2)


@pytest.fixture(scope="module", params=NETWORKS)
def from_them(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ViTConfig, Path, Any]:
    """A configuration, a directory that transformers wrote, and its network."""
    config, folder = NETWORKS[request.param], tmp_path_factory.mktemp(request.param)
    model: Any = transformers_model(config)
    model.save_pretrained(folder)
    return config, folder, model


def test_features_of_a_transformers_directory_are_those_of_transformers(from_them: tuple[ViTConfig, Path, Any]) -> None:
    config, folder, model = from_them
    found = load_vit(folder)
    assert found.config == config == read_config(folder) and not found.training
    assert all(value.dtype == torch.float32 and value.requires_grad for value in found.parameters())
    assert distance(ours(found, native(config)), theirs(model, native(config))) < 1e-4
    for size in other_sizes(config):
        assert distance(ours(found, images(*size)), theirs(model, images(*size))) < 1e-4


def test_masked_patches_are_those_of_transformers(from_them: tuple[ViTConfig, Path, Any]) -> None:
    config, folder, model = from_them
    found, pixels = load_vit(folder), images(3 * config.patch_size, 5 * config.patch_size)
    mask = torch.rand(2, 15, generator=torch.Generator().manual_seed(1)) < 0.4
    assert distance(ours(found, pixels, mask), theirs(model, pixels, mask)) < 1e-4
    assert distance(ours(found, pixels, mask), ours(found, pixels)) > 1e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_transformers_opens_what_is_written_for_it(tmp_path: Path, name: str) -> None:
    config = NETWORKS[name]
    model = our_model(config)
    assert save_transformers(model, tmp_path / "out", EVAL) == []
    opened, loading = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers 4 asks for it
    registers = config.registers or config.interpolation == "antialias"
    assert type(opened).__name__ == ("Dinov2WithRegistersModel" if registers else "Dinov2Model")
    if config.image_size < 500:  # the largest: see above
        assert distance(ours(model, native(config)), theirs(opened, native(config))) < 1e-4
    for size in other_sizes(config):
        assert distance(ours(model, images(*size)), theirs(opened, images(*size))) < 1e-4
    back = load_vit(tmp_path / "out")
    assert back.config == config
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def test_a_model_that_transformers_interpolates_otherwise_is_written_with_a_note(tmp_path: Path) -> None:
    model = our_model(replace(TINY, interpolation="meta"))
    (note,) = save_transformers(model, tmp_path / "out", EVAL)
    assert "84 pixels" in note and "meta" in note and "(hf)" in note
    opened = AutoModel.from_pretrained(tmp_path / "out")
    assert distance(ours(model, images(84, 84)), theirs(opened, images(84, 84))) < 1e-4
    assert distance(ours(model, images(70, 112)), theirs(opened, images(70, 112))) > 1e-3
    assert load_vit(tmp_path / "out").config.interpolation == "hf"
    assert load_vit(tmp_path / "out", "meta").config == model.config
    registers = our_model(replace(TINY, registers=2, interpolation="hf"))
    (note,) = save_transformers(registers, tmp_path / "registers", EVAL)
    assert "(antialias)" in note


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.75."""
    x, a = np.abs(x), -0.75
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def resample(old: int, new: int, scale: float) -> np.ndarray:
    """[new, old]: weights of bicubic interpolation, values beyond the border being those on it."""
    weights = np.zeros((new, old))
    for row in range(new):
        at = (row + 0.5) / scale - 0.5
        for source in range(math.floor(at) - 1, math.floor(at) + 3):
            weights[row, min(max(source, 0), old - 1)] += cubic(np.array(at - source))
    return weights


@pytest.mark.parametrize(("height", "width"), [(5, 5), (3, 8), (16, 16), (6, 9)])
def test_meta_and_hf_positions_are_the_published_formulas(tmp_path: Path, height: int, width: int) -> None:
    """Positions by a dense product in float64, put in place of `pos_embed` of a network native to that size."""
    grid = TINY.grid
    model = our_model(TINY)
    plane = model.pos_embed.detach()[0, 1:].reshape(grid, grid, -1).double().numpy()
    found = {}
    for mode, offset in (("meta", 0.1), ("hf", 0.0)):
        rows = resample(grid, height, (height + offset) / grid)
        columns = resample(grid, width, (width + offset) / grid)
        expected = np.einsum("hi,wj,ijd->hwd", rows, columns, plane).reshape(1, height * width, -1)
        model.config = replace(TINY, interpolation=mode)  # type: ignore[arg-type]
        np.testing.assert_allclose(model.positions(height, width).detach().numpy(), expected, atol=1e-5)
        found[mode] = ours(model, images(14 * height, 14 * width))
    assert distance(found["meta"], found["hf"]) > 1e-3


def published(folder: Path, chunks: int | None = None) -> dict[str, Tensor]:
    """The weights in a directory of transformers by their published names, in `chunks` of blocks."""
    found: dict[str, Tensor] = {}
    tensors = load_file(folder / "model.safetensors")
    depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder"))
    outer = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    if tensors.get("embeddings.register_tokens", torch.empty(0)).numel():
        outer["register_tokens"] = "embeddings.register_tokens"
    for ours, name in outer.items():
        found[ours] = tensors[name]
    ffn = {"w12": "weights_in", "w3": "weights_out"}
    if "encoder.layer.0.mlp.fc1.weight" in tensors:
        ffn = {"fc1": "fc1", "fc2": "fc2"}
    for block in range(depth):
        old = f"encoder.layer.{block}"
        new = f"blocks.{block}" if chunks is None else f"blocks.{block * chunks // depth}.{block}"
        for leaf in ("weight", "bias"):
            qkv = [tensors[f"{old}.attention.attention.{part}.{leaf}"] for part in ("query", "key", "value")]
            found[f"{new}.attn.qkv.{leaf}"] = torch.cat(qkv)
            found[f"{new}.attn.proj.{leaf}"] = tensors[f"{old}.attention.output.dense.{leaf}"]
            for layer in ("norm1", "norm2"):
                found[f"{new}.{layer}.{leaf}"] = tensors[f"{old}.{layer}.{leaf}"]
            for layer, name in ffn.items():
                found[f"{new}.mlp.{layer}.{leaf}"] = tensors[f"{old}.mlp.{name}.{leaf}"]
        for layer in ("1", "2"):
            found[f"{new}.ls{layer}.gamma"] = tensors[f"{old}.layer_scale{layer}.lambda1"]
    return found


def teacher(weights: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """A training checkpoint with heads beside the network."""
    heads = ["dino_head.mlp.0.weight", "dino_head.last_layer.weight_g", "ibot_head.last_layer.weight_v"]
    backbone = {f"{prefix}backbone.{name}": value for name, value in weights.items()}
    return {"teacher": backbone | {f"{prefix}{name}": torch.ones(3) for name in heads}, "iteration": 12500}


LAYOUTS: dict[str, Callable[[Path], Any]] = {
    "plain": published,
    "chunked": lambda folder: published(folder, chunks=2),
    "teacher": lambda folder: teacher(published(folder)),
    "chunked teacher": lambda folder: teacher(published(folder, chunks=2)),
    "parallel teacher": lambda folder: teacher(published(folder), "module."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_published_layouts_give_the_same_features(tmp_path: Path, layout: str, ffn: Any, registers: int) -> None:
    interpolation: Any = "antialias" if registers else "hf"
    config = ViTConfig(128, 4, 2, image_size=70, registers=registers, ffn=ffn, interpolation=interpolation)
    model: Any = transformers_model(config)
    model.save_pretrained(tmp_path)
    torch.save(LAYOUTS[layout](tmp_path), tmp_path / "weights.pth")
    found = load_vit(tmp_path / "weights.pth", interpolation)
    assert found.config == config == read_config(tmp_path / "weights.pth", interpolation)
    for pixels in (images(70, 70), images(42, 98)):
        assert distance(ours(found, pixels), theirs(model, pixels)) < 1e-4
    plain = read_config(tmp_path / "weights.pth")
    assert plain == replace(config, interpolation="antialias" if registers else "meta")
    assert read_own_preprocessing(tmp_path / "weights.pth") is None
    assert checkpoint_files(tmp_path / "weights.pth") == [tmp_path / "weights.pth"]


@pytest.mark.parametrize("variant", ["small", "base", "large", "giant"])
@pytest.mark.parametrize("registers", [0, 4])
def test_published_files_are_recognised_by_shapes(tmp_path: Path, variant: str, registers: int) -> None:
    expected = replace(VARIANTS[variant], registers=registers, interpolation="antialias" if registers else "meta")
    with torch.device("meta"):
        model = VisionTransformer(replace(expected, depth=3))
    weights = {name: torch.zeros(()).expand(value.shape) for name, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")  # one number a tensor
    assert read_config(tmp_path / "weights.pth") == replace(expected, depth=3)


def test_shards_and_half_precision(tmp_path: Path) -> None:
    model: Any = transformers_model(TINY)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    files = checkpoint_files(tmp_path / "shards")
    assert len(files) > 4 and tmp_path / "shards/model.safetensors.index.json" in files
    assert {file.name for file in files} == {path.name for path in (tmp_path / "shards").iterdir()}
    assert distance(ours(load_vit(tmp_path / "shards"), images(84, 84)), theirs(model, images(84, 84))) < 1e-4
    model.half().save_pretrained(tmp_path / "half")
    torch.save({name: value.half() for name, value in our_model(TINY, 1).state_dict().items()}, tmp_path / "half.pth")
    found = load_vit(tmp_path / "half")
    assert {value.dtype for value in found.parameters()} == {torch.float32}
    assert {value.dtype for value in load_vit(tmp_path / "half.pth").parameters()} == {torch.float32}
    assert distance(ours(found, images(84, 84)), theirs(model.float(), images(84, 84))) < 1e-4
    assert checkpoint_files(tmp_path / "half") == [tmp_path / "half/config.json", tmp_path / "half/model.safetensors"]
    (tmp_path / "half/model.safetensors.index.json").write_text("{}")  # the one file goes first, as in transformers
    assert checkpoint_files(tmp_path / "half") == [tmp_path / "half/config.json", tmp_path / "half/model.safetensors"]


def test_a_directory_without_mask_token_gets_one_of_zeros(tmp_path: Path) -> None:
    model = transformers_model(TINY)
    model.save_pretrained(tmp_path / "with")  # type: ignore[operator]
    tensors = load_file(tmp_path / "with/model.safetensors")
    del tensors["embeddings.mask_token"]
    save_file(tensors, tmp_path / "with/model.safetensors")
    with pytest.raises(EmbedderError, match=r"model.safetensors: .*1 missing \(embeddings.mask_token\)"):
        load_vit(tmp_path / "with")
    edit_json(tmp_path / "with/config.json", use_mask_token=False)
    found = load_vit(tmp_path / "with")
    assert not found.mask_token.any() and found.mask_token.shape == (1, TINY.dim)
    assert distance(ours(found, images(84, 84)), theirs(model, images(84, 84))) < 1e-4


OWN = [
    TINY,
    ViTConfig(64, 2, 4, 16, 96, registers=2, ffn="swiglu", mlp_ratio=2.6, interpolation="antialias"),
    replace(VARIANTS["test"], interpolation="meta"),
]
PREPROCESSINGS = [
    EVAL,
    Preprocessing(resize=(98, 84), crop=None, resample=2, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.1)),
    Preprocessing(resize=(90, 98), crop=(84, 70), resample=1, mean=(0.0, 0.1, 0.2), std=(1.0, 1.5, 3.0), scale=1.0),
]


@pytest.mark.parametrize("config", OWN)
@pytest.mark.parametrize("preprocessing", PREPROCESSINGS)
def test_our_own_file_comes_back_as_it_was(tmp_path: Path, config: ViTConfig, preprocessing: Preprocessing) -> None:
    model, file = our_model(config).train(), tmp_path / "new/model.safetensors"
    save_vit(model, file, preprocessing)
    found = load_vit(file)
    assert found.config == config == read_config(file) and not found.training
    assert read_own_preprocessing(file) == preprocessing
    assert read_config(file, "hf") == replace(config, interpolation="hf") == load_vit(file, "hf").config
    assert list(found.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["lvd_vit"])
    assert (
        header["format"] == 1
        and header["config"] == asdict(config)
        and set(header)
        == {
            "format",
            "config",
            "preprocessing",
        }
    )


def test_a_network_of_a_loaded_checkpoint_does_not_need_its_file(tmp_path: Path) -> None:
    save_vit(our_model(TINY), tmp_path / "a.safetensors", EVAL)
    torch.save(our_model(TINY).state_dict(), tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        found = load_vit(tmp_path / name)
        before = ours(found, images(84, 84))
        with (tmp_path / name).open("r+b") as file:
            file.write(bytes((tmp_path / name).stat().st_size))
        torch.testing.assert_close(ours(found, images(84, 84)), before, rtol=0, atol=0)


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    save_vit(our_model(TINY, 1), file, EVAL)
    save_vit(our_model(TINY, 2).bfloat16().to(memory_format=torch.channels_last), file, EVAL)  # type: ignore[call-overload]
    assert {value.dtype for value in load_file(file).values()} == {torch.float32}
    for key, value in our_model(TINY, 2).bfloat16().state_dict().items():
        assert torch.equal(load_vit(file).state_dict()[key], value.float()), key
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
    content = file.read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(EmbedderError, match=r"model.safetensors: No space left on device"):
        save_vit(our_model(TINY, 3), file, EVAL)
    with pytest.raises(EmbedderError, match=r"out: No space left on device"):
        save_transformers(our_model(TINY, 3), tmp_path / "out", EVAL)
    assert file.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "plain"]


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS)
def test_preprocessing_reaches_transformers_and_comes_back(tmp_path: Path, preprocessing: Preprocessing) -> None:
    """To a few levels in a few pixels: transformers resizes all, then crops."""
    save_transformers(our_model(TINY), tmp_path / "out", preprocessing)
    assert read_own_preprocessing(tmp_path / "out") == preprocessing
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = photo(3, 120, 100)
    pixels = preprocessing.pixels(saved(picture, "PNG")).astype(np.float64)
    expected = (pixels * preprocessing.scale - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    found = np.asarray(processor(Image.fromarray(np.asarray(picture)), return_tensors="np")["pixel_values"])[0]
    difference = np.abs(found.transpose(1, 2, 0) - expected) * preprocessing.std / preprocessing.scale
    assert difference.max() < 3 and difference.mean() < 0.01


def test_preprocessing_is_read_where_it_is_said(tmp_path: Path) -> None:
    save_transformers(our_model(TINY), tmp_path / "out", EVAL)
    path = tmp_path / "out/preprocessor_config.json"
    for change, message in (
        ({"image_mean": None}, "not iterable"),
        ({"size": {"widest": 3}}, "'height' is missing"),
        ({"crop_size": 300}, "crops"),
    ):
        before = path.read_text()
        edit_json(path, **change)
        with pytest.raises(EmbedderError, match=f"preprocessor_config.json: .*{message}"):
            read_own_preprocessing(tmp_path / "out")
        path.write_text(before)
    path.unlink()
    assert read_own_preprocessing(tmp_path / "out") is None
    assert read_config(tmp_path / "out") == TINY


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


Damage = Callable[[Path], Any]


def in_json(name: str, **values: Any) -> Damage:
    return lambda place: edit_json(place / name, **values)


def without(name: str, key: str) -> Damage:
    def damage(place: Path) -> None:
        content = json.loads((place / name).read_text())
        del content[key]
        (place / name).write_text(json.dumps(content))

    return damage


def in_weights(change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    """A change of the state dict in a file of any kind."""

    def damage(place: Path) -> None:
        file = place / "model.safetensors" if place.is_dir() else place
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
            tensors = {key: value.clone() for key, value in load_file(file).items()}
            change(tensors)
            save_file(tensors, file, metadata)
        else:
            tensors = torch.load(file, weights_only=True)
            change(tensors)
            torch.save(tensors, file)

    return damage


def fill(key: str, value: float) -> Damage:
    return in_weights(lambda tensors: tensors[key].view(-1)[-1:].fill_(value))


def drop(*keys: str) -> Damage:
    return in_weights(lambda tensors: [tensors.pop(key) for key in keys])


def put(key: str, value: Any) -> Damage:
    return in_weights(lambda tensors: tensors.update({key: value}))


def cut(name: str = "") -> Damage:
    def damage(place: Path) -> None:
        file = place / name if name else place
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def write(content: bytes, name: str = "") -> Damage:
    return lambda place: (place / name if name else place).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda place: (place / name).unlink()


def header(said: Any) -> Damage:
    """Another header in a file of ours."""

    def damage(file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            before = json.loads(opened.metadata()["lvd_vit"])
        text = said if isinstance(said, str) else json.dumps(said(before))
        save_file({key: value.clone() for key, value in load_file(file).items()}, file, {"lvd_vit": text})

    return damage


def other_model(place: Path) -> None:
    config = OtherConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    OtherModel(config).save_pretrained(place)


def torchscript(file: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(file)


class Harmful:
    """Does something when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


DIRECTORIES: list[tuple[Damage, str]] = [
    (remove("config.json"), r"config.json: no such file"),
    (write(b"{", "config.json"), r"config.json: not JSON"),
    (write(b"[]", "config.json"), r"config.json: not a JSON object"),
    (write(b"\xff\xfe\xfd", "config.json"), r"config.json: not JSON"),
    (other_model, r"config.json: model_type is 'vit', not one of dinov2, dinov2_with_registers"),
    (in_json("config.json", qkv_bias=False), r"config.json: qkv_bias is False"),
    (in_json("config.json", hidden_act="relu"), r"config.json: hidden_act is 'relu'"),
    (in_json("config.json", layer_norm_eps=1e-5), r"config.json: layer_norm_eps is 1e-05"),
    (in_json("config.json", num_channels=4), r"config.json: num_channels is 4"),
    (in_json("config.json", image_size=[84, 98]), r"config.json: image_size is \[84, 98\]"),
    (in_json("config.json", mlp_ratio=2.5), r"config.json: mlp_ratio is 2.5"),
    (in_json("config.json", hidden_size="64"), r"config.json: hidden_size is '64'"),
    (in_json("config.json", num_attention_heads=0), r"config.json: sizes of a network are not positive"),
    (in_json("config.json", num_attention_heads=3), r"config.json: dim 64 is not a multiple of heads 3"),
    (in_json("config.json", patch_size=85), r"config.json: image_size 84 is below patch_size 85"),
    (without("config.json", "num_hidden_layers"), r"config.json: num_hidden_layers is missing"),
    (without("config.json", "model_type"), r"config.json: model_type is None"),
    (
        in_json("config.json", num_hidden_layers=4),
        r"model.safetensors: keys .*: 18 missing \((encoder.layer.3.[\w.]+, ){3}...\)$",
    ),
    (in_json("config.json", num_hidden_layers=2), r"model.safetensors: keys .*: 18 unexpected \(encoder.layer.2."),
    (
        in_json("config.json", image_size=98),
        r"model.safetensors: .* 1 of a wrong shape "
        r"\(embeddings.position_embeddings \[1, 37, 64\] instead of \[1, 50, 64\]\)$",
    ),
    (remove("model.safetensors"), r"model.safetensors: no such file; weights are read as safetensors alone"),
    (cut("model.safetensors"), r"model.safetensors: not a safetensors file, or cut short"),
    (write(b"some text", "model.safetensors"), r"model.safetensors: not a safetensors file"),
    (drop("embeddings.cls_token"), r"model.safetensors: .*1 missing \(embeddings.cls_token\)$"),
    (put("pooler.weight", torch.zeros(3)), r"model.safetensors: .*1 unexpected \(pooler.weight\)$"),
    (fill("encoder.layer.1.mlp.fc1.bias", math.nan), r"model.safetensors: encoder.layer.1.mlp.fc1.bias holds"),
]
OURS: list[tuple[Damage, str]] = [
    (cut(), r"place.safetensors: not a safetensors file, or cut short"),
    (write(b""), r"place.safetensors: not a safetensors file"),
    (header("{"), r"place.safetensors: not JSON"),
    (header("3"), r"place.safetensors: not a JSON object"),
    (header(lambda said: {**said, "format": 2}), r"place.safetensors: format 2 in its header; .* format 1$"),
    (header(lambda said: {"format": 1}), r"place.safetensors: header.config: missing"),
    (header(lambda said: {**said, "more": 1}), r"place.safetensors: header.more: unexpected key"),
    (
        header(lambda said: {**said, "config": {**said["config"], "heads": 5}}),
        r"place.safetensors: header.config: dim 64 is not a multiple of heads 5",
    ),
    (
        header(lambda said: {**said, "config": {**said["config"], "dim": "64"}}),
        r"place.safetensors: header.config.dim: '64' does not fit",
    ),
    (
        header(lambda said: {**said, "config": {**said["config"], "mlp": 1}}),
        r"place.safetensors: header.config.mlp: unexpected",
    ),
    (
        header(lambda said: {**said, "preprocessing": {**said["preprocessing"], "mean": "grey"}}),
        r"place.safetensors: header.preprocessing.mean: 'grey' does not fit",
    ),
    (
        lambda file: save_file(load_file(file), file, {"format": "pt"}),
        r"place.safetensors: no lvd_vit in its header; a model of transformers is opened by its directory",
    ),
    (drop("norm.bias", "mask_token"), r"place.safetensors: .*2 missing \(mask_token, norm.bias\)$"),
    (put("head.weight", torch.zeros(3)), r"place.safetensors: .*1 unexpected \(head.weight\)$"),
    (
        put("blocks.2.ls1.gamma", torch.zeros(63)),
        r"place.safetensors: .* \(blocks.2.ls1.gamma \[63\] instead of \[64\]\)$",
    ),
    (fill("cls_token", math.inf), r"place.safetensors: cls_token holds values that are infinite or no number$"),
    (put("cls_token", torch.zeros(1, 1, 64, dtype=torch.int64)), r"place.safetensors: cls_token holds int64"),
]
TORCH: list[tuple[Damage, str]] = [
    (cut(), r"place.pth: not a file saved by torch"),
    (write(b"Not Found\n"), r"place.pth: not a file saved by torch"),
    (write(b""), r"place.pth: not a file saved by torch"),
    (torchscript, r"place.pth: TorchScript, which holds code; .* torchscript:FILE$"),
    (lambda file: torch.save({"a": Harmful()}, file), r"place.pth: it holds \w+.mkdir beside tensors"),
    (lambda file: torch.save([1, 2], file), r"place.pth: it holds a list, not a state dict"),
    (lambda file: torch.save({}, file), r"place.pth: neither a state dict nor"),
    (lambda file: torch.save({"model": {}, "step": 3}, file), r"place.pth: neither .* it holds model, step$"),
    (lambda file: torch.save({"teacher": {"head": torch.ones(1)}}, file), r"place.pth: the teacher has no .*head$"),
    (lambda file: torch.save({"teacher": {"head": 3}}, file), r"place.pth: neither .* it holds head$"),
    (drop("pos_embed"), r"place.pth: pos_embed is missing"),
    (put("cls_token", torch.zeros(3)), r"place.pth: cls_token is missing or has no 3 dimensions"),
    (put("cls_token", torch.zeros(1, 1, 65)), r"place.pth: cls_token is 65 wide"),
    (put("pos_embed", torch.zeros(1, 38, 64)), r"place.pth: .* \(pos_embed \[1, 38, 64\] instead of \[1, 37, 64\]\)$"),
    (put("pos_embed", torch.zeros(1, 0, 64)), r"place.pth: image_size 0 is below patch_size 14"),
    (put("blocks.0.2.norm1.bias", torch.zeros(64)), r"place.pth: two chunks hold blocks of the same number"),
    (drop("blocks.1.attn.qkv.weight"), r"place.pth: .*1 missing \(blocks.1.attn.qkv.weight\)$"),
    (put("head\n.weight", torch.zeros(3)), r"place.pth: .*1 unexpected \(head .weight\)$"),
    (fill("blocks.1.mlp.fc2.weight", -math.inf), r"place.pth: blocks.1.mlp.fc2.weight holds"),
]


def expect_one_line(place: Path, damage: Damage, message: str) -> None:
    damage(place)
    with pytest.raises(EmbedderError) as caught:
        load_vit(place)
    line = str(caught.value)
    assert line.startswith(str(place)) and "\n" not in line and len(line) < len(str(place)) + 250, line
    assert re.search(message, line), line


@pytest.mark.parametrize(("damage", "message"), DIRECTORIES)
def test_a_damaged_directory_is_one_line(tmp_path: Path, damage: Damage, message: str) -> None:
    save_transformers(our_model(TINY), tmp_path / "place", EVAL)
    expect_one_line(tmp_path / "place", damage, message)


@pytest.mark.parametrize(("damage", "message"), OURS)
def test_a_damaged_file_of_ours_is_one_line(tmp_path: Path, damage: Damage, message: str) -> None:
    save_vit(our_model(TINY), tmp_path / "place.safetensors", EVAL)
    expect_one_line(tmp_path / "place.safetensors", damage, message)


@pytest.mark.parametrize(("damage", "message"), TORCH)
def test_a_damaged_torch_file_is_one_line(tmp_path: Path, damage: Damage, message: str) -> None:
    torch.save(our_model(TINY).state_dict(), tmp_path / "place.pth")
    assert load_vit(tmp_path / "place.pth").config.depth == TINY.depth
    expect_one_line(tmp_path / "place.pth", damage, message)
    assert not (tmp_path / "unpickled").exists()


def complaint(place: Path) -> str:
    try:
        load_vit(place)
    except EmbedderError as error:
        return str(error)
    return ""


def test_damaged_pickles_are_one_line(tmp_path: Path) -> None:
    torch.save(our_model(VARIANTS["test"]).state_dict(), tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    draw, complaints = np.random.default_rng(0), []
    for number in range(40):
        with zipfile.ZipFile(tmp_path / f"{number}.pth", "w") as archive:
            for name, content in entries.items():
                data = bytearray(content)
                if name.endswith("/data.pkl"):
                    data[draw.integers(len(data))] = draw.integers(256)
                archive.writestr(name, bytes(data))
        complaints.append(complaint(tmp_path / f"{number}.pth"))
    assert sum(map(bool, complaints)) > 5 and not any("\n" in line for line in complaints)


def test_a_place_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for name in ("none", "none.pth", "none.safetensors"):
        for function in (read_config, load_vit, checkpoint_files):
            with pytest.raises(EmbedderError, match=rf"^{tmp_path / name}: no such file$"):
                function(tmp_path / name)
    (tmp_path / "empty").mkdir()
    for function in (read_config, load_vit, checkpoint_files):
        with pytest.raises(EmbedderError, match="no such file"):
            function(tmp_path / "empty")


def test_a_damaged_index_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "place"
    transformers_model(TINY).save_pretrained(folder, max_shard_size="100KB")  # type: ignore[operator]
    index = folder / "model.safetensors.index.json"
    shard = sorted(folder.glob("*.safetensors"))[1]
    for file, damage in ((shard, shard.unlink), (index, lambda: index.write_text("{}")), (index, index.unlink)):
        damage()
        for function in (load_vit, checkpoint_files):
            with pytest.raises(EmbedderError, match=f"{file.name}: |model.safetensors: ") as caught:
                function(folder)
            assert "\n" not in str(caught.value)


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    model = our_model(TINY)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EmbedderError, match=r"used: is not empty"):
        save_transformers(model, tmp_path / "used", EVAL)
    with pytest.raises(EmbedderError, match=r"file: Not a directory"):
        save_transformers(model, tmp_path / "file", EVAL)
    with pytest.raises(EmbedderError, match=r"mlp_ratio is 2.6; transformers takes whole numbers alone"):
        save_transformers(our_model(OWN[1]), tmp_path / "ratio", EVAL)
    with pytest.raises(EmbedderError, match=r"model.pth: the name must end in .safetensors"):
        save_vit(model, tmp_path / "model.pth", EVAL)
    with pytest.raises(EmbedderError, match=r"^[^\n]*x.safetensors: [^\n]*$"):
        save_vit(model, tmp_path / "file/x.safetensors", EVAL)
    assert sorted(os.listdir(tmp_path)) == ["file", "used"]
    (tmp_path / "empty").mkdir()
    save_transformers(model, tmp_path / "empty", EVAL)
    assert load_vit(tmp_path / "empty").config == TINY


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "sub/x.safetensors", "..", "", 3])
def test_an_index_leads_to_files_of_its_directory_alone(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    network = VisionTransformer(VARIANTS["test"])
    checkpoints.save_transformers(network, folder, dinov2.standard_preprocessing(56))
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"layernorm.weight": name}}))
    with pytest.raises(EmbedderError, match="which is no file of its directory"):
        checkpoints.load_vit(folder)

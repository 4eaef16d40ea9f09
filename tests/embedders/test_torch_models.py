"""`hf:` and `torchscript:` on tiny random networks, against transformers and torch themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from embedders.base import CopyThresholds, EmbedderError
from embedders.hf import read_preprocessing
from embedders.images import UndecodableImage, decode
from embedders.load import load_embedder
from embedders.preprocessing import Preprocessing
from tests.embedders.images_for_tests import photo, saved

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 64}
PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 36},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "resample": 3,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.25],
}
NETWORKS = {
    "vit": lambda: ViTModel(ViTConfig(image_size=32, **TINY), add_pooling_layer=False),
    "vit_pooler": lambda: ViTModel(ViTConfig(image_size=32, **TINY)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(image_size=32, **TINY)),
    "clip_vision": lambda: CLIPVisionModel(CLIPVisionConfig(image_size=32, **TINY)),
    "siglip_vision": lambda: SiglipVisionModel(SiglipVisionConfig(image_size=32, **TINY)),
    "clip": lambda: CLIPModel(CLIPConfig(vision_config={"image_size": 32, **TINY}, text_config=TEXT)),
}


def saved_model(folder: Path, kind: str = "vit", **processor: Any) -> tuple[Path, Any]:
    torch.manual_seed(0)
    network = NETWORKS[kind]().eval()
    with torch.no_grad():
        for value in network.parameters():  # away from the initial values, of which many are 0 or 1
            value.add_(0.1 * torch.randn_like(value))
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **processor}))
    return folder, network


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """The definition, in float64 and per value."""
    images = (pixels / 255 - np.array(PROCESSOR["image_mean"])) / np.array(PROCESSOR["image_std"])
    return torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32)


@pytest.mark.parametrize("kind", NETWORKS)
def test_vectors_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    folder, network = saved_model(tmp_path, kind)
    model = load_embedder(f"hf:{folder}", "cpu", "float32")
    batch = np.stack([model.preprocess(saved(photo(n))) for n in range(3)])
    assert batch.shape == (3, 32, 32, 3) and model.dim == 16 and model.copy_thresholds is None
    with torch.inference_mode():
        tower = network.vision_model if kind == "clip" else network
        result = tower(pixel_values=normalised(batch))
        expected = result.pooler_output if "clip" in kind or "siglip" in kind else result.last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(expected).numpy()
    np.testing.assert_allclose(
        model._run(batch) / np.linalg.norm(model._run(batch), axis=1)[:, None], expected, atol=1e-4
    )
    vectors = model.embed(batch)
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(vectors, expected, atol=1e-3)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2  # the images do count


def test_a_row_does_not_depend_on_the_others(tmp_path: Path) -> None:
    model = load_embedder(f"hf:{saved_model(tmp_path)[0]}", "cpu", "float32")
    draw = np.random.default_rng(0)
    one, other = draw.integers(0, 256, (2, 6, 32, 32, 3), dtype=np.uint8)
    other[2] = one[2]
    np.testing.assert_array_equal(model.embed(one)[2], model.embed(other)[2])


def test_bfloat16_is_near_float32_and_not_it(tmp_path: Path) -> None:
    folder, _ = saved_model(tmp_path, "dinov2")
    batch = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    full, half = (load_embedder(f"hf:{folder}", "cpu", p).embed(batch) for p in ("float32", "bfloat16"))
    assert 0 < np.abs(full.astype(float) - half.astype(float)).max() < 0.1


def test_the_fingerprint_covers_weights_and_preprocessing_but_not_the_place(tmp_path: Path) -> None:
    def fingerprint(name: str, change: Any = None, **processor: Any) -> str:
        folder, _ = saved_model(tmp_path / name, **processor)
        if change:
            change(folder)
        return load_embedder(f"hf:{folder}", "cpu", "float32").fingerprint

    def flip(folder: Path) -> None:
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    first = fingerprint("a")
    assert fingerprint("b") == first
    assert (
        len({first, fingerprint("c", flip), fingerprint("d", resample=2), fingerprint("e", image_mean=[0, 0, 0])}) == 4
    )


def test_threads_are_set(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            load_embedder(f"hf:{saved_model(tmp_path)[0]}", "cpu", "float32", threads)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def rewrite(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_a_layer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {key: value for key, value in load_file(folder / "model.safetensors").items() if "cls_token" not in key}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "config.json is missing"),
        (remove("preprocessor_config.json"), "preprocessor_config.json is missing"),
        (rewrite("preprocessor_config.json", b"{"), "preprocessor_config.json is missing or not JSON"),
        (rewrite("config.json", b'{"model_type": "nonsense"}'), "cannot load"),
        (only_pickle, "no model.safetensors"),
        (rewrite("model.safetensors", b"garbage"), "cannot load"),
        (without_a_layer, "cls_token"),
        (rewrite("preprocessor_config.json", b'{"size": {"shortest_edge": 32}}'), "one fixed size"),
        (rewrite("preprocessor_config.json", b'{"size": {"height": 40, "width": 40}}'), "image_mean"),
    ],
)
def test_unusable_directories_are_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    folder, _ = saved_model(tmp_path)
    damage(folder)
    with pytest.raises(EmbedderError) as caught:
        load_embedder(f"hf:{folder}", "cpu", "float32")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_image_size_and_other_kinds_of_model_are_one_line(tmp_path: Path) -> None:
    folder, _ = saved_model(tmp_path / "a", crop_size=24)
    with pytest.raises(EmbedderError, match="24 x 24 pixels"):
        load_embedder(f"hf:{folder}", "cpu", "float32")
    folder, _ = saved_model(tmp_path / "b")
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(folder)
    with pytest.raises(EmbedderError, match="model type resnet"):
        load_embedder(f"hf:{folder}", "cpu", "float32")


@pytest.mark.parametrize("name", ["no/such-model", "not/a/name", "/no/such/dir"])
def test_no_network_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EmbedderError, match="no such directory") as caught:
        load_embedder(f"hf:{name}", "cpu", "float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "resize", "crop"),
    [
        ({"size": 32}, (32, 32), None),
        ({"size": 36, "crop_size": 32, "do_center_crop": True}, 36, (32, 32)),
        ({"size": {"height": 20, "width": 30}}, (20, 30), None),
        (
            {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 24}, "do_center_crop": True},
            36,
            (32, 24),
        ),
    ],
)
def test_preprocessor_configs(config: dict[str, Any], resize: Any, crop: Any) -> None:
    means = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    found = read_preprocessing({**config, **means})
    assert (found.resize, found.crop, found.resample) == (resize, crop, 3)
    with pytest.raises(ValueError, match="crops"):
        read_preprocessing({"size": 20, "crop_size": 24, "do_center_crop": True, **means})


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90), (61, 61), (37, 400)])
def test_resize_and_crop(width: int, height: int) -> None:
    data = saved(photo(1, width, height), "PNG")
    mean = (0.0, 0.0, 0.0)
    pixels = Preprocessing(resize=36, crop=(32, 24), resample=3, mean=mean, std=mean).pixels(data)
    short = min(width, height)
    whole = decode(data).resize((width * 36 // short, height * 36 // short), Image.Resampling.BICUBIC)
    left, top = (whole.width - 24) // 2, (whole.height - 32) // 2
    np.testing.assert_array_equal(pixels, np.asarray(whole)[top : top + 32, left : left + 24])
    squeezed = Preprocessing(resize=(20, 30), crop=None, resample=2, mean=mean, std=mean)
    assert squeezed.pixels(data).shape == squeezed.shape == (20, 30, 3)


class Pool(torch.nn.Module):
    def __init__(self, flat: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(7, 48, generator=torch.Generator().manual_seed(0)))
        self.flat = flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.adaptive_avg_pool2d(x, [4, 4])
        return y.flatten(1) @ self.weight.T if self.flat else y


def test_torchscript_gets_sscd_preprocessing(tmp_path: Path) -> None:
    network = Pool()
    torch.jit.script(network).save(tmp_path / "sscd_tiny.torchscript.pt")
    torch.jit.script(network).save(tmp_path / "other.pt")
    model = load_embedder(f"torchscript:{tmp_path}/sscd_tiny.torchscript.pt", "cpu", "float32")
    assert model.copy_thresholds == CopyThresholds(self_dedup=0.6, reference=0.45)
    assert (model.dim, model.name) == (7, "torchscript:sscd_tiny.torchscript.pt")
    pixels = model.preprocess(saved(photo(1), "PNG"))
    np.testing.assert_array_equal(pixels, np.asarray(photo(1).resize((320, 320), Image.Resampling.BILINEAR)))
    images = (pixels[None] / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(
            network(torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32))
        )
    np.testing.assert_allclose(model.embed(pixels[None]), expected, atol=1e-3)
    assert load_embedder(f"torchscript:{tmp_path}/other.pt", "cpu", "float32").copy_thresholds is None
    with pytest.raises(UndecodableImage):
        model.preprocess(b"no image")


def test_unusable_torchscript_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save(Pool().state_dict(), tmp_path / "weights.pt")
    torch.jit.script(Pool(flat=False)).save(tmp_path / "maps.pt")
    for name, message in (
        ("junk.pt", "not a TorchScript"),
        ("weights.pt", "not a TorchScript"),
        ("maps.pt", "not a vector"),
    ):
        with pytest.raises(EmbedderError, match=message) as caught:
            load_embedder(f"torchscript:{tmp_path / name}", "cpu", "float32")
        assert "\n" not in str(caught.value)

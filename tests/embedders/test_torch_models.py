"""`hf:` on tiny random networks, against transformers itself; and what every torch network has in common."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from embedders import checkpoints, hf
from embedders.base import EmbedderError, Runtime
from embedders.hf import read_preprocessing
from embedders.images import decode
from embedders.load import load_embedder
from embedders.preprocessing import Preprocessing
from embedders.torch_model import TorchEmbedder
from embedders.vit import VisionTransformer
from tests.embedders.images_for_tests import photo, saved

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 8}
OWN = {**TINY, "image_size": 32, "mlp_ratio": 2}
TEXT = {"hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 64}
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
    "deit": lambda: DeiTModel(DeiTConfig(image_size=32, **TINY), add_pooling_layer=False),
    "beit": lambda: BeitModel(BeitConfig(image_size=32, **TINY)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**OWN)),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=3, **OWN)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(image_size=32, num_register_tokens=3, **TINY)),
    "clip_vision": lambda: CLIPVisionModel(CLIPVisionConfig(image_size=32, **TINY)),
    "clip": lambda: CLIPModel(CLIPConfig(vision_config={"image_size": 32, **TINY}, text_config=TEXT)),
    "siglip_vision": lambda: SiglipVisionModel(SiglipVisionConfig(image_size=32, **TINY)),
    "siglip": lambda: SiglipModel(SiglipConfig(vision_config={"image_size": 32, **TINY}, text_config=TEXT)),
    "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])),
}
CPU = Runtime()


def saved_model(folder: Path, kind: str = "vit", **processor: Any) -> tuple[Path, Any]:
    torch.manual_seed(0)
    network = NETWORKS[kind]().eval()
    with torch.no_grad():
        for value in network.parameters():  # away from the initial values, of which many are 0 or 1
            value.add_(0.1 * torch.randn_like(value))
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **processor}))
    return folder, network


def opened(spec: object, runtime: Runtime = CPU) -> TorchEmbedder:
    model = load_embedder(f"hf:{spec}", runtime)
    assert isinstance(model, TorchEmbedder)
    return model


def vectors(model: TorchEmbedder, batch: np.ndarray) -> np.ndarray:
    return model.embed(model.upload(batch))


def noise(num: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def expected_vectors(network: Any, pixels: np.ndarray, pooled: bool) -> np.ndarray:
    """Normalised by the definition, in float64 and per value, then transformers' own output."""
    images = (pixels / 255 - np.array(PROCESSOR["image_mean"])) / np.array(PROCESSOR["image_std"])
    with torch.inference_mode():
        tower = getattr(network, "vision_model", network)
        result = tower(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32))
        found = result.pooler_output.flatten(1) if pooled else result.last_hidden_state[:, 0]
    return torch.nn.functional.normalize(found).numpy()


@pytest.mark.parametrize(
    ("kind", "options", "output"),
    [
        ("vit", "", "cls"),
        ("vit", "#output=cls", "cls"),
        ("vit_pooler", "", "cls"),
        ("vit_pooler", "#output=pooled", "pooled"),
        ("deit", "", "cls"),
        ("beit", "", "cls"),
        ("beit", "#output=pooled", "pooled"),
        ("dinov2", "", "cls"),
        ("dinov2", "#output=pooled", "cls"),  # they are the same there
        ("dinov2_registers", "", "cls"),
        ("dinov3", "", "cls"),
        ("dinov3", "#output=pooled", "pooled"),
        ("clip_vision", "", "pooled"),
        ("clip", "", "pooled"),
        ("clip", "#output=cls", "cls"),
        ("siglip_vision", "", "pooled"),
        ("siglip", "", "pooled"),
        ("resnet", "#output=pooled", "pooled"),
    ],
)
def test_vectors_are_those_of_transformers(tmp_path: Path, kind: str, options: str, output: str) -> None:
    folder, network = saved_model(tmp_path, kind)
    model = opened(f"{folder}{options}")
    assert (model.details["output"], model.copy_thresholds, model.fixed_shape) == (output, None, True)
    assert model.dim == (12 if kind == "resnet" else 16)
    batch = np.stack([model.preprocess(saved(photo(n))) for n in range(3)])
    assert batch.shape == (3, 32, 32, 3)
    expected = expected_vectors(network, batch, "pooled" in options or output == "pooled")
    found = vectors(model, batch)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, atol=6e-4)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2  # the images do count


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_registers"])
def test_dinov2_runs_on_our_network_at_any_size(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, network = saved_model(tmp_path, kind, crop_size={"height": 24, "width": 32})
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)  # not needed
    model = opened(folder)
    pixels = noise(3)[:, :24]
    np.testing.assert_allclose(vectors(model, pixels), expected_vectors(network, pixels, False), atol=6e-4)
    assert isinstance(model._open_network().network, VisionTransformer)
    assert model.details["interpolation"] == ("antialias" if "registers" in kind else "hf")


@pytest.mark.parametrize("kind", [kind for kind in NETWORKS if kind != "resnet"])
def test_loading_reads_no_weights(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved_model(tmp_path, kind)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights are read")

    for module, name in ((transformers.AutoModel, "from_pretrained"), (checkpoints, "load_file")):
        monkeypatch.setattr(module, name, refuse)
    model = opened(folder)
    assert model.dim == 16 and len(model.fingerprint) == 64
    assert json.loads(json.dumps(model.details)) == model.details
    with pytest.raises((AssertionError, EmbedderError), match="weights are read"):
        vectors(model, noise(1))


def test_details_say_what_the_vector_is(tmp_path: Path) -> None:
    folder, _ = saved_model(tmp_path / "tiny-clip", "clip")
    details = opened(folder).details
    assert (details["model"], details["output"], details["vector"]) == ("hf:tiny-clip", "pooled", "pooler_output")
    assert set(details["weights"]) == {"config.json", "model.safetensors"}
    assert details["preprocessing"] == {
        "resize": 36,
        "crop": [32, 32],
        "resample": 3,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.25],
        "scale": 1 / 255,
    }


def test_a_row_does_not_depend_on_the_others(tmp_path: Path) -> None:
    model = opened(saved_model(tmp_path)[0])
    one, other = noise(6), noise(6, seed=1)
    other[2] = one[2]
    np.testing.assert_array_equal(vectors(model, one)[2], vectors(model, other)[2])


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_bfloat16_is_near_float32_and_not_it(tmp_path: Path, kind: str) -> None:
    folder, _ = saved_model(tmp_path, kind)
    full, half = (vectors(opened(folder, Runtime(precision=p)), noise(4)) for p in ("float32", "bfloat16"))
    assert 0 < np.abs(full.astype(float) - half.astype(float)).max() < 0.1


@pytest.mark.parametrize("kind", ["vit_pooler", "dinov2"])
def test_the_fingerprint_covers_what_decides_vectors_but_not_the_place(tmp_path: Path, kind: str) -> None:
    def fingerprint(name: str, change: Any = None, options: str = "", **processor: Any) -> str:
        folder, _ = saved_model(tmp_path / name, kind, **processor)
        if change:
            change(folder)
        return opened(f"{folder}{options}").fingerprint

    def flip(folder: Path) -> None:
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    def other_config(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "note": "x"}))

    first = fingerprint("a")
    assert fingerprint("b") == first
    assert opened(tmp_path / "a", Runtime(precision="bfloat16", threads=2, compiled=True)).fingerprint == first
    assert fingerprint("c", options="#output=cls") == first
    assert (fingerprint("d", options="#output=pooled") == first) == (kind == "dinov2")
    changed = [fingerprint("e", flip), fingerprint("f", other_config)]
    changed += [fingerprint("g", resample=2), fingerprint("h", image_mean=[0, 0, 0])]
    assert len({first, *changed}) == 5


def test_threads_are_set(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            vectors(opened(saved_model(tmp_path)[0], replace(CPU, threads=threads)), noise(1))
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
        (rewrite("config.json", b'{"model_type": "nonsense"}'), "model type nonsense"),
        (rewrite("config.json", b'{"model_type": "vit", "hidden_size": "x"}'), "cannot read config.json"),
        (only_pickle, "no model.safetensors"),
        (rewrite("preprocessor_config.json", b'{"size": {"shortest_edge": 32}}'), "one fixed size"),
        (rewrite("preprocessor_config.json", b'{"size": {"height": 40, "width": 40}}'), "image_mean"),
    ],
)
def test_unusable_directories_are_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    folder, _ = saved_model(tmp_path)
    damage(folder)
    with pytest.raises(EmbedderError) as caught:
        opened(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(rewrite("model.safetensors", b"garbage"), "safetensors|cannot load"), (without_a_layer, "cls_token")],
)
def test_unusable_weights_are_one_line_when_they_are_opened(
    tmp_path: Path, kind: str, damage: Any, message: str
) -> None:
    folder, _ = saved_model(tmp_path, kind)
    damage(folder)
    model = opened(folder)
    with pytest.raises(EmbedderError, match=message) as caught:
        vectors(model, noise(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("resnet", "", "no image vector is known for model type resnet; say which output"),
        ("siglip", "#output=cls", "model type siglip has no output cls; take pooled"),
        ("vit", "#output=pooled", r"lack 2 of its tensors, such as pooler\..*; take #output=cls"),
        ("resnet", "#output=cls", "no class token; take #output=pooled"),
    ],
)
def test_outputs_that_a_model_does_not_have(tmp_path: Path, kind: str, options: str, message: str) -> None:
    folder, _ = saved_model(tmp_path, kind)
    with pytest.raises(EmbedderError, match=message):
        vectors(opened(f"{folder}{options}"), noise(1))


def test_models_whose_vectors_would_mean_nothing(tmp_path: Path) -> None:
    for network, options, message in (
        (Siglip2VisionModel(Siglip2VisionConfig(**TINY)), "", "siglip2-base-patch16-224"),
        (ViTMAEModel(ViTMAEConfig(image_size=32, **TINY)), "#output=cls", "hides patches by chance"),
    ):
        folder, _ = saved_model(tmp_path)
        network.save_pretrained(folder)
        with pytest.raises(EmbedderError, match=message):
            opened(f"{folder}{options}")


def test_code_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    folder, _ = saved_model(tmp_path)
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EmbedderError) as caught:
        opened(f"{folder}#output=cls")
    assert not ran.exists() and "\n" not in str(caught.value)


def test_wrong_image_sizes_are_one_line(tmp_path: Path) -> None:
    folder, _ = saved_model(tmp_path / "a", crop_size=24)
    with pytest.raises(EmbedderError, match="24 x 24 pixels"):
        vectors(opened(folder), noise(1, 24))
    folder, _ = saved_model(tmp_path / "b", "dinov2", crop_size=20)
    with pytest.raises(EmbedderError, match="20 x 20 pixels do not divide into patches of 8, as those of size 16 do"):
        opened(folder)


@pytest.mark.parametrize("name", ["no/such-model", "not/a/name", "/no/such/dir"])
def test_no_network_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EmbedderError, match="no such directory") as caught:
        opened(name)
    assert "\n" not in str(caught.value)


def test_hub_names_are_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved_model(tmp_path)
    monkeypatch.setattr(hf, "_folder", lambda place: folder)
    assert opened("some/model").details["model"] == "hf:some/model"
    assert opened("some/model").fingerprint == opened(folder).fingerprint


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
    np.testing.assert_allclose(pixels.astype(int), np.asarray(whole)[top : top + 32, left : left + 24], atol=2)
    squeezed = Preprocessing(resize=(20, 30), crop=None, resample=2, mean=mean, std=mean)
    assert squeezed.pixels(data).shape == squeezed.shape == (20, 30, 3)

"""`dinov2_*` and `vit:` on tiny networks in the published layout, in ours and in that of transformers."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedders import checkpoints, dinov2, weights
from embedders.base import EmbedderError, Runtime
from embedders.checkpoints import save_transformers, save_vit
from embedders.dinov2 import address, variant
from embedders.load import load_embedder
from embedders.preprocessing import Preprocessing
from embedders.specs import DINOV2
from embedders.torch_model import TorchEmbedder
from embedders.vit import VARIANTS, VisionTransformer, ViTConfig
from tests.embedders.images_for_tests import photo, saved

TINY = ViTConfig(dim=64, depth=2, heads=1, image_size=56)
OWN = Preprocessing(resize=(42, 28), crop=None, resample=2, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))


@pytest.fixture(autouse=True)
def _tiny_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the built-in names stand for, made small."""
    monkeypatch.setitem(VARIANTS, "small", TINY)
    monkeypatch.setitem(VARIANTS, "giant", replace(TINY, dim=128, heads=2, ffn="swiglu"))


def network(config: ViTConfig = TINY, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(config, layer_scale=1.0).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


def published(path: Path, model: VisionTransformer | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save((model or network()).state_dict(), path)
    return path


def own(path: Path, model: VisionTransformer | None = None) -> Path:
    save_vit(model or network(), path, OWN)
    return path


def opened(spec: str, runtime: Runtime | None = None) -> TorchEmbedder:
    model = load_embedder(spec, runtime or Runtime())
    assert isinstance(model, TorchEmbedder)
    return model


def expected_vectors(model: VisionTransformer, pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    images = (pixels / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    with torch.inference_mode():
        found = model(torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32)).cls
    return torch.nn.functional.normalize(found).numpy()


def check(model: TorchEmbedder, expected: VisionTransformer) -> None:
    """Its vectors are those of a network, of pixels normalised by the definition."""
    assert model.preprocessing.shape is not None
    batch = np.random.default_rng(0).integers(0, 256, (3, *model.preprocessing.shape), dtype=np.uint8)
    found = model.embed(model.upload(batch))
    np.testing.assert_allclose(found, expected_vectors(expected, batch, model.preprocessing), atol=6e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-2  # the images do count


@pytest.mark.parametrize(
    ("name", "config", "mode"),
    [
        ("dinov2_vits14", TINY, "meta"),
        ("dinov2_vits14_reg4", replace(TINY, registers=4), "antialias"),
        ("dinov2_vitg14", replace(TINY, dim=128, heads=2, ffn="swiglu"), "meta"),
    ],
)
@pytest.mark.parametrize("asked", ["", "&interpolation=hf"])
def test_published_models(tmp_path: Path, name: str, config: ViTConfig, mode: str, asked: str) -> None:
    expected = network(replace(config, interpolation="hf" if asked else mode))
    path = published(tmp_path / "m.pth", expected)
    model = opened(f"{name}#file={path}&size=98{asked}")  # 98 pixels are 7 patches, natively there are 4
    assert (model.name, model.dim, model.copy_thresholds) == (name, config.dim, None)
    assert model.details["interpolation"] == expected.config.interpolation
    check(model, expected)


def test_images_are_prepared_as_for_dinov2s_evaluation(tmp_path: Path) -> None:
    path = published(tmp_path / "m.pth")
    image = photo(1, 400, 300)
    for options, resize, crop in (("", 256, 224), ("&size=98", 112, 98), ("&size=518", 592, 518)):
        model = opened(f"dinov2_vits14#file={path}{options}")
        pixels = model.preprocess(saved(image, "PNG"))
        whole = np.asarray(image.resize((400 * resize // 300, resize), Image.Resampling.BICUBIC))
        top, left = (resize - crop) // 2, (whole.shape[1] - crop) // 2
        difference = pixels.astype(int) - whole[top : top + crop, left : left + crop]
        assert pixels.shape == (crop, crop, 3) and np.abs(difference).max() <= 3
        assert model.preprocessing.mean == (0.485, 0.456, 0.406) and model.preprocessing.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("name", DINOV2)
def test_published_files_are_fetched_by_their_pins(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "base", TINY)
    monkeypatch.setitem(VARIANTS, "large", TINY)
    path = published(tmp_path / "m.pth", network(variant(name)))
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(weights, "fetch", lambda url, sha256: asked.append((url, sha256)) or path)
    for options in ("", "#file=https://mirror/x.pth", f"#sha256={'a' * 64}"):
        opened(name + options)
    folder = name.removesuffix("_reg4")
    official = f"https://dl.fbaipublicfiles.com/dinov2/{folder}/{name}_pretrain.pth"
    pin = dinov2.PINS[name]
    assert asked == [(official, pin), ("https://mirror/x.pth", pin), (official, "a" * 64)]
    assert address(name) == official and len(set(dinov2.PINS.values())) == 8
    assert len(pin) == 64 and set(pin) <= set("0123456789abcdef")


def test_built_in_names_stand_for_the_published_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sizes = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24)}
    for name in DINOV2:
        config = variant(name)
        assert (config.dim, config.depth, config.heads) == sizes[name[10]]
        assert config.ffn == ("swiglu" if name[10] == "g" else "mlp")
        assert (config.patch_size, config.image_size, config.registers) == (14, 518, 4 if "reg4" in name else 0)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    path = published(tmp_path / "m.pth")
    for name in ("dinov2_vits14_reg4", "dinov2_vitg14"):
        with pytest.raises(EmbedderError, match=f"^{name}: .* holds another network; open it as vit:"):
            opened(f"{name}#file={path}")


def test_vit_opens_every_kind_of_checkpoint(tmp_path: Path) -> None:
    model = network(replace(TINY, interpolation="hf"))
    save_transformers(model, tmp_path / "folder", OWN)
    torch.save({"teacher": {f"backbone.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "t.pth")
    for place in (own(tmp_path / "m.safetensors", model), tmp_path / "folder"):
        found = opened(f"vit:{place}")
        assert (found.name, found.preprocessing, found.dim) == (f"vit:{place.name}", OWN, 64)
        assert found.details["interpolation"] == "hf"
        check(found, model)
        other = opened(f"vit:{place}#size=70&interpolation=meta")
        assert other.preprocessing == replace(OWN, resize=80, crop=(70, 70))
        check(other, network(replace(TINY, interpolation="meta")))
    for place in (published(tmp_path / "p.pth", model), tmp_path / "t.pth"):
        found = opened(f"vit:{place}#size=98")
        assert found.details["interpolation"] == "meta" and found.preprocessing.shape == (98, 98, 3)
        check(found, network(replace(TINY, interpolation="meta")))


def test_vit_by_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = own(tmp_path / "m.safetensors")
    monkeypatch.setattr(weights, "fetch", lambda url, sha256: path)
    model = opened(f"vit:https://host/some/name.safetensors?token=x#sha256={'a' * 64}")
    assert (model.name, model.details["weights"]) == ("vit:name.safetensors", "a" * 64)
    with pytest.raises(EmbedderError, match=r"^vit:name\.pth: no SHA-256 is known"):
        opened("vit:https://host/name.pth")


def test_details_are_complete(tmp_path: Path) -> None:
    path = published(tmp_path / "m.pth")
    details = opened(f"dinov2_vits14#file={path}").details
    assert details == {
        "model": "dinov2_vits14",
        "weights": hashlib.sha256(path.read_bytes()).hexdigest(),
        "output": "cls",
        "interpolation": "meta",
        "preprocessing": {
            "resize": 256,
            "crop": [224, 224],
            "resample": 3,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "scale": 1 / 255,
        },
    }
    assert json.loads(json.dumps(details)) == details


def test_the_fingerprint_covers_what_decides_vectors_but_no_names(tmp_path: Path) -> None:
    path, other = published(tmp_path / "m.pth"), published(tmp_path / "other" / "n.pth", network(seed=1))
    copy = tmp_path / "copy.pth"
    copy.write_bytes(path.read_bytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    same = [f"dinov2_vits14#file={path}", f"dinov2_vits14#file={copy}&sha256={digest}", f"vit:{copy}#size=224"]
    same += [f"vit:{path}", f"dinov2_vits14#file={path}&interpolation=meta"]
    found = {opened(spec).fingerprint for spec in same}
    found.add(opened(same[0], Runtime(precision="bfloat16", threads=2, compiled=True)).fingerprint)
    assert len(found) == 1
    changed = [f"dinov2_vits14#file={other}", f"{same[0]}&size=98", f"{same[0]}&interpolation=hf"]
    changed += [f"{same[0]}&interpolation=antialias", f"vit:{own(tmp_path / 'm.safetensors')}"]
    assert len({*found, *(opened(spec).fingerprint for spec in changed)}) == 6


def test_fingerprints_of_directories_are_those_of_their_content(tmp_path: Path) -> None:
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_transformers(network(replace(TINY, interpolation="hf"), seed), tmp_path / place, OWN)
    a, b, c = (opened(f"vit:{tmp_path / place}").fingerprint for place in "abc")
    assert a == b == opened(f"hf:{tmp_path / 'a'}").fingerprint != c


def test_loading_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_transformers(network(replace(TINY, interpolation="hf")), tmp_path / "folder", OWN)
    specs = [f"dinov2_vits14#file={published(tmp_path / 'm.pth')}", f"vit:{own(tmp_path / 'm.safetensors')}"]
    monkeypatch.setattr(dinov2, "load_vit", lambda *args: pytest.fail("weights are read"))
    monkeypatch.setattr(checkpoints, "load_file", lambda *args: pytest.fail("weights are read"))
    for spec in (*specs, f"vit:{tmp_path / 'folder'}"):
        model = opened(spec)
        assert model.dim == 64 and model.fingerprint and model.details
        with pytest.raises(pytest.fail.Exception, match="weights are read"):
            model.embed(model.upload(np.zeros((1, *model.preprocessing.shape), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "dinov2_vits14#file={}/m.pth&size=100",
            "100 x 100 pixels do not divide into patches of 14, as those of size 98",
        ),
        ("dinov2_vits14#file={}/m.pth&size=1", "those of size 14 do"),
        ("dinov2_vits14#file={}/no.pth", "dinov2_vits14: no such file: "),
        ("dinov2_vits14#file={}/junk.pth", "junk.pth: "),
        ("vit:{}/junk.pth", "junk.pth: "),
        ("vit:{}/no.pth", "vit:no.pth: no such file: "),
        ("vit:{}/many.safetensors", "images of many sizes do not divide"),
        ("vit:{}#sha256=" + "0" * 64, "sha256 is of one file"),
        ("vit:{}/m.pth#sha256=" + "0" * 64, "has SHA-256"),
    ],
)
def test_mistakes_are_one_line_at_once(tmp_path: Path, spec: str, message: str) -> None:
    published(tmp_path / "m.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    save_vit(network(), tmp_path / "many.safetensors", replace(OWN, resize=56))
    with pytest.raises(EmbedderError) as caught:
        opened(spec.format(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_weights_are_one_line_when_they_are_read(tmp_path: Path) -> None:
    state = network().state_dict()
    del state["norm.bias"]
    torch.save(state, tmp_path / "m.pth")
    model = opened(f"vit:{tmp_path / 'm.pth'}")
    with pytest.raises(EmbedderError, match=r"norm\.bias") as caught:
        model.embed(model.upload(np.zeros((1, 224, 224, 3), dtype=np.uint8)))
    assert "\n" not in str(caught.value)

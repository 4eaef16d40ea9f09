"""TorchScript files, SSCD's among them, on a tiny network."""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedders import sscd, torchscript, weights
from embedders.base import CopyThresholds, EmbedderError, Runtime
from embedders.images import UndecodableImage
from embedders.load import load_embedder
from embedders.specs import SSCD
from embedders.torch_model import TorchEmbedder
from tests.embedders.images_for_tests import photo, saved

SSCD_THRESHOLDS = CopyThresholds(self_dedup=0.6, reference=0.45)


class Pool(torch.nn.Module):
    """Sixteen means of each channel, and of them `dim` mixtures."""

    def __init__(self, dim: int = 7, flat: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(dim, 48, generator=torch.Generator().manual_seed(0)))
        self.flat = flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.adaptive_avg_pool2d(x, [4, 4])
        return y.flatten(1) @ self.weight.T if self.flat else y


def script(path: Path, network: torch.nn.Module | None = None) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(network or Pool()).save(path)
    return path


def opened(spec: str) -> TorchEmbedder:
    model = load_embedder(spec, Runtime())
    assert isinstance(model, TorchEmbedder)
    return model


def expected_vectors(network: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    images = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with torch.inference_mode():
        found = network(torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32))
    return torch.nn.functional.normalize(found).numpy()


@pytest.mark.parametrize("options", ["", "#preprocessing=skew_320"])
def test_images_are_squeezed_to_320_pixels_in_batches(tmp_path: Path, options: str) -> None:
    model = opened(f"torchscript:{script(tmp_path / 'm.pt')}{options}")
    images = [photo(n, 700, 500) for n in range(3)]
    batch = np.stack([model.preprocess(saved(image, "PNG")) for image in images])
    squeezed = [np.asarray(image.resize((320, 320), Image.Resampling.BILINEAR)) for image in images]
    assert np.abs(batch.astype(int) - np.stack(squeezed)).max() <= 3 and model.fixed_shape
    assert model.preprocessing.resample == Image.Resampling.BILINEAR
    np.testing.assert_allclose(model.embed(model.upload(batch)), expected_vectors(Pool(), batch), atol=1e-3)
    assert (model.dim, model.name, model.copy_thresholds) == (7, "torchscript:m.pt", None)
    with pytest.raises(UndecodableImage):
        model.preprocess(b"no image")


def test_or_brought_to_288_pixels_on_the_shorter_side_one_by_one(tmp_path: Path) -> None:
    model = opened(f"torchscript:{script(tmp_path / 'm.pt')}#preprocessing=small_288")
    assert not model.fixed_shape and model.dim == 7 and model.preprocessing.resample == Image.Resampling.BILINEAR
    for width, height, shape in ((700, 500, (288, 403)), (500, 700, (403, 288)), (288, 288, (288, 288))):
        image = photo(1, width, height)
        pixels = model.preprocess(saved(image, "PNG"))
        resized = np.asarray(image.resize(shape[::-1], Image.Resampling.BILINEAR))
        assert pixels.shape == (*shape, 3) and np.abs(pixels.astype(int) - resized).max() <= 3
        found = model.embed(model.upload(pixels[None]))
        np.testing.assert_allclose(found, expected_vectors(Pool(), pixels[None]), atol=1e-3)


def test_files_named_as_sscd_for_copies_bring_its_thresholds(tmp_path: Path) -> None:
    assert opened(f"torchscript:{script(tmp_path / 'sscd_disc_x.pt')}").copy_thresholds == SSCD_THRESHOLDS
    assert opened(f"torchscript:{script(tmp_path / 'sscd_imagenet_x.pt')}").copy_thresholds is None


def test_the_fingerprint_covers_weights_and_preprocessing_but_no_names(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one = script(tmp_path / "sscd_disc_mixup.torchscript.pt")
    two = Path(tmp_path / "other/copy.pt")
    two.write_bytes(one.read_bytes())
    other = script(tmp_path / "other/m.pt", Pool(8))
    same = {opened(f"torchscript:{one}").fingerprint, opened(f"torchscript:{two}").fingerprint}
    same |= {opened(f"sscd_disc_mixup#file={two}").fingerprint, opened(f"sscd_disc_large#file={two}").fingerprint}
    assert len(same) == 1
    changed = [f"torchscript:{other}", f"torchscript:{one}#preprocessing=small_288"]
    changed += [f"sscd_disc_mixup#file={other}&preprocessing=small_288"]
    assert len({*same, *(opened(spec).fingerprint for spec in changed)}) == 4


def test_details_say_that_there_is_code(tmp_path: Path) -> None:
    path = script(tmp_path / "m.pt")
    details = opened(f"sscd_disc_blur#file={path}&preprocessing=small_288").details
    assert json.loads(json.dumps(details)) == details
    assert details["format"] == "TorchScript, which contains code"
    assert (details["model"], details["output"]) == ("sscd_disc_blur", "vector")
    assert details["weights"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (details["preprocessing"]["resize"], details["preprocessing"]["crop"]) == (288, None)


@pytest.mark.parametrize("name", SSCD)
def test_sscd_by_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dim = 1024 if name == "sscd_disc_large" else 512
    path = script(tmp_path / "m.pt", Pool(dim))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(weights, "fetch", lambda url, sha256: asked.append((url, sha256)) or path)
    model = opened(f"{name}#sha256={digest}")
    address = f"https://dl.fbaipublicfiles.com/sscd-copy-detection/{name}.torchscript.pt"
    assert asked == [(address, digest)]
    assert model.copy_thresholds == (SSCD_THRESHOLDS if name.startswith("sscd_disc_") else None)
    assert model.dim == dim and "_network" not in vars(model)  # known without opening
    pixels = np.zeros((1, 320, 320, 3), dtype=np.uint8)
    assert model.embed(model.upload(pixels)).shape == (1, dim)
    if name in sscd.PINS:
        opened(name)
        opened(f"{name}#file=https://mirror/x.pt")
        assert asked[1:] == [(address, sscd.PINS[name]), ("https://mirror/x.pt", sscd.PINS[name])]
    else:
        with pytest.raises(EmbedderError, match=f"^{name}: no SHA-256 is known for https://dl.* add #sha256="):
            opened(name)


def test_a_file_of_another_network_than_its_name_says(tmp_path: Path) -> None:
    model = opened(f"sscd_disc_mixup#file={script(tmp_path / 'm.pt')}")
    with pytest.raises(EmbedderError, match="vectors of 7 numbers"):
        model.embed(model.upload(np.zeros((1, 320, 320, 3), dtype=np.uint8)))


def test_unusable_files_are_one_line_when_they_are_opened(tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save(Pool().state_dict(), tmp_path / "weights.pt")
    script(tmp_path / "maps.pt", Pool(flat=False))
    for name, message in (
        ("junk.pt", "not a TorchScript"),
        ("weights.pt", "not a TorchScript"),
        ("maps.pt", "not vectors"),
    ):
        model = opened(f"torchscript:{tmp_path / name}")
        with pytest.raises(EmbedderError, match=message) as caught:
            model.embed(model.upload(np.zeros((1, 320, 320, 3), dtype=np.uint8)))
        assert "\n" not in str(caught.value)


def test_loading_opens_no_file_and_opening_warns_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path / "m.pt")
    load = torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("the file is opened"))
    model = opened(f"sscd_disc_mixup#file={path}")
    assert model.dim == 512 and model.fingerprint and model.details
    monkeypatch.setattr(torch.jit, "load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchscript._open(path, "m")


def test_only_files_named_so_are_opened_as_torchscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path / "m.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("the file is opened"))
    for spec in (f"vit:{path}", f"dinov2_vits14#file={path}"):
        with pytest.raises(EmbedderError, match="TorchScript"):
            opened(spec)

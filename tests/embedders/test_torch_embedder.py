"""A torch network as an embedder: vectors, failures in one line, compilation, and the same bytes from two processes."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from embedders.base import Embedder, EmbedderError, Runtime
from embedders.dct import DctEmbedder
from embedders.network import Picked
from embedders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from embedders.torch_model import TorchEmbedder
from embedders.vit import VARIANTS, VisionTransformer
from tests.embedders.images_for_tests import photo, saved

PREPROCESSING = Preprocessing(resize=64, crop=(56, 56), resample=3, mean=IMAGENET_MEAN, std=IMAGENET_STD)
ROOT = Path(__file__).parents[2]
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))


class Own(nn.Module):
    """A network whose forward pass is the function given."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def embedder(network: nn.Module, runtime: Runtime | None = None, dim: int | None = 3) -> TorchEmbedder:
    return TorchEmbedder("own", "print", dim, None, PREPROCESSING, {}, lambda: network, runtime or Runtime())


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return Picked(VisionTransformer(VARIANTS["test"], layer_scale=1.0), lambda features: features.cls)


def pixels(seed: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 56, 56, 3), dtype=np.uint8)


@pytest.mark.parametrize("seed", range(3))
def test_the_network_gets_normalised_images(seed: int) -> None:
    seen: list[Tensor] = []
    model = embedder(Own(lambda images: seen.append(images) or images.mean((2, 3))))  # type: ignore[func-returns-value]
    batch = pixels(seed)
    vectors = model.embed(model.upload(batch))
    expected = (batch / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(seen[0].permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)
    means = expected.mean((1, 2))
    np.testing.assert_allclose(vectors, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-3)
    assert vectors.dtype == np.float16


def test_the_network_is_opened_once_and_not_before_it_is_needed() -> None:
    opened: list[int] = []

    def open_network() -> nn.Module:
        opened.append(1)
        return Own(lambda images: images.mean((2, 3)))

    model = TorchEmbedder("own", "print", 3, None, PREPROCESSING, {}, open_network, Runtime())
    assert (model.dim, model.fixed_shape, opened) == (3, True, [])
    for _ in range(3):
        model.embed(model.upload(pixels(0)))
    assert opened == [1]
    assert embedder(Own(lambda images: images.flatten(1)[:, :17]), dim=None).dim == 17


def no_memory(images: Tensor) -> Tensor:
    return torch.empty(10**15) if len(images) > 1 else torch.empty(10**16)


def no_cuda_memory(images: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand many lines more")


def wrong_size(images: Tensor) -> Tensor:
    raise RuntimeError("Sizes of tensors must match")


@pytest.mark.parametrize(
    ("function", "count", "message"),
    [
        (no_memory, 6, "own: cpu ran out of memory at batch_size 6; set batch_size to 3"),
        (no_memory, 1, "at batch_size 1; one image is too much for it"),
        (no_cuda_memory, 128, "ran out of memory at batch_size 128; set batch_size to 64"),
        (wrong_size, 2, "does not take images of 56 x 56 pixels: Sizes of tensors must match"),
        (lambda images: images, 2, r"gives \[2, 3, 56, 56\] for 2 images, not vectors"),
        (lambda images: images.sum((2, 3))[:1], 2, r"gives \[1, 3\] for 2 images"),
        (lambda images: (images,), 2, "gives tuple for 2 images"),
        (lambda images: images.flatten(1), 2, "vectors of 9408 numbers, but its settings say 3"),
    ],
)
def test_failures_are_one_line(function: Callable[[Tensor], Tensor], count: int, message: str) -> None:
    model = embedder(Own(function))
    with pytest.raises(EmbedderError, match=message) as caught:
        model.embed(model.upload(pixels(0, count)))
    assert "\n" not in str(caught.value)


def test_a_worker_without_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = embedder(small_vit(), Runtime(device="cuda"))
    with pytest.raises(EmbedderError, match="torch finds no GPU here"):
        model.embed(torch.zeros(1, 56, 56, 3, dtype=torch.uint8))


def test_a_gpu_too_small_is_one_line_wherever_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = embedder(small_vit(), Runtime(device="cuda"))
    monkeypatch.setattr(Tensor, "pin_memory", full)
    with pytest.raises(EmbedderError, match="cuda ran out of memory at batch_size 4; set batch_size to 2"):
        model.upload(pixels(0))
    monkeypatch.setattr(nn.Module, "to", full)
    with pytest.raises(EmbedderError, match="the weights do not fit into cuda's memory"):
        model.embed(torch.zeros(1, 56, 56, 3, dtype=torch.uint8))


@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_is_compiled_once_and_near_the_plain_one() -> None:
    plain = embedder(small_vit(), dim=32)
    compiled = embedder(small_vit(), Runtime(precision="bfloat16", compiled=True), dim=32)
    compiled.embed(compiled.upload(pixels(9)))
    for seed in range(3):
        with torch._dynamo.config.patch(error_on_recompile=True):
            ours = compiled.embed(compiled.upload(pixels(seed))).astype(np.float64)
        expected = plain.embed(plain.upload(pixels(seed))).astype(np.float64)
        assert np.sum(ours * expected, axis=1).min() > 0.999
        assert not np.array_equal(ours, expected)


def test_without_a_compiler_the_message_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = embedder(small_vit(), Runtime(compiled=True), dim=32)
    message = r"torch\.compile failed: .*; set compile to false"
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))})
    with no_compiler, pytest.raises(EmbedderError, match=message) as caught:
        model.embed(model.upload(pixels(0, 3)))
    assert "\n" not in str(caught.value)


PROGRAM = """
import sys
import numpy as np
from tests.embedders.test_torch_embedder import embedder, pixels, small_vit
from embedders.base import Runtime
model = embedder(small_vit(), Runtime(precision=sys.argv[1]), dim=32)
sys.stdout.buffer.write(b"".join(model.embed(model.upload(pixels(n))).tobytes() for n in range(3)))
"""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_processes_give_the_same_bytes(precision: str) -> None:
    command = [sys.executable, "-c", PROGRAM, precision]
    first, second = (subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout for _ in range(2))
    assert first == second and len(first) == 3 * 4 * 32 * 2


@pytest.mark.parametrize("model", [DctEmbedder(), embedder(small_vit(), dim=32)], ids=["dct", "vit"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_rotation_by_exif_gives_the_vector_of_the_rotated_pixels(model: Embedder, orientation: int) -> None:
    shown = photo(orientation, 90, 60)
    stored = shown.transpose(INVERSE[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    rotated = [saved(stored, "PNG", exif=exif), saved(shown, "PNG")]
    one, other = (model.embed(model.upload(model.preprocess(data)[None])) for data in rotated)
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one, model.embed(model.upload(model.preprocess(saved(stored, "PNG"))[None])))


INVERSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What the camera did to the picture before it stored it; the tag says how to undo it."""

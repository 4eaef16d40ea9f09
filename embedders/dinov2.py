"""Networks of `embedders/vit.py`: the published DINOv2 models by name (`dinov2_*`), and any checkpoint (`vit:FILE`).

The vector is the class token after the last norm. Unless a checkpoint says how its images were prepared, they are
prepared as for DINOv2's own evaluation: the shorter side to 256/224 of `size` (bicubic), the centre of `size` x `size`
pixels, mean and standard deviation of ImageNet.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from PIL import Image

from embedders.base import EmbedderError, Runtime
from embedders.checkpoints import checkpoint_files, load_vit, read_config, read_own_preprocessing
from embedders.network import ONE_FILE, ClassTokens, network_embedder
from embedders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from embedders.specs import Spec, is_url
from embedders.torch_model import TorchEmbedder
from embedders.vit import VARIANTS, Interpolation, ViTConfig
from embedders.weights import basename, file_sha256, obtain

DEFAULT_SIZE = 224
RESIZE_TO_CROP = 256 / 224

ADDRESS = "https://dl.fbaipublicfiles.com/dinov2/{model}/{name}_pretrain.pth"
SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}

# The publisher states no hashes. Each of these stands in several public projects that do not depend on each other.
PINS = {
    "dinov2_vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "dinov2_vitb14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "dinov2_vitl14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    "dinov2_vitg14": "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3",
    "dinov2_vits14_reg4": "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    "dinov2_vitb14_reg4": "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    "dinov2_vitl14_reg4": "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
    "dinov2_vitg14_reg4": "746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283",
}


def load_published(spec: Spec, runtime: Runtime) -> TorchEmbedder:
    """A published model. Its file is fetched unless the option `file` names a local one. Raises EmbedderError."""
    name = spec.kind
    place = spec.options.get("file", address(name))
    pin = spec.options.get("sha256") or (PINS[name] if is_url(place) else None)
    path, sha256 = obtain(place, pin, name)
    config = read_config(path, _interpolation(spec))
    expected = variant(name)
    if replace(config, interpolation=expected.interpolation) != expected:
        raise EmbedderError(f"{name}: {place} holds another network; open it as vit:{place}")
    return vit_embedder(name, path, config, _prepared(spec, None), {ONE_FILE: sha256}, runtime)


def load_file(spec: Spec, runtime: Runtime) -> TorchEmbedder:
    """A checkpoint of any kind that `embedders/checkpoints.py` reads, by path or URL. Raises EmbedderError."""
    name = f"vit:{basename(spec.place)}"
    path = Path(spec.place)
    if path.is_dir():
        if "sha256" in spec.options:
            raise EmbedderError(f"{name}: sha256 is of one file, and {path} is a directory")
        hashes = file_hashes(path)
    else:
        path, sha256 = obtain(spec.place, spec.options.get("sha256"), name)
        hashes = {ONE_FILE: sha256}
    config = read_config(path, _interpolation(spec))
    return vit_embedder(name, path, config, _prepared(spec, read_own_preprocessing(path)), hashes, runtime)


def vit_embedder(
    name: str, place: Path, config: ViTConfig, prepared: Preprocessing, hashes: Mapping[str, str], runtime: Runtime
) -> TorchEmbedder:
    """The network at `place` as an embedder; its weights are read at the first `embed`.

    Args:
        hashes: SHA-256 of the files that decide the network, by name.

    Raises:
        EmbedderError: images prepared so do not divide into the network's patches.
    """
    sides = prepared.shape[:2] if prepared.shape else ()
    if not sides or any(side % config.patch_size for side in sides):
        found = "{} x {} pixels".format(*sides) if sides else "many sizes"
        fits = max(1, round(min(sides or (DEFAULT_SIZE,)) / config.patch_size)) * config.patch_size
        raise EmbedderError(
            f"{name}: images of {found} do not divide into patches of {config.patch_size}, as those of size {fits} do: "
            f"write #size={fits} (for a model of hf:, open its directory as vit:DIR#size={fits})"
        )
    return network_embedder(
        name,
        hashes,
        "cls",
        prepared,
        config.dim,
        lambda: ClassTokens(load_vit(place, config.interpolation)),
        runtime,
        interpolation=config.interpolation,
    )


def standard_preprocessing(size: int) -> Preprocessing:
    """DINOv2's preparation for evaluation, at a crop of `size` pixels."""
    return Preprocessing(
        resize=round(size * RESIZE_TO_CROP),
        crop=(size, size),
        resample=Image.Resampling.BICUBIC.value,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def address(name: str) -> str:
    """Where a built-in model is published."""
    return ADDRESS.format(model=name.removesuffix("_reg4"), name=name)


def variant(name: str) -> ViTConfig:
    """What network a built-in model is."""
    registers = 4 if name.endswith("_reg4") else 0
    return replace(VARIANTS[SIZES[name[len("dinov2_vit")]]], registers=registers)


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that decides the network in a directory of transformers."""
    return {path.name: file_sha256(path) for path in checkpoint_files(folder)}


def _interpolation(spec: Spec) -> Interpolation | None:
    return cast(Interpolation | None, spec.options.get("interpolation"))


def _prepared(spec: Spec, own: Preprocessing | None) -> Preprocessing:
    """The checkpoint's own preparation, or the standard one; a size asked for changes its geometry alone."""
    standard = standard_preprocessing(int(spec.options.get("size", DEFAULT_SIZE)))
    if own is None:
        return standard
    return replace(own, resize=standard.resize, crop=standard.crop) if "size" in spec.options else own

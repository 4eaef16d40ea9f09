"""A trained network as files for others: for the embedders of this project, or for transformers.

Weights agree exactly in both. Away from the size that position embeddings were made for (`image_size`), they are
interpolated: as networks trained here do it ("antialias"), transformers does it too, in its class for registers, which
is therefore written even for a network without any. Networks that began as published ones without registers ("meta")
differ a little there; `export` says so.
"""

from pathlib import Path
from typing import Literal

from curation.errors import ConfigError, LvdError
from embedders.base import EmbedderError
from embedders.checkpoints import save_transformers, save_vit
from embedders.dinov2 import standard_preprocessing
from embedders.preprocessing import Preprocessing
from embedders.vit import VisionTransformer
from trainer.features import check_fit
from trainer.start import open_weights

Layout = Literal["lvd", "transformers"]


def export(
    model: VisionTransformer, place: str, layout: Layout, preprocessing: Preprocessing | None = None
) -> list[str]:
    """Writes the network (of a run, usually the moving average), whole or not at all.

    Args:
        model: float32 or lower, on any device, not sharded.
        place: on this machine. "lvd": a file NAME.safetensors, which is replaced if it is there; the embedder
            `vit:FILE` opens it. "transformers": a directory, new or empty, which `AutoModel` opens, and `vit:DIR`.
        preprocessing: how images are to be prepared; None for the published way, at the network's `image_size`.

    Returns:
        what the user should know: where transformers computes otherwise than this network.

    Raises:
        ConfigError: the place cannot be written, images prepared so do not fit, transformers has no such network.
        LvdError: weights that are not finite.
    """
    if "://" in place:
        raise ConfigError(f"{place} is no local path; export to a local one and copy it")
    preprocessing = preprocessing or standard_preprocessing(model.config.grid * model.config.patch_size)
    check_fit(model, preprocessing)
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise LvdError(f"weights that are not finite, {broken[0]} first; export an earlier checkpoint")
    try:
        if layout == "transformers":
            return save_transformers(model, Path(place), preprocessing)
        save_vit(model, Path(place), preprocessing)
        return []
    except EmbedderError as error:
        raise ConfigError(str(error)) from None


def export_from(place: str, out: str, layout: Layout, size: int | None = None) -> list[str]:
    """`export` of the network at a place, as `trainer.start.open_weights` reads it, for images of `size` pixels."""
    network = open_weights(place).backbone
    return export(network, out, layout, None if size is None else standard_preprocessing(size))

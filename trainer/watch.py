"""What is watched while a network trains: k-NN and gauges on labelled images, and pictures to look at."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from curation import storage
from embedders.dinov2 import standard_preprocessing
from embedders.vit import VisionTransformer
from trainer import gauges
from trainer.batch import Batch
from trainer.labelled import Labelled
from trainer.pictures import crops_page, pca_page
from trainer.step import Precision

if TYPE_CHECKING:
    from trainer.config import TrainSettings

PICTURES = "pictures"
SHOWN = 8

Evaluate = Callable[[VisionTransformer, nn.Module | None], dict[str, float]]
"""Backbone and DINO head (None without heads) of the moving average, plain ones, to numbers by name."""


class Album:
    """The pictures of a run: example crops and masks at once, maps of patch features whenever it is evaluated.

    Args:
        run: the run's directory.
        batch: its first one, of which some images are shown.
    """

    def __init__(self, run: Path, batch: Batch) -> None:
        self._folder = run / PICTURES
        self._folder.mkdir(exist_ok=True)
        self._pixels = batch.global_crops[: min(SHOWN, len(batch.image_ids))].permute(0, 2, 3, 1)
        self._preprocessing = standard_preprocessing(batch.global_crops.shape[2])
        crops_page(batch, SHOWN).save(self._folder / "crops.png")

    def add_patches(self, step: int, backbone: VisionTransformer) -> None:
        """PCA maps of the patches of the first global crops, before colours change, as `backbone` sees them."""
        pca_page(backbone, self._pixels, self._preprocessing).save(self._folder / f"patches-{step:08d}.png")


def labelled_evaluation(settings: "TrainSettings", precision: Precision) -> tuple[Evaluate | None, list[str]]:
    """The evaluation that settings ask for, its images read and prepared, and what to say of it.

    Raises:
        ConfigError: as `gauges.load_subset`.
    """
    asked = settings.evaluation
    if asked.train is None or asked.test is None:
        return None, []
    columns = (asked.image_column, asked.label_column)
    bank = Labelled(storage.absolute(asked.train), *columns, *asked.train_rows, asked.train_images, settings.seed)
    queries = Labelled(storage.absolute(asked.test), *columns, *asked.test_rows, asked.test_images, settings.seed)
    subset = gauges.load_subset(bank, queries, standard_preprocessing(settings.crops.global_size))

    def evaluate(backbone: VisionTransformer, head: nn.Module | None) -> dict[str, float]:
        return gauges.evaluate(backbone, subset, head, precision)

    counts = f"{len(subset.bank.labels):,} labelled images as bank and {len(subset.queries.labels):,} as queries"
    notes = [f"evaluation: {counts}"]
    if subset.skipped:
        place, reason = subset.skipped[0]
        notes.append(f"evaluation: {len(subset.skipped)} rows cannot be used; the first, {place}: {reason}")
    return evaluate, notes

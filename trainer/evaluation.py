"""A network at a place, evaluated on labelled images: what `lvd eval` does, from Python."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from curation.errors import ConfigError
from embedders.base import EmbedderError
from embedders.dinov2 import DEFAULT_SIZE, standard_preprocessing
from embedders.load import resolve_runtime
from embedders.preprocessing import Preprocessing
from embedders.vit import VisionTransformer
from trainer.distributed import chosen_device
from trainer.features import FeatureSet, RandomView, View, check_fit, features_of
from trainer.knn import KS, Accuracy, evaluate_knn
from trainer.labelled import Labelled, Skipped
from trainer.linear import LAST_BLOCKS, ChosenOn, LinearResult, evaluate_linear
from trainer.logistic import LogisticResult, evaluate_logistic
from trainer.start import open_weights


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and how: a network on its device, the preparation of images, the precision of products."""

    network: VisionTransformer
    preprocessing: Preprocessing
    precision: str

    @property
    def size(self) -> int:
        """Side of the centre crop in pixels."""
        assert self.preprocessing.shape is not None
        return self.preprocessing.shape[0]

    def features(
        self, source: Labelled, *, blocks: int = 1, patches: bool = False, view: View | None = None
    ) -> FeatureSet:
        """See `features_of`."""
        return features_of(
            self.network,
            source,
            self.preprocessing,
            blocks=blocks,
            patches=patches,
            view=view,
            precision=self.precision,
        )


def open_subject(place: str, size: int | None = None, device: str = "auto", precision: str = "auto") -> Subject:
    """The network at a place, as `trainer.start.open_weights` reads it; of a run, the moving average.

    Args:
        size: side in pixels of the centre crop; the shorter side is first brought to 256/224 of it. None for the size
            that the network was made for, at most the published 224.
        device, precision: "auto", or as `resolve_runtime` has them.

    Raises:
        ConfigError: no such network or device, or a size that does not divide into its patches.
    """
    network = open_weights(place).backbone
    chosen = chosen_device(device)
    try:
        runtime = resolve_runtime("vit:network", chosen.type, precision)
    except EmbedderError as error:
        raise ConfigError(str(error)) from None
    preprocessing = standard_preprocessing(size or default_size(network))
    check_fit(network, preprocessing)
    return Subject(network.to(chosen).eval(), preprocessing, runtime.precision)


def default_size(network: VisionTransformer) -> int:
    """Side in pixels that a network is evaluated at: its own, or as many patches as fit the published 224."""
    patch = network.config.patch_size
    return patch * min(network.config.grid, DEFAULT_SIZE // patch)


def knn(
    subject: Subject, train: Labelled, test: Labelled, ks: Sequence[int] = KS
) -> tuple[dict[int, Accuracy], list[Skipped]]:
    """k-NN accuracies by number of neighbors, and rows that could not be used.

    Holds the class tokens of all training images, 4 D bytes each and as many again when they are normalised: for
    ImageNet's 1.28 million and a ViT-L 5.2 GB twice. `Labelled.sample` takes fewer.

    Raises:
        ConfigError: as `features_of` and `evaluate_knn`.
    """
    bank, queries = subject.features(train), subject.features(test)
    return evaluate_knn(bank, queries, ks, device=_device(subject)), bank.skipped + queries.skipped


def linear(
    subject: Subject,
    train: Labelled,
    test: Labelled,
    *,
    steps: int = 12_500,
    batch_size: int = 1024,
    chosen_on: ChosenOn = "held_out",
    random_views: bool = False,
    seed: int = 0,
) -> tuple[LinearResult, list[Skipped]]:
    """The linear probe, see `trainer/linear.py`, and rows that could not be used.

    `random_views` trains on other random crops in each pass over the images, as published, for a forward pass of all of
    them each time. Raises ConfigError as `features_of` and `evaluate_linear`.
    """

    def features(source: Labelled, view: View | None = None) -> FeatureSet:
        return subject.features(source, blocks=LAST_BLOCKS, patches=True, view=view)

    def views(epoch: int) -> FeatureSet:
        return features(train, RandomView(subject.size, seed, epoch))

    bank, queries = features(train), features(test)
    result = evaluate_linear(
        bank,
        queries,
        steps=steps,
        batch_size=batch_size,
        chosen_on=chosen_on,
        seed=seed,
        views=views if random_views else None,
        device=_device(subject),
    )
    return result, bank.skipped + queries.skipped


def logistic(subject: Subject, train: Labelled, test: Labelled, seed: int = 0) -> tuple[LogisticResult, list[Skipped]]:
    """Logistic regression, see `trainer/logistic.py`, and rows that could not be used. Raises ConfigError as it."""
    bank, queries = subject.features(train), subject.features(test)
    return evaluate_logistic(bank, queries, seed, _device(subject)), bank.skipped + queries.skipped


def rows_of(source: Labelled, rows: str | None) -> Labelled:
    """A part of the rows, `START:STOP` with either left out as in Python. Raises ConfigError for anything else."""
    if rows is None:
        return source
    start, colon, stop = rows.partition(":")
    if not colon or not all(bound == "" or bound.isdecimal() for bound in (start, stop)):
        raise ConfigError(f"rows {rows!r}: give START:STOP, such as 0:45000 or 45000:")
    return replace(source, start=int(start or 0), stop=int(stop) if stop else None)


def _device(subject: Subject) -> torch.device:
    return subject.network.cls_token.device

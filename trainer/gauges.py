"""Whether a network learns or collapses, on a fixed subset of labelled images: what the loss alone does not show.

k-NN accuracy rises as features improve; the gauges fall as a network comes to give one answer for all images.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from embedders.preprocessing import Preprocessing
from embedders.vit import VisionTransformer
from trainer.features import Pixels, extract, pixels_of
from trainer.knn import evaluate_knn
from trainer.labelled import Labelled, Skipped, class_numbers

ROWS_AT_ONCE = 256
TEMPERATURE = 0.1
"""Of the softmax over prototypes: that of the student."""


@dataclass(frozen=True)
class Subset:
    """Prepared images that do not change during a run, on the CPU.

    Attributes:
        bank, queries: of k-NN; the gauges are of the queries.
        preprocessing: as they were prepared.
        skipped: rows that are not there, and why.
    """

    bank: Pixels
    queries: Pixels
    preprocessing: Preprocessing
    skipped: list[Skipped]


def load_subset(bank: Labelled, queries: Labelled, preprocessing: Preprocessing) -> Subset:
    """Reads and decodes a subset once; it takes 3 H W bytes an image, so `Labelled.sample` should bound it.

    Raises:
        ConfigError: nothing to read, or labels that do not fit, now and not in the middle of a run.
    """
    (known, lost), (asked, also_lost) = pixels_of(bank, preprocessing), pixels_of(queries, preprocessing)
    class_numbers(known.labels, asked.labels)
    return Subset(known, asked, preprocessing, lost + also_lost)


def evaluate(
    backbone: VisionTransformer, subset: Subset, head: nn.Module | None = None, precision: str = "float32"
) -> dict[str, float]:
    """Accuracy and gauges of a network at some point of its training; its mode and weights stay as they are.

    Args:
        backbone: a plain network (not sharded), on the device that is to work.
        head: [n, D] to prototypes [n, K], on the same device; None leaves out the entropies.
        precision: of the backbone's products, "float32" or "bfloat16".

    Returns:
        `knn_K`: shares of right queries, 0 to 1, by the published numbers of neighbors.
        `cls_std`: see `class_token_std`.
        `koleo_distance`: see `nearest_distance`.
        `prototype_entropy_of_mean`, `prototype_mean_entropy`: see `prototype_entropies`.
    """
    bank, queries = (
        extract(backbone, _batches(pixels), subset.preprocessing, precision=precision)
        for pixels in (subset.bank, subset.queries)
    )
    device = backbone.cls_token.device
    cls = queries.cls[:, -1].to(device)
    found = {f"knn_{k}": accuracy.top1 for k, accuracy in evaluate_knn(bank, queries, device=device).items()}
    found |= {"cls_std": class_token_std(cls), "koleo_distance": nearest_distance(cls)}
    if head is not None:
        of_mean, mean = prototype_entropies(head, cls)
        found |= {"prototype_entropy_of_mean": of_mean, "prototype_mean_entropy": mean}
    return found


def class_token_std(cls: Tensor) -> float:
    """Standard deviation over images of each dimension of the unit class tokens, averaged over dimensions.

    Of [n, D]. It is 0 where all images have one direction, and 1 / sqrt(D) where directions are spread evenly (SimSiam,
    arXiv 2011.10566, section 4.1).
    """
    return float(F.normalize(cls.float(), dim=1).std(0, unbiased=False).mean())


def nearest_distance(cls: Tensor) -> float:
    """Mean Euclidean distance of the unit class tokens [n, D] to their nearest other: what KoLeo pushes up."""
    units = F.normalize(cls.float(), dim=1)
    if len(units) < 2:
        return math.nan
    total = units.new_zeros((), dtype=torch.float64)
    for start in range(0, len(units), ROWS_AT_ONCE):
        part = units[start : start + ROWS_AT_ONCE]
        products = part @ units.T
        products[torch.arange(len(part)), torch.arange(start, start + len(part))] = -torch.inf  # not itself
        total += torch.linalg.vector_norm(part - units[products.argmax(1)], dim=1).double().sum()
    return float(total / len(units))


@torch.no_grad()
def prototype_entropies(head: nn.Module, cls: Tensor, temperature: float = TEMPERATURE) -> tuple[float, float]:
    """Entropies in nats of softmax(head(cls) / temperature) over K prototypes, for class tokens [n, D].

    Returns:
        of the mean over images: log K where all prototypes are used alike, 0 where all images take the same one;
        mean over images: log K where no image prefers any, and close to 0 where each takes one.

    Collapse to one prototype brings the first to 0, collapse to uniform answers the second to log K.
    """
    sums, each = [], 0.0
    for part in torch.split(cls, ROWS_AT_ONCE):
        log_shares = F.log_softmax(head(part).double() / temperature, dim=1)
        sums.append(log_shares.exp().sum(0))
        each -= float((log_shares.exp() * log_shares).sum())
    mean = torch.stack(sums).sum(0) / len(cls)
    return float(torch.special.entr(mean).sum()), each / len(cls)


def _batches(pixels: Pixels) -> list[Pixels]:
    """Views of the images, some at a time."""
    return [
        Pixels(pixels.images[start : start + ROWS_AT_ONCE], pixels.labels[start : start + ROWS_AT_ONCE])
        for start in range(0, len(pixels.labels), ROWS_AT_ONCE)
    ]

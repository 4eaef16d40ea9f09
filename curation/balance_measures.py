"""How balanced a set is over clusters, classes or any other cells: measures of their counts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.sampling import Tree


def entropy(counts: npt.NDArray[Any]) -> float:
    """Shannon entropy of the shares counts / sum(counts), in nats; 0 for nothing."""
    present = np.asarray(counts)[np.asarray(counts) > 0]
    share = present / present.sum() if len(present) else np.ones(1)
    return float(abs((share * np.log(share)).sum()))


def normalized_entropy(counts: npt.NDArray[Any]) -> float:
    """`entropy` over its largest value log k, k counting empty clusters too: 1 is perfect balance (also for k = 1)."""
    if np.sum(counts) == 0:
        return 0.0
    return entropy(counts) / float(np.log(len(counts))) if len(counts) > 1 else 1.0


def gini(counts: npt.NDArray[Any]) -> float:
    """Gini coefficient: mean absolute difference of two counts over twice their mean; 0 is perfect balance."""
    ordered = np.sort(np.asarray(counts, dtype=np.float64))
    num_counts, total = len(ordered), float(ordered.sum())
    if total == 0.0:
        return 0.0
    weight = 2 * np.arange(1, num_counts + 1) - num_counts - 1
    return float((weight * ordered).sum() / (num_counts * total))


def kl_to_uniform(counts: npt.NDArray[Any]) -> float:
    """KL divergence of the shares from equal shares, sum p log(p k) = log k - `entropy`, in nats; 0 for nothing.

    k counts empty clusters too; 0 is perfect balance, log k everything in one.
    """
    return max(0.0, float(np.log(len(counts))) - entropy(counts)) if np.sum(counts) else 0.0


def effective_clusters(counts: npt.NDArray[Any]) -> float:
    """exp(`entropy`): as many equal clusters would be as diverse; 0 for nothing."""
    return float(np.exp(entropy(counts))) if np.sum(counts) else 0.0


@dataclass(frozen=True)
class Balance:
    """All measures of one set of counts; `filled` is the number of clusters with images."""

    clusters: int
    filled: int
    entropy: float
    normalized_entropy: float
    gini: float
    kl_to_uniform: float
    effective_clusters: float


def balance(counts: npt.NDArray[Any]) -> Balance:
    """The measures of counts, int or float [k], at least 0. Holds about 40 bytes a cluster."""
    filled = int(np.count_nonzero(counts))
    measures = (entropy, normalized_entropy, gini, kl_to_uniform, effective_clusters)
    return Balance(len(counts), filled, *(measure(counts) for measure in measures))


def balance_by_level(tree: Tree, counts: npt.NDArray[Any]) -> list[Balance]:
    """The measures at every level, finest first, from the images of each finest cluster, int [K_1]."""
    return [balance(level) for level in tree.totals(counts)]

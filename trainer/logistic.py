"""Logistic regression on frozen features, its penalty chosen on held-out rows, as DINOv2 reports it.

Multinomial, float64, solved by L-BFGS: min over W, b of |W|^2 / 2 + C sum of cross-entropies; b is not penalised.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from trainer.features import FeatureSet
from trainer.labelled import class_numbers, held_out_rows

STRENGTHS = tuple((10 ** torch.linspace(-6, 5, 45, dtype=torch.float64)).tolist())
MAX_ITERATIONS = 1000
TOLERANCE = 1e-12
"""Of the gradient. A looser one leaves biases wrong by more than the weights of a strong penalty are worth."""


@dataclass(frozen=True)
class LogisticResult:
    """What the regression found.

    Attributes:
        accuracy: share of the test rows, 0 to 1, by a model of all training rows.
        strength: C, the best on the held-out rows (of equals the lowest).
        held_out: accuracy on the held-out rows for each C, by models of the other training rows.
    """

    accuracy: float
    strength: float
    held_out: dict[float, float]


def evaluate_logistic(
    train: FeatureSet, test: FeatureSet, seed: int = 0, device: str | torch.device = "cpu"
) -> LogisticResult:
    """Chooses C by a tenth of the training rows, then trains on all of them.

    Each C starts from the solution of the one before: the problem is convex, so that this only saves time. Holds the
    class tokens of the last block as float64 on `device`.

    Raises:
        ConfigError: too few rows, or labels that do not fit.
    """
    classes, labels, truth = class_numbers(train.labels, test.labels)
    kept, held = held_out_rows(len(labels), seed)
    x, labels = train.cls[:, -1].to(device, torch.float64), labels.to(device)
    kept, held = kept.to(device), held.to(device)
    model = zero_model(x.shape[1], len(classes), device)
    found: dict[float, float] = {}
    models = {}
    for strength in STRENGTHS:
        model = fit(x[kept], labels[kept], strength, model)
        found[strength] = accuracy(model, x[held], labels[held])
        models[strength] = model
    best = max(STRENGTHS, key=found.__getitem__)
    model = fit(x, labels, best, models[best])
    return LogisticResult(accuracy(model, test.cls[:, -1].to(x), truth.to(device)), best, found)


def zero_model(dim: int, num_classes: int, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Weights [C, D] and biases [C], float64, all zero."""
    weight = torch.zeros(num_classes, dim, dtype=torch.float64, device=device)
    return weight, weight.new_zeros(num_classes)


def fit(x: Tensor, labels: Tensor, strength: float, start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The best weights [C, D] and biases [C] for float64 [n, D] and int64 [n], beginning at `start`.

    Minimised is the objective over C n, so that it is of the size of one cross-entropy, until no part of its gradient
    is above 1e-12, nothing changes any more, or for 1,000 iterations.
    """
    weight, bias = (value.clone().requires_grad_() for value in start)
    penalty = 1 / (2 * strength * len(x))
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        max_eval=10 * MAX_ITERATIONS,  # of the line searches; by itself it would end them before
        tolerance_grad=TOLERANCE,
        tolerance_change=torch.finfo(torch.float64).eps,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, labels) + penalty * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def accuracy(model: tuple[Tensor, Tensor], x: Tensor, labels: Tensor) -> float:
    """Share of the rows [n, D] whose class, int64 [n], is the likeliest."""
    weight, bias = model
    return float((x @ weight.T + bias).argmax(1).eq(labels).double().mean())

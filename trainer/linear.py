"""The linear probe of DINOv2: linear classifiers on frozen features, all of the published grid in one pass.

A head is a choice of input (class tokens of the last block, or of the last four; with or without the mean patch of the
last) and a learning rate. Published are 12,500 steps of batch 1,024 over random views. Here the features of the centre
views are computed once and trained on, unless `views` gives those of random views for each pass over the data, which
costs a forward pass of all training images each time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from curation.errors import ConfigError
from trainer.features import FeatureSet
from trainer.labelled import class_numbers, held_out_rows

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""Learning rates for a batch of RATE_BATCH."""
RATE_BATCH = 256
LAST_BLOCKS = 4
MOMENTUM = 0.9
INITIAL_STD = 0.01
SCORED_ROWS = 1024

ChosenOn = Literal["held_out", "test"]


class Head(NamedTuple):
    """One classifier of the grid: class tokens of so many blocks, whether the mean patch, learning rate."""

    blocks: int
    patches: bool
    rate: float

    def __str__(self) -> str:
        tokens = f"class tokens of {self.blocks} blocks" if self.blocks > 1 else "class token"
        return f"{tokens}{' and mean patch' if self.patches else ''}, learning rate {self.rate:g}"


@dataclass(frozen=True)
class LinearResult:
    """What the probe found; accuracies are shares, 0 to 1, of the test rows.

    Attributes:
        accuracy: of the chosen head.
        head: the best on the rows it was chosen on.
        all_heads: accuracy of every head.
    """

    accuracy: float
    head: Head
    all_heads: dict[Head, float]


@dataclass
class Heads:
    """Heads on one input, R of them, by learning rate.

    Attributes:
        blocks, patches: the input.
        weight, bias: float32 [R, C, W] and [R, C], for inputs of width W.
        weight_velocity, bias_velocity: of momentum, of the same shapes.
    """

    blocks: int
    patches: bool
    weight: Tensor
    bias: Tensor
    weight_velocity: Tensor
    bias_velocity: Tensor

    def inputs(self, features: FeatureSet, rows: Tensor | slice) -> Tensor:
        """[B, W]."""
        tokens = features.cls[rows, -self.blocks :].flatten(1)
        if not self.patches or features.patches is None:
            return tokens
        return torch.cat([tokens, features.patches[rows]], 1)

    def logits(self, inputs: Tensor) -> Tensor:
        """[B, R, C] of inputs [B, W]."""
        return (inputs @ self.weight.flatten(0, 1).T).view(-1, *self.bias.shape) + self.bias

    def step(self, inputs: Tensor, labels: Tensor, rates: Tensor) -> None:
        """One step of SGD with momentum on the mean cross-entropy of each head by itself; rates: [R].

        The gradient by the logits is (softmax - one-hot) / B, and those by weights and biases follow.
        """
        error = self.logits(inputs).softmax(2) - F.one_hot(labels, self.bias.shape[1])[:, None]
        error /= len(inputs)
        self.weight_velocity.mul_(MOMENTUM).add_((error.flatten(1).T @ inputs).view_as(self.weight))
        self.bias_velocity.mul_(MOMENTUM).add_(error.sum(0))
        self.weight -= rates[:, None, None] * self.weight_velocity
        self.bias -= rates[:, None] * self.bias_velocity


def evaluate_linear(
    train: FeatureSet,
    test: FeatureSet,
    *,
    steps: int = 12_500,
    batch_size: int = 1024,
    chosen_on: ChosenOn = "held_out",
    seed: int = 0,
    views: Callable[[int], FeatureSet] | None = None,
    device: str | torch.device = "cpu",
) -> LinearResult:
    """Trains all heads and gives the accuracy of the best.

    Args:
        train, test: features of the centre views with `blocks=4, patches=True`, as `features_of` gives them. Networks
            with fewer blocks have heads on all of them.
        steps, batch_size: batches are drawn without replacement, pass after pass; the last, smaller one is left out.
        chosen_on: "held_out": the best head on a tenth of the training rows, which is not trained on. "test": on the
            test rows themselves, as published, which flatters.
        seed: of batches, held-out rows and initial weights.
        views: features of the same rows in random views, by pass, in place of `train` for training.
        device: where the heads train; it holds them and one batch.

    Raises:
        ConfigError: sizes that are not positive, too few rows, labels that do not fit, no mean patches.
    """
    if min(steps, batch_size) < 1:
        raise ConfigError(f"steps {steps} and batch_size {batch_size} of the linear probe must be positive")
    if train.patches is None or test.patches is None:
        raise ConfigError("the linear probe needs mean patches: take features with patches=True")
    classes, labels, truth = class_numbers(train.labels, test.labels)
    kept, held = held_out_rows(len(labels), seed) if chosen_on == "held_out" else (torch.arange(len(labels)), None)
    stacks = new_heads(train, len(classes), seed, device)
    train_heads(stacks, views or (lambda _: train), labels, kept, steps, batch_size, seed)
    all_heads = accuracies(stacks, test, truth, torch.arange(len(truth)))
    scores = all_heads if held is None else accuracies(stacks, train, labels, held)
    best = max(scores, key=scores.__getitem__)
    return LinearResult(all_heads[best], best, all_heads)


def new_heads(features: FeatureSet, num_classes: int, seed: int, device: str | torch.device = "cpu") -> list[Heads]:
    """The grid, untrained: weights from N(0, 0.01), biases zero."""
    draw = torch.Generator().manual_seed(seed)
    _, depth, dim = features.cls.shape
    stacks = []
    for blocks in sorted({1, min(LAST_BLOCKS, depth)}):
        for patches in (False, True):
            shape = (len(RATES), num_classes, dim * (blocks + patches))
            weight = (torch.randn(shape, generator=draw) * INITIAL_STD).to(device)
            bias = weight.new_zeros(shape[:2])
            stacks.append(Heads(blocks, patches, weight, bias, torch.zeros_like(weight), torch.zeros_like(bias)))
    return stacks


def train_heads(
    stacks: list[Heads],
    views: Callable[[int], FeatureSet],
    labels: Tensor,
    kept: Tensor,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Trains on the rows `kept` (int64) of `views(0)`, then of `views(1)`, ...; all have the labels int64 [n].

    The learning rate of a head is its own times batch / 256, and falls to 0 along a cosine.
    """
    device = stacks[0].weight.device
    batch = min(batch_size, len(kept))
    rates = torch.tensor(RATES, device=device) * batch / RATE_BATCH
    for step in range(steps):
        epoch, index = divmod(step, len(kept) // batch)
        if index == 0:
            features, order = views(epoch), _shuffled(kept, seed, epoch)
            if len(features.labels) != len(labels):
                raise ConfigError(f"pass {epoch} has {len(features.labels)} rows instead of {len(labels)}")
        rows = order[index * batch : (index + 1) * batch]
        factor = (1 + math.cos(math.pi * step / steps)) / 2
        for heads in stacks:
            heads.step(heads.inputs(features, rows).to(device), labels[rows].to(device), rates * factor)


def accuracies(stacks: list[Heads], features: FeatureSet, labels: Tensor, rows: Tensor) -> dict[Head, float]:
    """Share of `rows` that each head gets right; a head whose logits are not finite gets nothing right."""
    found = {}
    for heads in stacks:
        right = torch.zeros(len(RATES), dtype=torch.int64, device=heads.weight.device)
        for part in torch.split(rows, SCORED_ROWS):
            logits = heads.logits(heads.inputs(features, part).to(heads.weight.device))
            hits = logits.argmax(2) == labels[part].to(heads.weight.device)[:, None]
            right += (hits & logits.isfinite().all(2)).sum(0)
        for rate, share in zip(RATES, (right.double() / len(rows)).tolist(), strict=True):
            found[Head(heads.blocks, heads.patches, rate)] = share
    return found


def _shuffled(rows: Tensor, seed: int, epoch: int) -> Tensor:
    """`rows` in an order that is a function of (seed, epoch)."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return rows[torch.randperm(len(rows), generator=draw)]

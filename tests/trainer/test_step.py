"""A step of training against one written out from the formulas, and a step that must leave no trace."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainer.step
from tests.trainer.tiny_runs import copied, random_batch, settings, trained
from trainer.batch import Batch
from trainer.build import make_schedules
from trainer.checkpoints import tensors_of
from trainer.config import TrainSettings
from trainer.pair import Network
from trainer.photometric import augment
from trainer.schedules import Values
from trainer.step import Trained, draw_seed, train_step

CASES = {
    "softmax, tied": (),
    "sinkhorn, separate": ("loss.centering=sinkhorn", "heads.separate=true", "heads.ibot_prototypes=20"),
    "without KoLeo": ("loss.koleo=0", "optimizer.layerwise_decay=1.0"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


class SlowRun:
    """Section 4 of arXiv 2304.07193, appendix B, and AdamW (1711.05101), one crop, pair and parameter at a time."""

    def __init__(self, given: TrainSettings, student: Network) -> None:
        self.given = given
        self.student, self.teacher = copy.deepcopy(student), copy.deepcopy(student)
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in student.named_parameters()}
        self.centers: dict[str, Tensor] = {}
        self.pending: dict[str, Tensor] = {}
        self.steps = 0

    def step(self, batch: Batch, values: Values) -> dict[str, Tensor]:
        losses = self.losses(batch, values)
        weights = self.given.loss
        total = sum(getattr(weights, name) * loss for name, loss in losses.items())
        for value in self.student.parameters():
            value.grad = None
        total.backward()
        norms = {f"norm_{name}": self.clip(part) for name, part in self.student.named_children()}
        self.steps += 1
        self.gradients = {name: value.grad.clone() for name, value in self.student.named_parameters()}
        with torch.no_grad():
            for name, value in self.student.named_parameters():
                self.adamw(name, value, values)
            for mean, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.copy_(values.momentum * mean + (1 - values.momentum) * value)
        return {"loss": total.detach(), **{name: loss.detach() for name, loss in losses.items()}, **norms}

    def losses(self, batch: Batch, values: Values) -> dict[str, Tensor]:
        images, masks = len(batch.image_ids), batch.masks
        assert masks is not None
        views = list(augment(batch.global_crops, batch.global_colors).split(images))
        masked = list(masks.mask.split(images))
        local = augment(batch.local_crops, batch.local_colors).split(images)
        with torch.no_grad():
            seen = [self.teacher.backbone(view) for view in views]
            cls = self.probabilities("cls", torch.cat([self.teacher.dino_head(each.cls) for each in seen]), values)
            patches = torch.cat([each.patches[mask] for each, mask in zip(seen, masked, strict=True)])
            there = self.probabilities("patches", self.patch_head(self.teacher, patches), values)
        own = [self.student.backbone(view, mask) for view, mask in zip(views, masked, strict=True)]
        all_cls = [each.cls for each in own] + [self.student.backbone(view).cls for view in local]
        dino, terms = torch.zeros(()), 0
        for target, probs in enumerate(cls.split(images)):
            for view, tokens in enumerate(all_cls):
                if view != target:
                    dino = dino + self.cross_entropy(probs, self.student.dino_head(tokens)).mean()
                    terms += 1
        ibot, first = torch.zeros(()), 0
        for each, mask in zip(own, masked, strict=True):
            for tokens, chosen in zip(each.patches, mask, strict=True):
                count = int(chosen.sum())
                if count:
                    logits = self.patch_head(self.student, tokens[chosen])
                    ibot = ibot + self.cross_entropy(there[first : first + count], logits).mean()
                first += count
        losses = {"dino": dino / terms, "ibot": ibot / (2 * images)}
        if self.given.loss.koleo:
            losses["koleo"] = self.koleo(own[0].cls) + self.koleo(own[1].cls)
        return losses

    def patch_head(self, network: Network, patches: Tensor) -> Tensor:
        logits: Tensor = (network.ibot_head or network.dino_head)(patches)
        return logits

    def cross_entropy(self, probs: Tensor, logits: Tensor) -> Tensor:
        return -(probs * (logits / self.given.loss.student_temperature).log_softmax(dim=1)).sum(dim=1)

    def koleo(self, tokens: Tensor) -> Tensor:
        units = tokens / tokens.norm(dim=1, keepdim=True)
        nearest = [min((a - b).norm() for j, b in enumerate(units) if j != i) for i, a in enumerate(units)]
        return -torch.stack(nearest).log().mean()

    def probabilities(self, kind: str, logits: Tensor, values: Values) -> Tensor:
        temperature = values.teacher_temperature
        if self.given.loss.centering == "sinkhorn":
            shares = (logits.double() / temperature).exp()
            for _ in range(3):
                shares = shares / shares.sum(dim=0, keepdim=True) / shares.shape[1]
                shares = shares / shares.sum(dim=1, keepdim=True) / shares.shape[0]
            return (shares * shares.shape[0]).float()
        center = self.centers.get(kind, torch.zeros(logits.shape[1]))
        if kind in self.pending:
            center = 0.9 * center + 0.1 * self.pending[kind]
        self.centers[kind], self.pending[kind] = center, logits.mean(dim=0)
        return ((logits - center) / temperature).softmax(dim=1)

    def clip(self, part: nn.Module) -> Tensor:
        norm = torch.stack([value.grad.square().sum() for value in part.parameters() if value.grad is not None]).sum()
        norm = norm.sqrt()
        for value in part.parameters():
            if value.grad is not None:
                value.grad *= min(1.0, self.given.optimizer.clip / (float(norm) + 1e-6))
        return norm

    def adamw(self, name: str, value: Tensor, values: Values) -> None:
        lr, decay = self.rates(name, values)
        beta1, beta2 = self.given.optimizer.betas
        gradient = value.grad
        assert gradient is not None
        first, second = self.moments[name]
        first.copy_(beta1 * first + (1 - beta1) * gradient)
        second.copy_(beta2 * second + (1 - beta2) * gradient**2)
        value *= 1 - lr * decay
        denominator = (second / (1 - beta2**self.steps)).sqrt() + 1e-8
        value -= lr * first / (1 - beta1**self.steps) / denominator

    def rates(self, name: str, values: Values) -> tuple[float, float]:
        depth, parts = len(self.student.backbone.blocks), name.split(".")
        layer = depth + 1
        if "blocks" in parts:
            layer = int(parts[parts.index("blocks") + 1]) + 1
        elif parts[0] == "backbone" and parts[1] != "norm":
            layer = 0
        lr = values.last_layer_lr if "last_layer" in parts else values.lr
        lr *= self.given.optimizer.layerwise_decay ** (depth + 1 - layer)
        if "patch_embed" in parts:
            lr *= self.given.optimizer.patch_embed_factor
        plain = parts[-1] in ("bias", "gamma") or any(part.startswith("norm") for part in parts)
        return lr, 0.0 if plain else values.weight_decay


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_ones_written_from_the_formulas(case: str) -> None:
    given = settings(*CASES[case])
    run = trained(given, seed=2)
    assert isinstance(run.pair.student, Network)
    slow, schedules = SlowRun(given, run.pair.student), make_schedules(given, given.batch_size)
    for step in range(3):
        values = schedules.at(step)
        metrics = train_step(run, random_batch(given, step), step, values)
        expected = slow.step(random_batch(given, step), values)
        numbers = dict(zip(metrics.names, metrics.values, strict=True))
        assert numbers.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(numbers[name], value, rtol=2e-4, atol=1e-6, msg=f"{name} of step {step}")
    assert schedules.at(2).lr > 0
    for ours, theirs in ((run.pair.student, slow.student), (run.pair.ema, slow.teacher)):
        for (name, value), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            # AdamW makes steps of full size of gradients that are 0 but for rounding, as those of the keys' biases.
            sure = slow.moments[name][1].sqrt() > 1e-5
            torch.testing.assert_close(value[sure], other[sure], rtol=1e-3, atol=2e-5, msg=name)
            torch.testing.assert_close(value, other, rtol=0, atol=6 * schedules.at(2).lr, msg=name)
    for name, value in run.pair.student.named_parameters():
        first, second = slow.moments[name]
        state = run.optimizer.state[value]
        torch.testing.assert_close(state["exp_avg"], first, rtol=1e-3, atol=1e-6, msg=name)
        torch.testing.assert_close(state["exp_avg_sq"], second, rtol=2e-3, atol=1e-9, msg=name)
        assert state["step"] == 3


@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_equal_those_of_the_formulas(seed: int) -> None:
    given = settings("optimizer.clip=1000000")
    run, batch = trained(given, seed), random_batch(given, seed)
    assert isinstance(run.pair.student, Network)
    slow, values = SlowRun(given, run.pair.student), make_schedules(given, 4).at(1)
    slow.step(batch, values)
    loss, _ = run.objective(run.pair, trainer.step.augmented(batch), values.teacher_temperature)
    loss.backward()
    for name, value in run.pair.student.named_parameters():
        assert value.grad is not None, name
        scale = slow.gradients[name].abs().max()
        torch.testing.assert_close(value.grad, slow.gradients[name], rtol=1e-3, atol=float(1e-4 * scale), msg=name)


def all_of(run: Trained) -> dict[str, Tensor]:
    """All that a run is made of, with the centres as they will be used."""
    run = copy.deepcopy(run)
    for center in getattr(run.objective, "centers", []):
        center.apply_pending()
    return {name: value.clone() for name, value in tensors_of(run).items()}


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_a_step_that_is_not_finite_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, centering: str, value: float
) -> None:
    given = settings(f"loss.centering={centering}")
    run, schedules = trained(given), make_schedules(given, 4)
    train_step(run, random_batch(given, 0), 0, schedules.at(0))
    train_step(run, random_batch(given, 1), 1, schedules.at(1))
    before = all_of(run)

    def broken(*args: Any) -> Tensor:
        out = augment(*args)
        out[0, 0, 0, 0] = value
        return out

    monkeypatch.setattr(trainer.step, "augment", broken)
    metrics = train_step(run, random_batch(given, 2), 2, schedules.at(2))
    assert not metrics.values.isfinite().all()
    after = all_of(run)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    monkeypatch.undo()
    metrics = train_step(run, random_batch(given, 2), 2, schedules.at(2))
    assert metrics.values.isfinite().all()
    changed = {name.split(".")[0] for name, was in after.items() if not torch.equal(all_of(run)[name], was)}
    assert changed >= {"student", "ema", "optimizer"}


def test_a_gradient_that_is_not_finite_counts_too() -> None:
    given = settings()
    run, schedules = trained(given), make_schedules(given, 4)
    run.pair.student.backbone.cls_token.register_hook(lambda gradient: gradient * math.inf)
    before = all_of(run)
    metrics = train_step(run, random_batch(given, 0), 3, schedules.at(3))
    numbers = dict(zip(metrics.names, metrics.values.tolist(), strict=True))
    assert math.isfinite(numbers["loss"]) and not math.isfinite(numbers["norm_backbone"])
    assert [name for name, was in before.items() if not torch.equal(was, all_of(run)[name])] == []


def test_heads_alone_learn_while_the_backbone_is_held() -> None:
    given = settings()
    run, schedules = trained(given), make_schedules(given, 4)
    before = copied(run.pair.student)
    train_step(run, random_batch(given, 0), 3, schedules.at(3), backbone_learns=False)
    for name, value in run.pair.student.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


def test_nothing_drawn_before_matters_and_ranks_draw_apart() -> None:
    given = settings("model.drop_path=0.5")
    runs = [trained(given) for _ in range(3)]
    for number, (run, step) in enumerate(zip(runs, (3, 3, 4), strict=True)):
        torch.manual_seed(number)
        train_step(run, random_batch(given, 0), step, make_schedules(given, 4).at(3))
    first, again, later = (copied(run.pair.student) for run in runs)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, later[name]) for name, value in first.items())
    assert len({draw_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)}) == 8

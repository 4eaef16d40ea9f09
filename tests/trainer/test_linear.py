"""The linear probe against one torch module, optimizer and schedule for each head."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from curation.errors import ConfigError
from tests.trainer.labelled_for_tests import blobs, feature_set
from trainer.features import FeatureSet
from trainer.labelled import held_out_rows
from trainer.linear import RATES, Head, accuracies, evaluate_linear, new_heads, train_heads


def make(rows: int, seed: int, blocks: int = 5, spread: float = 1.0, classes: int = 3) -> FeatureSet:
    cls, labels = blobs(rows, classes, 4, seed, spread, blocks)
    patches, _ = blobs(rows, classes, 4, seed + 50, spread, centres=9)
    return feature_set(cls, labels, patches[:, 0])


def test_the_grid_is_the_published_one() -> None:
    stacks = new_heads(make(12, 0), 3, seed=0)
    assert [(heads.blocks, heads.patches) for heads in stacks] == [(1, False), (1, True), (4, False), (4, True)]
    assert [heads.weight.shape for heads in stacks] == [(13, 3, width) for width in (4, 8, 16, 20)]
    assert RATES == (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
    weights = torch.cat([heads.weight.flatten() for heads in stacks])
    assert 0.0095 < weights.std() < 0.0105 and abs(weights.mean()) < 0.001
    assert all(not heads.bias.any() for heads in stacks)
    again, other = new_heads(make(12, 0), 3, seed=0), new_heads(make(12, 0), 3, seed=1)
    assert torch.equal(again[2].weight, stacks[2].weight) and not torch.equal(other[2].weight, stacks[2].weight)
    assert [heads.blocks for heads in new_heads(make(12, 0, blocks=2), 3, 0)] == [1, 1, 2, 2]
    assert [heads.blocks for heads in new_heads(make(12, 0, blocks=1), 3, 0)] == [1, 1]


def test_inputs_are_the_last_blocks_and_the_mean_patch() -> None:
    features = make(6, 0)
    assert features.patches is not None
    rows = torch.tensor([4, 1])
    one, one_patch, four, four_patch = (heads.inputs(features, rows) for heads in new_heads(features, 3, 0))
    assert torch.equal(one, features.cls[rows, 4])
    assert torch.equal(one_patch, torch.cat([features.cls[rows, 4], features.patches[rows]], 1))
    assert torch.equal(four, torch.cat([features.cls[rows, block] for block in (1, 2, 3, 4)], 1))
    assert torch.equal(four_patch, torch.cat([four, features.patches[rows]], 1))


@pytest.mark.parametrize(("seed", "kept_rows", "batch"), [(0, 23, 8), (1, 16, 16), (2, 5, 64)])
def test_training_is_that_of_separate_heads(seed: int, kept_rows: int, batch: int) -> None:
    """Batches are seen through a recorded run; the rest is torch's SGD, cosine schedule and autograd."""
    features, steps = make(30, seed), 6
    labels = torch.tensor(features.labels)
    kept = torch.randperm(30, generator=torch.Generator().manual_seed(seed))[:kept_rows]
    stacks = new_heads(features, 3, seed)
    references = [(heads.blocks, heads.patches, heads.weight.clone(), heads.bias.clone()) for heads in stacks]
    seen: list[torch.Tensor] = []
    record = stacks[0].inputs
    stacks[0].inputs = lambda f, rows: (seen.append(rows), record(f, rows))[1]  # type: ignore[method-assign]
    train_heads(stacks, lambda epoch: features, labels, kept, steps, batch, seed)
    assert len(seen) == steps
    batch = min(batch, kept_rows)
    for heads, (blocks, patches, weights, biases) in zip(stacks, references, strict=True):
        for place, rate in enumerate(RATES):
            linear = torch.nn.Linear(weights.shape[2], 3)
            linear.weight.data, linear.bias.data = weights[place].clone(), biases[place].clone()
            optimizer = torch.optim.SGD(linear.parameters(), lr=rate * batch / 256, momentum=0.9, weight_decay=0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
            for rows in seen:
                x = torch.cat([features.cls[rows, b] for b in range(5 - blocks, 5)], 1)
                x = torch.cat([x, features.patches[rows]], 1) if patches else x
                optimizer.zero_grad()
                F.cross_entropy(linear(x), labels[rows]).backward()
                optimizer.step()
                schedule.step()
            torch.testing.assert_close(heads.weight[place], linear.weight.data, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(heads.bias[place], linear.bias.data, atol=1e-6, rtol=1e-5)


def test_batches_pass_through_the_rows_anew_each_epoch() -> None:
    features, kept = make(30, 0), torch.arange(3, 25)
    labels, seen, asked = torch.tensor(features.labels), [], []
    stacks = new_heads(features, 3, 0)
    record = stacks[0].inputs
    stacks[0].inputs = lambda f, rows: (seen.append(rows), record(f, rows))[1]  # type: ignore[method-assign]

    def views(epoch: int) -> FeatureSet:
        asked.append(epoch)
        return features

    train_heads(stacks, views, labels, kept, 7, 10, seed=5)
    assert asked == [0, 1, 2, 3] and [len(rows) for rows in seen] == [10] * 7
    passes = [torch.cat(seen[start : start + 2]).tolist() for start in (0, 2, 4)]
    for rows in passes:
        assert len(set(rows)) == 20 and set(rows) <= set(range(3, 25))
    assert len({tuple(rows) for rows in passes}) == 3


def test_views_take_the_place_of_the_centre_in_training_alone() -> None:
    train, test = make(60, 1), make(30, 2)
    shifted = replace(train, cls=train.cls.flip(2))
    plain = evaluate_linear(train, test, steps=30, batch_size=16)
    viewed = evaluate_linear(train, test, steps=30, batch_size=16, views=lambda epoch: shifted)
    trained = evaluate_linear(train, test, steps=30, batch_size=16, views=lambda epoch: train)
    assert trained == plain and viewed.all_heads != plain.all_heads
    with pytest.raises(ConfigError, match="pass 1 has 12 rows instead of 60"):
        evaluate_linear(train, test, steps=30, batch_size=16, views=lambda epoch: make(12, 1) if epoch else train)


def test_accuracy_is_counted_for_each_head_and_broken_ones_have_none() -> None:
    features = make(40, 3)
    labels, rows = torch.tensor(features.labels), torch.arange(2, 39)
    stacks = new_heads(features, 3, 0)
    stacks[1].weight[5, 2, 0] = torch.nan
    stacks[2].weight[6] = torch.inf
    found = accuracies(stacks, features, labels, rows)
    assert len(found) == 52
    assert found[Head(1, True, RATES[5])] == 0 and found[Head(4, False, RATES[6])] == 0
    for heads in stacks:
        for place, rate in enumerate(RATES):
            logits = heads.inputs(features, rows) @ heads.weight[place].T + heads.bias[place]
            if logits.isfinite().all():
                share = float((logits.argmax(1) == labels[rows]).double().mean())
                assert found[Head(heads.blocks, heads.patches, rate)] == pytest.approx(share)


@pytest.mark.parametrize("chosen_on", ["held_out", "test"])
def test_the_best_head_is_chosen_where_it_is_said(chosen_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = make(200, 4, spread=3.0), make(60, 5, spread=3.0)
    kept, held = held_out_rows(200, 1)
    trained_on = []
    import trainer.linear as module

    original = module.train_heads
    monkeypatch.setattr(module, "train_heads", lambda *args: (trained_on.append(args[3]), original(*args))[1])
    result = evaluate_linear(train, test, steps=40, batch_size=32, chosen_on=chosen_on, seed=1)  # type: ignore[arg-type]
    assert result.accuracy == result.all_heads[result.head]
    stacks = new_heads(train, 3, 1)
    if chosen_on == "test":
        assert torch.equal(trained_on[0], torch.arange(200))
        assert result.accuracy == max(result.all_heads.values())
    else:
        assert torch.equal(trained_on[0], kept)
        original(stacks, lambda epoch: train, torch.tensor(train.labels), kept, 40, 32, 1)
        scores = accuracies(stacks, train, torch.tensor(train.labels), held)
        assert scores[result.head] == max(scores.values())
        assert result.accuracy < max(result.all_heads.values())  # the honest choice was not the lucky one here


def test_it_learns_and_not_from_labels_that_mean_nothing() -> None:
    train, test = make(120, 6), make(60, 7)
    assert evaluate_linear(train, test, steps=150, batch_size=32).accuracy > 0.85
    draw = torch.Generator().manual_seed(0)
    mixed = replace(train, labels=[train.labels[row] for row in torch.randperm(120, generator=draw)])
    assert evaluate_linear(mixed, test, steps=150, batch_size=32).accuracy < 0.6


def test_heads_have_names() -> None:
    assert str(Head(1, False, 0.1)) == "class token, learning rate 0.1"
    assert str(Head(4, True, 1e-5)) == "class tokens of 4 blocks and mean patch, learning rate 1e-05"


def test_unusable_requests_are_one_clear_line() -> None:
    train, test = make(30, 0), make(12, 1)
    for changed, says in [
        ({"steps": 0}, "must be positive"),
        ({"batch_size": 0}, "must be positive"),
        ({"train": replace(train, patches=None)}, "needs mean patches"),
        ({"test": replace(test, labels=[7] * 12)}, "are on no training row"),
        ({"train": make(8, 0)}, "too few"),
    ]:
        with pytest.raises(ConfigError, match=says):
            evaluate_linear(**({"train": train, "test": test, "steps": 3} | changed))

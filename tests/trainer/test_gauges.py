"""Gauges against plain formulas, and what they say of collapse."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from curation.errors import ConfigError
from embedders.vit import VisionTransformer
from tests.builders import photo, truncated
from tests.trainer.labelled_for_tests import network, write_labelled
from trainer import gauges
from trainer.features import evaluation_preprocessing, features_of
from trainer.gauges import class_token_std, evaluate, load_subset, nearest_distance, prototype_entropies
from trainer.knn import evaluate_knn
from trainer.labelled import Labelled

SMALL = evaluation_preprocessing(20, 16)


def tokens(seed: int, rows: int = 30, dim: int = 6) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("seed", range(3))
def test_gauges_are_their_formulas(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "ROWS_AT_ONCE", 7)
    cls = tokens(seed)
    units = [row / row.norm() for row in cls.double()]
    columns = torch.stack(units).T
    stds = [math.sqrt(sum((float(v) - float(c.mean())) ** 2 for v in c) / len(c)) for c in columns]
    assert class_token_std(cls) == pytest.approx(sum(stds) / len(stds), rel=1e-5)
    nearest = [min(float((a - b).norm()) for j, b in enumerate(units) if j != i) for i, a in enumerate(units)]
    assert nearest_distance(cls) == pytest.approx(sum(nearest) / len(nearest), rel=1e-5)
    head = nn.Linear(6, 11).requires_grad_(False)
    shares = [torch.softmax(row / 0.1, 0) for row in head(cls).double()]
    entropy = lambda p: -sum(float(v) * math.log(float(v)) for v in p if v > 0)  # noqa: E731
    of_mean, mean = prototype_entropies(head, cls)
    assert of_mean == pytest.approx(entropy(torch.stack(shares).mean(0)), rel=1e-4)
    assert mean == pytest.approx(sum(map(entropy, shares)) / len(shares), rel=1e-4)


def test_collapse_is_seen() -> None:
    one = tokens(0, rows=1).expand(20, 6)
    assert class_token_std(one) < 1e-6 and nearest_distance(one * torch.rand(20, 1).add(0.5)) < 1e-6
    spread = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))
    assert class_token_std(spread) == pytest.approx(1 / 4, rel=0.01)
    assert math.isnan(nearest_distance(tokens(0, rows=1)))
    assert nearest_distance(torch.tensor([[2.0, 0.0], [-3.0, 0.0]])) == pytest.approx(2)
    head = nn.Identity()
    to_one, even, apart = 100 * torch.eye(8)[:1].expand(20, 8), torch.zeros(20, 8), 100 * torch.eye(8)
    assert prototype_entropies(head, to_one) == pytest.approx((0, 0), abs=1e-6)
    assert prototype_entropies(head, even) == pytest.approx((math.log(8), math.log(8)))
    assert prototype_entropies(head, apart) == pytest.approx((math.log(8), 0), abs=1e-6)


def test_a_subset_is_evaluated_as_its_rows_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "ROWS_AT_ONCE", 5)
    train = Labelled(write_labelled(tmp_path / "train.parquet", [photo(i) for i in range(16)], ["a", "b"] * 8))
    test = Labelled(write_labelled(tmp_path / "test.parquet", [photo(20 + i) for i in range(7)], list("abababa")))
    model, head = network(), nn.Linear(24, 9)
    subset = load_subset(Labelled(train.uri, sample=12, seed=1), test, SMALL)
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = evaluate(model, subset, head)
    assert model.training and all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    bank, queries = (features_of(model, rows, SMALL) for rows in (Labelled(train.uri, sample=12, seed=1), test))
    expected = {f"knn_{k}": share.top1 for k, share in evaluate_knn(bank, queries).items()}
    cls = queries.cls[:, 0]
    expected |= {"cls_std": class_token_std(cls), "koleo_distance": nearest_distance(cls)}
    expected["prototype_entropy_of_mean"], expected["prototype_mean_entropy"] = prototype_entropies(head, cls)
    assert list(found) == list(expected) and found == pytest.approx(expected, abs=1e-5)
    assert list(evaluate(model, subset)) == list(expected)[:-2]


def test_a_subset_says_what_it_left_out_and_what_does_not_fit(tmp_path: Path) -> None:
    good = Labelled(write_labelled(tmp_path / "a.parquet", [photo(0), truncated(1), photo(2)], [0, 1, 1]))
    assert [skip.reason for skip in load_subset(good, good, SMALL).skipped] == ["truncated", "truncated"]
    other = Labelled(write_labelled(tmp_path / "b.parquet", [photo(0)], [2]))
    with pytest.raises(ConfigError, match="are on no training row"):
        load_subset(good, other, SMALL)
    with pytest.raises(ConfigError, match="one class alone"):
        load_subset(other, other, SMALL)


def test_a_network_without_input_shows_as_collapsed(tmp_path: Path) -> None:
    images, labels = [photo(i) for i in range(12)], [0, 1] * 6
    rows = Labelled(write_labelled(tmp_path / "a.parquet", images, labels))
    subset, model = load_subset(rows, rows, SMALL), network()
    alive = evaluate(model, subset)

    def blind(model: VisionTransformer) -> VisionTransformer:
        with torch.no_grad():
            model.patch_embed.proj.weight.zero_()
        return model

    dead = evaluate(blind(model), subset)
    assert dead["cls_std"] < 1e-5 < 0.01 < alive["cls_std"]
    assert dead["koleo_distance"] < 1e-5 < 0.01 < alive["koleo_distance"]

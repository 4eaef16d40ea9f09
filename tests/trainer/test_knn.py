"""k-NN against loops in plain Python, ties included."""

import math

import pytest
import torch
from torch import Tensor

from curation.errors import ConfigError
from tests.trainer.labelled_for_tests import blobs, feature_set
from trainer import knn as module
from trainer.features import Pixels
from trainer.knn import Accuracy, centred_pixels, evaluate_knn, knn


def slow_knn(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, ks: list[int], t: float) -> dict:
    """By sorting everything; ranks by (votes, lower class), and a class without votes is not found."""
    right = {k: [0, 0] for k in ks}
    for query, true in zip(queries.double(), truth.tolist(), strict=True):
        cosines = [float(query @ row / (query.norm() * row.norm())) for row in bank.double()]
        order = sorted(range(len(bank)), key=lambda row: (-round(cosines[row], 6), row))[: max(ks)]
        total = sum(math.exp(cosines[row] / t) for row in order)
        for k in ks:
            votes: dict[int, float] = {}
            for row in order[:k]:
                label = int(labels[row])
                votes[label] = votes.get(label, 0.0) + math.exp(cosines[row] / t) / total
            ranked = sorted(votes, key=lambda label: (-round(votes[label], 6), label))
            right[k][0] += true in ranked[:1]
            right[k][1] += true in ranked[:5]
    return {k: Accuracy(*(count / len(queries) for count in counts)) for k, counts in right.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunks", [(256, 32_768), (7, 16)])
def test_it_is_the_published_rule(seed: int, chunks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERY_ROWS", chunks[0])
    monkeypatch.setattr(module, "BANK_ROWS", chunks[1])
    bank, labels = blobs(90, 9, 6, seed, spread=1.3)
    queries, truth = blobs(40, 9, 6, seed + 100, spread=1.3)
    draw = torch.Generator().manual_seed(seed)
    bank, queries = bank[:, 0] * torch.rand(90, 1, generator=draw).add(0.1), queries[:, 0] * 5
    for ks, t in (([1, 5, 10, 30], 0.07), ([20, 4], 0.5), ([200], 0.07)):
        found = knn(bank, labels, queries, truth, ks, t)
        assert found == slow_knn(bank, labels, queries, truth, ks, t)
        assert list(found) == ks
    assert 0.2 < found[200].top1 < found[200].top5 < 1


def test_weights_count_and_not_heads_alone() -> None:
    """One near neighbor of class 1 outvotes three far ones of class 0 at a low temperature, and not at a high one."""
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    labels, query = torch.tensor([1, 0, 0, 0]), torch.tensor([[1.0, 0.01]])
    assert knn(bank, labels, query, torch.tensor([1]), [4], 0.07)[4].top1 == 1
    assert knn(bank, labels, query, torch.tensor([1]), [4], 10.0)[4].top1 == 0


def test_of_equal_neighbors_the_lower_rows_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BANK_ROWS", 5)
    row = torch.tensor([0.0, 2.0, 0.0])  # of exact products: others differ in a bit, by their place, on some processors
    labels = torch.tensor([2, 2, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    for k, winner in ((1, 2), (2, 2), (4, 1), (5, 1), (9, 0), (12, 0)):  # with 4, classes 1 and 2 have two votes each
        found = knn(row.expand(12, 3), labels, row[None], torch.tensor([winner]), [k])
        assert found[k].top1 == 1, (k, winner)
        others = torch.tensor([label for label in range(3) if label != winner])
        assert knn(row.expand(12, 3), labels, row.expand(2, 3), others, [k])[k].top1 == 0, (k, winner)


def test_a_class_without_votes_is_never_right() -> None:
    bank, labels = torch.eye(4), torch.tensor([0, 0, 1, 2])
    found = knn(bank, labels, torch.eye(4)[:1], torch.tensor([2]), [2])
    assert found[2] == Accuracy(0.0, 0.0)


def test_similarities_and_rows_are_ranked_exactly() -> None:
    values = torch.tensor([[-0.0, 0.0, 1.0, -1.0, 1e-30, -1e-30, 0.3, 0.3, -0.3]])
    ranks = module._ranks(values, 5)
    order = ranks.argsort(descending=True)[0].tolist()
    assert order == [2, 6, 7, 4, 0, 1, 5, 8, 3]
    assert torch.equal(module._similarity(ranks), values)
    assert (module.LAST_ROW - (ranks & module.LAST_ROW)).tolist() == [list(range(5, 14))]


def test_neighbors_are_found_through_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BANK_ROWS", 8)
    draw = torch.Generator().manual_seed(0)
    bank, queries = (torch.nn.functional.normalize(torch.randn(n, 4, generator=draw), dim=1) for n in (50, 9))
    similarity, rows = module._nearest(bank, queries, 11)
    expected = (queries @ bank.T).sort(dim=1, descending=True)
    torch.testing.assert_close(similarity, expected.values[:, :11])
    assert torch.equal(rows, expected.indices[:, :11])


def test_of_feature_sets_the_last_block_counts() -> None:
    train, labels = blobs(60, 3, 5, 1, blocks=2)
    test, truth = blobs(30, 3, 5, 2, blocks=2)
    names = ["x", "y", "z"]
    sets = [feature_set(cls, rows) for cls, rows in ((train, labels), (test, truth))]
    for part, rows in zip(sets, (labels, truth), strict=True):
        part.labels[:] = [names[row] for row in rows]
    assert evaluate_knn(*sets, ks=[5]) == knn(train[:, 1], labels, test[:, 1], truth, [5])


def test_raw_pixels_are_compared_without_their_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    train, test = (
        Pixels(torch.randint(0, 256, (n, 4, 4, 3), dtype=torch.uint8, generator=draw), list(range(n))) for n in (6, 3)
    )
    bank, queries = centred_pixels(train, test)
    mean = train.images.double().mean(0)
    for found, pixels in ((bank, train), (queries, test)):
        expected = (pixels.images.double() - mean).flatten(1)
        torch.testing.assert_close(found.cls[:, 0].double(), expected, atol=1e-3, rtol=0)
        assert found.labels == pixels.labels


def test_unusable_requests_are_one_clear_line() -> None:
    x, labels = torch.eye(3), torch.tensor([0, 1, 0])
    for ks in ([], [0], [5, -1]):
        with pytest.raises(ConfigError, match="k of k-NN must be positive"):
            knn(x, labels, x, labels, ks)
    with pytest.raises(ConfigError, match="0 queries in a bank of 3"):
        knn(x, labels, x[:0], labels[:0])

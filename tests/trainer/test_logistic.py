"""Logistic regression against scipy's solver on the objective as scikit-learn writes it."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Tensor

from curation.errors import ConfigError
from tests.trainer.labelled_for_tests import blobs, feature_set
from trainer import logistic
from trainer.labelled import held_out_rows
from trainer.logistic import STRENGTHS, accuracy, evaluate_logistic, fit, zero_model


def slow_objective(x: np.ndarray, labels: np.ndarray, c: float, flat: np.ndarray, classes: int) -> float:
    """|W|^2 / 2 + C sum of cross-entropies."""
    weight, bias = flat[:-classes].reshape(classes, -1), flat[-classes:]
    logits = x @ weight.T + bias
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(x)), labels]
    return float(0.5 * (weight**2).sum() + c * losses.sum())


def slow_fit(x: Tensor, labels: Tensor, c: float, classes: int) -> np.ndarray:
    """Numerical gradients, from several steps of BFGS until nothing moves."""
    start = np.zeros(classes * (x.shape[1] + 1))
    value = lambda flat: slow_objective(x.numpy(), labels.numpy(), c, flat, classes)  # noqa: E731
    return minimize(value, start, method="BFGS", options={"gtol": 1e-7, "maxiter": 2000}).x


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("c", [1e-4, 0.05, 3.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_solution_is_the_minimum(seed: int, c: float, classes: int) -> None:
    features, labels = blobs(40, classes, 3, seed, spread=1.5)
    x = features[:, 0].double()
    weight, bias = fit(x, labels, c, zero_model(3, classes))
    expected = slow_fit(x, labels, c, classes)
    np.testing.assert_allclose(weight.flatten(), expected[:-classes], atol=2e-4, rtol=1e-3)
    probabilities = torch.softmax(x @ weight.T + bias, 1)
    slow = x @ torch.from_numpy(expected[:-classes].reshape(classes, -1)).T + torch.from_numpy(expected[-classes:])
    np.testing.assert_allclose(probabilities, torch.softmax(slow, 1), atol=2e-4)
    found = np.concatenate([weight.flatten(), bias])
    values = [slow_objective(x.numpy(), labels.numpy(), c, flat, classes) for flat in (found, expected)]
    assert values[0] <= values[1] + 1e-9


def test_where_it_starts_does_not_matter() -> None:
    features, labels = blobs(60, 3, 4, 0, spread=1.5)
    x = features[:, 0].double()
    cold = fit(x, labels, 1.0, zero_model(4, 3))
    warm = fit(x, labels, 1.0, fit(x, labels, 0.1, zero_model(4, 3)))
    torch.testing.assert_close(cold[0], warm[0], atol=1e-5, rtol=1e-5)
    assert not cold[0].requires_grad


def test_strengths_are_the_published_ones() -> None:
    np.testing.assert_allclose(STRENGTHS, [10 ** (-6 + 11 * i / 44) for i in range(45)])


def test_the_strength_is_chosen_on_held_out_rows_and_all_are_used_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "STRENGTHS", (1e-2, 0.1, 1.0, 1e3))
    train, labels = blobs(120, 4, 3, 1, spread=2.0, blocks=2)
    test, truth = blobs(80, 4, 3, 2, spread=2.0, blocks=2)
    result = evaluate_logistic(feature_set(train, labels), feature_set(test, truth), seed=2)
    x, queries = train[:, 1].double(), test[:, 1].double()
    kept, held = held_out_rows(120, 2)
    scores = {
        c: accuracy(fit(x[kept], labels[kept], c, zero_model(3, 4)), x[held], labels[held]) for c in result.held_out
    }
    assert result.held_out == scores and list(scores) == [1e-2, 0.1, 1.0, 1e3]
    assert result.strength == min(c for c in scores if scores[c] == max(scores.values()))
    assert result.accuracy == accuracy(fit(x, labels, result.strength, zero_model(3, 4)), queries, truth)
    assert result.accuracy > 0.4


def test_accuracy_is_a_share() -> None:
    model = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([0.0, 0.5]).double()
    x = torch.tensor([[1.0, 0.0], [1.0, 0.9], [0.0, 1.0], [0.0, 0.0]]).double()
    assert accuracy(model, x, torch.tensor([0, 1, 1, 0])) == 0.75


def test_too_few_rows_are_one_clear_line() -> None:
    features, labels = blobs(8, 2, 3, 0)
    with pytest.raises(ConfigError, match="too few"):
        evaluate_logistic(feature_set(features, labels), feature_set(features, labels))

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compress.distill import Ensemble, confidence_weights
from compress.errors import DataError, RecipeError


def test_as_a_network_it_is_the_weighted_mean() -> None:
    torch.manual_seed(0)
    teachers, x = [nn.Linear(4, 3) for _ in range(3)], torch.randn(5, 4)
    weights = [1.0, 2.0, 1.0]
    expected = sum(w / 4 * teacher(x) for w, teacher in zip(weights, teachers))
    assert torch.allclose(Ensemble(teachers, weights)(x), torch.as_tensor(expected))
    assert list(Ensemble(teachers).state_dict()) == [
        f"teachers.{i}.{name}" for i in range(3) for name in ("weight", "bias")
    ]


def test_confidence_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    outputs, targets = [torch.randn(4, 5).double() for _ in range(3)], torch.tensor([0, 2, -100, 4])
    weights = confidence_weights(outputs, targets)
    assert torch.allclose(weights.sum(0), torch.ones(4, dtype=torch.float64).to(weights))
    for n, y in enumerate(targets.tolist()):
        if y == -100:
            assert torch.allclose(weights[:, n], torch.full((3,), 1 / 3))
            continue
        errors = [float(-o[n].log_softmax(0)[y]) for o in outputs]
        total = sum(map(math.exp, errors))
        for k, error in enumerate(errors):
            assert float(weights[k, n]) == pytest.approx((1 - math.exp(error) / total) / 2, rel=1e-5)


def test_without_labels_all_weigh_the_same() -> None:
    assert confidence_weights([torch.zeros(2, 3)] * 4, None).tolist() == [[0.25, 0.25]] * 4
    ensemble = Ensemble([nn.Linear(2, 2), nn.Linear(2, 2)], weighting="confidence")
    answers = [torch.zeros(3, 2)] * 2
    assert ensemble.sample_weights(answers, None).tolist() == [[0.5] * 3] * 2
    with pytest.raises(DataError, match="expected one class a sample for teachers weighted by confidence"):
        ensemble.sample_weights(answers, {"a": torch.zeros(3)})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([],), "expected at least one network"),
        (([nn.Linear(1, 1)], [0.5, 0.5]), r"weights: expected 1 values of at least 0, not all 0, got \[0\.5, 0\.5\]"),
        (([nn.Linear(1, 1)], [0.0]), "not all 0"),
        (([nn.Linear(1, 1)], None, "best"), "weighting: expected fixed or confidence, got 'best'"),
    ],
)
def test_mistakes_are_named(arguments: tuple, error: str) -> None:
    with pytest.raises(RecipeError, match=error):
        Ensemble(*arguments)

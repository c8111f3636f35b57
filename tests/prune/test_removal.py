from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compress.errors import RecipeError
from compress.prune import plan_removal
from compress.prune.removal import Removal, doomed_slices, push, silence
from tests.networks import Residual, images


def test_what_is_silenced_may_be_removed() -> None:
    from compress.prune import apply_removal

    torch.manual_seed(0)
    network, (x, _) = Residual().double().eval(), images(4)
    x = x.double()
    data = plan_removal(network, [x], {"conv1": 8, "stem": 8})
    assert data is not None
    silence(doomed_slices(network, data["slices"]))
    masked = network(x)
    assert torch.allclose(apply_removal(network, data)(x), masked, atol=1e-9)


def test_a_push_adds_to_the_gradient_of_doomed_slices_only() -> None:
    layer = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]))
    layer.weight.grad = torch.ones(3, 2)
    push(doomed_slices(layer, {"weight": {"0": [1]}}), "growing", 0.5)
    assert layer.weight.grad.tolist() == [[2.5, 3.0], [1.0, 1.0], [1.0, 2.0]]
    layer.weight.grad = torch.zeros(3, 2)
    push(doomed_slices(layer, {"weight": {"0": [1, 2]}}), "group_lasso", 1.0)
    assert torch.allclose(layer.weight.grad, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))


def test_columns_are_pushed_as_units_too() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 1.0], [4.0, 1.0]]))
    layer.weight.grad = torch.zeros(2, 2)
    push(doomed_slices(layer, {"weight": {"1": [1]}}), "group_lasso", 1.0)
    assert torch.allclose(layer.weight.grad, torch.tensor([[0.6, 0.0], [0.8, 0.0]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "firm"}, r"prune\.removal\.form: expected one of hard, soft, got 'firm'"),
        ({"penalty": "l3"}, r"prune\.removal\.penalty: expected one of growing, group_lasso"),
        ({"penalty": "growing", "strength": 0.0}, r"prune\.removal\.strength"),
        ({"lead": 0.0}, r"prune\.removal\.lead"),
        ({"recalibrate": -1}, r"prune\.removal\.recalibrate"),
        ({"form": "soft", "penalty": "growing"}, r"prune\.removal\.penalty: expected none with form: soft"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Removal(**arguments)

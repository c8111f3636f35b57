from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.models import LSTMClassifier
from compress.quantize import coverage, prepare
from tests.networks import Residual


def test_macs_by_hand() -> None:
    """A convolution of 3x3 from 1 to 4 channels on 6x6, and a linear layer of 4 x 36 to 5."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    x = torch.randn(2, 1, 6, 6)
    found = coverage(prepare(network, [x], "int8", keep=["3"]), [x])
    assert [(p.layer, p.operator, p.macs, p.integer) for p in found.products] == [
        ("0", "conv2d", 2 * 4 * 36 * 9, True),
        ("3", "linear", 2 * 144 * 5, False),
    ]
    assert found.share == pytest.approx(2592 / (2592 + 1440))
    assert list(found.reasons.values()) == [pytest.approx(1440 / (2592 + 1440))]


def test_products_of_activations_are_counted() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return nn.functional.scaled_dot_product_attention(y, y, y) + torch.einsum("nij,njk->nik", y @ y.mT, y)

    x = torch.randn(2, 5, 6)
    found = coverage(prepare(Attention().eval(), [x], "int8"), [x])
    macs = {product.operator: product.macs for product in found.products}
    assert macs == {
        "linear": 2 * 5 * 6 * 6,
        "scaled_dot_product_attention": 2 * 2 * 5 * 5 * 6,
        "matmul": 2 * 5 * 5 * 6,
        "einsum": 2 * 5 * 5 * 6,
    }


def test_a_recurrent_layer_counts_its_weights_at_every_step() -> None:
    x = torch.randn(2, 7, 4)
    found = coverage(prepare(LSTMClassifier(4, 5, hidden=8).eval(), [x], "int8"), [x])
    assert [(p.layer, p.macs) for p in found.products] == [("lstm", 2 * 7 * (32 * 4 + 32 * 8)), ("fc", 2 * 8 * 5)]


def test_everything_of_a_convolutional_network_is_in_integers() -> None:
    x = torch.randn(2, 1, 8, 8)
    prepared = prepare(Residual(), [x], "int8").train()
    found = coverage(prepared, [x])
    assert found.share == 1.0
    assert len(found.products) == 4
    assert prepared.training

"""Which weights a layer has, and that they come back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.quantize import prepare
from compress.quantize.sensitivity import measure_bits, num_weights, rounded


class Reader(nn.Module):
    """Attention, whose code takes the weights of a layer within it, and layers of several weights."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)  # too small to be quantised
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(self.encoder(x))[0])[0][:, -1])


def test_layers_are_those_that_schemes_are_given_to() -> None:
    network = Reader().eval()
    sizes = num_weights(network)
    assert sizes == {
        "encoder.self_attn": 4 * 16 * 16,
        "encoder.linear1": 16 * 32,
        "encoder.linear2": 16 * 32,
        "lstm": 4 * 8 * (16 + 8),
        "head": 8 * 3,
    }
    prepared = prepare(network, [torch.randn(2, 5, 16)], "int8", layers=dict.fromkeys(sizes, "w4a8"))
    assert prepared(torch.randn(4, 5, 16)).shape == (4, 3)


def test_all_weights_of_a_layer_are_rounded_and_come_back() -> None:
    network = Reader().eval()
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}

    def changed(network: nn.Module) -> list[str]:
        return [name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])]

    found = measure_bits(network, changed, bits=[2])
    assert found["encoder.self_attn"][2] == [f"encoder.self_attn.{n}" for n in ("in_proj_weight", "out_proj.weight")]
    assert found["lstm"][2] == ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert found["head"][2] == ["head.weight"]
    assert changed(network) == []
    with rounded(network, "lstm", 2):
        assert len(network.get_parameter("lstm.weight_hh_l0")[0].unique()) <= 4

"""Which weights a layer has, and that they come back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from compress.measure.modes import kept_modes
from compress.quantize import prepare
from compress.quantize.sensitivity import capture_layers, measure_bits, num_weights, round_weight, rounded


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


class Product(nn.Module):
    """A linear layer whose weight has its outputs last, as in GPT-2."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_inputs, num_outputs))
        self.bias = nn.Parameter(torch.randn(num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Written(nn.Module):
    """Products as people write them, and weights that follow from others."""

    def __init__(self) -> None:
        super().__init__()
        self.product = Product(6, 6)
        self.mixing = nn.Parameter(torch.randn(6, 5))
        self.normed = parametrizations.weight_norm(nn.Linear(5, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.product(self.product(x)) @ self.mixing
        return self.head(F.relu(self.normed(x)))


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
    assert num_weights(capture_layers(network, [torch.randn(2, 5, 16)])) == sizes
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


def test_what_a_parametrization_computes_is_rounded_and_it_stays() -> None:
    network = Reader()
    parametrizations.weight_norm(network.head)
    parametrizations.spectral_norm(network.encoder.linear1)
    parametrizations.orthogonal(network.encoder.self_attn.out_proj)
    parametrizations.weight_norm(network.lstm, "weight_hh_l0")
    x, before = torch.randn(3, 5, 16), copy.deepcopy(network.state_dict())
    network.train()
    assert num_weights(network) == num_weights(Reader())

    def levels(network: Any) -> dict[str, int]:
        with kept_modes(network, training=False):
            weights = {
                "encoder.self_attn": network.encoder.self_attn.out_proj.weight,
                "encoder.linear1": network.encoder.linear1.weight,
                "lstm": network.lstm.weight_hh_l0,
                "head": network.head.weight,
            }
        return {layer: max(len(row.unique()) for row in weight) for layer, weight in weights.items()}

    found = measure_bits(network, levels, bits=[2])
    with torch.no_grad():
        whole = network.eval()(x)
    assert all(layer == other or found[layer][2][other] > 4 for layer in found for other in found["head"][2])
    assert all(found[layer][2][layer] <= 4 for layer in found["head"][2])
    parametrized: Any = [network.encoder.linear1, network.head]
    assert [len(layer.parametrizations.weight) for layer in parametrized] == [1, 1]
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad(), rounded(network, "lstm", 2):
        assert not torch.equal(network(x), whole)
    with torch.no_grad():
        assert torch.equal(network(x), whole)


def test_a_graph_has_all_that_is_quantised_by_the_names_that_schemes_are_given_by() -> None:
    network, x = Written().eval(), torch.randn(5, 6)
    before = copy.deepcopy(network.state_dict())
    graph = capture_layers(network, [x[:2]])
    sizes = num_weights(graph)
    assert sizes == {"product": 36, "": 30, "normed": 20, "head": 12}
    prepared = prepare(network, [x[:2]], "int8", layers=dict.fromkeys(sizes, "w4a8"))
    assert prepared(x).shape == (5, 3)

    with torch.no_grad():
        whole = graph(x)
        twin = copy.deepcopy(network)
        twin.product.weight.copy_(round_weight(network.product.weight.t(), 2).t())
        expected = {"product": twin(x)}
        twin = copy.deepcopy(network)
        weight, twin.normed = round_weight(network.normed.weight, 2), nn.Linear(5, 4)
        twin.normed.load_state_dict({"weight": weight, "bias": network.normed.bias})
        expected["normed"] = twin(x)
    found = measure_bits(graph, lambda graph: graph(x), bits=[2])
    for layer, values in expected.items():
        torch.testing.assert_close(found[layer][2], values)
    assert not any(torch.equal(points[2], whole) for points in found.values())
    with torch.no_grad():
        assert torch.equal(graph(x), whole)
    assert graph.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_weight_that_others_read_is_rounded_for_its_layer_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    network, x = Tied().eval(), torch.arange(8).reshape(4, 2)
    expected = F.linear(network.table(x), round_weight(network.head.weight, 2), network.head.bias)
    graph = capture_layers(network, [x[:2]])
    torch.testing.assert_close(measure_bits(graph, lambda graph: graph(x), bits=[2])["head"][2], expected)

"""A captured graph moves with all that tracing wrote into it. There is no GPU here: the meta device is another, too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.quantize.pt2e import convert, prepare
from compress.surgery.capture import capture


class Scaled(nn.Module):
    """Has a tensor that is no buffer, and makes one, in a module within the network."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((8,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.device) + torch.tensor([0.5] * 8, device=x.device)


class Made(nn.Module):
    """Makes tensors on its way: positions, a mask, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc, self.dropout = nn.Embedding(16, 8), nn.Linear(8, 3), nn.Dropout(0.2)
        self.scaled = Scaled()

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], device=tokens.device).triu(1)
        x = (
            self.scaled(self.embedding(tokens))
            + self.embedding(positions)
            + torch.tensor([0.5] * 8, device=tokens.device)
        )
        return self.fc(self.dropout(mask @ x)).mean(1).to(tokens.device)


def tokens() -> Tensor:
    return torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [True, False])
def test_what_the_network_makes_is_made_where_it_is(training: bool) -> None:
    captured = capture(Made(), [tokens()]).train(training)
    captured.forward_with_features(["fc"], tokens())  # a graph derived from it
    captured.to("meta")
    assert captured(tokens().to("meta")).device.type == "meta"
    _, features = captured.forward_with_features(["fc"], tokens().to("meta"))
    assert features["fc"].device.type == "meta"


def test_it_moves_as_a_part_of_another_module() -> None:
    whole = nn.ModuleList([capture(Made(), [tokens()])])
    whole.to("meta")
    assert whole[0](tokens().to("meta")).device.type == "meta"


def test_a_derived_graph_has_the_constants_of_today() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.tensor([[0.5]] * 8)

    captured = capture(Shifted(), [torch.ones(2, 8)])
    captured.compile_with(lambda module: module)
    captured(torch.ones(2, 8))
    assert captured.double()(torch.ones(2, 8, dtype=torch.float64)).dtype == torch.float64
    assert captured.half()(torch.ones(2, 8, dtype=torch.float16)).dtype == torch.float16


def test_its_numbers_stay_and_a_copy_stays_where_it_was() -> None:
    network = Made().eval()
    captured = capture(network, [tokens()])
    twin = copy.deepcopy(captured)
    twin.to("meta")
    assert torch.allclose(captured(tokens()), network(tokens()))


def test_a_fake_quantised_network_moves_and_converts() -> None:
    prepared = prepare(Made().train(), [tokens()], "int8")
    prepared(tokens())
    twin = copy.deepcopy(prepared).to("meta")
    assert {tensor.device.type for tensor in twin.state_dict().values()} == {"meta"}
    assert convert(prepared)(tokens()).shape == (2, 3)

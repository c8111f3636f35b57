from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import FakeQuantizeBase

from compress.distill.features import FeatureTaps, find_layers
from compress.errors import CaptureError, RecipeError
from compress.models import ResNet
from compress.quantize import prepare
from tests.networks import Residual, images


def by_hand(network: nn.Module, layer: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    network(x)
    handle.remove()
    return seen[-1]


def test_names_with_wildcards() -> None:
    network = ResNet(in_channels=1, width=4, blocks=(1, 2))
    assert find_layers(network, "stages.1.0.conv2") == ["stages.1.0.conv2"]
    assert find_layers(network, "stages.*.0.conv?") == [
        f"stages.{stage}.0.conv{number}" for stage in (0, 1) for number in (1, 2)
    ]
    assert find_layers(network, "stages.*") == ["stages.0", "stages.1"]


def test_an_unknown_layer_lists_near_names() -> None:
    with pytest.raises(RecipeError, match=r"got 'stages\.0\.0\.conv9'.*stages\.0\.0\.conv"):
        find_layers(ResNet(in_channels=1, width=4, blocks=(1,)), "stages.0.0.conv9")


def test_activations_are_what_hooks_see_and_nothing_stays_behind() -> None:
    network, (x, _) = Residual(8).eval(), images(6)
    taps = FeatureTaps(["norm1", "fc", "norm1"])
    view = taps(network, x)
    assert torch.equal(view.features["norm1"], by_hand(network, "norm1", x))
    assert torch.equal(view.features["fc"], view.outputs)
    assert not any(module._forward_hooks for module in network.modules())


def test_a_layer_that_is_not_called_is_an_error() -> None:
    network = Residual(8)
    network.extra = nn.Linear(2, 2)
    with pytest.raises(RecipeError, match="expected activations of extra, got none"):
        FeatureTaps(["extra", "fc"])(network, images(4)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_an_entry_of_a_layer_that_returns_several_tensors() -> None:
    network, x = Attention(), torch.randn(3, 5, 8)
    assert find_layers(network, "attention:1") == ["attention:1"]
    features = FeatureTaps(["attention:1", "attention:0"])(network, x).features
    assert features["attention:1"].shape == (3, 5, 5)
    assert features["attention:0"].shape == (3, 5, 8)
    with pytest.raises(RecipeError, match="expected one of 0, 1, got '7'"):
        FeatureTaps(["attention:7"])(network, x)


@pytest.mark.parametrize("how", ["function", "in place"])
def test_a_compiled_network_gives_the_same(how: str) -> None:
    torch.manual_seed(0)
    network, (x, _) = Residual(8).eval(), images(6)
    expected = by_hand(network, "conv1", x)
    compiled: nn.Module = copy.deepcopy(network)
    if how == "function":
        compiled = torch.compile(compiled, backend="eager")  # type: ignore[assignment]
    else:
        compiled.compile(backend="eager")
    compiled(x)  # compiled without the hooks
    taps = FeatureTaps(find_layers(compiled, "conv1"))
    for _ in range(2):
        assert torch.allclose(taps(compiled, x).features["conv1"], expected, atol=1e-6)
    gradient = taps(compiled.train(), x).features["conv1"]
    assert gradient.requires_grad


def test_a_captured_graph_gives_what_the_module_gave() -> None:
    torch.manual_seed(0)
    network, (x, _) = Residual(8), images(24)
    layers = ["stem", "norm1", "conv2", "fc"]
    expected = FeatureTaps(layers)(copy.deepcopy(network).eval(), x).features
    captured = prepare(copy.deepcopy(network).train(), (x[:2],), "int8")
    captured.eval()
    for module in captured.graph_module.modules():
        if isinstance(module, FakeQuantizeBase):
            module.disable_fake_quant()
    view = FeatureTaps(layers)(captured, x)
    for name in layers:
        assert torch.allclose(view.features[name], expected[name], atol=1e-4), name
    assert torch.equal(view.outputs, captured(x))


def test_a_tapped_graph_follows_the_mode_and_learns() -> None:
    torch.manual_seed(0)
    captured, (x, _) = prepare(Residual(8).train(), (images(4)[0],), "int8").train(), images(24)
    taps = FeatureTaps(["norm1"])
    before = captured.state_dict()["norm1.running_mean"].clone()
    taps(captured, x).features["norm1"].square().mean().backward()
    assert not torch.equal(captured.state_dict()["norm1.running_mean"], before)
    assert captured.get_parameter("conv1.weight").grad is not None
    captured.eval()
    assert torch.equal(taps(captured, x).outputs, taps(captured, x).outputs)  # no dropout


def test_a_layer_without_operators_in_the_graph_is_an_error() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Identity(), nn.Flatten(), nn.Linear(4 * 36, 2))
    captured = prepare(network.train(), (images(2)[0],), "int8")
    with pytest.raises(CaptureError, match="expected the activation of '1' in the captured graph"):
        FeatureTaps(["1"])(captured, images(2)[0])

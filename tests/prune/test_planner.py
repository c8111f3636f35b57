from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from compress.errors import EditError
from compress.models import ConvNet1d, ResNet
from compress.prune import find_groups, plan_removal, replay_prune, score_groups, study
from compress.surgery import Edit
from tests.networks import Residual

CASES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (Residual(), (1, 8, 8)),
    (ResNet(in_channels=1, width=8, blocks=(1, 2)), (1, 12, 12)),
    (ConvNet1d(width=8), (1, 20)),
    (nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 4)), (2, 6, 6)),
]


@pytest.mark.parametrize(("network", "shape"), CASES)
def test_masked_equals_shrunk(network: nn.Module, shape: tuple[int, ...]) -> None:
    """Channels that are zero wherever they are read may be removed without changing the output."""
    torch.manual_seed(0)
    network = copy.deepcopy(network).double().eval()
    x = torch.randn(3, *shape, dtype=torch.float64)
    groups = find_groups(network, [x])
    data = plan_removal(network, [x], {group.name: group.width // 2 for group in groups})
    assert data is not None
    masked = copy.deepcopy(network)
    _silence(masked, data["slices"])
    shrunk = replay_prune(copy.deepcopy(network), Edit("prune", json.loads(json.dumps(data))))
    assert torch.allclose(masked(x), shrunk(x), atol=1e-9)
    assert sum(p.numel() for p in shrunk.parameters()) < sum(p.numel() for p in network.parameters())


def test_layer_norm_shrinks_along() -> None:
    # Not masked ≡ shrunk: its mean runs over the channels that go.
    network = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3))
    data = plan_removal(network, [torch.randn(2, 6)], {"0": 8})
    assert data is not None
    shrunk = replay_prune(network, Edit("prune", data))
    assert shrunk(torch.randn(2, 6)).shape == (2, 3)
    assert shrunk.get_submodule("1").normalized_shape == (8,)


def _silence(network: nn.Module, slices: dict[str, dict[str, list[int]]]) -> None:
    """Zero what consumers read of the channels that go: dimension 1 of weights."""
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name, kept in slices.items():
            if "1" in kept:
                weight = parameters[name]
                gone = sorted(set(range(weight.shape[1])) - set(kept["1"]))
                weight[:, gone] = 0


def test_the_least_important_channels_go() -> None:
    torch.manual_seed(0)
    network = Residual()
    with torch.no_grad():
        network.conv1.weight[[3, 17]] *= 1e-3
        network.norm1.weight[[3, 17]] = 0
        network.conv2.weight[:, [3, 17]] *= 1e-3
    data = plan_removal(network, [torch.randn(2, 1, 8, 8)], {"conv1": 30})
    assert data is not None
    assert sorted(set(range(32)) - set(data["slices"]["conv1.weight"]["0"])) == [3, 17]
    assert data["widths"] == {"conv1": [32, 30]}


def test_importance_is_the_mean_of_squared_norms_over_the_group() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    (score,) = score_groups(study(network, [torch.randn(2, 3)]), "l2").values()
    first, second = network[0].weight, network[2].weight
    expected = (first.square().sum(1) + second.square().sum(0)) / 2  # type: ignore[operator, union-attr]
    assert torch.allclose(score, expected, rtol=1e-5)


def test_outputs_are_protected_whatever_they_are_called() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aaa, self.trunk, self.zzz = nn.Linear(8, 3), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.trunk(x).relu()
            return {"one": self.aaa(x).softmax(-1), "two": self.zzz(x)}

    network, x = TwoHeads(), torch.randn(2, 4)
    assert [group.name for group in find_groups(network, [x])] == ["trunk"]


def test_ignored_layers_keep_their_outputs() -> None:
    x = torch.randn(2, 1, 8, 8)
    assert "conv1" not in [group.name for group in find_groups(Residual(), [x], ignore=["conv1"])]
    with pytest.raises(EditError, match=r"prune\.ignore: expected names of layers, got 'conv7'"):
        find_groups(Residual(), [x], ignore=["conv7"])


def test_planning_leaves_the_network_alone() -> None:
    network = Residual().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    plan_removal(network, [torch.randn(2, 1, 8, 8)], {"conv1": 4})
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_nothing_to_remove_is_no_edit() -> None:
    assert plan_removal(Residual(), [torch.randn(2, 1, 8, 8)], {"conv1": 32}) is None

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from compress.distill.features import FeatureTaps
from compress.distill.kept import kept_channels, observer
from compress.models import ConvNet1d, ResNet
from compress.prune import describe_removal, find_groups, plan_removal, replay_prune, study
from compress.surgery import Edit
from tests.networks import Residual, images


def prune_by_half(network: nn.Module, x: Tensor) -> Edit:
    groups = find_groups(network, (x,))
    data = plan_removal(network, (x,), {group.name: group.width // 2 for group in groups})
    assert data is not None
    return Edit("prune", data)


def test_kept_channels_are_those_of_the_layers_own_weights() -> None:
    torch.manual_seed(0)
    network, x = Residual(16), images(2)[0]
    edit = prune_by_half(network, x)
    names = ["stem", "norm", "conv1", "norm1", "conv2", "relu", "fc"]
    kept = kept_channels(network, edit, replay_prune, observer(FeatureTaps(names), (x,), {}))
    slices = edit.data["slices"]
    for name in ("stem", "conv1", "conv2"):
        assert kept[name] == slices[f"{name}.weight"]["0"], name
    assert kept["norm1"] == kept["conv1"]
    assert kept["relu"] == kept["conv2"]  # its last call is behind the residual sum
    assert "fc" not in kept


def test_blocks_and_one_dimensional_networks() -> None:
    torch.manual_seed(0)
    for network, x, names in [
        (ResNet(in_channels=1, width=8, blocks=(1, 1)), torch.randn(2, 1, 8, 8), ["stages.0", "stages.1"]),
        (ConvNet1d(in_channels=1, num_classes=3), torch.randn(2, 1, 64), []),
    ]:
        layers = names or [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm1d)][:2]
        edit = prune_by_half(network, x)
        taps = FeatureTaps(layers)
        kept = kept_channels(network, edit, replay_prune, observer(taps, (x,), {}))
        pruned = replay_prune(copy.deepcopy(network), edit)
        shapes = {name: tensor.shape[1] for name, tensor in taps(pruned, x).features.items()}
        assert {name: len(kept[name]) for name in layers} == shapes
        assert all(sorted(set(indices)) == indices for indices in kept.values())


def test_channels_are_followed_past_a_block_that_is_left_out() -> None:
    torch.manual_seed(0)
    network, x = ResNet(in_channels=1, width=8, blocks=(2, 2)), images(2)[0]
    anatomy = study(network, (x,))
    gone = {name: torch.tensor([1, 3]) for name in anatomy.groups}
    data = describe_removal(anatomy, gone, blocks=["stages.0.1"])
    assert data is not None
    taps = FeatureTaps(["stages.0", "stages.1.1.bn1"])
    kept = kept_channels(network, Edit("prune", data), replay_prune, observer(taps, (x,), {}))
    assert kept["stages.0"] == [0, 2, 4, 5, 6, 7]
    assert kept["stages.1.1.bn1"] == [0, 2, *range(4, 16)]


def test_the_network_is_left_alone() -> None:
    network, x = Residual(16), images(2)[0]
    edit = prune_by_half(network, x)
    before = copy.deepcopy(network.state_dict())
    kept_channels(network, edit, replay_prune, observer(FeatureTaps(["conv1"]), (x,), {}))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())

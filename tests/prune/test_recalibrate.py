from __future__ import annotations

import copy

import torch
from torch import nn

from compress.prune.recalibrate import recalibrate
from compress.surgery import Captured, capture
from tests.networks import Residual, images


def batches(num: int = 3) -> list[tuple[torch.Tensor]]:
    return [(images(12, seed=seed)[0],) for seed in range(num)]


def statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in network.named_buffers() if name.endswith(("running_mean", "running_var"))}


def test_statistics_are_means_over_batches() -> None:
    torch.manual_seed(0)
    network = Residual().train()
    expected = []
    for (x,) in batches():
        y = network.stem(x)
        expected.append((y.mean((0, 2, 3)), y.transpose(0, 1).flatten(1).var(1)))
    recalibrate(network, batches())
    assert torch.allclose(network.norm.running_mean, torch.stack([m for m, _ in expected]).mean(0), atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(network.norm.running_var, torch.stack([v for _, v in expected]).mean(0), atol=1e-5)  # type: ignore[arg-type]


def test_a_captured_graph_gets_the_same() -> None:
    torch.manual_seed(0)
    network = Residual()
    graph = capture(copy.deepcopy(network), [images(2)[0]], mode="eval").train()
    recalibrate(network, batches())
    recalibrate(graph, batches())
    assert isinstance(graph, Captured)
    for name, buffer in statistics(network).items():
        assert torch.allclose(buffer, graph.get_buffer(name), atol=1e-5), name


def test_nothing_else_changes() -> None:
    torch.manual_seed(0)
    for network in (Residual().train(), capture(Residual(), [images(2)[0]], mode="eval").train()):
        (x,) = batches(1)[0]
        state = torch.get_rng_state()
        weights = {name: p.clone() for name, p in network.named_parameters()}
        recalibrate(network, batches())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(weights[name], p) for name, p in network.named_parameters())
        assert network.training
        before = statistics(network)
        first = network.get_buffer("norm.running_mean").clone()
        network(x)  # the momentum is what it was
        y = nn.functional.conv2d(x, network.get_parameter("stem.weight"), padding=1).mean((0, 2, 3))
        assert torch.allclose(network.get_buffer("norm.running_mean"), 0.7 * first + 0.3 * y, atol=1e-5)
        assert before


def test_no_batches_leave_statistics_alone() -> None:
    network = Residual()
    before = statistics(network)
    recalibrate(network, [])
    assert all(torch.equal(before[name], buffer) for name, buffer in statistics(network).items())

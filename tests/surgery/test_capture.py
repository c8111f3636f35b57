from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import CaptureError, DataError
from compress.quantize import prepare
from compress.surgery import Captured, capture
from tests.networks import Residual, images


def batch_norm_is_training(captured: Captured) -> list[bool]:
    graph = captured.graph_module.graph
    return [bool(node.args[5]) for node in graph.nodes if node.target is torch.ops.aten.batch_norm.default]


def test_graph_equals_network_in_both_modes() -> None:
    torch.manual_seed(0)
    network = Residual()
    twin = copy.deepcopy(network)
    captured = capture(network, [torch.randn(2, 1, 8, 8)])
    x, _ = images(12)
    for mode in (True, False, True):
        torch.manual_seed(1)
        expected = twin.train(mode)(x)
        torch.manual_seed(1)
        assert torch.allclose(captured.train(mode)(x), expected, atol=1e-6)
    # The graph does not count batches: nothing reads that number when momentum is one.
    expected_state = {name: t for name, t in twin.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert set(captured.state_dict()) == set(expected_state)
    for name, value in expected_state.items():
        assert torch.allclose(captured.state_dict()[name].float(), value.float(), atol=1e-6), name


def test_parameters_are_shared() -> None:
    network = Residual()
    captured = capture(network, [torch.randn(2, 1, 8, 8)])
    assert [id(p) for p in captured.parameters()] == [id(p) for p in network.parameters()]


def test_mode_follows_the_attribute_even_when_it_is_assigned() -> None:
    captured = capture(Residual(), [torch.randn(2, 1, 8, 8)])
    x, _ = images(4)
    captured.eval()(x)
    assert batch_norm_is_training(captured) == [False] * 3
    for module in captured.modules():
        module.training = True  # what Lightning does after validation
    captured(x)
    assert batch_norm_is_training(captured) == [True] * 3


def test_frozen_batchnorm_keeps_its_statistics_in_training() -> None:
    captured = capture(Residual(), [torch.randn(2, 1, 8, 8)]).train()
    x, _ = images(8)
    captured(x)
    before = captured.state_dict()["norm.running_mean"].clone()
    captured.freeze_batchnorm = True
    captured(x)
    assert torch.equal(before, captured.state_dict()["norm.running_mean"])
    dropout = [n for n in captured.graph_module.graph.nodes if n.target is torch.ops.aten.dropout.default]
    assert [node.args[2] for node in dropout] == [True]


class StochasticDepth(nn.Module):
    """As Swin's drop path: a random branch of the network's own, beside what the graph's mode covers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.norm(x))
        if self.training:
            y = y * (torch.rand(len(x), 1, 1, 1) > 0.5)
        return x + y


@pytest.mark.parametrize("training", [True, False])
def test_random_branches_of_the_network_stay_out_of_the_graph(training: bool) -> None:
    torch.manual_seed(0)
    network = StochasticDepth().train(training)
    captured = capture(network, [torch.randn(2, 1, 8, 8)])
    assert network.training == captured.training == training
    x, _ = images(12)
    assert torch.equal(captured.eval()(x), network.eval()(x))
    assert not torch.equal(captured.train()(x), captured(x))  # dropout
    assert "rand" not in captured.graph_module.code
    assert not torch.equal(captured.get_buffer("norm.running_mean"), torch.zeros(1))


def test_a_batchnorm_whose_statistics_would_stand_still_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None)).train()
    with pytest.raises(CaptureError, match=r"expected BatchNorms with a momentum, got none in '1'"):
        capture(network, [torch.randn(2, 1, 8, 8)])


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, affine=True)]
)
def test_norms_without_running_statistics_take_those_of_the_batch(norm: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), norm)
    captured = capture(network, [torch.randn(2, 1, 8, 8)])
    x, _ = images(5)
    for mode in (False, True, False):
        assert torch.allclose(captured.train(mode)(x), network.train(mode)(x), atol=1e-5)


class AnyInputs(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        return self.inner(x + sum(inputs))


@pytest.mark.parametrize("num", [1, 2, 3])
def test_inputs_may_be_taken_as_a_tuple(num: int) -> None:
    network = AnyInputs(Residual())
    captured = capture(network, [torch.randn(2, 1, 8, 8)] * num)
    x, _ = images(5)
    assert torch.allclose(captured.eval()(*[x] * num), network.eval()(*[x] * num), atol=1e-6)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, input: Tensor, mask: Tensor, *others: Tensor, flag: bool = True) -> Tensor:
        return self.fc(input) * mask + sum(others)


@pytest.mark.parametrize("quantized", [False, True])
def test_inputs_are_taken_by_the_names_that_the_network_has_for_them(quantized: bool) -> None:
    network, x, mask = Masked().eval(), torch.randn(4, 3), torch.rand(4, 3)
    example = [x[:2], mask[:2]]
    graph = prepare(network, example, "int8").eval() if quantized else capture(network, example)
    for each in (graph, copy.deepcopy(graph)):
        whole = each(x, mask)
        assert torch.equal(each(x, mask=mask), whole)
        assert torch.equal(each(mask=mask, input=x), whole)
        outputs, features = each.forward_with_features(["fc"], x, mask=mask)
        assert torch.equal(outputs, whole)
        assert features["fc"].shape == x.shape
    message = r"captured network: expected (the inputs input, mask|inputs of shapes)"
    wrong: list[tuple[tuple[Tensor, ...], dict[str, Any]]]
    wrong = [((), {"mask": mask}), ((x, mask), {"flag": True}), ((x,), {"input": x}), ((x, mask, x), {})]
    for given, named in wrong:
        with pytest.raises(DataError, match=message):
            graph(*given, **named)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)


@pytest.mark.parametrize("network", [DataDependent(), FixedBatch()])
def test_what_cannot_be_captured_is_named(network: nn.Module) -> None:
    with pytest.raises(CaptureError, match=f"got {type(network).__name__}"):
        capture(network, [torch.ones(2, 3)])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().mean() > 1:  # another size
            x = x / x.abs().mean()
        return self.fc(x)


def test_what_cannot_be_captured_is_named_with_its_layer_and_line() -> None:
    blocks = nn.Sequential(Scaled(), nn.ReLU(), Scaled())
    number = next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "# another size" in line)
    with pytest.raises(CaptureError) as caught:
        capture(nn.Sequential(OrderedDict(stem=nn.Linear(3, 3), blocks=blocks)), [torch.ones(2, 3)])
    message = str(caught.value)
    assert "got Sequential: Data-dependent branching in 'blocks.0' (Scaled, the first of 2) at " in message
    assert f"test_capture.py:{number}: if x.abs().mean() > 1:" in message


def test_a_frozen_norm_stays_frozen() -> None:
    torch.manual_seed(0)
    network = Residual().train()
    network.norm1.eval()
    graph = capture(network, [images(2)[0]]).train()
    twin = copy.deepcopy(graph)
    for captured in (graph, twin, capture(graph, [images(2)[0]]).train()):
        frozen, other = (captured.get_buffer(f"{name}.running_mean").clone() for name in ("norm1", "norm"))
        captured(images(8)[0])
        assert torch.equal(captured.get_buffer("norm1.running_mean"), frozen)
        assert not torch.equal(captured.get_buffer("norm.running_mean"), other)
    assert network.training
    assert not network.norm1.training


@pytest.mark.parametrize(
    "layer",
    [
        nn.RReLU(),
        nn.RReLU(inplace=True),
        nn.Dropout(0.5, inplace=True),
        nn.Dropout2d(0.5, inplace=True),
        nn.AlphaDropout(0.5),
        nn.FeatureAlphaDropout(0.5),
    ],
)
def test_what_is_random_in_training_follows_the_mode(layer: nn.Module) -> None:
    x = torch.randn(4, 3, 6, 6)
    graph = capture(nn.Sequential(nn.Conv2d(3, 8, 1), layer), [x[:2]]).train()
    assert not torch.equal(graph(x), graph(x))
    assert torch.equal(graph.eval()(x), graph(x))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.8])
def test_dropout_keeps_its_rate_through_switches_of_mode(p: float) -> None:
    """PT2E's own switch matches dropout of 0.5 alone; another rate would stay as it was captured."""
    torch.manual_seed(0)
    x = torch.rand(64, 1000) + 1
    graph = capture(nn.Sequential(nn.Linear(1000, 1000), nn.Dropout(p)).eval(), [x[:2]])
    whole = graph.eval()(x)
    for _ in range(2):
        dropped = graph.train()(x)
        gone = dropped == 0
        assert gone.float().mean().item() == pytest.approx(p, abs=0.01)
        assert torch.allclose(dropped[~gone], whole[~gone] / (1 - p), rtol=1e-5, atol=1e-6)
        assert torch.equal(graph.eval()(x), whole)


def test_dropout_between_recurrent_layers_follows_the_mode() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0]

    x = torch.randn(2, 5, 3)
    graph = capture(Recurrent(), [x]).train()
    assert not torch.equal(graph(x), graph(x))
    assert torch.equal(graph.eval()(x), graph(x))


def test_a_graph_is_not_pickled_as_a_whole(tmp_path: Path) -> None:
    whole = nn.ModuleDict({"net": capture(nn.Linear(3, 2), [torch.ones(2, 3)])})
    for save in pickle.dumps, lambda module: torch.save(module, tmp_path / "whole.pt"):
        with pytest.raises(CaptureError, match=r"got pickled as a whole\. Save its state_dict\(\)") as raised:
            save(whole)
        assert isinstance(raised.value, pickle.PicklingError)  # Lightning leaves such hyperparameters out
    assert torch.equal(copy.deepcopy(whole)["net"](torch.ones(4, 3)), whole["net"](torch.ones(4, 3)))

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.errors import CaptureError, RecipeError
from compress.measure.cost import num_bytes
from compress.quantize import convert, prepare
from compress.quantize.pt2e import num_quantized
from compress.surgery import Captured
from tests.networks import Residual, images


@pytest.fixture(scope="module")
def trained() -> tuple[Residual, Captured]:
    """A network whose BatchNorms have seen data, and its prepared twin after some more steps."""
    torch.manual_seed(0)
    network, (x, y) = Residual(), images(64)
    for _ in range(5):
        network(x)
    prepared = prepare(copy.deepcopy(network), [x[:2]], "int8").train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(prepared(x), y).backward()
        optimizer.step()
    return network, prepared


def test_batchnorm_keeps_its_constants() -> None:
    """PT2E's fused pattern has eps 1e-5 and momentum 0.1 written in; the network has neither."""
    prepared = prepare(Residual(), [torch.randn(2, 1, 8, 8)], "int8")
    graph = prepared.graph_module.graph
    norms = {n.args[4].target: n.args[6:8] for n in graph.nodes if n.target is torch.ops.aten.batch_norm.default}
    assert norms == {
        "norm.running_var": (0.3, 1e-3),
        "norm1.running_var": (0.1, 1e-5),
        "norm2.running_var": (0.1, 1e-2),
    }


@pytest.mark.parametrize("training", [True, False])
def test_without_rounding_it_is_the_same_network(training: bool) -> None:
    torch.manual_seed(0)
    network, (x, _) = Residual(), images(16)
    network.dropout.p = 0.0
    for _ in range(3):
        network(x)
    prepared = prepare(copy.deepcopy(network), [x[:2]], "int8")
    for module in prepared.graph_module.modules():
        if hasattr(module, "fake_quant_enabled"):
            module.fake_quant_enabled[0] = 0  # type: ignore[index, operator]
    expected, got = network.train(training)(x), prepared.train(training)(x)
    assert torch.allclose(expected, got, atol=1e-4)
    for name in ("norm.running_mean", "norm.running_var", "norm2.running_var"):
        assert torch.allclose(network.state_dict()[name], prepared.state_dict()[name], atol=1e-5), name


def test_every_matrix_product_is_quantised(trained: tuple[Residual, Captured]) -> None:
    assert num_quantized(trained[1]) == 4


def test_converted_equals_fake_quantised(trained: tuple[Residual, Captured]) -> None:
    x, _ = images(64, seed=1)
    prepared = trained[1].eval()
    with torch.no_grad():
        fake, integer = prepared(x), convert(prepared)(x)
    assert float((fake - integer).norm() / fake.norm()) < 0.02
    assert float((fake.argmax(1) == integer.argmax(1)).float().mean()) > 0.98


def test_converted_holds_integers_alone(trained: tuple[Residual, Captured]) -> None:
    network, prepared = trained
    converted = convert(prepared)
    weights = [tensor for tensor in converted.state_dict().values() if tensor.dim() > 1]
    assert {tensor.dtype for tensor in weights} == {torch.int8}
    assert sum(tensor.numel() for tensor in weights) == sum(p.numel() for p in network.parameters() if p.dim() > 1)
    assert num_bytes(converted) < num_bytes(network)


def test_converting_leaves_the_prepared_network_alone(trained: tuple[Residual, Captured]) -> None:
    prepared = trained[1]
    before = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    convert(prepared)
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.state_dict().items())


def test_evaluation_does_not_move_the_ranges(trained: tuple[Residual, Captured]) -> None:
    prepared = copy.deepcopy(trained[1])
    before = {name: tensor.clone() for name, tensor in prepared.state_dict().items() if "activation" in name}
    prepared.eval()(100 * images(16)[0])
    moved = [n for n, t in prepared.state_dict().items() if n in before and not torch.equal(t, before[n])]
    assert all(name.endswith("observer_enabled") for name in moved)
    prepared.train()(100 * images(16)[0])
    assert any(
        not torch.equal(t, before[n]) for n, t in prepared.state_dict().items() if n in before and n.endswith("scale")
    )


class StochasticDepth(Residual):
    """A branch of the network's own that only training takes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand_like(x) if self.training else x)


@pytest.mark.parametrize("training", [True, False])
def test_random_branches_are_left_out_while_batchnorm_and_dropout_follow_the_mode(training: bool) -> None:
    torch.manual_seed(0)
    network, (x, _) = StochasticDepth().train(training), images(32)
    prepared = prepare(network, [x[:2]], "int8")
    assert prepared.training == training
    prepared.train()(x)  # activation ranges
    before = prepared.state_dict()["norm.running_mean"].clone()
    assert not torch.equal(prepared(x), prepared(x))  # dropout
    assert not torch.equal(prepared.state_dict()["norm.running_mean"], before)
    before = prepared.state_dict()["norm.running_mean"].clone()
    prepared.eval()
    assert torch.equal(prepared(x), prepared(x))
    assert torch.equal(prepared.state_dict()["norm.running_mean"], before)
    assert "rand" not in prepared.graph_module.code


def test_batchnorms_are_fused_as_in_a_capture_in_training_mode() -> None:
    """Each convolution with a BatchNorm has its weight scaled by it, and nothing between the two is quantised."""
    prepared = prepare(Residual(), [torch.randn(2, 1, 8, 8)], "int8")
    nodes = list(prepared.graph_module.graph.nodes)
    norms = [node for node in nodes if node.target is torch.ops.aten.batch_norm.default]
    assert len(norms) == 3
    for norm in norms:
        undo = norm.args[0]
        assert undo.target is torch.ops.aten.div.Tensor
        assert undo.args[0].target is torch.ops.aten.conv2d.default


def test_it_trains_under_autocast() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    x, before = torch.randn(32, 8), copy.deepcopy(network.state_dict())
    prepared = prepare(network, [x[:2]], "int8").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(prepared(x).float(), torch.arange(32) % 3)
    loss.backward()
    torch.optim.SGD(prepared.parameters(), lr=0.1).step()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with torch.no_grad():
        fake = prepared.eval()(x)
        assert torch.allclose(fake, convert(prepared)(x), atol=0.05 * float(fake.abs().max()))


def test_nothing_to_quantise_is_an_error() -> None:
    with pytest.raises(CaptureError, match="expected convolutions or linear layers"):
        prepare(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), [torch.randn(2, 3)], "int8")


def test_unknown_scheme() -> None:
    with pytest.raises(RecipeError, match=r"quantize\.scheme: expected one of .*, or w4a8 and the like .*, got 'int5'"):
        prepare(Residual(), [torch.randn(2, 1, 8, 8)], "int5")


def test_a_norm_of_the_batch_alone_is_refused_behind_a_convolution() -> None:
    x = torch.randn(4, 1, 6, 6)
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(CaptureError, match="expected BatchNorms with running statistics behind convolutions, got '1'"):
        prepare(nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.Conv2d(8, 2, 1)).train(), (x[:2],), "int8")
    behind = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), norm, nn.Conv2d(8, 2, 1))
    assert prepare(behind.train(), (x[:2],), "int8")(x).shape == (4, 2, 4, 4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), r"with factors and biases of their own .* got '1'"),
        ((nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), r"of one group in front .* got '0' with 2"),
    ],
)
def test_norms_that_cannot_be_fused_are_refused_before_anything_runs(
    layers: tuple[nn.Module, ...], message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        prepare(nn.Sequential(*layers).train(), (torch.randn(2, 4, 8, 8),), "int8")


def test_every_weight_becomes_the_integer_that_was_trained(trained: tuple[Residual, Captured]) -> None:
    """PT2E's conversion has a formula of its own for a weight's scale, and an eps of its own for folded BatchNorms."""
    prepared = copy.deepcopy(trained[1]).eval()
    used: dict[tuple[int, ...], Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        scale = module.scale.reshape(-1, *[1] * (output.dim() - 1))  # type: ignore[operator, union-attr]
        used[tuple(output.shape)] = torch.round(output.detach() / scale)

    for module in prepared.graph_module.modules():
        if getattr(module, "is_per_channel", False):
            module.register_forward_hook(watch)
    x, _ = images(64, seed=1)
    with torch.no_grad():
        fake, integer = prepared(x), convert(trained[1])(x)
    converted = [tensor for tensor in convert(trained[1]).state_dict().values() if tensor.dtype == torch.int8]
    assert len(converted) == len(used) == 4
    for tensor in converted:
        assert int((tensor != used[tuple(tensor.shape)]).sum()) <= 1  # a tie, where BatchNorm is folded in
    assert float((fake - integer).norm() / fake.norm()) < 2e-3

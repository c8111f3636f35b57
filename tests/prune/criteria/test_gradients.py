"""Sums over steps, and criteria that use them, against what autograd and finite removal say."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compress.errors import EditError
from compress.prune import study
from compress.prune.criteria import Gradients, Member, score_groups
from compress.prune.criteria import derivatives as criteria


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)).double()


def steps(net: nn.Module, num: int = 3) -> tuple[Gradients, list[dict[str, tuple[Tensor, Tensor]]]]:
    """Return the sums, and weights and gradients of every step."""
    gradients, seen = Gradients(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(num):
        x = torch.randn(4, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        gradients.update(net)
        seen.append({n: (p.detach().clone(), p.grad.clone()) for n, p in net.named_parameters() if p.grad is not None})
        optimizer.step()
    return gradients, seen


def test_sums_are_those_of_all_steps() -> None:
    net = network()
    gradients, seen = steps(net)
    assert gradients.count == 3
    assert gradients.products.keys() == dict(net.named_parameters()).keys()
    for name in gradients.products:
        assert torch.allclose(gradients.products[name], sum(w * g for w, g in (step[name] for step in seen)))  # type: ignore[arg-type]
        assert torch.allclose(gradients.squares[name], sum(g * g for _, g in (step[name] for step in seen)))  # type: ignore[arg-type]


def test_update_leaves_the_network_alone() -> None:
    net = network()
    net(torch.randn(2, 1, 6, 6, dtype=torch.float64)).sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in net.parameters() if p.grad is not None]
    gradients = Gradients()
    gradients.update(net)
    for parameter, (weight, grad) in zip(net.parameters(), before):
        assert torch.equal(parameter, weight)
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)
    assert not any(each.requires_grad for each in gradients.products.values())


def test_parameters_without_a_gradient_are_skipped() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    gradients = Gradients()
    gradients.update(net)  # none has one
    assert gradients.count == 0
    net(torch.ones(1, 2)).sum().backward()
    gradients.update(net)
    assert gradients.products.keys() == {"1.weight", "1.bias"}


def test_half_precision_is_summed_in_float32() -> None:
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(layer.weight)
    gradients = Gradients()
    for _ in range(300):  # bfloat16 stops counting at 256
        layer.weight.grad = torch.ones_like(layer.weight)
        gradients.update(layer)
    assert gradients.products["weight"].item() == gradients.squares["weight"].item() == 300
    assert gradients.products["weight"].dtype == torch.float32


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_a_step_that_overflows_is_left_out(bad: float) -> None:
    net = network()
    gradients, _ = steps(net)
    before = {name: total.clone() for name, total in gradients.products.items()}
    grad = net.get_parameter("3.weight").grad
    assert grad is not None
    grad[0, 0, 0, 0] = bad
    gradients.update(net)
    assert gradients.count == 3
    assert all(torch.equal(total, before[name]) for name, total in gradients.products.items())


def test_sparse_gradients_count() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1, 1, 3])).sum().backward()
    gradients = Gradients()
    gradients.update(table)
    assert gradients.squares["weight"].tolist() == [[0, 0], [4, 4], [0, 0], [1, 1]]


def test_state_loads_with_weights_only_and_goes_on() -> None:
    net = network()
    gradients, _ = steps(net)
    stored = io.BytesIO()
    torch.save(gradients.state_dict(), stored)
    stored.seek(0)
    restored = Gradients()
    restored.load_state_dict(torch.load(stored, weights_only=True))
    for each in (gradients, restored):
        each.update(net)
        assert each.count == 4
    for name, total in gradients.products.items():
        assert torch.equal(total, restored.products[name])
        assert torch.equal(gradients.squares[name], restored.squares[name])


def test_restored_sums_are_their_own() -> None:
    net = network()
    gradients, _ = steps(net)
    state = gradients.state_dict()
    before = state["products"]["0.weight"].clone()
    restored = Gradients()
    restored.load_state_dict(state)
    restored.update(net)
    assert torch.equal(state["products"]["0.weight"], before)


def test_reset_forgets_and_other_shapes_are_refused_before() -> None:
    gradients, _ = steps(network())
    other = nn.Sequential(nn.Conv2d(1, 5, 3))
    other(torch.ones(1, 1, 3, 3)).sum().backward()
    with pytest.raises(EditError, match=r"expected 0\.weight of shape \(6, 1, 3, 3\), got \(5, 1, 3, 3\)"):
        gradients.update(other)
    gradients.reset()
    gradients.update(other)
    assert gradients.count == 1
    assert gradients.products["0.weight"].shape == (5, 1, 3, 3)


def test_ranks_are_averaged_in_one_call() -> None:
    one, _ = steps(network())
    other, _ = steps(network().requires_grad_(True), num=3)
    for total in (*other.products.values(), *other.squares.values()):
        total.mul_(3)
    expected = {name: (total + other.products[name]) / 2 for name, total in one.products.items()}
    flat = _joined(other)
    calls = []

    def reduce(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        return (tensor + flat) / 2

    one.all_reduce(reduce)
    assert len(calls) == 1
    for name, total in one.products.items():
        assert torch.allclose(total, expected[name])
    Gradients().all_reduce(reduce)
    assert len(calls) == 1  # nothing to do


def _joined(gradients: Gradients) -> Tensor:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor.clone())
        return tensor

    gradients.all_reduce(keep)
    return found[0]


def gated(net: nn.Sequential, at: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the network with a gate on every channel behind a layer."""
    return lambda x, gate: net[at:](net[:at](x) * gate)


def test_taylor_is_the_gradient_of_a_gate() -> None:
    """Independent formula: Molchanov's gate behind the activation function, by autograd."""
    net = network()
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    net(x).square().mean().backward()
    gradients = Gradients()
    gradients.update(net)
    score = score_groups(study(net, [x]), "taylor", gradients=gradients)["0"]
    gate = torch.ones(1, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    gated(net, 3)(x, gate).square().mean().backward()
    assert gate.grad is not None
    assert torch.allclose(score, gate.grad.flatten().square().float(), rtol=1e-4)


def test_taylor_of_a_residual_stream_is_that_of_all_that_read_it() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, gate: Tensor | float = 1.0) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.block(x * gate)) * gate)

    torch.manual_seed(0)
    net, x = Stream(), torch.randn(4, 3)
    gate = torch.ones(5, requires_grad=True)
    net(x, gate).square().mean().backward()
    gradients = Gradients()
    gradients.update(net)
    assert gate.grad is not None
    score = score_groups(study(net, [x]), "taylor", gradients=gradients)["stem"]
    assert torch.allclose(score, gate.grad.square(), rtol=1e-4)


def test_taylor_predicts_the_loss_of_a_small_unit() -> None:
    net = network().eval()
    with torch.no_grad():
        net.get_parameter("3.weight")[:, 2] *= 1e-3
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    net(x).square().mean().backward()
    gradients = Gradients()
    gradients.update(net)
    score = score_groups(study(net, [x]), "taylor", gradients=gradients)["0"]
    gate = torch.ones(1, 6, 1, 1, dtype=torch.float64)
    gate[0, 2] = 0
    with torch.no_grad():
        change = gated(net, 3)(x, gate).square().mean() - net(x).square().mean()
    assert score[2].item() == pytest.approx(change.item() ** 2, rel=2e-2)


def test_hessian_is_half_the_squared_gradient_times_the_squared_weight() -> None:
    net = network()
    gradients, seen = steps(net)
    anatomy = study(net, [torch.randn(2, 1, 6, 6, dtype=torch.float64)])
    score = score_groups(anatomy, "hessian", gradients=gradients)["0"]
    expected = torch.zeros(6, dtype=torch.float64)
    for name, parameter in net.named_parameters():
        if name != "3.bias":
            saliency = 0.5 * torch.stack([step[name][1].square() for step in seen]).mean(0) * parameter.detach() ** 2
            expected += saliency.movedim(1 if name == "3.weight" else 0, 0).reshape(6, -1).sum(1)
    assert torch.allclose(score, expected.float(), rtol=1e-4)


def test_hessian_is_exact_where_the_squared_gradient_is() -> None:
    """Log-likelihood of a Gaussian: the mean squared gradient is the Hessian, and the loss is quadratic."""
    torch.manual_seed(0)
    weight = torch.randn(4, 1)
    square = torch.rand(4, 1)
    score = criteria.hessian([Member("w", 0, weight, square=square)])
    assert torch.allclose(score, 0.5 * (square * weight**2)[:, 0])


def test_units_that_no_layer_reads_use_what_they_have() -> None:
    group = [
        Member("q", 0, torch.ones(2, 1), "makes", product=torch.tensor([[1.0], [2.0]])),
        Member("k", 0, torch.ones(2, 1), "makes", product=torch.tensor([[1.0], [-2.0]])),
    ]
    assert criteria.taylor(group).tolist() == [4.0, 0.0]
    assert not criteria.has_gradient([Member("frozen", 0, torch.ones(2, 1))])

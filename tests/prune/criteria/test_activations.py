"""What units say, measured on the graph, against hooks on the module and numpy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.errors import DataError
from compress.models import LSTMClassifier
from compress.prune import study
from compress.prune.criteria import Activation, measure_activations, score_groups
from compress.prune.criteria import activations as measuring
from compress.prune.criteria import responses as criteria
from compress.surgery import capture
from tests.networks import Residual, images
from tests.prune.coupling.networks import NETWORKS, Attention


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1), nn.SiLU(),
        nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def hooked(net: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer gives, by a hook."""
    found: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        mode = net.training
        net.eval()(x)
        net.train(mode)
    handle.remove()
    return found[0]


def test_values_are_those_behind_the_activation_function_and_before_pooling() -> None:
    net, x = convolutional(), torch.randn(8, 1, 8, 8)
    said = measure_activations(study(net, [x]), [(x,)])
    assert said.keys() == {"0", "4"}
    for group, layer in (("0", net[2]), ("4", net[5])):
        values = hooked(net, layer, x).transpose(0, 1).flatten(1)
        assert torch.allclose(said[group].magnitude, values.abs().mean(1), rtol=1e-5)
        assert torch.allclose(said[group].zero_fraction, (values == 0).float().mean(1))
        expected = np.corrcoef(values.double().numpy())
        correlation = said[group].correlation
        assert correlation is not None
        assert np.allclose(correlation.numpy(), expected, atol=1e-4)
        assert said[group].count.item() == values.shape[1]
    assert (said["0"].zero_fraction > 0).all()
    assert (said["4"].zero_fraction == 0).all()


def test_batches_add_up_in_pieces_of_the_example() -> None:
    net, x = convolutional(), torch.randn(12, 1, 8, 8)
    small, large = study(net, [x[:2]]), study(net, [x])
    pieces = measure_activations(small, [(x[:6],), (x[6:],)])
    whole = measure_activations(large, [(x,)])
    for name, said in whole.items():
        assert said.count == pieces[name].count
        assert torch.allclose(said.magnitude, pieces[name].magnitude, rtol=1e-5)
        assert said.correlation is not None
        assert pieces[name].correlation is not None
        assert torch.allclose(said.correlation, pieces[name].correlation, atol=1e-5)  # type: ignore[arg-type]


def test_the_last_piece_is_filled_up_from_the_front() -> None:
    net, x = convolutional(), torch.randn(4, 1, 8, 8)
    anatomy = study(net, [x])
    for num, filled in ((1, [0, 0, 0, 0]), (3, [0, 1, 2, 0])):
        got = measure_activations(anatomy, [(x[:num],)])
        expected = measure_activations(anatomy, [(x[filled],)])
        for name in got:
            assert torch.equal(got[name].magnitudes, expected[name].magnitudes)


@pytest.mark.parametrize("name", ["resnet", "attention", "gru", "regions", "captured"])
def test_large_batches_run_whole_where_the_graph_can(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net: nn.Module = Regions().double()
    if name == "regions":
        x = torch.randn(2, 3, dtype=torch.float64)
    else:
        make, x = NETWORKS["resnet" if name == "captured" else name]
        net = make().double()  # type: ignore[operator]
    many = torch.cat([x + i if x.is_floating_point() else (x + i) % 11 for i in range(10)])
    if name == "captured":
        net = capture(net, [x])
    anatomy = study(net, [x])
    ran: list[int] = []
    run = measuring._Recorder.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(len(args[0]))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(measuring._Recorder, "run", counted)
    batches = [(many,), (many[:7],)]
    got = measure_activations(anatomy, batches)
    assert [num for num in ran if num > 2][:1] == [20]
    assert sum(ran) == 28 * (2 if name == "regions" else 1)  # a region runs once more, by itself
    monkeypatch.setattr(measuring, "_wide", lambda *args: None)
    expected = measure_activations(anatomy, batches)
    assert got.keys() == expected.keys()
    for group, said in got.items():
        assert said.count == expected[group].count
        assert torch.allclose(said.totals, expected[group].totals, rtol=1e-4)
        assert torch.allclose(said.magnitudes, expected[group].magnitudes, rtol=1e-6)


def test_a_network_with_its_batch_written_in_runs_in_pieces() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(2, 4).relu())

    torch.manual_seed(0)
    net, x = Fixed(), torch.randn(20, 3)
    said = measure_activations(study(net, [x[:2]]), [(x,)])
    assert torch.allclose(said["a"].magnitude, net.a(x).relu().mean(0), rtol=1e-5)


def test_heads_are_looked_at_where_the_projection_reads_them() -> None:
    torch.manual_seed(0)
    net, x = Attention(), torch.randn(3, 5, 3)
    said = measure_activations(study(net, [x]), [(x,)])
    found: list[Tensor] = []
    handle = net.proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    net(x)
    handle.remove()
    by_head = found[0].detach().view(3, 5, 3, 4).permute(2, 0, 1, 3).flatten(1)
    assert torch.allclose(said["qkv"].magnitude, by_head.abs().mean(1), rtol=1e-5)
    assert said["qkv"].count.item() == 3 * 5 * 4
    hidden = hooked(net, net.get_submodule("mlp.2"), x).flatten(0, 1)
    assert torch.allclose(said["mlp.1"].magnitude, hidden.abs().mean(0), rtol=1e-5)


def test_all_steps_of_a_recurrent_layer_are_looked_at() -> None:
    torch.manual_seed(0)
    net, x = LSTMClassifier(3, 2, hidden=6), torch.randn(4, 7, 3)
    anatomy = study(net, [x])
    said = measure_activations(anatomy, [(x,)])
    lstm = next(module for module in net.modules() if isinstance(module, nn.LSTM))
    outputs = hooked(net, lstm, x)[0]
    (group,) = said
    assert torch.allclose(said[group].magnitude, outputs.flatten(0, 1).abs().mean(0), rtol=1e-5)


def test_both_directions_of_a_unit_count() -> None:
    make, tokens = NETWORKS["gru"]
    torch.manual_seed(0)
    net: Any = make()  # type: ignore[operator]
    said = measure_activations(study(net, [tokens]), [(tokens,)])
    outputs = hooked(net, net.gru, tokens)[0].view(2, 5, 2, 5)  # (N, L, direction, unit)
    assert torch.allclose(said["gru"].magnitude, outputs.abs().mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("form", ["module", "captured"])
def test_nothing_is_changed_and_training_is_off_meanwhile(form: str) -> None:
    x = torch.randn(4, 1, 8, 8)
    plain = convolutional()
    plain(x)  # statistics that differ from those of a batch
    net: nn.Module = capture(plain, [x]) if form == "captured" else plain
    net.train()(x)
    expected = measure_activations(study(copy.deepcopy(plain).eval(), [x]), [(x,)])
    anatomy = study(net, [x])
    before = copy.deepcopy(net.state_dict())
    graph_before = copy.deepcopy(anatomy.graph.state_dict())
    random = torch.get_rng_state()
    said = measure_activations(anatomy, [(x,)])
    assert net.training
    assert torch.equal(random, torch.get_rng_state())  # no dropout was drawn
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(tensor, graph_before[name]) for name, tensor in anatomy.graph.state_dict().items())
    for name, each in said.items():
        assert torch.allclose(each.magnitude, expected[name].magnitude, rtol=1e-5)
        assert not each.magnitudes.requires_grad
    if form == "captured":
        torch.manual_seed(1)
        assert not torch.equal(net(x), net(x))  # dropout is on again


class Regions(nn.Module):
    """A part that runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.b(self.a(x).relu()).relu()
        return self.c(x)


def test_a_region_without_gradients_is_looked_into() -> None:
    torch.manual_seed(0)
    net, x = Regions(), torch.randn(6, 3)
    said = measure_activations(study(net, [x]), [(x,)])
    assert torch.allclose(said["a"].magnitude, net.a(x).relu().mean(0), rtol=1e-5)
    assert torch.allclose(said["b"].magnitude, net.b(net.a(x).relu()).relu().mean(0), rtol=1e-5)


def test_ranks_are_averaged() -> None:
    torch.manual_seed(0)
    values = torch.randn(20, 3)
    one, two = Activation.of(values[:5]), Activation.of(values[5:])
    whole = Activation.of(values)
    other = torch.cat([each.flatten() for each in (two.count, two.magnitudes, two.zeros, two.totals, two.products)])  # type: ignore[union-attr]
    mean = one.all_reduce(lambda flat: (flat + other) / 2)
    assert torch.allclose(mean.magnitude, whole.magnitude)
    assert mean.correlation is not None
    assert whole.correlation is not None
    assert torch.allclose(mean.correlation, whole.correlation, atol=1e-5)


def test_correlations_survive_a_large_mean() -> None:
    torch.manual_seed(0)
    apart = torch.randn(1000, 4)
    apart[:, 1] += apart[:, 0]
    moved = Activation.of(apart[:500] + 1000) + Activation.of(apart[500:] + 1000)
    assert moved.correlation is not None
    assert np.allclose(moved.correlation.numpy(), np.corrcoef(apart.T.numpy()), atol=1e-3)


def test_of_equal_units_one_stays() -> None:
    torch.manual_seed(0)
    one, two, three = torch.randn(3, 1000)
    said = Activation.of(torch.stack([one, two, -3 * one + 1, three, two], 1))
    scores = criteria.correlation(said)
    gone = set(scores.argsort(stable=True)[:2].tolist())
    assert len(gone & {0, 2}) == len(gone & {1, 4}) == 1
    assert 3 not in gone


def test_correlation_is_the_greedy_procedure() -> None:
    """Independent formula: remove units one by one, by plain loops."""
    torch.manual_seed(0)
    values = torch.randn(30, 8) @ torch.randn(8, 8)
    scores = criteria.correlation(Activation.of(values))
    rho = np.abs(np.corrcoef(values.T.double().numpy()))
    left, expected = list(range(8)), {}
    while len(left) > 1:
        pairs = [(rho[i, j], i, j) for i in left for j in left if i < j]
        value, i, j = max(pairs)
        unit = max((i, j), key=lambda u: sum(rho[u, v] for v in range(8) if v != u))
        expected[unit] = 1 - value
        left.remove(unit)
    expected[left[0]] = 1.0
    assert np.allclose(scores.numpy(), [expected[u] for u in range(8)], atol=1e-4)


def test_units_that_never_change_go_first() -> None:
    torch.manual_seed(0)
    values = torch.randn(50, 4)
    values[:, 1], values[:, 3] = 0.0, 7.5
    scores = criteria.correlation(Activation.of(values))
    assert set(scores.argsort()[:2].tolist()) == {1, 3}
    assert (scores[[1, 3]] < 1e-6).all()


def test_wide_groups_and_units_that_are_never_zero_are_ranked_by_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = convolutional(), torch.randn(4, 1, 8, 8)
    anatomy = study(net, [x])
    l2 = score_groups(anatomy, "l2")
    said = measure_activations(anatomy, [(x,)])
    apoz = score_groups(anatomy, "apoz", activations=said)
    assert torch.equal(apoz["4"], l2["4"])  # SiLU
    assert torch.equal(apoz["0"], 1 - said["0"].zero_fraction)
    monkeypatch.setattr(measuring, "WIDEST", 4)
    said = measure_activations(anatomy, [(x,)])
    assert said["0"].products is None
    assert said["0"].correlation is None
    assert torch.equal(score_groups(anatomy, "correlation", activations=said)["0"], l2["0"])
    assert not torch.equal(score_groups(anatomy, "correlation", activations=said)["4"], l2["4"])


def test_what_does_not_fit_is_named() -> None:
    net, x = convolutional(), torch.randn(4, 1, 8, 8)
    anatomy = study(net, [x])
    with pytest.raises(DataError, match="expected batches to measure activations on, got none"):
        measure_activations(anatomy, [])
    for wrong in ((x, torch.zeros(4)), (x[:, :, 1:],), (x[:0],)):
        with pytest.raises(DataError, match="expected batches of inputs of shape"):
            measure_activations(anatomy, [wrong])


def test_modes_are_each_modules_own_afterwards() -> None:
    network = Residual().train()
    network.norm1.eval()
    x = images(32)[0]
    measure_activations(study(network, [x[:2]]), [(x,)])
    assert network.training
    assert network.norm.training
    assert not network.norm1.training

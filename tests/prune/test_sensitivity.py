"""Sensitivity curves: values that can be counted by hand, silence against removal, and nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from compress.prune import apply_removal, describe_removal, score_groups, study
from compress.prune.planner import least
from compress.prune.sensitivity import divergence, measure_sensitivity, num_silent, silenced
from compress.surgery import capture
from tests.networks import Residual, images
from tests.prune.coupling.networks import NETWORKS


def counted() -> nn.Module:
    """Units of the first layer say 1, 2, 3 and 4, of the second 10 and 20; a bias, too, must fall silent."""
    network = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    weights = {
        "0.weight": torch.zeros(4, 1),
        "0.bias": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "2.weight": torch.tensor([[1.0, 1, 1, 1], [2.0, 2, 2, 2]]),
        "2.bias": torch.zeros(2),
        "4.weight": torch.ones(1, 2),
    }
    network.load_state_dict(weights)
    return network


X = torch.ones(2, 1)


def missing(network: nn.Module) -> float:
    return 30.0 - float(network(X)[0, 0])


def test_curves_are_those_counted_by_hand() -> None:
    network = counted()
    scores = {"0": torch.tensor([4.0, 3.0, 2.0, 1.0]), "2": torch.tensor([1.0, 2.0])}
    curves = measure_sensitivity(study(network, [X]), scores, missing, ratios=[0.75, 0.25, 0.3, 0.5])
    # Unit 3 of the first layer says 4, three times; units 3 and 2 say 7, units 3, 2 and 1 say 9.
    assert curves["0"] == [[0.0, 0.0], [0.25, 12.0], [0.5, 21.0], [0.75, 27.0]]
    assert curves["2"] == [[0.0, 0.0], [0.5, 10.0]]  # one unit of two always stays


def test_groups_without_scores_are_left_out() -> None:
    curves = measure_sensitivity(study(counted(), [X]), {"2": torch.ones(2)}, missing, ratios=[0.5])
    assert list(curves) == ["2"]


@pytest.mark.parametrize("width", [1, 2, 3, 7, 64])
def test_one_unit_always_stays(width: int) -> None:
    assert [num_silent(width, ratio) for ratio in (0.0, 0.99, 1.0)] == [
        0,
        min(width - 1, round(0.99 * width)),
        width - 1,
    ]


def test_values_can_be_more_than_a_number() -> None:
    def both(network: nn.Module) -> dict[str, float]:
        return {"loss": missing(network), "half": missing(network) / 2}

    curves = measure_sensitivity(study(counted(), [X]), {"2": torch.tensor([1.0, 2.0])}, both, ratios=[0.5])
    assert curves == {"2": [[0.0, {"loss": 0.0, "half": 0.0}], [0.5, {"loss": 10.0, "half": 5.0}]]}


@pytest.mark.parametrize("stop", range(7))
def test_what_is_done_is_not_measured_again(stop: int) -> None:
    network = counted()
    anatomy = study(network, [X])
    scores = {"0": torch.tensor([4.0, 3.0, 2.0, 1.0]), "2": torch.tensor([1.0, 2.0])}
    whole: list[Any] = []
    ratios = (0.25, 0.5, 0.75)
    expected = measure_sensitivity(anatomy, scores, missing, ratios=ratios, on_point=lambda *p: whole.append(p))
    assert whole[0] == ("0", 0.0, 0.0)
    assert len(whole) == 5
    done: dict[str, list[list[float]]] = {}
    for name, ratio, value in whole[:stop]:
        done.setdefault(name, []).append([ratio, value])
    rest: list[Any] = []
    again = measure_sensitivity(anatomy, scores, missing, ratios=ratios, done=done, on_point=lambda *p: rest.append(p))
    assert again == expected
    assert whole[:stop] + rest == whole


def test_the_network_is_as_before_also_when_the_loss_fails() -> None:
    torch.manual_seed(0)
    network = Residual().train()
    anatomy = study(network, [images(2)[0]])
    before = copy.deepcopy(network.state_dict())
    changed = []

    def interrupted(network: nn.Module) -> float:
        changed.append(not torch.equal(network.state_dict()["stem.weight"], before["stem.weight"]))
        if changed[-1]:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(anatomy, score_groups(anatomy, "l2"), interrupted)
    assert changed == [False, True]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "module") for name in ("resnet", "conv1d", "dense", "shuffled", "grouped", "grouped_queries", "gru")),
        ("residual", "captured"),
    ],
)
def test_silence_is_removal(name: str, form: str) -> None:
    torch.manual_seed(0)
    make, x = NETWORKS[name]
    network: nn.Module = make().double().eval()  # type: ignore[operator]
    x = x.double() if x.is_floating_point() else x
    for buffer_name, buffer in network.named_buffers():
        if "running_mean" in buffer_name:
            buffer.uniform_(-1.0, 0.1)
    if form == "captured":
        network = capture(network, [x], mode="eval")
    anatomy = study(network, [x])
    scores = score_groups(anatomy, "l2")
    for group, width in anatomy.widths.items():
        gone = least({group: scores[group]}, {group: width - max(1, width // 3)})
        data = describe_removal(anatomy, gone)
        assert data is not None
        with torch.no_grad(), silenced(anatomy, gone):
            silent = network(x)
        with torch.no_grad():
            removed = apply_removal(copy.deepcopy(network), data).eval()(x)
        assert torch.allclose(silent, removed, rtol=1e-9, atol=1e-9), group


def test_a_weight_normalisation_stays_finite() -> None:
    network = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    anatomy = study(network, [torch.ones(2, 3)])
    ((name, width),) = anatomy.widths.items()
    with torch.no_grad(), silenced(anatomy, {name: torch.arange(width - 1)}):
        hidden = network[0](torch.ones(2, 3))
    assert hidden[:, :-1].count_nonzero() == 0
    assert bool(hidden.isfinite().all())


def test_divergence_is_the_mean_kl_of_logits() -> None:
    torch.manual_seed(0)
    network, changed = nn.Linear(3, 4), nn.Linear(3, 4)
    batches = [[torch.randn(5, 3)], [torch.randn(2, 3)]]
    away = divergence(network, batches)
    x = torch.cat([inputs for (inputs,) in batches])
    p, q = network(x).softmax(1), changed(x).softmax(1)
    assert away(network) == 0
    assert away(changed) == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.number, self.map = nn.Linear(3, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"number": self.number(x), "map": self.map(x)[:, None]}


def test_divergence_of_what_is_no_logits_is_relative_and_outputs_add_up() -> None:
    torch.manual_seed(0)
    network = TwoOutputs()
    x = torch.randn(5, 3)
    away = divergence(network, [[x]])
    doubled = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    assert away(doubled) == pytest.approx(2.0)


@pytest.mark.parametrize("form", ["module", "captured"])
def test_divergence_leaves_modes_statistics_and_random_states(form: str) -> None:
    torch.manual_seed(0)
    network: nn.Module = Residual()
    x = images(12)[0]
    if form == "captured":
        network = capture(network, [x])
    anatomy = study(network.train(), [x[:2]])
    if form == "module":
        network.norm.eval()  # type: ignore[operator, union-attr]  # a mode of its own stays
    modes = [module.training for module in network.modules()]
    before = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    loss = divergence(network, [[x[:8]], [x[8:]]])
    scores = score_groups(anatomy, "l2")
    curves = measure_sensitivity(anatomy, scores, loss, ratios=[0.25, 0.75])
    assert curves == measure_sensitivity(anatomy, scores, loss, ratios=[0.25, 0.75])
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(curve[0] == [0.0, 0.0] and all(value > 0 for _, value in curve[1:]) for curve in curves.values())
    with torch.no_grad():  # dropout draws again: the graph, too, is back in training mode
        assert not torch.equal(network(x), network(x))

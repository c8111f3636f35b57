"""Criteria of weights against plain formulas, on cases that can be counted by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.models import ResNet
from compress.prune import study
from compress.prune.criteria import Member, members, score_groups
from compress.prune.criteria import weights as criteria
from compress.prune.criteria.roles import roles_of
from tests.prune.coupling.networks import NETWORKS


def pair() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)


def member(rows: list[list[float]], role: str = "makes") -> Member:
    return Member("w", 0, torch.tensor(rows), role)


def test_norms_are_means_over_what_is_coupled() -> None:
    network, x = pair()
    anatomy = study(network, [x])
    made, bias, read = (network.get_parameter(name) for name in ("0.weight", "0.bias", "2.weight"))
    l1 = (made.abs().sum(1) + bias.abs() + read.abs().sum(0)) / 3
    l2 = (made.square().sum(1) + bias.square() + read.square().sum(0)) / 3
    assert torch.allclose(score_groups(anatomy, "l1")["0"], l1)
    assert torch.allclose(score_groups(anatomy, "l2")["0"], l2)


def test_norms_of_heads_are_over_all_their_rows() -> None:
    make, x = NETWORKS["attention"]
    network: Any = make()  # type: ignore[operator]
    anatomy = study(network, [x.float()])
    parts = [
        network.qkv.weight.view(3, 3, 4, 12).transpose(0, 1).reshape(3, -1),  # (head, part, ...)
        network.qkv.bias.view(3, 3, 4).transpose(0, 1).reshape(3, -1),
        network.proj.weight.view(12, 3, 4).transpose(0, 1).reshape(3, -1),
        network.bias.view(3, -1),
    ]
    expected = torch.stack([part.abs().sum(1) for part in parts]).mean(0)
    assert torch.allclose(score_groups(anatomy, "l1")["qkv"], expected, rtol=1e-5)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_lamp_is_its_definition(values: list[int]) -> None:
    scores = criteria.lamp([member([[float(value)] for value in values])])
    squared = [value**2 for value in values]
    expected = [s / total if (total := sum(t for t in squared if t >= s)) else 0.0 for s in squared]
    assert torch.allclose(scores, torch.tensor(expected))
    ranks = criteria.l2([member([[float(value)] for value in values])])
    assert torch.equal(scores.argsort(stable=True), ranks.argsort(stable=True))  # within a group, the order of l2


def test_fpgm_is_the_sum_of_distances_between_filters() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    filters = network.get_parameter("0.weight").detach().flatten(1)
    expected = [sum(math.dist(one.tolist(), other.tolist()) for other in filters) for one in filters]
    anatomy = study(network, [torch.randn(2, 1, 6, 6)])
    # Neither the bias, nor the normalisation, nor what reads them is a filter.
    assert torch.allclose(score_groups(anatomy, "fpgm")["0"], torch.tensor(expected), rtol=1e-5)


def test_fpgm_takes_equal_filters_for_equal_and_many_rows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, 100) * 1e3
    rows[3] = rows[5]
    group = [Member("w", 0, rows, "makes")]
    whole = criteria.fpgm(group)
    assert whole[3] == whole[5]
    monkeypatch.setattr(criteria, "_ROWS", 2)
    assert torch.allclose(criteria.fpgm(group), whole)
    same = criteria.fpgm([Member("w", 0, rows[:1].repeat(3, 1), "makes")])
    assert (same < 1e-2).all()  # of norms of 1e4


def test_fpgm_joins_the_filters_of_all_layers_that_make_the_units() -> None:
    group = [member([[0.0], [3.0]]), member([[0.0], [4.0]]), member([[0.0], [100.0]], "reads")]
    assert criteria.fpgm(group).tolist() == [5.0, 5.0]


def test_scales_are_means_over_the_normalisations_of_the_units() -> None:
    torch.manual_seed(0)
    network = ResNet(in_channels=1, width=4, blocks=(2,))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    scores = score_groups(study(network, [torch.randn(2, 1, 6, 6)]), "batchnorm_scale")
    blocks = network.stages[0]
    norms = [network.stem[1], blocks[0].bn2, blocks[1].bn2]  # type: ignore[index]
    expected = torch.stack([norm.weight.detach().abs() for norm in norms]).mean(0)
    assert torch.allclose(scores["stem.0"], expected)
    assert torch.equal(scores["stages.0.0.conv1"], blocks[0].bn1.weight.detach().abs())  # type: ignore[index]


def test_members_know_what_parameters_do() -> None:
    network, x = pair()
    anatomy = study(network, [x])
    found = {(each.name, each.dim): each.role for each in members(anatomy, anatomy.groups["0"])}
    assert found == {("0.weight", 0): "makes", ("0.bias", 0): "joins", ("2.weight", 1): "reads"}


@pytest.mark.parametrize(
    ("name", "slot", "role"),
    [
        ("grouped", ("up.weight", 1), "makes"),  # transposed convolution
        ("grouped", ("up.weight", 0), "reads"),
        ("gru", ("embed.weight", 1), "makes"),
        ("gru", ("gru.weight_hh_l0", 0), "makes"),
        ("gru", ("gru.weight_hh_l0", 1), "reads"),
        ("gru", ("gru.bias_ih_l0", 0), "joins"),
        ("attention", ("position", 2), "joins"),
        ("attention", ("norm.weight", 0), "scales"),
        ("attention", ("scale", 0), "joins"),
    ],
)
def test_roles(name: str, slot: tuple[str, int], role: str) -> None:
    make, x = NETWORKS[name]
    assert roles_of(study(make().double(), [x]).graph)[slot] == role  # type: ignore[operator]


class Written(nn.Module):
    """Products written out, a weight norm, and a region without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(*shape)) for shape in ((3, 4), (5, 4), (5, 6)))
        self.d = nn.utils.parametrizations.weight_norm(nn.Linear(6, 7))
        self.e = nn.Linear(7, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("ni,ij->nj", x @ self.a @ self.b.t(), self.c)
        x = self.d(x)
        with torch.no_grad():
            x = self.e(x).relu()
        return self.head(x)


def test_roles_of_products_that_are_written_out() -> None:
    roles = roles_of(study(Written(), [torch.randn(2, 3)]).graph)
    expected = {
        "a": ("reads", "makes"),
        "b": ("makes", "reads"),
        "c": ("reads", "makes"),
        "e.weight": ("makes", "reads"),
    }
    for name, (first, second) in expected.items():
        assert (roles[name, 0], roles[name, 1]) == (first, second), name
    direction = next(name for name, dim in roles if name.startswith("d.") and name.endswith("original1") and dim == 1)
    assert (roles[direction, 0], roles[direction, 1]) == ("makes", "reads")


def test_random_is_uniform() -> None:
    drawn = torch.cat([criteria.random(f"layer{i}", 100) for i in range(100)])
    assert 0 <= drawn.min() < drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.02)
    assert drawn.std().item() == pytest.approx(12**-0.5, abs=0.02)

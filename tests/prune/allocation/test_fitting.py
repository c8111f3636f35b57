from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import EditError, RecipeError
from compress.models import ResNet
from compress.prune import Anatomy, apply_removal, describe_removal, score_groups, study
from compress.prune.allocation import Candidate, Grid, Target, fit_to_target, make_cost
from compress.prune.allocation.fitting import keep_what_is_free
from compress.prune.planner import least


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    torch.manual_seed(0)
    return study(ResNet(in_channels=1, width=32, blocks=(1, 2)), [torch.randn(2, 1, 12, 12)])


def groups(anatomy: Anatomy) -> list[Candidate]:
    curve = [(0.0, 0.5), (0.5, 0.6), (0.95, 1.0)]
    scores = score_groups(anatomy, "l2")
    return [Candidate(name, width, width, scores[name], curve) for name, width in anatomy.widths.items()]


@pytest.mark.parametrize("allocation", ["uniform", "global", "sensitivity"])
@pytest.mark.parametrize("currency", ["macs", "params", "bytes"])
def test_a_target_is_met_closely(anatomy: Anatomy, allocation: str, currency: str) -> None:
    target = Target(**{currency: 0.5})  # type: ignore[arg-type]
    found = fit_to_target(anatomy, groups(anatomy), allocation, target, round_to=2)
    cost = make_cost(anatomy, target)
    assert found.wanted == pytest.approx(cost.measure(anatomy.network, anatomy.inputs) / 2)
    assert found.met
    assert found.reached >= (1 - target.tolerance) * found.wanted
    assert found.rounds == 1
    data = describe_removal(anatomy, least(score_groups(anatomy, "l2"), found.widths))
    assert data is not None
    pruned = apply_removal(copy.deepcopy(anatomy.network), data)
    assert cost.measure(pruned, anatomy.inputs) == found.reached
    assert all(width % 2 == 0 for width in found.widths.values())


def test_absolute_and_intermediate_targets(anatomy: Anatomy) -> None:
    before = make_cost(anatomy, Target(params=0.5)).estimate({})
    absolute = fit_to_target(anatomy, groups(anatomy), "uniform", Target(params=0.5 * before), round_to=2)
    assert absolute.widths == fit_to_target(anatomy, groups(anatomy), "uniform", Target(params=0.5), round_to=2).widths
    step = fit_to_target(anatomy, groups(anatomy), "uniform", Target(params=0.5), round_to=2, wanted=0.9 * before)
    assert 0.8 * before < step.reached <= 0.9 * before
    assert all(step.widths[name] >= width for name, width in absolute.widths.items())


def test_what_is_cheap_enough_stays(anatomy: Anatomy) -> None:
    found = fit_to_target(anatomy, groups(anatomy), "uniform", Target(params=1e12))
    assert found.widths == anatomy.widths
    assert found.rounds == 0


def test_out_of_reach(anatomy: Anatomy) -> None:
    with pytest.raises(EditError, match=r"prune.target.macs: expected a cost .* got .* where the narrowest .* costs"):
        fit_to_target(anatomy, groups(anatomy), "uniform", Target(macs=0.01), round_to=8)
    with pytest.raises(EditError, match=r"prune.target.params: expected"):
        fit_to_target(anatomy, groups(anatomy), "global", Target(params=0.1), min_width=24)


class Overheads:
    """An engine with a share of time that no width changes, and of which estimates know nothing."""

    def __init__(self, anatomy: Anatomy, overhead: float) -> None:
        self.inner = make_cost(anatomy, Target(macs=0.5))
        self.overhead = overhead * self.inner.estimate({})
        self.measured = 0

    def estimate(self, widths: Mapping[str, int]) -> float:
        return self.inner.estimate(widths)

    def measure(self, network: nn.Module, inputs: Sequence[Tensor]) -> float:
        self.measured += 1
        return self.inner.measure(network, inputs) + self.overhead


def test_estimates_are_put_right_by_measuring(anatomy: Anatomy) -> None:
    cost = Overheads(anatomy, 0.3)
    found = fit_to_target(anatomy, groups(anatomy), "global", Target(latency=0.6), round_to=1, cost=cost)
    assert found.met
    assert found.reached == pytest.approx(found.wanted, rel=0.05)
    assert 2 <= found.rounds == cost.measured - 1 <= 5


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_groups_that_step_together_are_widened_singly(anatomy: Anatomy, allocation: str) -> None:
    # In steps of 16 all widths of a family that meet this target cost at most 0.83 of it; one group may be wider.
    cost = Overheads(anatomy, 0.3)
    found = fit_to_target(anatomy, groups(anatomy), allocation, Target(latency=0.8), round_to=16, cost=cost)
    assert found.met
    assert found.reached >= 0.92 * found.wanted
    assert all(width % 16 == 0 for width in found.widths.values())
    assert found.rounds == cost.measured - 1 <= 10


class Cliff:
    """An engine that is slow as long as the first layer is whole."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.inner = make_cost(anatomy, Target(macs=0.5))
        self.height = 0.4 * self.inner.estimate({})

    def estimate(self, widths: Mapping[str, int]) -> float:
        return self.inner.estimate(widths) + self.height * (widths["stem.0"] == 32)

    def measure(self, network: nn.Module, inputs: Sequence[Tensor]) -> float:
        return self.inner.measure(network, inputs) + self.height * (len(network.stem[0].weight) == 32)  # type: ignore[index, union-attr, arg-type]


def test_a_group_on_a_cliff_stays_and_the_others_lose_more(anatomy: Anatomy) -> None:
    candidates = groups(anatomy)
    cheap = [
        replace(each, scores=torch.linspace(0.001, 2, 32)) if each.name == "stem.0" else each for each in candidates
    ]
    found = fit_to_target(anatomy, cheap, "global", Target(latency=0.9), round_to=8, cost=Cliff(anatomy))
    assert found.met
    assert found.reached >= 0.95 * found.wanted
    assert found.widths["stem.0"] == 32


class Odd:
    """An engine on which a width that is no multiple of 16 is as slow as the next one that is."""

    def estimate(self, widths: Mapping[str, int]) -> float:
        return float(sum(-(-width // 16) * 16 for width in widths.values()))

    def measure(self, network: nn.Module, inputs: Sequence[Tensor]) -> float:
        return 0.0


def test_a_step_that_makes_nothing_faster_is_not_taken() -> None:
    both = [Candidate(name, 64, 64, torch.ones(64)) for name in "ab"]
    assert keep_what_is_free({"a": 40, "b": 32}, both, Grid(8), Odd(), 80.0) == {"a": 48, "b": 32}
    flat: Any = Odd()
    flat.estimate = lambda widths: 1.0
    assert keep_what_is_free({"a": 8, "b": 32}, both, Grid(8), flat, 1.0) == {"a": 64, "b": 64}


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({}, "prune.target: expected exactly one of latency_ms, latency, macs, params, bytes, got none"),
        ({"macs": 0.5, "params": 0.5}, "got macs and params"),
        ({"macs": 0.0}, "prune.target.macs: expected a positive number, got 0.0"),
        ({"params": -3}, "prune.target.params"),
        ({"bytes": float("nan")}, "prune.target.bytes"),
        ({"latency": 3.0}, "prune.target.latency: expected a fraction .* Use prune.target.latency_ms"),
        ({"latency_ms": 3.0, "engine": "abacus"}, "prune.target.engine: expected one of .*, got 'abacus'"),
        ({"latency_ms": 3.0, "batch": 0}, "prune.target.batch: expected at least 1, got 0"),
        ({"latency_ms": 3.0, "threads": 0}, "prune.target.threads: expected at least 1, got 0"),
        ({"latency_ms": 3.0, "threads": 10**6}, r"prune.target.threads: expected at most \d+, got 1000000"),
        ({"macs": 0.5, "tolerance": 0.0}, r"prune.target.tolerance: expected a value in \(0, 1\), got 0.0"),
    ],
)
def test_bad_targets(values: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Target(**values)

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import EditError, RecipeError
from compress.prune.allocation import ALLOCATIONS, Candidate, Grid, allocate
from compress.prune.allocation.families import share_globally, widths_at


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    found = []
    for index in range(draw(st.integers(1, 4))):
        original = draw(st.integers(1, 70))
        now = draw(st.integers(1, original))
        scores = draw(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.0, 5.0, 1e6]), min_size=now, max_size=now))
        losses = draw(st.lists(st.floats(0, 10), min_size=1, max_size=4))
        curve = [(round(0.9 * i / len(losses), 3), loss) for i, loss in enumerate(losses)]
        found.append(Candidate(str(index), original, now, torch.tensor(scores), curve))
    return found


@given(
    groups=candidates(),
    name=st.sampled_from(sorted(ALLOCATIONS)),
    levels=st.lists(st.floats(0, 1), min_size=2, max_size=5),
    round_to=st.sampled_from([1, 3, 8, 16]),
    min_width=st.integers(1, 20),
)
@settings(max_examples=200, deadline=None)
def test_widths_fall_with_the_level_within_bounds(
    groups: list[Candidate], name: str, levels: list[float], round_to: int, min_width: int
) -> None:
    before = {each.name: each.now for each in groups}
    for level in sorted(levels):
        widths = widths_at(groups, name, level, Grid(round_to, min_width))
        for each in groups:
            width = widths[each.name]
            assert 1 <= width <= before[each.name]
            assert width == each.now or (width % round_to == 0 and width >= min_width)
        before = widths


@given(groups=candidates(), ratio=st.floats(0, 0.99), round_to=st.sampled_from([1, 8]))
@settings(max_examples=50, deadline=None)
def test_uniform_takes_the_nearest_multiple(groups: list[Candidate], ratio: float, round_to: int) -> None:
    found = allocate(groups, "uniform", ratio, round_to=round_to)
    for each in groups if ratio else []:
        multiples = max(1, round(each.original * (1 - ratio) / round_to))
        assert found[each.name] == min(each.now, multiples * round_to)


@pytest.mark.parametrize("name", ["global", "sensitivity"])
def test_a_ratio_counts_all_units(name: str) -> None:
    torch.manual_seed(0)
    curve = [(0.0, 1.0), (0.5, 1.5), (0.9, 4.0)]
    groups = [Candidate(str(i), 100 * i, 100 * i, torch.rand(100 * i), curve) for i in range(1, 4)]
    for ratio in (0.1, 0.3, 0.55):
        kept = sum(allocate(groups, name, ratio, round_to=1).values())
        assert kept == pytest.approx(600 * (1 - ratio), abs=3)
    later = [Candidate(each.name, each.original, each.original // 2, each.scores[::2], curve) for each in groups]
    assert sum(allocate(later, name, 0.6, round_to=1).values()) == pytest.approx(240, abs=3)


def test_global_takes_where_scores_are_low_and_scale_does_not_count() -> None:
    flat, steep = torch.ones(10), torch.tensor([0.01] * 5 + [1.99] * 5)
    widths = share_globally([Candidate("flat", 10, 10, 1e9 * flat), Candidate("steep", 10, 10, steep)], 0.25)
    assert widths == {"flat": 10, "steep": 5}
    even = share_globally([Candidate("a", 10, 10, flat), Candidate("b", 20, 20, torch.ones(20))], 0.5)
    assert even == {"a": 5, "b": 10}


def test_sensitivity_spares_what_hurts() -> None:
    tough = Candidate("tough", 100, 100, torch.ones(100), [(0.0, 1.0), (0.5, 1.1), (0.9, 1.2)])
    tender = Candidate("tender", 100, 100, torch.ones(100), [(0.0, 1.0), (0.5, 2.0), (0.4, 1.9), (0.9, 1.5)])
    widths = widths_at([tough, tender], "sensitivity", 0.1, Grid(1))  # a rise of 0.1 is allowed
    assert widths == {"tough": 50, "tender": round(100 * (1 - 0.4 * 0.1 / 0.9))}
    # A dip after a rise does not count: nobody knows why.
    assert widths_at([tough, tender], "sensitivity", 0.99, Grid(1))["tender"] == round(100 * (1 - 0.4 - 0.1 * 0.9))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"allocation": "clever"}, "prune.allocation: expected one of uniform, global, sensitivity, got 'clever'"),
        ({"ratio": 1.0}, r"prune.ratio: expected a value in \[0, 1\), got 1.0"),
        ({"ratio": float("nan")}, "prune.ratio"),
        ({"round_to": 0}, "prune.round_to: expected at least 1, got 0"),
        ({"min_width": 0}, "prune.min_width: expected at least 1, got 0"),
    ],
)
def test_bad_numbers(change: dict[str, object], match: str) -> None:
    arguments: dict = {"allocation": "global", "ratio": 0.5, **change}
    with pytest.raises(RecipeError, match=match):
        allocate([Candidate("a", 4, 4, torch.ones(4))], **arguments)


def test_what_a_group_lacks() -> None:
    with pytest.raises(EditError, match="expected a measured curve of a"):
        allocate([Candidate("a", 4, 4, torch.ones(4))], "sensitivity", 0.5, round_to=1)
    with pytest.raises(EditError, match="expected finite scores of the units of a"):
        allocate([Candidate("a", 4, 4, torch.tensor([1.0, float("nan"), 2, 3]))], "global", 0.5, round_to=1)
    groups = [Candidate("a", 4, 4, torch.ones(4), [(0.0, 1.0), (0.5, float("inf"))])]
    with pytest.raises(EditError, match="expected finite losses on the curve of a"):
        allocate(groups, "sensitivity", 0.5, round_to=1)

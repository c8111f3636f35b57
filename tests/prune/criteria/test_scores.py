"""Every criterion on every kind of network."""

from __future__ import annotations

import copy
import functools
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.errors import EditError, RecipeError
from compress.prune import Anatomy, apply_removal, describe_removal, study
from compress.prune.criteria import CRITERIA, Gradients, measure_activations, normalise, score_groups
from compress.prune.criteria.activations import Activation
from compress.prune.criteria.scores import _say_once
from compress.prune.planner import least
from compress.surgery import capture
from tests.prune.coupling.networks import NETWORKS


@functools.cache
def evidence(name: str) -> tuple[Anatomy, Gradients, dict[str, Activation]]:
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    network: nn.Module = make().double().eval()  # type: ignore[operator]
    for parameter in network.parameters():
        if parameter.dim() == 1:  # fresh normalisations all have the scale 1
            nn.init.uniform_(parameter, 0.5, 1.5)
    gradients = Gradients()
    for _ in range(2):
        network.zero_grad()
        network(x).square().sum().backward()
        gradients.update(network)
    anatomy = study(network, [x])
    return anatomy, gradients, measure_activations(anatomy, [(x,)])


@pytest.mark.parametrize(
    ("name", "criterion"),
    [
        # A third of all pairs, in which each criterion and each network has its turn.
        pytest.param(name, criterion, marks=[pytest.mark.slow] if (row + column) % 3 else [])
        for row, name in enumerate(NETWORKS)
        for column, criterion in enumerate(CRITERIA)
    ],
)
def test_every_criterion_halves_every_network(name: str, criterion: str) -> None:
    anatomy, gradients, activations = evidence(name)
    assert activations.keys() == anatomy.groups.keys()
    scores = score_groups(anatomy, criterion, gradients=gradients, activations=activations)
    assert scores.keys() == anatomy.groups.keys()
    for group, score in scores.items():
        assert score.shape == (anatomy.groups[group].width,)
        assert score.isfinite().all()
        assert (score >= 0).all()
        # Two units are as far from each other; as to the rest, a criterion that says nothing is of no use.
        assert len(score.unique()) > 1 or len(score) == 2, f"{group}: units are not told apart"
    keep = {group: max(1, width // 2) for group, width in anatomy.widths.items()}
    data = describe_removal(anatomy, least(scores, keep))
    assert data is not None
    shrunk = apply_removal(copy.deepcopy(anatomy.network), json.loads(json.dumps(data)))
    x = anatomy.inputs[0]
    assert shrunk(x).shape == anatomy.network(x).shape
    assert {group: after for group, (_, after) in data["widths"].items()} == keep


def test_a_captured_network_is_scored_as_the_network_itself() -> None:
    make, x = NETWORKS["resnet"]
    torch.manual_seed(0)
    network = make().double()  # type: ignore[operator]
    plain = everything(network.eval(), x)
    captured = everything(capture(network, [x], mode="train").eval(), x)
    for criterion, scores in plain.items():
        assert scores.keys() == captured[criterion].keys()
        for group, score in scores.items():
            assert torch.allclose(score, captured[criterion][group], rtol=1e-4, atol=1e-7), (criterion, group)


def everything(network: nn.Module, x: Tensor) -> dict[str, dict[str, Tensor]]:
    """Return all scores by criterion."""
    anatomy, gradients = study(network, [x]), Gradients()
    network.zero_grad()
    network(x).square().sum().backward()
    gradients.update(network)
    said = measure_activations(anatomy, [(x,)])
    return {name: score_groups(anatomy, name, gradients=gradients, activations=said) for name in CRITERIA}


def test_random_is_the_same_for_a_seed_and_differs_between_seeds_and_groups() -> None:
    anatomy, _, _ = evidence("residual")
    first, again, other = (score_groups(anatomy, "random", seed=seed) for seed in (0, 0, 1))
    for name, score in first.items():
        assert torch.equal(score, again[name])
        assert not torch.equal(score, other[name])
    one, two, *_ = first.values()
    assert not torch.equal(one[:4], two[:4])


def test_scores_follow_the_parts_of_a_group() -> None:
    """Exchanging two units exchanges their scores."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    x = torch.randn(4, 1, 6, 6)
    nn.init.uniform_(network[1].weight)  # type: ignore[arg-type]
    twin = copy.deepcopy(network)
    order = torch.tensor([0, 4, 2, 3, 1, 5])
    with torch.no_grad():
        for name, tensor in twin.named_parameters():
            tensor.copy_(tensor[:, order] if name == "3.weight" else tensor if name == "3.bias" else tensor[order])
    before, after = (everything(net.eval(), x) for net in (network, twin))
    for criterion in CRITERIA.keys() - {"random"}:
        assert torch.allclose(before[criterion]["0"][order], after[criterion]["0"], rtol=1e-3, atol=1e-6), criterion


def test_a_group_without_a_scale_is_ranked_by_l2_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _say_once.cache_clear()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.uniform_(network[3].weight)  # type: ignore[arg-type]
    anatomy = study(network, [torch.randn(2, 3)])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            scores = score_groups(anatomy, "batchnorm_scale")
    assert torch.equal(scores["0"], score_groups(anatomy, "l2")["0"])
    assert torch.equal(scores["2"], network.get_parameter("3.weight").detach().abs())
    assert [record.message for record in caplog.records if record.name == "compress.prune.criteria.scores"] == [
        "prune: batchnorm_scale says nothing of 0, whose units are ranked by l2"
    ]


def test_frozen_layers_are_ranked_by_l2() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    network[:3].requires_grad_(False)
    network(torch.randn(2, 3)).sum().backward()
    gradients = Gradients()
    gradients.update(network)
    anatomy = study(network, [torch.randn(2, 3)])
    scores, l2 = score_groups(anatomy, "taylor", gradients=gradients), score_groups(anatomy, "l2")
    assert torch.equal(scores["0"], l2["0"])
    assert not torch.equal(scores["2"], l2["2"])


def test_what_is_missing_is_named() -> None:
    anatomy, _, _ = evidence("residual")
    with pytest.raises(RecipeError, match=r"prune\.criterion: expected one of l2, l1, .*, got 'l3'"):
        score_groups(anatomy, "l3")
    for nothing in (None, Gradients()):
        with pytest.raises(RecipeError, match="expected gradients for 'taylor', got none"):
            score_groups(anatomy, "taylor", gradients=nothing)
    with pytest.raises(RecipeError, match="expected activations for 'apoz', got none"):
        score_groups(anatomy, "apoz")


def test_gradients_from_before_an_edit_are_refused() -> None:
    anatomy, gradients, _ = evidence("residual")
    stale = Gradients()
    stale.load_state_dict(gradients.state_dict())
    stale.products = {name: tensor[:1] for name, tensor in stale.products.items()}
    with pytest.raises(EditError, match=r"expected .* of shape .*Call reset\(\) after an edit"):
        score_groups(anatomy, "taylor", gradients=stale)


def test_tied_parameters_have_their_gradients_whatever_name_the_graph_gives_them() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 4), nn.Linear(4, 4)
            self.first.weight = self.last.weight
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.last(self.first(self.first(x).relu()).relu()))

    torch.manual_seed(0)
    network, x = Tied(), torch.randn(2, 4)
    network(x).sum().backward()
    gradients = Gradients()
    gradients.update(network)
    anatomy = study(network, [x])
    for name, score in score_groups(anatomy, "hessian", gradients=gradients).items():
        own = {slot for slot, _ in anatomy.groups[name].slots}
        expected = torch.zeros(anatomy.groups[name].width)
        for slot in own & dict(network.named_parameters(remove_duplicate=False)).keys():
            tensor = network.get_parameter(slot)
            assert tensor.grad is not None
            for (other, dim), indices in anatomy.groups[name].slots.items():
                if other == slot:
                    each = (0.5 * tensor.grad.square() * tensor.square()).movedim(dim, 0).flatten(1)
                    expected += each[indices].flatten(1).sum(1).detach()
        assert torch.allclose(score, expected, rtol=1e-4)


def test_the_readme_lists_every_criterion_and_what_it_needs() -> None:
    text = (Path(__file__).parents[3] / "README.md").read_text()
    table = text.partition("<!-- criteria -->")[2].partition("<!-- /criteria -->")[0]
    listed: dict[str, str] = {}
    for line in table.splitlines()[3:]:
        names, needs, *_ = line.strip("|").split("|")
        listed |= {name.split("`")[1]: needs.strip() for name in names.split(",")}
    assert listed == {name: criterion.needs for name, criterion in CRITERIA.items()}


def test_normalised_scores_have_mean_one() -> None:
    scores = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([10.0, 30.0, 20.0]), "silent": torch.zeros(2)}
    result = normalise(scores)
    assert result["a"].tolist() == [0.5, 1.5]
    assert result["b"].tolist() == [0.5, 1.5, 1.0]
    assert result["silent"].tolist() == [0.0, 0.0]

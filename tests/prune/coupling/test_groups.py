"""Which units there are, as plain data, and why the rest must stay."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

from compress.errors import CaptureError
from compress.prune import apply_removal, describe_removal, study
from compress.prune.coupling import Coupling, find_coupling
from compress.prune.reference import reference_units
from tests.prune.coupling.networks import NETWORKS, Attention, Dense, Grouped, GroupedQueries, Mixer, Shuffled

VECTORS = torch.randn(2, 5, 3)
IMAGE = torch.randn(2, 1, 6, 6)

Unit = frozenset[tuple[str, int, int]]


def units(coupling: Coupling) -> set[Unit]:
    return {
        frozenset((name, dim, int(i)) for (name, dim), indices in group.slots.items() for i in indices[unit])
        for group in coupling.groups
        for unit in range(group.width)
    }


def slots(coupling: Coupling, name: str) -> dict[str, int]:
    """Return the slots of a group and how many indices of each one unit has."""
    (group,) = [group for group in coupling.groups if group.name == name]
    return {f"{tensor}@{dim}": indices.shape[1] for (tensor, dim), indices in group.slots.items()}


@pytest.mark.parametrize("name", ["residual", "resnet", "conv1d"])
def test_units_are_those_of_torch_pruning_where_that_works(name: str) -> None:
    make, x = NETWORKS[name]
    network = make().eval()  # type: ignore[operator]
    x = x.float()
    ours = units(find_coupling(network, (x,)))
    theirs = reference_units(network, (x,))
    outputs = {name for name, _ in network.named_parameters()} & {"fc.weight"}
    assert ours == {unit for unit in theirs if not any(tensor in outputs and dim == 0 for tensor, dim, _ in unit)}


class Averaged(nn.Module):
    """Code that runs on real tensors alone: tensors without data have no ``numpy()``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.from_numpy(x.numpy().mean(axis=1, keepdims=True))
        return self.outer((self.inner(x) * mean).relu())


def test_code_that_does_not_run_on_tensors_without_data_is_read() -> None:
    network, x = Averaged(), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="numpy"):
        torch.export.export(network, (x,), strict=False)
    assert slots(find_coupling(network, (x,)), "inner") == {"inner.weight@0": 1, "inner.bias@0": 1, "outer.weight@1": 1}


class Hidden(nn.Module):
    """A layer that its code also holds in a tuple, where no copy of the modules reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)
        self.steps = (self.inner, nn.ReLU(), self.outer)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def test_parameters_are_found_however_the_code_reaches_them() -> None:
    assert slots(find_coupling(Hidden(), (torch.ones(2, 3),)), "inner")["outer.weight@1"] == 1
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    network.compile(backend="eager")
    assert slots(find_coupling(network, (torch.ones(2, 3),)), "0")["2.weight@1"] == 1
    wrapped = nn.Sequential(torch.compile(nn.Linear(3, 4), backend="eager"), nn.Linear(4, 2))  # type: ignore[call-overload]
    assert len(find_coupling(wrapped, (torch.ones(2, 3),)).groups) == 1


class Tied(nn.Module):
    """One matrix as a table and as the last layer, and a tensor that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(1, 6))
        self.table, self.inner, self.outer = nn.Embedding(10, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(x + self.outer(self.inner(x).relu()))


def test_tied_tensors_are_found_by_any_name_and_unused_ones_are_left_alone() -> None:
    torch.manual_seed(0)
    network, tokens = Tied().eval(), torch.randint(10, (2, 5))
    anatomy = study(network, (tokens,))
    assert set(anatomy.widths.values()) == {6, 8}
    assert not any(name == "unused" for group in anatomy.groups.values() for name, _ in group.slots)
    data = describe_removal(anatomy, {name: torch.tensor([1, 3]) for name in anatomy.groups})
    assert data is not None
    pruned = apply_removal(copy.deepcopy(network), data)
    assert pruned.head.weight is pruned.table.weight  # type: ignore[union-attr]
    assert pruned.table.weight.shape == (10, 4)  # type: ignore[union-attr]
    assert pruned(tokens).shape == (2, 5, 10)


def test_a_network_keeps_its_own_state() -> None:
    class Remembering(nn.Linear):
        def __init__(self, width: int, out: int) -> None:
            super().__init__(width, out)
            self.seen: Tensor | None = None
            self.count = 0
            self.every: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen, self.count = super().forward(x), self.count + 1
            self.every.append(self.seen)
            return self.seen.relu()

    layer = Remembering(3, 4)
    assert find_coupling(nn.Sequential(layer, nn.Linear(4, 2)), (torch.ones(2, 3),)).groups
    assert (layer.seen, layer.count, layer.every) == (None, 0, [])


def test_whole_heads() -> None:
    coupling = find_coupling(Attention(), (VECTORS,))
    assert {group.name: group.width for group in coupling.groups} == {"embed": 12, "qkv": 3, "mlp.1": 20}
    assert slots(coupling, "qkv") == {"qkv.weight@0": 12, "qkv.bias@0": 12, "proj.weight@1": 4, "bias@0": 1}
    embed = slots(coupling, "embed")
    assert embed["position@2"] == embed["scale@0"] == embed["norm.weight@0"] == embed["qkv.weight@1"] == 1
    head = next(group for group in coupling.groups if group.name == "qkv")
    for unit in range(3):  # the same head of queries, keys and values
        rows = head.slots["qkv.weight", 0][unit].tolist()
        assert rows == [part * 12 + unit * 4 + i for part in range(3) for i in range(4)]


def test_query_heads_go_with_their_key_head() -> None:
    coupling = find_coupling(GroupedQueries(), (VECTORS,))
    assert slots(coupling, "q")["q.weight@0"] == 6
    assert slots(coupling, "q")["k.weight@0"] == slots(coupling, "q")["v.weight@0"] == 3
    assert {group.name: group.width for group in coupling.groups}["q"] == 2


def test_equal_numbers_per_shuffle_block() -> None:
    coupling = find_coupling(Shuffled(), (IMAGE,))
    for group in coupling.groups:
        if ("head.weight", 1) in group.slots:
            for pair in group.slots["head.weight", 1].tolist():
                assert pair[1] - pair[0] == 1  # one of each block, side by side after the shuffle


def test_a_convolution_group_goes_whole() -> None:
    coupling = find_coupling(Grouped(), (IMAGE,))
    assert slots(coupling, "a")["a.weight@0"] == 4
    assert slots(coupling, "a")["b.weight@0"] == 4
    assert slots(coupling, "a")["up.weight@0"] == 4
    assert slots(coupling, "up") == {"up.weight@1": 1, "up.bias@0": 1, "head.weight@1": 1}


def test_tokens_and_channels_are_two_families() -> None:
    coupling = find_coupling(Mixer(), (VECTORS,))
    assert {group.name: group.width for group in coupling.groups} == {"embed": 8, "tokens.0": 7, "channels.0": 10}
    assert any(group.name == "tokens.2" and group.reason for group in coupling.protected)


def test_gates_go_with_what_they_gate() -> None:
    coupling = find_coupling(Dense(), (IMAGE,))
    gated = slots(coupling, "c")
    assert gated["up.weight@0"] == gated["down.weight@1"] == 1
    assert gated["head.weight@1"] == 9  # the positions of a flattened channel
    assert slots(coupling, "a") == {"a.weight@0": 1, "a.bias@0": 1, "b.weight@1": 1, "c.weight@1": 1}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_slice_is_in_one_unit_and_most_can_go(name: str) -> None:
    make, x = NETWORKS[name]
    network = make().double().eval()  # type: ignore[operator]
    coupling = find_coupling(network, (x,))
    seen = [slice_ for unit in units(coupling) for slice_ in unit]
    assert len(seen) == len(set(seen))
    assert coupling.unknown == {}
    assert coupling.prunable_share() > 0.85
    assert all(group.width > 1 for group in coupling.groups)
    assert all(group.reason for group in coupling.protected)


def test_what_must_stay_says_why() -> None:
    coupling = find_coupling(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (torch.randn(2, 3, 8, 8),)
    )
    reasons = {(name, dim): group.reason for group in coupling.protected for name, dim in group.slots}
    assert "positions of a kernel" in str(reasons["0.weight", 2])
    assert "no counterpart" in str(reasons["0.weight", 1])  # it reads the network's input
    assert reasons["2.weight", 0] == "the network's output"


def test_planning_works_without_memory_for_the_weights() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(1000, 100_000), nn.ReLU(), nn.Linear(100_000, 10))
        coupling = find_coupling(network, (torch.empty(2, 1000),))
    assert [(group.name, group.width) for group in coupling.groups] == [("0", 100_000)]


class Sorts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.linalg.matrix_exp(x[:, :, None] * x[:, None, :]).sum(2)  # an operator without a rule
        return self.c(self.b(x).relu())


def test_an_operator_without_a_rule_protects_what_it_touches_and_is_named() -> None:
    coupling = find_coupling(Sorts(), (torch.randn(2, 3),))
    (operator, line), *rest = coupling.unknown.items()
    assert not rest
    assert "matrix_exp" in operator
    assert line.endswith("# an operator without a rule")
    assert "test_groups.py" in line
    assert [group.name for group in coupling.groups] == ["b"]
    assert any("has no rule" in str(group.reason) for group in coupling.protected)


def test_the_message_has_the_line_what_stays_and_what_is_still_possible(caplog: pytest.LogCaptureFixture) -> None:
    network, x = Sorts(), torch.randn(2, 3)
    (message,) = find_coupling(network, (x,)).gaps()
    number = next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "matrix_exp(x" in line)
    assert f"test_groups.py:{number}: x = torch.linalg.matrix_exp(" in message
    assert "What it touches stays (a); what can still be pruned: b, 68% of the parameters." in message
    with caplog.at_level("WARNING"):
        anatomy = study(network, (x,))  # what every plan begins with
    assert message in caplog.messages
    data = describe_removal(anatomy, {"b": torch.tensor([1, 4])})
    assert data is not None
    assert apply_removal(network, data)(x).shape == (2, 2)  # and it is possible


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # depends on data
            return self.a(x)
        return x


def test_control_flow_that_depends_on_data_is_named_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"expected a network that torch.export can capture, got Branches") as caught:
        find_coupling(Branches(), (torch.randn(2, 3),))
    assert "test_groups.py" in str(caught.value)
    assert "if x.sum() > 0" in str(caught.value)
    number = next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "if x.sum() > 0" in line)
    assert f"test_groups.py:{number}: if x.sum() > 0" in str(caught.value)
    assert "prune its parts one by one" in str(caught.value)
    assert "distillation and the artefact do not need this" in str(caught.value)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.from_numpy(numpy.sort(x.detach().numpy().tolist())).float())  # leaves torch


def test_a_network_that_cannot_be_exported_is_named_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"can capture, got Untraceable") as caught:
        find_coupling(Untraceable(), (torch.randn(2, 3),))
    number = next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "# leaves torch" in line)
    assert f"test_groups.py:{number}: return self.a(" in str(caught.value)
    assert "prune its parts one by one; distillation and the artefact do not need this" in str(caught.value)


def test_the_network_is_left_alone() -> None:
    network = Attention().train()
    before = copy.deepcopy(network.state_dict())
    find_coupling(network, (VECTORS,))
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())

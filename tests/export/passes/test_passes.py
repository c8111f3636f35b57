"""Each pass changes what it says and no number; together they leave a smaller program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn import functional as F

from compress.export.passes import (
    clean_up,
    drop_identities,
    drop_unused,
    fold_constants,
    fold_norms,
    fuse_activations,
    graph_size,
    merge_duplicates,
)
from compress.surgery.capture import export_program
from tests.export.programs import quantized

_ATEN = torch.ops.aten


def captured(network: nn.Module, *inputs: Tensor) -> tuple[GraphModule, Sequence[Tensor]]:
    return export_program(network.eval(), inputs).run_decompositions({}).module(check_guards=False), inputs


def check(apply: Callable[[GraphModule], int], network: nn.Module, *inputs: Tensor, changes: int) -> GraphModule:
    """Apply a pass, compare outputs, and return the graph."""
    graph_module, inputs_ = captured(network, *inputs)
    wanted = graph_module(*inputs_)
    assert apply(graph_module) == changes
    graph_module.graph.lint()
    graph_module.recompile()
    torch.testing.assert_close(graph_module(*inputs_), wanted, rtol=1e-5, atol=1e-6)
    return graph_module


def count(graph_module: GraphModule, *targets: object) -> int:
    return sum(node.target in targets for node in graph_module.graph.nodes)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def randomised(network: nn.Module) -> nn.Module:
    """Give norms statistics and scales that are not those of the beginning."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return network


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-2), nn.ReLU(inplace=True)),
            (2, 3, 6, 6),
        ),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, padding="same"), nn.BatchNorm2d(4, affine=False)), (2, 4, 6, 6)),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 8)),
        (nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2)), (2, 1, 4, 4, 4)),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), (2, 3, 4, 4)),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (2, 3)),
    ],
    ids=["conv", "depthwise", "conv1d", "conv3d", "transposed", "linear"],
)
def test_norms_are_folded_into_the_layer_in_front(network: nn.Module, shape: tuple[int, ...]) -> None:
    left = check(fold_norms, randomised(network), torch.randn(shape), changes=1)
    assert count(left, _ATEN._native_batch_norm_legit_no_training.default) == 0


class SharedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + x


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (SharedLayer(), (2, 3, 5)),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5)), (2, 5, 3)),
        (nn.Sequential(nn.ConvTranspose1d(4, 4, 2, groups=2), nn.BatchNorm1d(4)), (2, 4, 5)),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), (2, 3)),
    ],
    ids=["read twice", "over another dimension", "transposed in groups", "no layer in front"],
)
def test_norms_that_no_layer_can_take_stay(network: nn.Module, shape: tuple[int, ...]) -> None:
    check(fold_norms, randomised(network), torch.randn(shape), changes=0)


def test_a_layer_used_twice_is_folded_once_and_kept_for_the_other_use() -> None:
    class Twice(SharedLayer):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) - self.conv(2 * x)

    check(fold_norms, randomised(Twice()), torch.randn(2, 3, 5), changes=1)


def test_identities_go() -> None:
    def same(x: Tensor) -> Tensor:
        x = F.dropout(x.relu(), 0.3, training=False).to(torch.float32)
        x = x.view(x.shape).permute(0, 1, 2)[:, :, :].detach()
        return (x * 1 + 0).expand(-1, -1, -1).sigmoid()

    left = check(drop_identities, Function(same), torch.randn(2, 3, 4), changes=count_calls(same) - 2)
    drop_unused(left)
    assert [n.target for n in left.graph.nodes if n.op == "call_function"] == [
        _ATEN.relu.default,
        _ATEN.sigmoid.default,
    ]


def count_calls(function: Callable[[Tensor], Tensor]) -> int:
    graph_module, _ = captured(Function(function), torch.randn(2, 3, 4))
    calls = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]
    return sum("sym_size" not in call and "assert" not in call for call in calls)


def test_what_changes_type_shape_or_layout_stays() -> None:
    def other(x: Tensor) -> Tensor:
        x = x.double().permute(0, 2, 1).contiguous().view(x.shape[0], 2, 6)[:, :, 1:]
        return x[:, :, ::2] * 2 + 1

    graph_module, _ = captured(Function(other), torch.randn(2, 3, 4))
    assert drop_identities(graph_module) == 0


def test_an_input_is_not_returned_as_it_is() -> None:
    graph_module, _ = captured(Function(lambda x: F.dropout(x, 0.5, training=False)), torch.randn(2, 3))
    assert drop_identities(graph_module) == 0


class Tables(nn.Module):
    """A weight that is transposed and scaled, and positions looked up anew in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 50))
        self.positions = nn.Embedding(60, 40)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.positions(torch.arange(30))) @ (2.0 * self.weight.t().t())


def test_what_no_input_changes_is_computed_once() -> None:
    left = check(fold_constants, Tables(), torch.randn(2, 30, 40), changes=2)
    assert {node.target for node in left.graph.nodes if node.op == "call_function"} == {
        _ATEN.add.Tensor,
        _ATEN.matmul.default,
    }


def test_constants_that_would_grow_are_not_stored() -> None:
    class Grown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Parameter(torch.randn(1, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.row.exp().repeat(64, 1)

    left = check(fold_constants, Grown(), torch.randn(2, 64, 64), changes=1)  # the exponential, not its copies
    assert count(left, _ATEN.repeat.default) == 1
    assert count(left, _ATEN.exp.default) == 0


def test_integer_weights_stay_integers() -> None:
    program = quantized().program
    graph_module = program.run_decompositions({}).module(check_guards=False)
    before = sum(tensor.nbytes for tensor in graph_module.state_dict().values())
    fold_constants(graph_module)
    drop_unused(graph_module)
    assert sum(tensor.nbytes for tensor in graph_module.state_dict().values()) <= before
    assert sum("dequantize_per_channel" in str(node.target) for node in graph_module.graph.nodes) == 7


def test_equal_values_are_computed_once() -> None:
    left = check(merge_duplicates, Function(lambda x: x.exp().sin() + x.exp().sin()), torch.randn(2, 3), changes=2)
    assert count(left, _ATEN.exp.default) == count(left, _ATEN.sin.default) == 1


def test_constants_of_other_types_are_other_constants() -> None:
    check(merge_duplicates, Function(lambda x: (x + 1) // 2 + (x + 1.0) / 2), torch.arange(6), changes=0)


def test_random_values_are_drawn_each_time() -> None:
    graph_module, _ = captured(Function(lambda x: torch.rand_like(x) - torch.rand_like(x)), torch.randn(4, 3))
    assert merge_duplicates(graph_module) == 0


def test_what_nobody_reads_goes() -> None:
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x).exp()
            return self.used(x)

    left = check(drop_unused, Wasteful(), torch.randn(2, 3), changes=4)  # two weights and what reads them
    assert sorted(left.state_dict()) == ["used.bias", "used.weight"]


FORMULAS: dict[str, tuple[object, Callable[[Tensor], Tensor]]] = {
    "silu": (_ATEN.silu.default, lambda x: x * torch.sigmoid(x)),
    "silu, other order": (_ATEN.silu.default, lambda x: torch.sigmoid(x) * x),
    "mish": (_ATEN.mish.default, lambda x: x * torch.tanh(F.softplus(x))),
    "gelu of BERT": (_ATEN.gelu.default, lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "gelu, integers": (_ATEN.gelu.default, lambda x: x * (0.5 * (1 + torch.erf(x * 0.7071068)))),
    "gelu, halved last": (_ATEN.gelu.default, lambda x: 0.5 * (x * (1.0 + torch.erf(x / 1.41421)))),
    "gelu of GPT-2": (
        _ATEN.gelu.default,
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    ),
    "hard swish": (_ATEN.hardswish.default, lambda x: x * F.relu6(x + 3) / 6),
    "hard swish, clamped": (_ATEN.hardswish.default, lambda x: x * (torch.clamp(x + 3.0, 0.0, 6.0) / 6.0)),
    "hard sigmoid": (_ATEN.hardsigmoid.default, lambda x: F.hardtanh(x + 3, 0, 6) / 6),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_of_activations_become_one_operator(name: str) -> None:
    fused, formula = FORMULAS[name]
    left = check(fuse_activations, Function(formula), torch.linspace(-8, 8, 101).view(1, -1).repeat(2, 1), changes=1)
    assert [node.target for node in left.graph.nodes if node.op == "call_function"] == [fused]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.5)),
        lambda x: x * torch.tanh(F.softplus(x, beta=2.0)),
        lambda x: x * F.relu6(x + 3) / 5,
        lambda x: F.hardtanh(x + 3, 0, 5) / 6,
    ],
    ids=["quick gelu", "another erf", "another softplus", "a fifth", "clipped at five"],
)
def test_other_numbers_are_other_functions(other: Callable[[Tensor], Tensor]) -> None:
    check(fuse_activations, Function(other), torch.randn(2, 5), changes=0)


class Messy(nn.Module):
    """Something for every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = F.dropout(x * torch.sigmoid(x), 0.2, self.training).mean((2, 3))
        self.unused(x)
        return self.fc(x) + self.fc(x) * torch.arange(2)


def test_all_of_it_leaves_a_smaller_program_that_says_the_same() -> None:
    network = randomised(Messy()).eval()
    inputs = torch.randn(5, 3, 6, 6)
    program = export_program(network, [inputs[:2]])
    nodes = len(program.graph.nodes)
    cleaned, done = clean_up(program)
    assert len(program.graph.nodes) == nodes
    assert set(done.changes) == {
        "drop_identities",
        "drop_unused",
        "fold_constants",
        "fold_norms",
        "fuse_activations",
        "merge_duplicates",
    }
    assert done.before == graph_size(program)
    assert done.after == graph_size(cleaned)
    assert done.after.nodes == 6  # convolution, SiLU, mean, linear, times, plus
    assert done.after.bytes < done.before.bytes
    assert done.before.macs - done.after.macs == 2 * 4 * 2  # one linear was there thrice
    torch.testing.assert_close(cleaned.module()(inputs), network(inputs), rtol=1e-5, atol=1e-6)


def test_a_clean_program_is_left_alone() -> None:
    program = export_program(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval(), [torch.ones(2, 3)])
    cleaned, done = clean_up(program)
    assert cleaned is program
    assert done.changes == {}
    assert done.before == done.after


def test_a_quantised_program_says_the_same() -> None:
    trained = quantized()
    cleaned, done = clean_up(trained.program)
    assert done.after.nodes <= done.before.nodes
    assert isinstance(cleaned, ExportedProgram)
    with torch.no_grad():
        wanted = trained.program.module(check_guards=False)(trained.inputs)
        torch.testing.assert_close(cleaned.module(check_guards=False)(trained.inputs), wanted, rtol=1e-5, atol=1e-5)


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens).mean(1))

    assert graph_size(export_program(Tied().eval(), [torch.randint(20, (4, 5))])).bytes == 20 * 8 * 4

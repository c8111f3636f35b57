"""Attention's two products: spelt out without a change, rounded by hand, converted, in engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress.errors import RecipeError
from compress.export import Gates, export_artifact
from compress.quantize import Scheme, calibrate, convert, coverage, prepare
from compress.quantize.calibrate import float_mode
from compress.quantize.graph.attention import spell_out_attention
from compress.quantize.graph.normalize import normalize
from compress.quantize.layers import make_assignment
from compress.quantize.schemes import get_scheme
from compress.runtime.manifest import read_manifest
from compress.surgery import Captured, capture
from compress.surgery.capture import export_program
from tests.export.programs import HERE

ENGINES = [name for name in ("eager", "aoti", "onnxruntime", "openvino", "executorch") if name in HERE]


class Attention(nn.Module):
    """One layer of attention with two heads, and a product with weights before and after it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Written(nn.Module):
    """The same, product by product."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


def network(**options: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(**options).eval()


def tokens(num: int = 32) -> Tensor:
    return torch.randn(num, 6, 16, generator=torch.Generator().manual_seed(1))


def prepared(net: nn.Module, scheme: Any = "int8_attention") -> Captured:
    made = prepare(net, (tokens()[:2],), scheme)
    calibrate(made, [(tokens(),)])
    return made.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.arange(36).reshape(6, 6) % 5 != 1},
        {"attn_mask": torch.linspace(-1, 1, 36).reshape(6, 6)},
        {"attn_mask": torch.arange(36).reshape(6, 6) > 11},
        {"attn_mask": torch.zeros(6, 6).masked_fill(torch.arange(36).reshape(6, 6) < 12, -torch.inf)},
    ],
    ids=["plain", "scaled", "causal", "masked", "biased", "rows_masked", "rows_masked_by_infinity"],
)
def test_spelt_out_it_computes_the_same(options: dict[str, Any]) -> None:
    net = network(**options)
    captured = capture(net, [tokens()[:2]])
    normalize(captured.graph_module)
    before = {node.target for node in captured.graph_module.graph.nodes}
    spell_out_attention(captured.graph_module, {"": get_scheme("int8_attention")})
    after = {node.target for node in captured.graph_module.graph.nodes}
    assert before - after == {torch.ops.aten.scaled_dot_product_attention.default}
    for num in (1, 5):
        torch.testing.assert_close(captured(tokens(num)), net(tokens(num)))
    (gradient,) = torch.autograd.grad(captured(tokens()).sum(), net.qkv.weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(net(tokens()).sum(), net.qkv.weight)[0])


def test_both_factors_of_both_products_are_rounded_as_by_hand() -> None:
    net = network()
    fake = prepared(net)
    with torch.no_grad(), float_mode(fake):
        torch.testing.assert_close(fake(tokens()), net(tokens()))
    graph, steps = fake.graph_module, []
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.matmul.default:
            modules: list[Any] = [graph.get_submodule(str(factor.target)) for factor in node.args]
            steps.append([(float(module.scale), int(module.zero_point)) for module in modules])
    (q_step, k_step), (p_step, v_step) = steps
    assert {zero for pair in steps for _, zero in pair} == {127}  # symmetric: what every engine takes

    def rounded(x: Tensor, step: tuple[float, int]) -> Tensor:
        return (x / step[0]).round().clamp(-127, 127) * step[0]

    seen = {}
    inner = [node.name for node in graph.graph.nodes if node.target is torch.ops.aten.matmul.default]

    class Watching(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in inner:
                seen[n.name] = (*self.fetch_args_kwargs_from_env(n)[0], value)
            return value

    with torch.no_grad():
        Watching(graph).run(tokens())
    (q, k, scores), (shares, v, mixed) = (seen[name] for name in inner)
    # Both are integers times their step, and the product is that of the rounded.
    for value, step in ((q, q_step), (k, k_step), (shares, p_step), (v, v_step)):
        torch.testing.assert_close(rounded(value, step), value)
        assert len((value / step[0]).round().unique()) > 20
    torch.testing.assert_close(scores, q @ k)
    torch.testing.assert_close(mixed, shares @ v)


@pytest.mark.parametrize("kind", [Attention, Written])
def test_all_products_are_in_integers_however_written(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = kind().eval()
    assert coverage(prepared(net), [tokens()]).share == 1.0
    assert coverage(prepared(net, "int8_portable"), [tokens()]).share < 0.95


@pytest.mark.parametrize("returns_weights", [False, True])
def test_the_layer_of_pytorch_with_a_mask(returns_weights: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.triu(torch.full((6, 6), -torch.inf, device=x.device), 1)
            return self.attention(x, x, x, attn_mask=mask, need_weights=returns_weights)[0]

    torch.manual_seed(0)
    net = Layer().eval()
    fake = prepared(net)
    assert coverage(fake, [tokens()]).share == 1.0
    with torch.no_grad():
        wanted = net(tokens())
        assert (fake(tokens()) - wanted).norm() < 0.05 * wanted.norm()
        assert torch.equal(convert(fake)(tokens()), fake(tokens()))


def test_training_reaches_queries_through_the_rounding() -> None:
    net = network()
    fake = prepare(net.train(), (tokens()[:2],), "int8_attention").train()
    fake(tokens()).square().sum().backward()
    assert net.qkv.weight.grad is not None
    assert all(part.abs().max() > 0 for part in net.qkv.weight.grad.chunk(3))


def test_layers_are_named_and_kept_like_others() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.widen, self.second = Attention(), nn.Linear(3, 16), Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.widen(self.first(x)))

    torch.manual_seed(0)
    net = Two().eval()
    for assignment in (
        make_assignment("int8_attention", keep=["second"]),
        make_assignment("int8_portable", layers={"first": "int8_attention"}),
    ):
        fake = prepared(net, assignment)
        reasons = [(each.layer, each.integer) for each in coverage(fake, [tokens()]).products if each.layer in "second"]
        assert ("second", False) in reasons
        targets = [node.target for node in fake.graph_module.graph.nodes]
        assert targets.count(torch.ops.aten.matmul.default) == 2
    with pytest.raises(RecipeError, match="got 'first'"):  # it has no product with weights of its own
        prepared(net, make_assignment("int8_portable", keep=["first"]))


def test_it_needs_ranges() -> None:
    with pytest.raises(RecipeError, match=r"mine.attention: expected it with 2 to 8 bits"):
        Scheme("mine", "weights alone", activation_bits=None, attention=True)


def test_it_is_left_alone_where_nothing_could_round_it() -> None:
    mixed = make_assignment("int8_weights", layers={"*": "int8_attention"})
    targets = {node.target for node in prepared(network(), mixed).graph_module.graph.nodes}
    assert torch.ops.aten.scaled_dot_product_attention.default in targets


@pytest.mark.parametrize(
    ("options", "engines"),
    [
        ({}, ENGINES),
        pytest.param({"is_causal": True}, ("eager", "onnxruntime"), marks=pytest.mark.slow),
        ({"attn_mask": torch.arange(36).reshape(6, 6) > 11}, ("eager", "onnxruntime")),
    ],
    ids=["plain", "causal", "masked"],
)
def test_engines_that_can_multiply_integers(tmp_path: Path, options: dict[str, Any], engines: Sequence[str]) -> None:
    fake = prepared(network(**options))
    path = tmp_path / "artifact"
    export_artifact(
        export_program(convert(fake), (tokens()[:2],)),
        path,
        targets=engines,
        reference=fake,
        held_out=(tokens(),),
        scheme="int8_attention",
        gates=Gates(max_relative_error=0.05, min_top1_agreement=0.9),
    )
    targets = read_manifest(path).targets
    census = targets["onnxruntime"].census
    assert (census["int8_kernels"], census["float_kernels"]) == (4, 0)
    assert census["int8_macs"] == census["macs"]
    if "executorch" in targets:
        assert targets["executorch"].census["int8_macs"] == 6 * 16 * (48 + 3)  # those with weights, and they alone
    wanted = fake(tokens()).detach()
    for name in targets:
        found = compress.load(path, engine=name)(tokens())
        assert (found - wanted).norm() < 0.05 * wanted.norm(), name

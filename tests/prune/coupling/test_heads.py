"""Heads of attention that become narrower instead of fewer."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import EditError
from compress.prune import apply_removal, describe_removal, study
from compress.surgery import Captured
from tests.prune.coupling.masked import masked_and_shrunk
from tests.prune.coupling.networks import NETWORKS, VECTORS, Attention
from tests.prune.coupling.test_masked import a_third_of_all, build, each_unit


class Rotary(nn.Module):
    """Queries and keys are turned in pairs of places: one in the first half of a head, one in the second."""

    def __init__(self, heads: int = 2, width: int = 8) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width
        self.embed = nn.Linear(3, 6)
        self.q, self.k, self.v = (nn.Linear(6, heads * width) for _ in range(3))
        self.out, self.head = nn.Linear(heads * width, 6), nn.Linear(6, 2)
        self.register_buffer("speeds", 0.5 ** torch.arange(width // 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        angles = torch.arange(5, device=x.device)[:, None] * self.speeds.to(x.dtype)  # type: ignore[operator, union-attr]
        angles = torch.cat([angles, angles], -1)
        q, k, v = (m(x).view(-1, 5, self.heads, self.head_dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = (t * angles.cos() + self.turned(t) * angles.sin() for t in (q, k))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head((x + self.out(y.transpose(1, 2).flatten(2))).mean(1))

    def turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)


class Follows(nn.Module):
    """As timm writes it: sizes of heads are attributes, the scale is a number of its own."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.embed, self.qkv = nn.Linear(3, width), nn.Linear(width, 3 * width)
        self.q_norm, self.proj = nn.LayerNorm(self.head_dim), nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        num, length, _ = x.shape
        qkv = self.qkv(x).reshape(num, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (self.q_norm(q) * self.scale) @ k.transpose(-2, -1)
        return self.head((x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))).mean(1))


CASES: dict[str, tuple[Any, Tensor]] = {
    **{name: NETWORKS[name] for name in ("attention", "torch_attention", "grouped_queries", "grouped", "resnet")},
    "many_heads": (lambda: Attention(12, 6), VECTORS),
    "many_heads_apart": (lambda: Rotary(8, 4), VECTORS),
    "rotary": (Rotary, VECTORS),
    "follows": (Follows, VECTORS),
}
NETWORKS_HERE = pytest.mark.parametrize("name", CASES)


def make(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.setitem(NETWORKS, name, CASES[name])
    return build(name, dtype)


@NETWORKS_HERE
def test_masked_is_shrunk_place_by_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = make(name, torch.float64, monkeypatch)
    for unit, masked, shrunk in masked_and_shrunk(network, (x,), each_unit, heads="width"):
        assert torch.allclose(masked, shrunk, rtol=1e-9, atol=1e-9), unit
    for dtype, tolerance in [(torch.float64, 1e-9), (torch.float32, 1e-5)]:
        network, x = make(name, dtype, monkeypatch)
        ((_, masked, shrunk),) = masked_and_shrunk(network, (x,), a_third_of_all, heads="width")
        assert torch.allclose(masked, shrunk, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("attention", {"qkv": 4}),  # one matrix is viewed as (3, heads, width): all three lose the same places
        ("many_heads", {"qkv": 2}),
        ("torch_attention", {"attention": 2}),
        ("grouped_queries", {"q": 3, "v": 3}),
        ("many_heads_apart", {"q": 2, "v": 4}),
        ("rotary", {"q": 4, "v": 8}),  # places go in pairs
        ("follows", {"qkv": 4}),
    ],
)
def test_units_are_places_of_a_head(name: str, widths: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = make(name, torch.float32, monkeypatch)
    found = study(network, [x], heads="width").widths
    assert {group: found[group] for group in widths} == widths
    others = {key: value for key, value in study(network, [x]).widths.items() if key not in widths}
    assert {key: value for key, value in found.items() if key not in widths} == others


@pytest.mark.parametrize("name", ["resnet", "grouped"])
def test_groups_of_a_normalisation_still_go_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = make(name, torch.float32, monkeypatch)
    assert study(network, [x], heads="width").widths == study(network, [x]).widths


@pytest.mark.parametrize(
    ("name", "group", "form"),
    [("follows", "qkv", "module"), ("attention", "qkv", "graph"), ("torch_attention", "attention", "graph")],
)
def test_an_edit_replays_in_either_form(name: str, group: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = make(name, torch.float32, monkeypatch)
    data = describe_removal(study(network, [x], heads="width"), {group: torch.tensor([1])})
    assert data is not None
    data = json.loads(json.dumps(data))
    assert (data["form"], data["heads"]) == (form, "width")
    left = apply_removal(copy.deepcopy(network), data)
    assert isinstance(left, Captured) == (form == "graph")
    captured = apply_removal(copy.deepcopy(network), {**data, "form": "graph"})
    assert torch.allclose(left.eval()(x), captured.eval()(x), atol=1e-5)
    left.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in left.parameters())
    again = describe_removal(study(left, [x]), {name: torch.tensor([0]) for name in study(left, [x]).groups})
    assert again is not None  # whole heads, after all
    assert apply_removal(left, again)(x).shape == network(x).shape


def test_the_scale_of_scores_stays() -> None:
    """The fused operator would divide by the root of the narrower head."""
    torch.manual_seed(0)
    network = Rotary().eval()
    with torch.no_grad():
        for layer in (network.q, network.k):
            layer.weight.mul_(8)
            layer.weight[[3, 7, 11, 15]] = 0  # places 3 and 7 of both heads say nothing
            layer.bias[[3, 7, 11, 15]] = 0
    x = torch.randn(2, 5, 3)
    data = describe_removal(study(network, [x], heads="width"), {"q": torch.tensor([3])})
    assert data is not None
    assert data["form"] == "graph"
    assert torch.allclose(apply_removal(copy.deepcopy(network), data)(x), network(x), atol=1e-5)


def test_another_word_is_refused() -> None:
    with pytest.raises(EditError, match=r"prune\.heads: expected 'whole' or 'width', got 'narrow'"):
        study(Attention(), [VECTORS.float()], heads="narrow")

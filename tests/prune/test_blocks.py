from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import EditError
from compress.models import ResNet
from compress.prune import apply_removal, block_influence, describe_removal, find_blocks, replay_prune, study
from compress.surgery import Captured, Edit, History, capture, load_snapshot, save_snapshot
from compress.surgery.relink import relink_optimizer


class Layer(nn.Module):
    """A transformer layer; what is added last is made by ``proj`` and ``down``."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        num, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(num, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    def silence(self) -> None:
        for layer in (self.proj, self.down):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class Stack(nn.Module):
    """Layers in a loop, with a mask that all of them share; their number may be written into the code."""

    def __init__(self, num: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 12)
        self.layers = nn.ModuleList(Layer() for _ in range(num))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(5, 5, dtype=torch.bool, device=x.device).tril()
        x = self.embed(x)
        for layer in self.layers:
            x = self.call(layer, x, mask)
        return self.head(self.norm(x).mean(1))

    def call(self, layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return layer(x, mask)


class MaskFirst(Stack):
    """Calls its layers in a way that a module in their place cannot know: only the graph says what goes through."""

    class Turned(Layer):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # the names say one thing, the caller another
            return super().forward(mask, x)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Turned() for _ in range(3))

    def call(self, layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return layer(mask, x)


VECTORS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def resnet() -> ResNet:
    torch.manual_seed(0)
    network = ResNet(in_channels=1, width=8, blocks=(2, 3))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[operator, union-attr]
    return network


def through_json(data: dict[str, Any] | None) -> dict[str, Any]:
    assert data is not None
    return json.loads(json.dumps(data))


def without(network: nn.Module, x: Tensor, *blocks: str) -> dict[str, Any]:
    return through_json(describe_removal(study(network, [x]), {}, blocks=blocks))


def test_blocks_are_found_in_either_form() -> None:
    expected = ["stages.0.0", "stages.0.1", "stages.1.1", "stages.1.2"]  # the first of stage 1 changes the shape
    assert list(find_blocks(study(resnet(), [IMAGES]))) == expected
    for mode in ("train", "eval"):
        assert list(find_blocks(study(capture(resnet(), [IMAGES], mode=mode), [IMAGES]))) == expected
    assert list(find_blocks(study(Stack(), [VECTORS]))) == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize("ignore", ["stages.0", "stages.0.1", "stages.0.1.conv2"])
def test_ignored_layers_protect_blocks(ignore: str) -> None:
    anatomy = study(resnet(), [IMAGES], ignore=[ignore])
    assert "stages.0.1" not in find_blocks(anatomy)
    assert "stages.1.1" in find_blocks(anatomy)
    with pytest.raises(EditError, match=r"prune\.blocks: expected names among .*stages\.1\.1.*got 'stages\.0\.1'"):
        describe_removal(anatomy, {}, blocks=["stages.0.1"])


class Adds(nn.Module):
    """Adds a parameter or a computed share; nothing, or only a constant, comes of what it is given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.fc, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.kind == "residual":
            return torch.relu(x + y)
        if self.kind == "table":
            return x + self.table
        if self.kind == "gated":
            return x * y.sigmoid() + y
        if self.kind == "doubled":
            return 2 * x + y
        return y + self.table  # no way around


@pytest.mark.parametrize(
    ("kind", "found"), [("residual", True), ("table", False), ("gated", False), ("doubled", False), ("plain", False)]
)
def test_only_what_adds_to_its_input_is_a_block(kind: str, found: bool) -> None:
    network = nn.Sequential(nn.Linear(4, 4), Adds(kind), nn.Linear(4, 2))
    assert list(find_blocks(study(network, [torch.randn(2, 4)]))) == (["1"] if found else [])


def test_a_block_whose_weights_are_read_elsewhere_stays() -> None:
    class Tied(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x)) @ self[0].fc.weight  # type: ignore[union-attr, operator]

    network = Tied(Adds("residual"), Adds("residual"))
    assert list(find_blocks(study(network, [torch.randn(2, 4)]))) == ["1"]


def silent(network: nn.Module, *names: str) -> nn.Module:
    """Make blocks hand on what they are given."""
    for name in names:
        block: Any = network.get_submodule(name)
        if isinstance(block, Layer):
            block.silence()
        else:
            nn.init.zeros_(block.bn2.weight)
            nn.init.zeros_(block.bn2.bias)
    return network


CASES = {
    "resnet": (resnet, IMAGES, ("stages.0.0", "stages.0.1", "stages.1.2"), "module"),
    "stack": (Stack, VECTORS, ("layers.0", "layers.1"), "module"),
    "mask first": (MaskFirst, VECTORS, ("layers.0", "layers.2"), "graph"),
}


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_blocks_that_add_nothing_go_without_a_trace(case: str, captured: bool) -> None:
    make, x, names, form = CASES[case]
    torch.manual_seed(0)
    network = silent(make(), *names).eval()  # type: ignore[operator]
    expected = network(x)
    given = capture(network, [x], mode="eval") if captured else network
    data = without(given, x, *names)
    assert (data["form"], data["slices"], data["widths"]) == ("graph" if captured else form, {}, {})
    left = apply_removal(copy.deepcopy(given), data)
    assert torch.allclose(left.eval()(x), expected, atol=1e-5)
    below = tuple(f"{name}." for name in names)
    assert {n for n, _ in left.named_parameters()} == {
        n for n, _ in network.named_parameters() if not n.startswith(below)
    }
    assert not [key for key in left.state_dict() if key.startswith(below)]
    left.train()(torch.cat([x, x])).sum().backward()
    assert all(parameter.grad is not None for parameter in left.parameters())


def test_a_block_that_adds_something_is_missed() -> None:
    network = Stack().eval()
    left = apply_removal(copy.deepcopy(network), without(network, VECTORS, "layers.1"))
    assert not torch.allclose(left(VECTORS), network(VECTORS), atol=1e-4)
    x = network.embed(VECTORS)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    x = network.layers[2](network.layers[0](x, mask), mask)
    assert torch.allclose(left(VECTORS), network.head(network.norm(x).mean(1)), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_blocks_and_channels_go_in_one_edit(case: str) -> None:
    make, x, names, form = CASES[case]
    torch.manual_seed(0)
    network: Any = make()  # type: ignore[operator]
    anatomy = study(network, [x])
    gone = {name: torch.arange(width // 2) for name, width in anatomy.widths.items()}
    data = through_json(describe_removal(anatomy, gone, blocks=names))
    assert data["form"] == form
    assert data["blocks"] == list(names)
    assert not [name for name in data["slices"] if name.startswith(tuple(f"{block}." for block in names))]
    assert not [name for name in data["widths"] if name.startswith(tuple(f"{block}." for block in names))]
    both = apply_removal(copy.deepcopy(network), data).eval()
    blocks_first = apply_removal(copy.deepcopy(network), without(network, x, *names))
    channels = {name: gone[name] for name in data["widths"]}
    then = through_json(describe_removal(study(blocks_first, [x]), channels))
    one_by_one = apply_removal(blocks_first, then).eval()
    assert torch.allclose(both(x), one_by_one(x), atol=1e-6)
    captured = apply_removal(capture(network, [x], mode="eval"), {**data, "form": "graph"}).eval()
    assert torch.allclose(both(x), captured(x), atol=1e-5)
    # Once more on what is left.
    rest = list(find_blocks(study(both, [x])))
    assert not set(rest) & set(names)
    twice = apply_removal(both, without(both, x, rest[0]))
    assert twice(x).shape == network(x).shape


def test_all_blocks_of_a_chain_may_go_but_not_all_of_a_network() -> None:
    network = Stack()
    left = apply_removal(copy.deepcopy(network), without(network, VECTORS, "layers.0", "layers.1", "layers.2"))
    assert left(VECTORS).shape == (2, 2)
    with pytest.raises(EditError, match=r"prune\.blocks: expected some parameters to stay"):
        without(nn.Sequential(Adds("residual"), Adds("residual")), torch.randn(2, 4), "0", "1")


@pytest.mark.parametrize("case", ["resnet", "mask first"])
def test_snapshots_and_optimisers_follow(case: str, tmp_path: Path) -> None:
    make, x, names, _ = CASES[case]
    network: Any = make()  # type: ignore[operator]
    before = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    network(x).square().sum().backward()
    optimizer.step()
    anatomy = study(network, [x])
    narrow = next(name for name in anatomy.groups if not name.startswith(names))
    data = through_json(describe_removal(anatomy, {narrow: torch.tensor([0])}, blocks=names))
    left = replay_prune(network, Edit("prune", data))
    relink_optimizer(optimizer, before, dict(left.named_parameters()), data["slices"])
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in left.parameters()]
    assert set(optimizer.state) == set(left.parameters())
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
    weights = {name: parameter.detach().clone() for name, parameter in left.named_parameters()}
    optimizer.zero_grad()
    left(x).square().sum().backward()
    optimizer.step()
    assert not [name for name, parameter in left.named_parameters() if torch.equal(parameter, weights[name])]
    save_snapshot(tmp_path / "a.pt", left, History([Edit("prune", data)]))
    again, _ = load_snapshot(tmp_path / "a.pt", make(), {"prune": replay_prune})  # type: ignore[operator]
    assert isinstance(again, Captured) == isinstance(left, Captured)
    assert torch.allclose(again.eval()(x), left.eval()(x), atol=1e-6)


def test_influence_is_one_minus_the_mean_cosine() -> None:
    torch.manual_seed(0)
    network = Stack().eval()
    batches = [torch.randn(5, 5, 3), torch.randn(2, 5, 3)]  # an odd number does not fit the graph's two
    x, mask = network.embed(torch.cat(batches)), torch.ones(5, 5, dtype=torch.bool).tril()
    expected = {}
    for index, layer in enumerate(network.layers):
        y = layer(x, mask)
        cosine = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
        expected[f"layers.{index}"] = 1 - cosine.mean().item()
        x = y
    assert block_influence(study(network, [VECTORS]), batches) == pytest.approx(expected, abs=1e-5)
    captured = capture(network, [VECTORS]).train()
    assert block_influence(study(captured, [VECTORS]), batches) == pytest.approx(expected, abs=1e-5)


def test_influence_of_convolutions_is_over_channels() -> None:
    network = silent(resnet(), "stages.0.1")
    influence = block_influence(study(network, [IMAGES]), [IMAGES])
    assert influence["stages.0.1"] == pytest.approx(0, abs=1e-6)
    x = network.stem(IMAGES) if not network.training else network.eval().stem(IMAGES)  # type: ignore[operator]
    y = network.stages[0][0](x)  # type: ignore[index, operator]
    expected = 1 - torch.cosine_similarity(x, y, dim=1).mean().item()
    assert influence["stages.0.0"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(EditError, match="expected batches"):
        block_influence(study(network, [IMAGES]), [])


class Block(nn.Module):
    """Adds something to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Ordered(nn.Module):
    """Two blocks over tokens, with the batch or the tokens first."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x if self.batch_first else x.transpose(0, 1))
        return self.head(x.mean(1 if self.batch_first else 0))


def test_influence_does_not_depend_on_where_the_batch_lies() -> None:
    torch.manual_seed(0)
    first, second = Ordered(batch_first=True), Ordered(batch_first=False)
    second.load_state_dict(first.state_dict())
    x = torch.randn(8, 3, 6)
    ours, theirs = (block_influence(study(network, [x[:2]]), [(x,)]) for network in (first, second))
    assert ours == pytest.approx(theirs, rel=1e-5)
    with torch.no_grad():
        y = first.blocks[0](x)
    expected = 1 - float(torch.cosine_similarity(x, y, dim=2).mean())
    assert ours["blocks.0"] == pytest.approx(expected, rel=1e-4)


def test_blocks_side_by_side_share_what_they_are_given() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](x) + self.blocks[1](x))

    x = torch.randn(4, 6)
    assert set(block_influence(study(Parallel(), [x[:2]]), [(x,)])) == {"blocks.0", "blocks.1"}

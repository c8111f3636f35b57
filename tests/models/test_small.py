"""The shared networks: shapes, sizes, and that everything downstream can take them in."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compress.errors import RecipeError
from compress.models import BasicBlock, ConvNet1d, LSTMClassifier, ResNet
from compress.prune import find_groups, plan_removal
from compress.surgery import apply_slices, capture

NETWORKS = {
    "resnet_28": (lambda: ResNet(1, 10, 8, (1, 1, 1)), (1, 28, 28)),
    "resnet_8": (lambda: ResNet(1, 10, 8, (2, 1, 1, 1)), (1, 8, 8)),
    "resnet_stem_5": (lambda: ResNet(3, 4, 8, (1,), kernel=5), (3, 9, 9)),
    "convnet1d": (lambda: ConvNet1d(2, 5, 8), (2, 40)),
    "lstm": (lambda: LSTMClassifier(3, 5, 8, 2), (12, 3)),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[request.param]
    return make(), torch.randn(4, *shape)


def test_gives_one_row_of_logits_a_sample_and_trains_every_parameter(network: tuple[nn.Module, Tensor]) -> None:
    model, x = network
    logits = model(x)
    assert logits.shape == (4, model.get_submodule("fc").out_features)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_samples_do_not_see_each_other(network: tuple[nn.Module, Tensor]) -> None:
    model, x = network
    model.eval()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


def test_strict_export_with_a_dynamic_batch(network: tuple[nn.Module, Tensor]) -> None:
    model, x = network
    model.eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},), strict=True)
    for batch in (x[:1], x, torch.cat([x, x])):
        torch.testing.assert_close(program.module()(batch), model(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet_28", "resnet_8", "convnet1d"])
def test_capture_gives_the_same_function(name: str) -> None:
    make, shape = NETWORKS[name]
    model, x = make().eval(), torch.randn(2, *shape)
    captured = capture(copy.deepcopy(model), (x,)).eval()
    torch.testing.assert_close(captured(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet_28", "resnet_8", "convnet1d"])
def test_pruning_reaches_every_convolution(name: str) -> None:
    make, shape = NETWORKS[name]
    model, x = make(), torch.randn(2, *shape)
    before = convolution_widths(model)
    keep = {group.name: group.width // 2 for group in find_groups(model, (x,))}
    plan = plan_removal(model, (x,), keep)
    assert plan is not None
    apply_slices(model, plan["slices"], plan["attributes"])
    assert convolution_widths(model) == {layer: width // 2 for layer, width in before.items()}
    assert model(x).shape == (2, model.get_submodule("fc").out_features)


def convolution_widths(model: nn.Module) -> dict[str, int]:
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d)}


def test_a_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = BasicBlock(4, 6, stride=2).eval()
    x = torch.randn(2, 4, 8, 8)
    inner = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), torch.relu(inner + block.shortcut(x)))
    assert block(x).shape == (2, 6, 4, 4)
    assert isinstance(BasicBlock(4, 4).shortcut, nn.Identity)


def test_resnet_20_has_the_published_size() -> None:
    # 0.27 M in He et al. 2015, table 6, where shortcuts have no parameters.
    assert sum(p.numel() for name, p in ResNet().named_parameters() if "shortcut" not in name) == 269_722


def test_stages_halve_the_image_and_the_stem_does_not() -> None:
    model = ResNet(1, 10, 4, (1, 1, 1))
    x = model.stem(torch.randn(1, 1, 28, 28))
    shapes = [tuple(x.shape[1:])]
    for stage in model.stages:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 28, 28), (4, 28, 28), (8, 14, 14), (16, 7, 7)]


def test_blocks_may_be_a_list_as_yaml_gives_it() -> None:
    assert ResNet(1, 10, 4, [1, 1])(torch.randn(1, 1, 8, 8)).shape == (1, 10)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(width=0), r"ResNet\.width: expected a positive number, got 0"),
        (lambda: ResNet(num_classes=-1), r"ResNet\.num_classes: expected a positive number, got -1"),
        (lambda: ResNet(blocks=()), r"ResNet\.blocks: expected one positive number a stage, got \(\)"),
        (lambda: ResNet(blocks=(1, 0)), r"ResNet\.blocks: .*got \(1, 0\)"),
        (lambda: ResNet(kernel=4), r"ResNet\.kernel: expected an odd number, got 4"),
        (lambda: ConvNet1d(kernels=(7, 4, 3)), r"ConvNet1d\.kernel: expected an odd number, got 4"),
        (lambda: ConvNet1d(width=0), r"ConvNet1d\.width"),
        (lambda: LSTMClassifier(hidden=0), r"LSTMClassifier\.hidden: expected a positive number"),
    ],
)
def test_refuses_sizes_that_make_no_network(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()

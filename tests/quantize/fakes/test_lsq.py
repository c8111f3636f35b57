"""Learned steps: the gradient of the paper by hand, the integers of the conversion, a fit that stops and goes on.

The fits accumulate gradients, under bfloat16, with an average of the weights beside them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.errors import EditError, RecipeError
from compress.quantize import QuantizationAwareTraining, calibrate, convert, prepare
from compress.quantize.fakes.lsq import LearnedFakeQuantize, fake_quantize, learn_steps
from compress.surgery import Captured, RandomStates, history_of, rebuild
from compress.surgery.relink import join_optimizers
from tests.networks import Residual, images, trainer
from tests.quantize.graph.test_factors import LAYERS, network_and_inputs
from tests.surgery.modules import Foreign, SaveAfter, resumable

STEPS = 16  # four an epoch
CHOSEN = sorted(random.Random(8).sample(range(1, STEPS), 3))


def learned(network: Any) -> dict[str, LearnedFakeQuantize]:
    return {n: m for n, m in network.graph_module.named_modules() if isinstance(m, LearnedFakeQuantize)}


# x / s, the integer, and the two gradients, for integers from -4 to 3 and steps of 1/2
BY_HAND = [
    (0.2, 0, -0.2, 1),
    (1.4, 1, -0.4, 1),
    (1.6, 2, 0.4, 1),
    (-2.3, -2, 0.3, 1),
    (3.2, 3, 3, 0),  # outside by less than half a step is outside: the paper clips, then rounds
    (-4.3, -4, -4, 0),
    (50.0, 3, 3, 0),
    (-50.0, -4, -4, 0),
]


@pytest.mark.parametrize("zero", [0, 2, -1])
def test_gradients_are_those_of_the_paper(zero: int) -> None:
    places, integers, of_step, of_x = (torch.tensor(column, dtype=torch.float32) for column in zip(*BY_HAND))
    x = (places / 2).requires_grad_()
    scale, weight = torch.tensor([0.5], requires_grad=True), torch.arange(1.0, 9.0)
    limits: Any = {"quant_min": -4 + zero, "quant_max": 3 + zero}
    y = fake_quantize(x, scale, torch.tensor([zero], dtype=torch.int32), **limits, factor=0.25)
    assert torch.equal(y, integers / 2)
    to_x, to_scale = torch.autograd.grad((weight * y).sum(), [x, scale])
    assert torch.equal(to_x, weight * of_x)
    assert torch.allclose(to_scale, 0.25 * (weight * of_step).sum(), atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_each_channel_has_a_step_of_its_own(axis: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    num = x.shape[axis]
    scale, zero = torch.rand(num) / 4 + 0.1, torch.zeros(num, dtype=torch.int32)
    limits: Any = {"quant_min": -4, "quant_max": 3}

    def gradient(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, axis: int | None) -> Tensor:
        scale.requires_grad_()
        y = fake_quantize(x, scale, zero, **limits, axis=axis)
        return torch.autograd.grad((weight * y).sum(), scale)[0]

    alone = [
        gradient(x.select(axis, i), weight.select(axis, i), scale[i : i + 1].clone(), zero[:1], None)
        for i in range(num)
    ]
    assert torch.allclose(gradient(x, weight, scale, zero, axis), torch.cat(alone), atol=1e-5)


@pytest.fixture(scope="module")
def trained() -> Captured:
    """A network with learned steps after some training, under bfloat16 in the last steps."""
    torch.manual_seed(0)
    network, (x, y) = Residual(), images(64)
    for _ in range(5):
        network(x)
    prepared = prepare(network, [x[:2]], "int8").train()
    calibrate(prepared, [(x,)])
    with torch.no_grad():
        before = prepared.eval()(x)
        assert torch.equal(learn_steps(prepared)(x), before)  # they start where calibration put them
    assert all(module.log_scale.requires_grad for module in learned(prepared).values())
    optimizer = torch.optim.AdamW(prepared.train().parameters(), lr=1e-2)
    for step in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=step >= 8):
            loss = nn.functional.cross_entropy(prepared(x).float(), y)
        loss.backward()
        optimizer.step()
    return prepared.eval()


def test_there_is_a_step_for_each_channel_of_a_weight_and_one_for_an_activation(trained: Captured) -> None:
    sizes = {name.rpartition("_")[2]: module.scale.numel() for name, module in learned(trained).items()}
    assert sizes == {"0": 1, "1": 16, "2": 1, "3": 32, "4": 1, "5": 16, "6": 1, "7": 1, "8": 3}
    assert all(bool((module.log_scale != 0).all()) for module in learned(trained).values())
    assert not [name for name, _ in trained.named_buffers() if name.endswith(("min_val", "scale"))]


def test_gradient_scale(trained: Captured) -> None:
    factors = {name.rpartition("_")[2]: module.factor for name, module in learned(trained).items()}
    assert factors["3"] == 127**-2  # int8
    assert factors["2"] == 255**-2  # uint8
    few = learn_steps(prepare(nn.Sequential(nn.Linear(50, 4)), [torch.randn(2, 50)], "w2a4", first_last="w2a4"))
    (weight,) = (module for module in learned(few).values() if module.is_per_channel)
    assert weight.factor == pytest.approx(50**-0.5)  # values of one channel, integers up to one: the paper's


@pytest.mark.parametrize("scheme", ["int8", "w4a4", "w2a2"])
def test_sgd_learns_and_steps_stay_of_their_size(scheme: str) -> None:
    torch.manual_seed(0)
    x, y = images(64)
    layers = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)]
    network = nn.Sequential(nn.Flatten(), *layers)
    prepared = prepare(network, [x[:2]], scheme, first_last=scheme).train()
    calibrate(prepared, [(x,)])
    optimizer = torch.optim.SGD(learn_steps(prepared).train().parameters(), lr=0.05, momentum=0.9)
    norms = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(prepared(x), y)
        loss.backward()
        steps = {id(module.log_scale) for module in learned(prepared).values()}
        of_steps, of_weights = (
            torch.stack(
                [p.grad.norm() for p in prepared.parameters() if p.grad is not None and (id(p) in steps) is own]
            )
            for own in (True, False)
        )
        norms.append(float(of_steps.norm() / of_weights.norm()))
        optimizer.step()
    assert float(loss.detach()) < 0.1
    assert max(float(module.log_scale.detach().abs().max()) for module in learned(prepared).values()) < 2.0
    assert sorted(norms)[30] < 3.0  # where gradients are clipped by their norm, there is room for the weights'


def test_a_step_of_sgd_moves_a_step_as_the_paper_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    prepared = prepare(nn.Sequential(nn.Linear(8, 4)), [x[:2]], "int8").train()
    calibrate(prepared, [(x,)])
    (module,) = (module for module in learned(learn_steps(prepared)).values() if module.is_per_channel)
    inside: Any = prepared.get_parameter("0.weight")
    scale = module.scale.detach().clone().requires_grad_()
    limits: Any = {"quant_min": -128, "quant_max": 127, "axis": 0, "factor": module.factor}
    (3 * fake_quantize(inside.detach(), scale, module.zero_point, **limits)).sum().backward()
    (3 * module(inside)).sum().backward()
    torch.optim.SGD([module.log_scale], lr=1e-6).step()
    assert scale.grad is not None
    moved = module.scale - scale
    assert torch.allclose(moved, -1e-6 * scale.grad, rtol=0.05, atol=1e-8)


def test_every_weight_becomes_the_integer_that_was_trained(trained: Captured) -> None:
    used: dict[tuple[int, ...], Tensor] = {}

    def watch(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        scale = module.steps(*inputs[1:]).reshape(-1, *[1] * (output.dim() - 1))
        used[tuple(output.shape)] = torch.round(output.detach() / scale)

    twin = copy.deepcopy(trained)
    for module in learned(twin).values():
        if module.is_per_channel:
            module.register_forward_hook(watch)
    x, _ = images(64, seed=1)
    converted = convert(trained)
    with torch.no_grad():
        fake, integer = twin(x), converted(x)
    weights = [tensor for tensor in converted.state_dict().values() if tensor.dtype == torch.int8]
    assert len(weights) == len(used) == 4
    for tensor in weights:
        assert int((tensor != used[tuple(tensor.shape)]).sum()) <= 1  # a tie, where BatchNorm is folded in
    assert float((fake - integer).norm() / fake.norm()) < 2e-3


def started(kind: str, gamma: float) -> tuple[nn.Sequential, Captured, Tensor]:
    """Return a layer with its BatchNorm, whose gamma is small, learned steps that start there, and its inputs."""
    network, x = network_and_inputs(kind, slice(0))
    norm: Any = network[1]
    with torch.no_grad():
        norm.weight.mul_(gamma)
    prepared = prepare(network, [x[:2]], "int8")
    calibrate(prepared, [[x]], ranges="minmax")
    return network, learn_steps(prepared), x


def round_weights_alone(prepared: Captured) -> None:
    for module in learned(prepared).values():
        module.fake_quant_enabled[0] = int(module.is_per_channel)


@pytest.mark.parametrize("gamma", [0.0, 1e-7, 0.1, 1.0])
@pytest.mark.parametrize("kind", LAYERS)
def test_steps_go_with_what_the_norm_becomes(kind: str, gamma: float) -> None:
    network, prepared, x = started(kind, gamma)
    norm: Any = network[1]
    with torch.no_grad():
        norm.weight.uniform_(0.2, 2).mul_(torch.arange(len(norm.weight)) % 2 * 2 - 1)
        norm.running_var.mul_(0.03)
        expected = network.eval()(x)
        assert torch.equal(convert(prepared)(x), prepared.eval()(x))
        round_weights_alone(prepared)
        assert float((prepared(x) - expected).norm() / expected.norm()) < 0.01


def test_steps_end_where_engines_can_still_count_biases() -> None:
    network, prepared, x = started("conv2d", 1.0)
    norm: Any = network[1]
    with torch.no_grad():
        norm.weight[0] = 1e-30
        fake = prepared.eval()(x)
        converted = convert(prepared)
    assert torch.equal(converted(x), fake)
    scales = [tensor for name, tensor in converted.state_dict().items() if "scale" in name and tensor.numel() == 6]
    assert [float(scale.min()) for scale in scales] == [pytest.approx(float(scale.max()) / 4096) for scale in scales]
    assert len(scales) == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_a_norm_learns_as_behind_a_weight_that_is_rounded_by_itself(frozen: bool) -> None:
    network, prepared, x = started("conv2d", 1.0)
    prepared.freeze_batchnorm = frozen
    round_weights_alone(prepared)
    (weights,) = (module for module in learned(prepared).values() if module.is_per_channel)
    with torch.no_grad():
        weights.log_scale.sub_(0.7)  # half of them lie outside
    layer: Any
    norm: Any
    layer, norm = copy.deepcopy(network)
    assert weights.norm is not None
    relative = (weights.scale / weights.norm).detach().requires_grad_()
    signs = torch.sign(norm.weight.detach()).view(-1, 1, 1, 1)
    limits: Any = {"quant_min": -128, "quant_max": 127, "axis": 0}
    rounded = signs * fake_quantize(signs * layer.weight, relative, weights.zero_point, **limits)
    given = nn.functional.conv2d(x, rounded, layer.bias)
    expected = norm.train(not frozen)(given)
    got = prepared.train()(x)
    assert torch.allclose(got, expected, atol=1e-4)
    direction = torch.randn(got.shape)
    (expected * direction).sum().backward()
    (got * direction).sum().backward()
    theirs: Any = prepared.get_parameter
    assert torch.allclose(theirs("1.weight").grad, norm.weight.grad, rtol=1e-3, atol=1e-2)
    assert torch.allclose(theirs("0.weight").grad, layer.weight.grad, rtol=1e-3, atol=1e-2)
    assert relative.grad is not None
    assert weights.log_scale.grad is not None
    assert torch.allclose(weights.log_scale.grad, weights.factor * relative.grad / relative, rtol=1e-3)


class Accumulating(Foreign):
    """Decays matrices only, and so makes two groups of parameters."""

    def __init__(self) -> None:
        super().__init__(make=self.grouped)

    def grouped(self, _: Iterable[nn.Parameter]) -> Optimizer:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-2)


def quantization() -> QuantizationAwareTraining:
    return QuantizationAwareTraining(start=0.3, freeze_batchnorm=0.7, learn_steps=True, attribute="net")


def fit(*extra: Callback, resume: Path | None = None) -> Accumulating:
    pl.seed_everything(0 if resume is None else 99, verbose=False)
    module = Accumulating()
    run = trainer(
        max_epochs=4,
        accumulate_grad_batches=2,
        callbacks=[quantization(), EMAWeightAveraging(decay=0.5), RandomStates(), *extra],
    )
    run.fit(module, resumable(64), ckpt_path=resume, weights_only=resume is not None)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Accumulating]:
    folder = tmp_path_factory.mktemp("fit")
    return folder, fit(SaveAfter(folder, CHOSEN))


def test_steps_join_the_optimiser_where_a_new_one_would_have_them(whole: tuple[Path, Accumulating]) -> None:
    _, module = whole
    (optimizer,) = module.trainer.optimizers
    fresh = module.grouped([])
    for group, like in zip(optimizer.param_groups, fresh.param_groups):
        assert [id(p) for p in group["params"]] == [id(p) for p in like["params"]]
    assert all(p in optimizer.state for p in module.parameters())
    modules = learned(module.net)
    assert len(modules) == 9
    assert all(bool((module.log_scale != 0).any()) for module in modules.values())
    assert all(float(module.log_scale.abs().max()) < 0.5 for module in modules.values())  # no step has run away


@pytest.mark.parametrize("step", CHOSEN)
def test_resumed_equals_uninterrupted(whole: tuple[Path, Accumulating], step: int) -> None:
    folder, module = whole
    resumed = fit(resume=folder / f"step_{step}.ckpt")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_network_is_rebuilt_from_its_history(whole: tuple[Path, Accumulating]) -> None:
    _, module = whole
    again = rebuild(Residual(8), history_of(module))
    again.load_state_dict(module.net.state_dict())
    x, _ = images(8)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), module.net.eval()(x))


def test_the_average_has_the_steps_of_the_network(whole: tuple[Path, Accumulating]) -> None:
    _, module = whole
    (average,) = (c for c in module.trainer.callbacks if isinstance(c, EMAWeightAveraging))  # type: ignore[attr-defined]
    twin: Any = average._average_model
    ours, theirs = learned(module.net), learned(twin.module.net)
    assert all(theirs[name] is fake for name, fake in ours.items())


def test_other_groups_are_refused() -> None:
    one, two = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(EditError, match=r"configure_optimizers: expected the 1 groups .* got 2\."):
        join_optimizers([torch.optim.SGD([one])], [torch.optim.SGD([{"params": [one]}, {"params": [two]}])])


def test_nothing_is_learned_after_training() -> None:
    with pytest.raises(RecipeError, match=r"quantize\.learn_steps: expected training in integers, got start 1"):
        QuantizationAwareTraining(start=1, learn_steps=True)

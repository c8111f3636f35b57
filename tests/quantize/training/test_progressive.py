"""Bits that fall: the schedule, the grid that holds at each progress, a fit that stops and goes on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Callback
from torch import nn

from compress.errors import RecipeError
from compress.quantize import QuantizationAwareTraining, calibrate, convert, prepare
from compress.quantize.fakes.lsq import learn_steps
from compress.quantize.training.progressive import Stages, quantizers, set_bits
from compress.surgery import Captured, RandomStates
from tests.networks import images, trainer
from tests.surgery.modules import Foreign, SaveAfter, resumable


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 16), min_size=1, max_size=5, unique=True), st.data())
def test_bits_never_rise(bits: list[int], data: Any) -> None:
    at = data.draw(st.lists(st.floats(0, 1), min_size=len(bits), max_size=len(bits), unique=True))
    stages = Stages(sorted(bits, reverse=True), sorted(at))
    found = [stages.bits_at(step / 40) for step in range(41)]
    assert found == sorted(found, reverse=True)
    assert set(found) <= set(bits)
    assert stages.bits_at(1.0) == min(bits)


@pytest.mark.parametrize(
    ("bits", "at", "message"),
    [
        ([8, 4], [0.5], "expected as many bits as times, got 2 and 1"),
        ([4, 8], [0.5, 0.6], "expected falling numbers from 16 to 2, got .4, 8."),
        ([32, 8], [0.5, 0.6], "expected falling numbers"),
        ([4], [0.5], "order: expected two stages at least"),
        ([8, 4], [0.6, 0.5], "expected rising values in .0, 1., got .0.6, 0.5."),
    ],
)
def test_bad_stages(bits: list[int], at: list[float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Stages(bits, at, order=["*"])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))


def weight_levels(prepared: Captured) -> dict[str, int]:
    """Return how many values the weights of each layer have, as the graph sees them."""
    levels = {}

    def watch(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if module.is_per_channel:
            levels[str(tuple(output.shape))] = max(len(row.unique()) for row in output.detach())

    hooks = [m.register_forward_hook(watch) for m in prepared.graph_module.modules() if hasattr(m, "is_per_channel")]
    with torch.no_grad():
        prepared(images(8)[0])
    for hook in hooks:
        hook.remove()
    return levels


@pytest.mark.parametrize("learned", [False, True])
def test_few_bits_begin_as_many_over_the_same_range(learned: bool) -> None:
    x, _ = images(16)
    prepared = prepare(network(), [x[:2]], "w3a8")
    calibrate(prepared, [(x,)])
    if learned:
        learn_steps(prepared)
    prepared.eval()
    own = prepared(x)
    assert max(weight_levels(prepared).values()) > 8  # the first and the last layer have 8 bits
    assert weight_levels(prepared)["(8, 32)"] <= 8
    set_bits(quantizers(prepared)[0], 8)
    assert weight_levels(prepared)["(8, 32)"] > 8
    fine = prepared(x)
    set_bits(quantizers(prepared)[0], 2)  # fewer than its own: its own
    assert weight_levels(prepared)["(8, 32)"] <= 8
    coarse = prepared(x)
    assert torch.allclose(coarse, own, rtol=0.05, atol=0.05 * float(own.abs().max()))
    exact = network()(x)
    assert float((fine - exact).norm()) < 0.5 * float((coarse - exact).norm())


class Watch(Callback):
    """Notes the largest integer of the middle layer's weights in each step."""

    def __init__(self) -> None:
        self.limits: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if isinstance(pl_module.net, Captured):
            modules: list[Any] = [m for m in pl_module.net.graph_module.modules() if hasattr(m, "own_limits")]
            self.limits.append(max(m.quant_max for m in modules if m.own_limits == (-8, 7)))


def fit(watch: Watch, *extra: Callback, learned: bool, resume: Path | None = None) -> Foreign:
    pl.seed_everything(0 if resume is None else 99, verbose=False)
    module = Foreign(network())
    stages = Stages(bits=[16, 8, 4], at=[0.25, 0.5, 0.75])
    qat = QuantizationAwareTraining(
        "w4a8", start=0.25, freeze_batchnorm=0.9, learn_steps=learned, progressive=stages, attribute="net"
    )
    run = trainer(max_epochs=2, callbacks=[qat, RandomStates(), watch, *extra])
    run.fit(module, resumable(64), ckpt_path=resume, weights_only=resume is not None)
    return module


@pytest.mark.parametrize("learned", [False, True])
def test_a_fit_meets_each_stage_and_goes_on_bit_for_bit(learned: bool, tmp_path: Path) -> None:
    watch = Watch()
    module = fit(watch, SaveAfter(tmp_path, [6, 10]), learned=learned)
    assert watch.limits == [2**15 - 1] * 4 + [127] * 4 + [7] * 4
    for step in (6, 10):
        rest = Watch()
        again = fit(rest, learned=learned, resume=tmp_path / f"step_{step}.ckpt")
        assert rest.limits == watch.limits[step - 4 :]
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), (step, name)


def deeper() -> nn.Module:
    torch.manual_seed(0)
    widths = [64, 32, 16, 8, 3]
    layers = [layer for wide, narrow in pairwise(widths) for layer in (nn.Linear(wide, narrow), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


class WatchLayers(Callback):
    """Notes in each step which of the layers 3 and 5 have four bits."""

    def __init__(self) -> None:
        self.coarse: list[str] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if isinstance(pl_module.net, Captured):
            third, fifth = quantizers(pl_module.net, ["3", "5", "*"])[:2]
            weights = {"3": third, "5": fifth}
            self.coarse.append("".join(name for name, own in weights.items() if min(m.quant_max for m in own) == 7))


def fit_in_order(watch: WatchLayers, *extra: Callback, resume: Path | None = None) -> Foreign:
    pl.seed_everything(0 if resume is None else 99, verbose=False)
    module = Foreign(deeper())
    stages = Stages(bits=[8, 4], at=[0.25, 0.75], order=["5", "[13]"])
    qat = QuantizationAwareTraining("w4a8", start=0.25, freeze_batchnorm=0.9, progressive=stages, attribute="net")
    run = trainer(max_epochs=2, callbacks=[qat, RandomStates(), watch, *extra])
    run.fit(module, resumable(64), ckpt_path=resume, weights_only=resume is not None)
    return module


def test_layers_change_one_after_the_other_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    watch = WatchLayers()
    module = fit_in_order(watch, SaveAfter(tmp_path, [8]))
    assert watch.coarse == [""] * 4 + ["5"] * 4 + ["35"] * 4
    rest = WatchLayers()
    again = fit_in_order(rest, resume=tmp_path / "step_8.ckpt")
    assert rest.coarse == watch.coarse[4:]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_a_pattern_without_a_quantised_layer_is_named() -> None:
    prepared = prepare(network(), [images(2)[0]], "w3a8", layers={"3": "float"})
    with pytest.raises(
        RecipeError, match=r"progressive\.order: expected patterns .*, got '3'\. The layers are: 1, 5\."
    ):
        quantizers(prepared, ["1", "3"])


def test_a_rehearsal_names_such_a_pattern_before_any_training() -> None:
    stages = Stages([8, 4], [0.7, 0.8], order=["fc", "*"])
    quantization = QuantizationAwareTraining("w4a8", progressive=stages)
    with pytest.raises(RecipeError, match=r"progressive\.order: .* got 'fc'\. The layers are: 1, 3, 5\."):
        quantization.rehearse(network(), [images(2)[0]])


def test_what_ends_amid_more_bits_is_converted_with_steps_of_its_own() -> None:
    x, _ = images(64)
    prepared = prepare(network(), [x[:2]], "w4a8")
    calibrate(prepared, [(x,)])
    prepared.eval()
    own = prepared(x)
    set_bits(quantizers(prepared)[0], 8)
    prepared(x)
    set_bits(quantizers(prepared)[0], 4)  # as at the end of a fit: no batch follows
    with torch.no_grad():
        assert torch.allclose(convert(prepared)(x), own, atol=1e-5)


def test_each_quantizer_is_in_one_group() -> None:
    prepared = prepare(deeper(), [images(2)[0]], "w3a8")
    groups = quantizers(prepared, ["5", "7", "1"])
    assert [len(group) for group in groups] == [2, 2, 4]  # layer 3, which none matches, goes with the last
    assert {id(module) for group in groups for module in group} == {id(module) for module in quantizers(prepared)[0]}


@pytest.mark.parametrize(
    ("scheme", "layers", "bits"),
    [("w4a2", {}, [8, 4]), ("w4a8", {"3": "w2a8"}, [8, 4]), ("int8", {"3": "w4a8"}, [16, 8]), ("w2a4", {}, [8, 2])],
)
def test_in_the_end_each_layer_has_the_bits_of_its_own(scheme: str, layers: dict[str, str], bits: list[int]) -> None:
    pl.seed_everything(0, verbose=False)
    module, stages = Foreign(network()), Stages(bits, [0.25, 0.5])
    qat = QuantizationAwareTraining(scheme, layers=layers, start=0.25, progressive=stages, attribute="net")
    seen: list[list[tuple[int, int]]] = []

    class Limits(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if isinstance(pl_module.net, Captured):
                seen.append([(fake.quant_min, fake.quant_max) for fake in quantizers(pl_module.net)[0]])

    trainer(max_epochs=2, callbacks=[qat, Limits()]).fit(module, resumable(32))
    plain = prepare(network(), [images(2)[0]], qat.assignment)
    own = [(fake.quant_min, fake.quant_max) for fake in quantizers(plain)[0]]
    assert own not in seen[:2]
    assert seen[2:] == 4 * [own]


def test_stages_without_effect_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"quantize\.progressive: expected training in integers, got start 1\. Set"):
        QuantizationAwareTraining("w4a8", start=1, progressive=Stages([8, 4], [0.5, 0.7]))
    for scheme in ("int8", "fp8", "int16x8", "int8_weights"):
        with pytest.raises(RecipeError, match=rf"expected a scheme of fewer than 8 bits, .*, got {scheme}, float\."):
            QuantizationAwareTraining(scheme, keep=["fc"], start=0.5, progressive=Stages([16, 8], [0.5, 0.7]))


def test_the_last_stage_is_the_scheme() -> None:
    with pytest.raises(RecipeError, match=r"quantize\.progressive: expected 4 bits in the end, .* got 8"):
        QuantizationAwareTraining("w4a8", progressive=Stages([16, 8], [0.7, 0.8]))
    with pytest.raises(RecipeError, match=r"quantize\.progressive\.at: expected values in \[0\.7, 0\.9\]"):
        QuantizationAwareTraining("w4a8", progressive=Stages([8, 4], [0.7, 0.95]))

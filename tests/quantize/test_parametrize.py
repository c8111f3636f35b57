"""Fake quantization layer by layer: numbers by hand, a fit that stops and goes on, and an artefact.

Three networks: one that depends on data and has no graph at all, one whose code can be run for a graph but not read,
and one with branches that no batch reaches.
"""

from __future__ import annotations

import copy
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from compress.errors import CaptureError, RecipeError
from compress.export import Gates, export_artifact
from compress.quantize import (
    QuantizationAwareTraining,
    calibrate,
    callback,
    make_assignment,
    make_permanent,
    parametrize,
    prepare,
    pt2e,
    rounded_layers,
)
from compress.quantize.parametrize import freeze
from compress.quantize.training.progressive import Stages
from compress.surgery import Captured, RandomStates, history_of, rebuild
from compress.surgery.capture import export_program
from tests.networks import Residual, images, trainer
from tests.surgery.modules import Foreign, SaveAfter, resumable

STEPS = 16  # four an epoch
CHOSEN = sorted(random.Random(3).sample(range(1, STEPS), 2))


class Level(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.abs().mean() > 0.5:  # of this batch
            return x / x.abs().mean()
        return x


class Branching(Residual):
    def __init__(self) -> None:
        super().__init__(8)
        self.level = Level()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.level(x))


class Locked(nn.Module):
    """Its code holds a lock, which torch cannot read; run, it gives a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-2)
        self.conv = nn.Conv2d(8, 4, 3, stride=2)
        self.norm1 = nn.BatchNorm2d(4, eps=1e-3)
        self.dropout = nn.Dropout(0.3)
        self.fc1 = nn.Linear(36, 16)
        self.norm2 = nn.BatchNorm1d(16, affine=False)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        with threading.Lock():
            x = self.norm(self.stem(x)).relu()
            x = self.norm1(self.conv(x)).relu().flatten(1)
            return self.fc(self.norm2(self.fc1(self.dropout(x))))


def quantization(**changes: Any) -> QuantizationAwareTraining:
    values = {"start": 0.3, "freeze_batchnorm": 0.7, "fallback": "parametrize", "attribute": "net"}
    return QuantizationAwareTraining(**{"scheme": "w4a8", **values, **changes})


@pytest.mark.parametrize("captured", [True, False])
def test_a_network_is_prepared_once_in_a_fit_and_in_a_rehearsal(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[type[nn.Module]] = []

    def counted(network: nn.Module, *arguments: Any, **named: Any) -> Captured:
        calls.append(type(network))
        return prepare(network, *arguments, **named)

    monkeypatch.setattr(callback, "prepare", counted)
    monkeypatch.setattr(pt2e, "prepare", counted)
    network = Residual(8) if captured else Branching()
    module, qat = Foreign(copy.deepcopy(network)), quantization()
    trainer(max_epochs=1, callbacks=[qat]).fit(module, resumable())
    assert calls == [type(network)]
    assert isinstance(module.net, Captured) == captured
    rehearsed = [qat.rehearse(copy.deepcopy(network), [images(2)[0]]) for _ in range(2)]
    assert calls == [type(network)] * 3
    assert rehearsed[0] is not rehearsed[1]
    assert isinstance(rehearsed[1], Captured) == captured


def test_without_the_fallback_the_error_names_reason_layer_and_the_way_out() -> None:
    line = next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "# of this batch" in line)
    with pytest.raises(CaptureError) as caught:
        trainer(max_epochs=1, callbacks=[quantization(fallback=None)]).fit(Foreign(Branching()), resumable())
    message = str(caught.value)
    assert "got Branching: Data-dependent branching in 'level' (Level) at " in message
    assert f"test_parametrize.py:{line}: if x.abs().mean() > 0.5:" in message
    assert message.endswith("quantize.fallback: parametrize.")


@pytest.mark.parametrize(
    ("layer", "shape", "product"),
    [
        (nn.Linear(6, 4), (5, 6), nn.functional.linear),
        (nn.Conv2d(3, 4, 3, padding=1), (5, 3, 7, 7), lambda x, w: nn.functional.conv2d(x, w, padding=1)),
        (nn.ConvTranspose1d(3, 4, 2), (5, 3, 6), nn.functional.conv_transpose1d),
    ],
)
def test_numbers_are_those_of_integer_arithmetic(layer: nn.Module, shape: tuple[int, ...], product: Any) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape) + 0.3, layer.weight.detach().clone(), layer.bias.detach()  # type: ignore[operator, union-attr]
    network = parametrize(nn.Sequential(layer), make_assignment("int8"))
    calibrate(network, [(x,)], ranges="minmax")
    got = network.eval()(x)
    axis = 1 if isinstance(layer, nn.ConvTranspose1d) else 0
    rows = weight.movedim(axis, 0).flatten(1)
    step_w = torch.maximum(rows.amin(1) / -128, rows.amax(1) / 127)
    wide = [-1 if dim == axis else 1 for dim in range(weight.dim())]
    q_w = (weight / step_w.view(wide)).round().clamp(-128, 127).long()
    step_x = (x.max() - x.min()) / 255
    zero = (-x.min() / step_x).round().long()
    q_x = ((x / step_x).round().long() + zero).clamp(0, 255)
    sums = product(q_x - zero, q_w)
    along = [-1 if dim == 1 else 1 for dim in range(sums.dim())]
    wanted = sums * (step_x * step_w).view(along) + bias.view(along)
    assert torch.allclose(got, wanted, atol=1e-5)
    integers = make_permanent(network, [x[:2]]).state_dict()
    assert torch.equal(integers["0.stored_weight.integers"], q_w.to(torch.int8))
    assert torch.allclose(integers["0.stored_weight.scale"], step_w)


@pytest.mark.parametrize("scheme", ["int8", "int8_portable", "int8_reduced", "w4a8"])
@pytest.mark.parametrize("compiling", [False, True])
def test_a_transposed_convolution_trains_with_a_range_for_each_output_channel(
    scheme: str, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiled, all is left to PyTorch's kernel, as on a GPU.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    x, up = torch.randn(8, 3, 8, 8), nn.ConvTranspose2d(8, 6, 3)
    with torch.no_grad():
        up.weight[:, 2] *= 10
    module = parametrize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), up), make_assignment(scheme)).train()
    weight = up._parameters["weight"]
    assert weight is not None
    before, optimizer = weight.detach().clone(), torch.optim.SGD(module.parameters(), lr=0.1)
    module(x).square().mean().backward()
    optimizer.step()
    assert (weight != before).any((0, 2, 3)).all()
    module(x).square().mean().backward()
    fake: Any = up.weight_fake_quant
    assert fake.scale.shape == (6,)
    assert int(fake.scale.argmax()) == 2
    with torch.no_grad():
        error = (up.weight - weight).abs().amax((0, 2, 3))
        assert (error <= 1.01 * fake.scale).all()
        monkeypatch.undo()
        trained = module.eval()(x)
        assert torch.allclose(make_permanent(module, [x[:2]])(x), trained, atol=1e-5)


@pytest.fixture(scope="module")
def locked() -> nn.Module:
    """A network after some steps, BatchNorm still at the end, with one norm's scale below zero."""
    torch.manual_seed(0)
    network, (x, y) = parametrize(Locked(), make_assignment("int8")).train(), images(64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(8):
        freeze(network, step >= 6)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


def test_norms_and_dropout_are_the_networks_own(locked: nn.Module) -> None:
    network, x = copy.deepcopy(locked), images(8, seed=2)[0]
    with torch.no_grad():
        assert torch.equal(network(x), network(x))
        mean = network.get_buffer("norm.running_mean").clone()
        network.train()
        assert not torch.equal(network(x), network(x))  # dropout
        assert not torch.equal(network.get_buffer("norm.running_mean"), mean)
        freeze(network, True)
        still = {name: buffer.clone() for name, buffer in network.named_buffers()}
        assert not torch.equal(network(100 * x), network(100 * x))
        for name, buffer in network.named_buffers():
            if not name.endswith("observer_enabled"):
                assert torch.equal(buffer, still[name]), name
        graph = make_permanent(locked, [x[:2]])
        assert norms_of(graph) == []  # with their own eps, in the scales
        assert float((graph(x) - locked(x)).norm() / locked(x).norm()) < 2e-3


def norms_of(graph: Any) -> list[str]:
    return [node.name for node in graph.graph_module.graph.nodes if node.target is torch.ops.aten.batch_norm.default]


def test_a_norm_that_turns_signs(locked: nn.Module) -> None:
    network, x = copy.deepcopy(locked), images(8, seed=2)[0]
    stem: Any = rounded_layers(network)["stem"]
    with torch.no_grad():
        network.get_parameter("norm.weight")[1:4].neg_()
        network.get_parameter("norm.weight")[0] = 0
        for low, left in ((-100, 0), (-128, 1)):  # the least of the integers has no counterpart
            channels, limits = (
                stem._parameters["weight"][1:4].flatten(1),
                stem.weight_fake_quant.activation_post_process,
            )
            limits.min_val[1:4] = channels.amin(1) * 128 / -low
            limits.max_val[1:4] = -limits.min_val[1:4] * 127 / 128
            graph = make_permanent(network, [x[:2]])
            assert len(norms_of(graph)) == left
            assert float((graph(x) - network(x)).norm() / network(x).norm()) < 2e-3


def test_an_artefact_has_integer_kernels(locked: nn.Module, tmp_path: Path) -> None:
    x, _ = images(64, seed=1)
    manifest = export_artifact(
        export_program(make_permanent(locked, [x[:2]]), [x[:2]]),
        tmp_path / "a",
        targets=["onnxruntime"],
        reference=locked,
        held_out=[x],
        scheme="int8",
        gates=Gates(max_relative_error=0.02, min_top1_agreement=0.98, min_int8_fraction=0.9),
    )
    census = manifest.targets["onnxruntime"].census
    assert (census["int8_kernels"], census["float_kernels"]) == (4, 0)
    assert [product["quantized"] for product in manifest.products] == [True] * 4


class Watch(Callback):
    def __init__(self) -> None:
        self.means: list[Tensor] = []
        self.levels: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if layers := rounded_layers(pl_module.net):
            self.means.append(pl_module.net.norm.running_mean.clone())
            fake = layers["conv1"].weight_fake_quant
            self.levels.append(fake.quant_max - fake.quant_min)


def fit(*extra: Callback, resume: Path | None = None) -> Foreign:
    pl.seed_everything(0 if resume is None else 99, verbose=False)
    module = Foreign(Branching())
    progressive = Stages(bits=[8, 4], at=[0.3, 0.5], order=["fc", "*"])
    callbacks = [quantization(progressive=progressive), EMAWeightAveraging(decay=0.5), RandomStates(), *extra]
    run = trainer(max_epochs=4, accumulate_grad_batches=2, callbacks=callbacks)
    run.fit(module, resumable(64), resumable(16), ckpt_path=resume, weights_only=resume is not None)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Foreign, Watch]:
    folder, watch = tmp_path_factory.mktemp("fit"), Watch()
    return folder, fit(SaveAfter(folder, CHOSEN), watch), watch


def test_a_fit_goes_through_the_phases(whole: tuple[Path, Foreign, Watch]) -> None:
    _, module, watch = whole
    (edit,) = history_of(module)
    assert edit.data["fallback"] == "parametrize"
    assert [name for name, _ in module.net.named_parameters()] == [name for name, _ in Branching().named_parameters()]
    (optimizer,) = module.trainer.optimizers  # type: ignore[misc]
    assert {int(state["step"]) for state in optimizer.state.values()} == {STEPS}  # moments were carried
    assert watch.levels == [255] * 6 + [15] * 16
    moved = [not torch.equal(before, after) for before, after in zip(watch.means, watch.means[1:])]
    assert moved == [True] * 13 + [False] * 8
    assert set(rounded_layers(module.net)) == {"stem", "conv1", "conv2", "fc"}


@pytest.mark.parametrize("step", CHOSEN)
def test_resumed_equals_uninterrupted(whole: tuple[Path, Foreign, Watch], step: int) -> None:
    folder, module, _ = whole
    resumed = fit(resume=folder / f"step_{step}.ckpt")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_after_the_fit(whole: tuple[Path, Foreign, Watch]) -> None:
    _, module, _ = whole
    (x, _), net = images(16, seed=1), module.net.eval()
    again = rebuild(Branching(), history_of(module))
    again.load_state_dict(net.state_dict())
    callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
    converted = callbacks[0].converted
    with torch.no_grad():
        assert torch.equal(again.eval()(x), net(x))
        assert not isinstance(converted, Captured)  # nothing can capture it
        assert torch.allclose(converted(x), net(x), atol=1e-5)
    kinds = {name: int(tensor.abs().max()) for name, tensor in converted.state_dict().items() if "integers" in name}
    assert kinds.keys() == {f"{name}.stored_weight.integers" for name in ("stem", "conv1", "conv2", "fc")}
    assert kinds["conv1.stored_weight.integers"] <= 8 < kinds["stem.stored_weight.integers"]
    with pytest.raises(CaptureError, match=r"got Branching: Data-dependent branching in 'level'"):
        export_program(converted, [x[:2]])


def test_after_training_alone_a_layer_that_no_batch_reaches_stays_in_floats() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(64, 3) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.experts[int(x.mean() > 100)](x)

    torch.manual_seed(0)
    module, qat = Foreign(Experts()), quantization(scheme="int8", start=1, keep=[])
    trainer(max_epochs=1, callbacks=[qat]).fit(module, resumable())
    x = images(16, seed=1)[0]
    with torch.no_grad():
        assert not torch.equal(module.net.eval()(x), copy.deepcopy(module.net).train()(x + 1))
        for inputs in (x, x + 1000):
            assert torch.allclose(qat.converted(inputs), module.net.eval()(inputs), atol=1e-3)
    kinds = {name: tensor.dtype for name, tensor in qat.converted.state_dict().items() if tensor.dim() == 2}
    assert kinds == {"experts.0.stored_weight.integers": torch.int8, "experts.1.weight": torch.float32}


def test_a_transformers_fast_path_does_not_pass_the_rounding_by() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 16)
    plain = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    network = parametrize(copy.deepcopy(plain), make_assignment("w2a2", first_last="w2a2"))
    calibrate(network, [(x,)])
    assert set(rounded_layers(network)) == {"linear1", "linear2"}
    slow = network(x)
    with torch.no_grad():
        assert torch.allclose(network(x), slow, atol=1e-4)
        assert not torch.allclose(plain(x), slow, atol=1e-1)
        assert torch.allclose(make_permanent(network, [x[:2]])(x), slow, atol=1e-4)


def test_patterns_name_layers() -> None:
    network = parametrize(Branching(), make_assignment("int8", layers={"conv*": "w4a8"}, keep=["fc"]))
    limits = {name: layer.weight_fake_quant.quant_max for name, layer in rounded_layers(network).items()}
    assert limits == {"stem": 127, "conv1": 7, "conv2": 7}
    with pytest.raises(RecipeError, match=r"expected patterns of layers with a product or a table, got 'head'"):
        parametrize(Branching(), make_assignment("int8", keep=["head"]))


def test_a_network_that_can_be_captured_still_is() -> None:
    assert isinstance(quantization().rehearse(nn.Sequential(nn.Linear(4, 3)), [torch.randn(2, 4)]), Captured)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fallback": "eager"}, r"quantize\.fallback: expected parametrize or null, got 'eager'"),
        ({"scheme": "int8_dynamic"}, r"quantize\.fallback: expected schemes of integers .* got int8_dynamic"),
        ({"layers": {"fc": "fp8"}}, r"quantize\.fallback: expected schemes of integers .* got fp8"),
        ({"learn_steps": True}, r"quantize\.fallback: .* got quantize\.learn_steps\. Leave one of the two out"),
        ({"start": 1, "improve": ["bias"]}, r"quantize\.fallback: .* got quantize\.improve\."),
    ],
)
def test_what_needs_a_graph_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantization(**arguments)


def test_layers_that_do_not_fit_are_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 3), weight_norm(nn.Linear(3, 3)))
    with pytest.raises(RecipeError, match=r"expected layers with a weight of their own, got '1'"):
        parametrize(network, make_assignment("int8"))
    assert not rounded_layers(network)
    with pytest.raises(CaptureError, match=r"expected convolutions or linear layers .* got none in ReLU"):
        parametrize(nn.ReLU(), make_assignment("int8"))
    with pytest.raises(CaptureError, match=r"quantize\.fallback: parametrize\.$"):
        prepare(Branching(), [images(2)[0]], "int8")

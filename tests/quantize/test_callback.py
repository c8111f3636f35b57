from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from compress.distill import Classification, Distiller
from compress.errors import CaptureError, EditError, RecipeError
from compress.quantize import QuantizationAwareTraining, deployed_form, replay_quantize
from compress.quantize.calibrate import float_mode
from compress.quantize.pt2e import example_tensors
from compress.surgery import Captured, history_of
from compress.surgery.capture import export_program
from compress.surgery.lengths import Length
from tests.networks import Residual, images, loader, trainer


class Watch(Callback):
    """Looks at the graph itself, not at ``.training``: what ran in training and in validation."""

    def __init__(self) -> None:
        self.train: list[tuple[int, set[bool], set[bool]]] = []
        self.val: list[tuple[set[bool], set[bool]]] = []
        self.means: list[Tensor] = []
        self.stuck: list[str] = []
        self.moments: list[int] = []
        self._before: dict[str, Tensor] = {}

    def modes(self, pl_module: pl.LightningModule) -> tuple[set[bool], set[bool]] | None:
        network = pl_module.student
        if not isinstance(network, Captured):
            return None
        nodes = network.graph_module.graph.nodes
        norms = {bool(n.args[5]) for n in nodes if n.target is torch.ops.aten.batch_norm.default}
        return norms, {bool(n.args[2]) for n in nodes if n.target is torch.ops.aten.dropout.default}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.moments.append(len(trainer.optimizers[0].state))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if modes := self.modes(pl_module):
            self.train.append((trainer.current_epoch, *modes))
            self.means.append(pl_module.student.state_dict()["norm.running_mean"].clone())  # type: ignore[union-attr, operator]
            self.stuck += [n for n, p in pl_module.named_parameters() if torch.equal(p, self._before[n])]

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if modes := self.modes(pl_module):
            self.val.append(modes)


@pytest.fixture(scope="module")
def fitted() -> tuple[Distiller, Watch, QuantizationAwareTraining]:
    pl.seed_everything(0)
    module = Distiller(
        Residual(), task=Classification(3), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
    )
    watch, qat = Watch(), QuantizationAwareTraining(start=0.2, freeze_batchnorm=0.8)
    trainer(max_epochs=5, callbacks=[qat, watch]).fit(module, loader(), loader(seed=1, shuffle=False))
    return module, watch, qat


def test_training_mode_comes_back_after_each_validation(
    fitted: tuple[Distiller, Watch, QuantizationAwareTraining],
) -> None:
    _, watch, _ = fitted
    assert [epoch for epoch, *_ in watch.train] == [e for e in range(1, 5) for _ in range(4)]
    assert all(norms == {True} and dropout == {True} for epoch, norms, dropout in watch.train if epoch < 4)
    assert len(watch.val) == 16
    assert all(norms == {False} and dropout == {False} for norms, dropout in watch.val)


def test_batchnorm_stands_still_late_and_dropout_does_not(
    fitted: tuple[Distiller, Watch, QuantizationAwareTraining],
) -> None:
    _, watch, _ = fitted
    assert all(norms == {False} and dropout == {True} for epoch, norms, dropout in watch.train if epoch == 4)
    assert all(torch.equal(mean, watch.means[-1]) for mean in watch.means[-4:])
    assert not torch.equal(watch.means[0], watch.means[4])


def test_all_weights_move_and_moments_are_kept(fitted: tuple[Distiller, Watch, QuantizationAwareTraining]) -> None:
    module, watch, _ = fitted
    assert watch.stuck == []
    num_parameters = len(list(module.student.parameters()))
    assert watch.moments == [0] + [num_parameters] * 19


def test_history_and_conversion(fitted: tuple[Distiller, Watch, QuantizationAwareTraining]) -> None:
    module, _, qat = fitted
    (edit,) = history_of(module)
    assert edit.kind == "quantize"
    assert edit.data["scheme"] == "int8"
    assert edit.data["inputs"] == [{"shape": [2, 1, 8, 8], "dtype": "float32"}]
    assert edit.data["shapes"] == {name: list(p.shape) for name, p in Residual().named_parameters()}
    assert {t.dtype for t in qat.converted.state_dict().values() if t.dim() > 1} == {torch.int8}
    x, _ = next(iter(loader(seed=1, shuffle=False)))
    agree = qat.converted(x).argmax(1) == module.eval()(x).argmax(1)
    assert float(agree.float().mean()) > 0.9


def test_after_the_fit_with_ranges_from_training_data() -> None:
    pl.seed_everything(0)
    module = Distiller(
        Residual(), task=Classification(3), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
    )
    callback = QuantizationAwareTraining("int8_portable", start=1, ranges="percentile", num_batches=3, keep=["fc"])
    seen: list[bool] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            seen.append(isinstance(pl_module.student, Captured))

    trainer(max_epochs=2, callbacks=[Look(), callback]).fit(module, loader())
    assert seen
    assert not any(seen)
    (edit,) = history_of(module)
    assert edit.data["scheme"] == "int8_portable"
    assert {pattern: scheme["name"] for pattern, scheme in edit.data["layers"].items()} == {"fc": "float"}
    kinds = {name: t.dtype for name, t in callback.converted.state_dict().items() if t.dim() > 1}
    assert sorted(str(kind) for kind in kinds.values()) == ["torch.float32", *3 * ["torch.int8"]]
    assert kinds["fc.weight"] == torch.float32
    x, _ = next(iter(loader(seed=1, shuffle=False)))
    with torch.no_grad():
        trained, integer = module.eval()(x), callback.converted(x)
    assert float((trained - integer).norm() / trained.norm()) < 2e-3
    again = replay_quantize(Residual(), edit)
    again.load_state_dict(module.student.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(x), trained)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 1.1}, r"quantize\.start: expected a value in \[0, 1\], got 1\.1"),
        ({"start": 0.5, "freeze_batchnorm": 0.4}, r"quantize\.freeze_batchnorm: expected a value in \[0\.5, 1\]"),
        ({"scheme": "int7"}, r"quantize\.scheme: expected one of .*, or w4a8 and the like .*, got 'int7'"),
        ({"ranges": "magic"}, r"quantize\.ranges: expected one of minmax, .*, got 'magic'"),
        (
            {"learn_steps": True, "layers": {"fc": "fp8"}},
            r"quantize\.learn_steps: expected schemes of integers with a step for a channel or a tensor, got fp8",
        ),
        ({"improve": ["magic"], "start": 1}, r"quantize\.improve: expected some of equalize, smooth, .*, got 'magic'"),
        ({"improve": ["bias"]}, r"quantize\.improve: expected quantize\.start 1, got 0\.7"),
        (
            {"observe": 0.3},
            r"quantize\.observe: expected a value in \[0, 0\.2\], from start to freeze_batchnorm, got 0\.3",
        ),
        (
            {"start": 0.25, "observe": 0.75, "freeze_batchnorm": 1.0},
            r"quantize\.observe: expected a value below 0\.75, so that training rounds before it ends, got 0\.75",
        ),
        ({"observe": 0.1, "learn_steps": True}, r"quantize\.observe: expected none beside learn_steps"),
        ({"percentile": 0.999}, r"quantize\.percentile: expected more than 50, at most 100, got 0\.999"),
        ({"num_batches": 0}, r"quantize\.num_batches: expected at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizationAwareTraining(**arguments)


def test_a_network_in_evaluation_is_refused_unless_nothing_is_trained_in_integers() -> None:
    # A fit leaves modes as they are, and ranges that are never learned round everything away.
    def fit(start: float) -> Distiller:
        pl.seed_everything(0)
        module = Distiller(
            Residual().eval(), task=Classification(3), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)
        )
        callback = QuantizationAwareTraining(start=start, freeze_batchnorm=1.0)
        trainer(max_epochs=1, callbacks=[callback]).fit(module, loader())
        return module

    with pytest.raises(EditError, match=r"quantize: expected student in training mode, got it in evaluation"):
        fit(0.5)
    assert history_of(fit(1)).count("quantize") == 1


@pytest.mark.parametrize("start", [0.5, 1])
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_parameters_in_other_types_than_float32_are_refused_before_training(precision: Any, start: float) -> None:
    module, steps = classifier(), _Steps()
    fit = trainer(max_epochs=2, precision=precision, callbacks=[QuantizationAwareTraining(start=start), steps])
    with pytest.raises(EditError, match=rf"trainer\.precision: .* got {precision}\. Use precision: 32-true or bf16"):
        fit.fit(module, loader())
    assert steps.num == 0
    module.student.fc.double()  # type: ignore[union-attr, operator]
    with pytest.raises(EditError, match=r"quantize: expected student in float32, .* got 'fc\.weight' in float64"):
        trainer(max_epochs=2, callbacks=[QuantizationAwareTraining(start=start)]).fit(module, loader())


@pytest.mark.parametrize("start", [0.5, 1])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_stays_possible(precision: Any, start: float) -> None:
    module, callback = classifier(), QuantizationAwareTraining(start=start)
    trainer(max_epochs=2, precision=precision, callbacks=[callback]).fit(module, loader())
    x, _ = images(12)
    with torch.no_grad():
        assert _distance(callback.converted(x), module.student.eval()(x)) < 2e-3


class _Steps(Callback):
    """Counts the batches of a fit."""

    num = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.num += 1


class Stream(IterableDataset):
    """Samples one by one, nobody knows how many."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(*images(24))


class Plain(pl.LightningModule):
    """Somebody's module, which asks for no progress of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.student = network

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.cross_entropy(self.student(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def plain() -> Plain:
    pl.seed_everything(0)
    return Plain(Residual())


def classifier() -> Distiller:
    pl.seed_everything(0)
    return Distiller(
        Residual(), task=Classification(3), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
    )


@pytest.mark.parametrize("end", [{"max_steps": 2, "max_epochs": -1}, {"max_epochs": 2}])
def test_data_without_a_length_calibrate(end: dict[str, int]) -> None:
    module, callback = plain(), QuantizationAwareTraining(start=1, num_batches=2)
    trainer(**end, callbacks=[callback]).fit(module, DataLoader(Stream(), batch_size=12))
    assert history_of(module).count("quantize") == 1


def test_a_trial_of_one_batch_ends_before_start_and_says_so() -> None:
    callback = QuantizationAwareTraining(start=0.5)
    with pytest.warns(UserWarning, match=r"quantize\.start: expected training to go beyond 0\.5 of its steps"):
        trainer(fast_dev_run=True, callbacks=[callback]).fit(plain(), loader())
    with pytest.raises(EditError, match=r"a finished fit that reached start=0\.5, got none, .* fast_dev_run has seen"):
        _ = callback.converted


def test_training_in_integers_says_that_a_loader_without_a_length_needs_steps() -> None:
    fit = trainer(max_epochs=2, callbacks=[QuantizationAwareTraining(start=0.5)])
    with pytest.raises(EditError, match=r"trainer\.max_steps: .* loader has no length .* 2 epochs .*Set max_steps"):
        fit.fit(plain(), DataLoader(Stream(), batch_size=12))
    limited = trainer(max_epochs=2, limit_train_batches=2, callbacks=[QuantizationAwareTraining(start=0.5)])
    module = plain()
    limited.fit(module, DataLoader(Stream(), batch_size=12))
    assert history_of(module).count("quantize") == 1


def test_the_percentile_says_what_is_cut_off() -> None:
    first: list[Tensor] = []
    for percentile in (100.0, 90.0):
        module = classifier()
        callback = QuantizationAwareTraining(start=1, ranges="percentile", percentile=percentile, num_batches=2)
        trainer(max_steps=1, callbacks=[callback]).fit(module, loader())
        scales = [tensor for name, tensor in module.student.state_dict().items() if name.endswith(".scale")]
        first.append(next(scale for scale in scales if scale.numel() == 1))
    assert first[1] < 0.9 * first[0]


def test_at_first_ranges_alone_are_learned() -> None:
    rounding: list[set[bool]] = []
    lost: list[float] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            network = pl_module.student
            if isinstance(network, Captured):
                fakes: list[Any] = [each for each in network.modules() if hasattr(each, "fake_quant_enabled")]
                rounding.append({bool(fake.fake_quant_enabled[0]) for fake in fakes})
                network.eval()
                with torch.no_grad():
                    got = network(images(12)[0])
                    with float_mode(network):
                        lost.append(float((got - network(images(12)[0])).norm()))
                network.train()

    module, callback = classifier(), QuantizationAwareTraining(start=0.25, observe=0.25, freeze_batchnorm=0.75)
    trainer(max_epochs=4, callbacks=[callback, Look()]).fit(module, loader())
    assert rounding == 4 * [{False}] + 8 * [{True}]
    assert max(lost[:4]) == 0 < min(lost[4:])
    ranges: list[Any] = [each for each in module.student.modules() if hasattr(each, "activation_post_process")]
    assert all(torch.isfinite(each.activation_post_process.min_val).all() for each in ranges)


class Stop(Callback):
    """Ends a fit early, as EarlyStopping and limits of time do, and keeps what a checkpoint would hold of it."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.state: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.state = copy.deepcopy(dict(pl_module.student.state_dict()))  # type: ignore[operator, union-attr]
            trainer.should_stop = True


@pytest.mark.parametrize(("scheme", "fallback"), [("int8", None), ("int8", "parametrize"), ("w4a8", None)])
def test_a_fit_that_ends_while_ranges_alone_are_learned_converts_by_them(scheme: str, fallback: str | None) -> None:
    module, stop = classifier(), Stop(8)
    if fallback is not None:
        module.student.forward = types.MethodType(_branching, module.student)  # type: ignore[method-assign]
    callback = QuantizationAwareTraining(scheme, start=0.25, observe=0.5, freeze_batchnorm=0.9, fallback=fallback)
    with pytest.warns(UserWarning, match=r"quantize\.observe: expected training to go beyond 0\.75 of its steps"):
        trainer(max_epochs=4, callbacks=[callback, stop]).fit(module, loader())
    x, network = images(64, seed=1)[0], module.student.eval()
    assert isinstance(network, Captured) == (fallback is None)
    (edit,) = history_of(module)
    saved = replay_quantize(classifier().student, edit)
    saved.load_state_dict(stop.state)
    with torch.no_grad():
        converted, from_saved = callback.converted(x), deployed_form(saved, example_tensors(edit))(x)
        assert torch.equal(from_saved, converted)
        assert _distance(converted, network(x)) < 2e-3
        with float_mode(network):
            assert 0 < _distance(converted, network(x)) < 0.3  # weights and ranges have moved for four steps


def _branching(self: Residual, x: Tensor) -> Tensor:
    return Residual.forward(self, x if x.mean() > 100 else x + 0)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_a_checkpoint_of_the_last_epoch_can_be_converted(tmp_path: Path) -> None:
    module, callback = classifier(), QuantizationAwareTraining(start=0.5)
    first = trainer(max_epochs=2, callbacks=[callback])
    first.fit(module, loader())
    first.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    again, other = classifier(), QuantizationAwareTraining(start=0.5)
    trainer(max_epochs=2, callbacks=[other]).fit(again, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    x, _ = images(12)
    with torch.no_grad():
        assert torch.equal(other.converted(x), callback.converted(x))


def test_a_network_is_trained_on_in_the_schemes_that_it_has() -> None:
    module = Distiller(Residual(), task=Classification(3), optimizer=torch.optim.SGD)
    trainer(max_epochs=1, callbacks=[QuantizationAwareTraining(start=0.0)]).fit(module, loader())
    with pytest.raises(CaptureError, match=r"got one that rounds to be trained\. Give what the callback's converted"):
        export_program(module.student, [images(2)[0]])
    others: list[tuple[dict[str, Any], str]] = [
        ({"scheme": "w4a8"}, "int8 and w4a8"),
        ({"keep": ["fc"]}, "int8 with others for some layers"),
    ]
    for settings, got in others:
        with pytest.raises(EditError, match=f"expected the schemes in which .* got others: {got}"):
            trainer(max_epochs=1, callbacks=[QuantizationAwareTraining(**settings)]).fit(module, loader())
    trainer(max_epochs=1, callbacks=[QuantizationAwareTraining(start=0.5)]).fit(module, loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "fc"}, r"quantize\.keep: expected a list of patterns, got 'fc'\. Write \[fc\]"),
        ({"layers": ["fc"]}, r"quantize\.layers: expected schemes by pattern, got \['fc'\]"),
        ({"improve": "bias", "start": 1}, r"quantize\.improve: expected some of .*, got 'bias'"),
        ({"lengths": [{"dimension": 1}]}, r"quantize\.lengths: expected a list of compress\.export\.Length, got \[\{"),
        ({"lengths": Length()}, r"quantize\.lengths: expected a list of compress\.export\.Length, got Length\("),
        ({"progressive": {"bits": [8, 4]}}, r"quantize\.progressive: expected compress\.quantize\.Stages, got \{"),
    ],
)
def test_values_of_another_kind_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizationAwareTraining(**settings)

"""Whole settings: several teachers, several tasks, exits, mutual learning, averages, missing labels, two domains."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compress.distill import (
    Classification,
    CorrelationAlignment,
    Distiller,
    EarlierSelf,
    Ensemble,
    Exits,
    Hint,
    MaximumMeanDiscrepancy,
    MovingAverage,
    MultiLabel,
    MultiTask,
    MutualDistiller,
    Regression,
    SoftTarget,
    confidence_weights,
    soft_target,
)
from compress.errors import DataError, RecipeError
from compress.prune import StructuredPruning
from compress.quantize import QuantizationAwareTraining
from compress.surgery import ResumePoint, history_of
from tests.networks import Residual, images, loader, trainer


def make(student: nn.Module | None = None, *, learning_rate: float = 0.05, **arguments: Any) -> Distiller:
    return Distiller(
        student or Residual(8),
        task=arguments.pop("task", Classification(3)),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=learning_rate),
        **arguments,
    )


def test_several_teachers_with_fixed_weights() -> None:
    torch.manual_seed(0)
    teachers = [Residual(8).eval(), Residual(4).eval()]
    module = make(Residual(4).eval(), teacher=Ensemble(teachers, [0.25, 0.75]), losses=[SoftTarget(weight=1.0)])
    x, y = images(6)
    module.prepare(lambda: (x, y))
    value = module.objective(module.lesson((x, y)))[0]
    student = module.student(x)
    expected = sum(w * soft_target(student, teacher(x)) for w, teacher in zip([0.25, 0.75], teachers))
    assert torch.allclose(value, torch.as_tensor(expected), rtol=1e-5)


def test_several_teachers_by_confidence() -> None:
    torch.manual_seed(0)
    teachers = [Residual(8).eval(), Residual(4).eval()]
    ensemble = Ensemble(teachers, weighting="confidence")
    module = make(Residual(4).eval(), teacher=ensemble, losses=[SoftTarget(weight=1.0)])
    x, y = images(6)
    value = module.objective(module.lesson((x, y)))[0]
    weights = confidence_weights([teacher(x) for teacher in teachers], y)
    student, expected = module.student(x), torch.zeros(())
    for row in range(6):
        for number, teacher in enumerate(teachers):
            answer = teacher(x)[row : row + 1]
            expected = expected + weights[number, row] * soft_target(student[row : row + 1], answer) / 6
    assert torch.allclose(value, expected, rtol=1e-4)


class TwoHeads(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.kind, self.size = nn.Linear(width, 3), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"kind": self.kind(y), "size": self.size(y)}


class TwoTargets(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.x, self.y = images(48)

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[index], {"kind": self.y[index], "size": self.x[index].mean((1, 2))}


def test_several_tasks_with_a_loss_and_weight_each() -> None:
    torch.manual_seed(0)
    task = MultiTask({"kind": Classification(3), "size": Regression()}, weights={"size": 2.0})
    module = make(TwoHeads(), task=task, teacher=TwoHeads(16), losses=[SoftTarget(weight=0.5, output="kind")])
    data = DataLoader(TwoTargets(), batch_size=12)
    fit = trainer(max_epochs=2)
    fit.fit(module, data, data)
    assert set(fit.callback_metrics) >= {"val/kind_accuracy", "val/size_mae", "train/soft_target_loss"}
    x, targets = next(iter(data))
    outputs = module(x)
    expected = (
        task.tasks["kind"].loss(outputs["kind"], targets["kind"])
        + 2 * (outputs["size"] - targets["size"]).square().mean()
    )
    assert torch.allclose(task.loss(outputs, targets), expected)
    with pytest.raises(DataError, match="outputs: expected a mapping with kind, size, got none for size"):
        task.loss({"kind": outputs["kind"]}, targets)
    with pytest.raises(RecipeError, match=r"task\.weights: expected names among kind, got colour"):
        MultiTask({"kind": Classification(3)}, weights={"colour": 1.0})


def test_tasks_do_not_count_what_has_no_label() -> None:
    logits, numbers = torch.randn(4, 3), torch.randn(4, 2)
    partly = torch.tensor([0, -100, 2, -100])
    assert torch.allclose(Classification(3).loss(logits, partly), Classification(3).loss(logits[::2], partly[::2]))
    assert float(Classification(3).loss(logits, torch.full((4,), -100))) == 0
    assert float(Regression().loss(numbers, torch.full((4, 2), torch.nan))) == 0
    labels = torch.tensor([[1, 0, -100]] * 4)
    assert torch.allclose(MultiLabel(3).loss(logits, labels), MultiLabel(2).loss(logits[:, :2], labels[:, :2]))
    metrics = Classification(3).metrics("")
    metrics.update(logits, torch.tensor([int(logits[0].argmax()), -100, -100, -100]))
    assert float(metrics.compute()["accuracy"]) == 1.0


def test_unlabelled_data_teach_through_the_teacher_alone() -> None:
    torch.manual_seed(0)
    x, _ = images(12)
    module = make(teacher=Residual(8), losses=[SoftTarget(weight=0.7)])
    value, parts = module.eval().objective(module.lesson(x))
    assert "train/task_loss" not in parts
    assert torch.allclose(value, 0.7 * parts["train/soft_target_loss"])
    fit = trainer(max_epochs=1)
    fit.fit(module.train(), DataLoader(TensorDataset(x), batch_size=6))
    lonely = make()
    with pytest.raises(RecipeError, match="expected labels or a teacher"):
        lonely.objective(lonely.lesson(x))


def test_exits_are_taught_by_labels_and_by_the_last_layer() -> None:
    torch.manual_seed(0)
    exits = Exits(["norm", "norm1"], weight=1.0)
    module = make(losses=[exits])
    fit = trainer(max_epochs=8)
    fit.fit(module, loader())
    assert [p.shape for p in exits.heads.parameters() if p.dim() == 2] == [(3, 8), (3, 16)]
    x, y = images(48)
    module.eval()
    after = float(exits(module.lesson((x, y))))
    fresh = copy.deepcopy(exits)
    for head in fresh.heads.values():
        assert isinstance(head, nn.Linear)
        head.reset_parameters()
    assert after < float(fresh(module.lesson((x, y))))
    value = exits(module.lesson((x, y)))
    gradient = torch.autograd.grad(value, module.student.get_parameter("fc.weight"), allow_unused=True)
    assert gradient == (None,)  # the last layer teaches and is not taught


def test_mutual_learning_trains_both() -> None:
    torch.manual_seed(0)
    module = MutualDistiller(
        Residual(4),
        Residual(8),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        losses=[SoftTarget(weight=0.5, temperature=1.0)],
    )
    before = copy.deepcopy(module.state_dict())
    fit = trainer(max_epochs=2)
    fit.fit(module, loader(), loader(seed=1))
    assert {"train/loss", "train/peer_loss", "train/peer_soft_target_loss", "val/accuracy"} <= set(fit.callback_metrics)
    for name, parameter in module.named_parameters():
        assert not torch.equal(before[name], parameter), name
    with pytest.raises(RecipeError, match="expected losses between outputs for mutual learning, got Hint"):
        MutualDistiller(
            Residual(4), Residual(8), task=Classification(3), optimizer=torch.optim.Adam, losses=[Hint({"fc": "fc"})]
        )


def test_moving_average_is_the_average_of_the_students_weights() -> None:
    torch.manual_seed(0)
    average = MovingAverage(decay=0.5)
    module = make(teacher=average, losses=[SoftTarget(weight=0.5)])
    expected = {name: p.detach().clone() for name, p in module.student.named_parameters()}
    steps: list[int] = []
    original = module.on_train_batch_end

    def after_step(*arguments: Any) -> None:
        original(*arguments)
        steps.append(1)
        keep = min(0.5, (1 + len(steps)) / (10 + len(steps)))
        for name, p in module.student.named_parameters():
            expected[name] = keep * expected[name] + (1 - keep) * p.detach()

    module.on_train_batch_end = after_step  # type: ignore[method-assign, assignment]
    trainer(max_epochs=2).fit(module, loader())
    assert len(steps) == 8
    assert average.network is not None
    for name, p in average.network.named_parameters():
        assert torch.allclose(p, expected[name], atol=1e-6), name
    assert not any("average" in name or "teacher" in name for name in module.state_dict())


def test_what_was_pruned_teaches_itself_in_integers() -> None:
    torch.manual_seed(0)
    module = make(teacher=EarlierSelf("quantize"), losses=[SoftTarget(weight=0.5)])
    pruning = StructuredPruning(0.5, schedule="one_shot", start=0.2, end=0.4, round_to=4)
    trainer(max_epochs=4, callbacks=[pruning, QuantizationAwareTraining(start=0.6)]).fit(module, loader())
    assert [edit.kind for edit in history_of(module)] == ["prune", "quantize"]
    assert module.teacher is not None
    assert module.teacher.get_parameter("conv1.weight").shape[0] == 8
    assert not any("fake_quant" in name for name in module.teacher.state_dict())
    with pytest.raises(RecipeError, match=r"teacher\.before: expected prune or quantize, got 'export'"):
        EarlierSelf("export")


@pytest.mark.parametrize("own", [MovingAverage, EarlierSelf])
def test_own_teachers_live_through_pruning_quantization_and_resume(own: Any, tmp_path: Path) -> None:
    def fit(stop: int | None) -> Distiller:
        torch.manual_seed(0)
        module = make(teacher=own(), losses=[SoftTarget(weight=0.5)])
        path = tmp_path / f"{own.__name__}.ckpt"
        callbacks = [
            StructuredPruning(0.5, schedule="linear", start=0.2, end=0.4, num_edits=2, round_to=4),
            QuantizationAwareTraining(start=0.7),
        ]
        arguments: dict[str, Any] = {"max_epochs": 10, "callbacks": [*callbacks, ResumePoint(path)]}
        arguments["enable_checkpointing"] = True
        if stop is not None:
            arguments["callbacks"].append(Stop(stop))
        with torch.random.fork_rng(), contextlib.suppress(KeyboardInterrupt, SystemExit):
            trainer(**arguments).fit(
                module, loader(shuffle=False), ckpt_path=path if path.exists() else None, weights_only=True
            )
        return module

    whole = fit(None)
    (tmp_path / f"{own.__name__}.ckpt").unlink()
    assert history_of(whole).count("prune") == 2
    assert whole.teacher is not None
    width = whole.teacher.get_parameter("conv1.weight").shape[0]
    assert width == (8 if own is MovingAverage else 16)
    for epoch in (3, 8):
        fit(epoch)
    again = fit(None)
    assert again.teacher is not None
    for name, tensor in whole.teacher.state_dict().items():
        assert tensor.shape == again.teacher.state_dict()[name].shape
    if own is EarlierSelf:
        buffer = io.BytesIO()
        torch.save(whole.teacher.state_dict(), buffer)


def test_activations_of_an_earlier_self_are_learned_from() -> None:
    torch.manual_seed(0)
    module = make(teacher=EarlierSelf(), losses=[Hint({"conv1": "conv1"}, weight=1.0)])
    pruning = StructuredPruning(0.5, schedule="one_shot", start=0.4, end=0.6, round_to=4)
    trainer(max_epochs=4, callbacks=[pruning]).fit(module, loader())
    assert history_of(module).count("prune") == 1
    projector = module.losses[0].projectors["0"].linear  # type: ignore[index, union-attr]
    assert tuple(projector.weight.shape[:2]) == (16, 8)
    # It began as the identity, of which the kept inputs were left, and has learned since.
    assert not torch.equal(projector.weight, projector.weight.round())


class Stop(Callback):
    """What Ctrl-C does, in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 2:
            raise KeyboardInterrupt


def test_two_domains_are_aligned() -> None:
    torch.manual_seed(0)
    source, target = loader(num=48), DataLoader(TensorDataset(images(48, seed=1)[0] * 3 + 1), batch_size=12)
    for loss in (MaximumMeanDiscrepancy(["relu"], weight=20.0), CorrelationAlignment(["relu"], weight=20.0)):
        apart = {}
        for weight in (0.0, 20.0):
            torch.manual_seed(0)
            used = copy.deepcopy(loss)
            used.weight = weight
            module = make(teacher=Residual(8), losses=[SoftTarget(weight=0.5), used])
            fit = trainer(max_epochs=8)
            fit.fit(module, {"source": source, "target": target})
            apart[weight] = float(fit.callback_metrics[f"train/{loss.name}_loss"])
        assert apart[20.0] < apart[0.0]

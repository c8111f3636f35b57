"""EMA and SWA follow edits, end equal in shape, and resume bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from compress.errors import EditError
from compress.quantize import QuantizationAwareTraining
from compress.surgery import Captured, RandomStates, history_of
from compress.surgery.averages import find_averages
from compress.surgery.slicing import slice_tensor
from tests.networks import Residual, loader, trainer
from tests.surgery.modules import Foreign, SaveAfter, pruning, resumable


def ema() -> Callback:
    return EMAWeightAveraging(decay=0.8)


def swa() -> Callback:
    return StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=1)


def fit(*callbacks: Callback, checkpoint: Path | None = None, seed: int = 0, epochs: int = 5) -> Foreign:
    pl.seed_everything(seed, verbose=False)
    module = Foreign()
    run = trainer(max_epochs=epochs, callbacks=[*callbacks, RandomStates()], enable_checkpointing=False)
    run.fit(module, resumable(), loader(num=12, shuffle=False), ckpt_path=checkpoint, weights_only=checkpoint is None)
    return module


@pytest.mark.parametrize(("make", "steps"), [(ema, [2, 7]), (WeightAveraging, [11]), (swa, [14])])
def test_an_average_is_pruned_and_resumes_bit_for_bit(make: Any, steps: list[int], tmp_path: Path) -> None:
    average, save = make(), SaveAfter(tmp_path, steps)
    whole = fit(pruning(num_edits=2), average, save)
    twin = average._average_model
    twin = twin.module if isinstance(twin, AveragedModel) else twin
    assert whole.net.get_parameter("conv1.weight").shape[0] == 8
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    if make is not swa:  # what was trained is the average in the end
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, twin.state_dict()[name]), name
    for step in steps:  # before, between or after the edits, in mid-epoch
        again = fit(pruning(num_edits=2), make(), checkpoint=tmp_path / f"step_{step}.ckpt", seed=99)
        assert history_of(again) == history_of(whole)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), (step, name)


def test_the_average_keeps_its_own_values() -> None:
    """An edit cuts the average's values, it does not replace them by the network's."""

    class Compare(Callback):
        num = 0
        cut: Any = None

        def on_before_edit(self, trainer: pl.Trainer, pl_module: Any, edit: Any) -> None:
            average = trainer.callbacks[1]._average_model.module.net  # type: ignore[attr-defined]
            self.cut = slice_tensor(average.conv1.weight.detach(), edit.data["slices"]["conv1.weight"])

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if self.cut is not None:
                average = trainer.callbacks[1]._average_model.module.net  # type: ignore[attr-defined]
                assert torch.equal(average.conv1.weight, self.cut)
                assert not torch.equal(average.conv1.weight, pl_module.net.conv1.weight)
                self.num, self.cut = self.num + 1, None

    compare = Compare()
    fit(pruning(schedule="one_shot"), ema(), compare)
    assert compare.num == 1


@pytest.mark.parametrize(
    "kind",
    [{"avg_fn": get_ema_avg_fn(0.8)}, {"multi_avg_fn": get_ema_multi_avg_fn(0.8)}, {}],
    ids=["one by one", "all at once", "mean"],
)
def test_an_average_of_a_quantised_network_keeps_its_ranges(kind: dict[str, Any], tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        qat = QuantizationAwareTraining(start=0.5, freeze_batchnorm=0.7, attribute="net")
        return [pruning(start=0.2, end=0.3, num_edits=1), WeightAveraging(**kind), qat]

    module = fit(*callbacks(), SaveAfter(tmp_path, [14]), epochs=4)
    assert [edit.kind for edit in history_of(module)] == ["prune", "quantize"]
    assert isinstance(module.net, Captured)
    state = module.net.state_dict()
    assert all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point())
    switches = [t for name, t in state.items() if name.endswith("fake_quant_enabled")]
    assert switches
    assert all(int(t) == 1 for t in switches)
    if "avg_fn" not in kind:
        return
    again = fit(*callbacks(), checkpoint=tmp_path / "step_14.ckpt", seed=99, epochs=4)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_after_calibration_the_average_is_what_was_quantised() -> None:
    average: Any = ema()
    qat = QuantizationAwareTraining(start=1, improve=["equalize", "bias"], num_batches=2, attribute="net")
    module = fit(qat, average, epochs=2)  # which stands before the average, and works after it
    assert isinstance(module.net, Captured)
    twin = average._average_model.module.net
    for name, tensor in module.net.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name


class OwnAverage(Foreign):
    """A user's own average of the network alone, as a part of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = AveragedModel(self.net, avg_fn=get_ema_avg_fn(0.8), use_buffers=True).requires_grad_(False)

    def on_train_start(self) -> None:
        self.ema.eval()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.update_parameters(self.net)


def test_an_average_inside_the_module_follows() -> None:
    torch.manual_seed(0)
    module = OwnAverage()
    trainer(max_epochs=3, callbacks=[pruning()]).fit(module, loader())
    shapes = {name: p.shape for name, p in module.net.named_parameters()}
    assert shapes["conv1.weight"][0] == 8
    assert {name: p.shape for name, p in module.ema.module.named_parameters()} == shapes
    assert not any(p.requires_grad for p in module.ema.parameters())
    assert not any(m.training for m in module.ema.module.modules())


def test_layers_made_after_the_copy_are_named() -> None:
    class Late(Foreign):
        def setup(self, stage: str) -> None:
            self.late = nn.Linear(2, 2)

    late = EMAWeightAveraging(update_starting_at_step=99)
    with pytest.raises(EditError, match=r"EMAWeightAveraging: expected a copy of Late.*difference in late\.weight"):
        trainer(max_epochs=2, callbacks=[pruning(), late]).fit(Late(), loader())


def test_other_copies_are_none_of_our_business() -> None:
    class Keeper(Callback):
        def __init__(self) -> None:
            self.other = AveragedModel(nn.Linear(2, 2))
            self.module = copy.deepcopy(Residual(4))

    run = trainer(max_epochs=1, callbacks=[Keeper()])
    assert find_averages(run, Foreign(), "net") == []

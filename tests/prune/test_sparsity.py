"""Weights that become zero during a fit stay exactly zero, through momentum, edits, resuming and quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from compress.errors import EditError, RecipeError
from compress.prune import StructuredPruning, WeightSparsity
from compress.quantize import QuantizationAwareTraining
from compress.surgery import RandomStates, ResumePoint, history_of
from tests.networks import Residual, loader, trainer
from tests.prune.test_callback import Foreign

SPARSE = ("conv1.weight", "conv2.weight")


class Watch(Callback):
    """Keeps the fraction of zeros of each weight after each step."""

    def __init__(self) -> None:
        self.shares: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        network: Any = pl_module.backbone
        self.shares.append({n: float((p == 0).float().mean()) for n, p in network.named_parameters()})


class Stop(Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


def sparsity(ratio: float | None = None, **changes: Any) -> WeightSparsity:
    values = {"schedule": "linear", "start": 0.2, "end": 0.6, "num_edits": 3, "attribute": "backbone", **changes}
    return WeightSparsity(ratio, **values)


def fit(*callbacks: Callback, network: nn.Module | None = None, **arguments: Any) -> Foreign:
    pl.seed_everything(0, verbose=False)
    module = Foreign(network or Residual())
    path = arguments.pop("ckpt_path", None)
    run = trainer(max_epochs=4, callbacks=list(callbacks), **arguments)
    run.fit(module, loader(), ckpt_path=path, weights_only=True)
    return module


def weight(module: Foreign, name: str) -> Tensor:
    return module.backbone.get_parameter(name).detach()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_zeros_grow_by_schedule_and_stay(scope: str) -> None:
    watch = Watch()
    module = fit(sparsity(0.6, scope=scope), watch)
    mean = [sum(share[name] for name in SPARSE) / 2 for share in watch.shares]
    assert sorted({round(value, 2) for value in mean}) == [0.0, 0.2, 0.4, 0.6]
    assert mean == sorted(mean)
    others = {name for name in watch.shares[-1] if watch.shares[-1][name] > 0}
    assert others == set(SPARSE)  # neither stem nor fc, no bias, no norm
    assert float((weight(module, "conv1.weight") == 0).float().mean()) == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4)])
def test_patterns_hold(pattern: str, n: int, m: int) -> None:
    module = fit(sparsity(pattern=pattern))
    for name in SPARSE:
        groups = weight(module, name).movedim(1, -1).unflatten(-1, (-1, m))
        assert bool(((groups != 0).sum(-1) == n).all())


def test_masks_follow_channels_that_go() -> None:
    for pattern in ("unstructured", "2:4"):
        prune = StructuredPruning(0.5, schedule="linear", start=0.3, end=0.7, num_edits=2, attribute="backbone")
        watch = Watch()
        module = fit(sparsity(pattern=pattern, start=0.1, end=0.2), prune, watch)
        assert history_of(module).count("prune") == 2
        assert weight(module, "conv2.weight").shape[1] == 16
        assert watch.shares[-1]["conv2.weight"] > 0.3
        after = watch.shares[-3:]
        assert all(share == after[0] for share in after)
        if pattern == "2:4":
            groups = weight(module, "conv2.weight").movedim(1, -1).unflatten(-1, (-1, 4))
            assert int((groups != 0).sum(-1).max()) == 2


def test_resuming_is_bit_for_bit(tmp_path: Path) -> None:
    def callbacks(folder: str, *more: Callback) -> list[Callback]:
        return [sparsity(0.5), RandomStates(), *more, ResumePoint(tmp_path / folder / "resume.ckpt")]

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = fit(*callbacks("a"), enable_checkpointing=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(*callbacks("b", Stop()), enable_checkpointing=True)
    again = fit(*callbacks("b"), enable_checkpointing=True, ckpt_path=tmp_path / "b" / "resume.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_zeros_are_zeros_in_int8() -> None:
    quantize = QuantizationAwareTraining(start=0.7, attribute="backbone")
    module = fit(sparsity(0.5), quantize)
    zeros = weight(module, "conv2.weight") == 0
    assert float(zeros.float().mean()) == pytest.approx(0.5, abs=0.01)
    integers = [
        tensor
        for tensor in quantize.converted.state_dict().values()
        if tensor.dtype == torch.int8 and tensor.shape == zeros.shape
    ]
    assert integers
    assert any(bool((tensor[zeros] == 0).all()) for tensor in integers)


def test_nothing_to_make_sparse_is_an_error() -> None:
    class Two(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 3))

    with pytest.raises(EditError, match=r"sparsify: expected layers of Two to make sparse, got none"):
        fit(sparsity(0.5), network=Two())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, r"sparsify\.ratio: expected a value in \[0, 1\), got 1\.0"),
        ({"ratio": 0.5, "pattern": "2:4"}, r"sparsify\.ratio: expected none beside pattern 2:4"),
        ({"pattern": "4:2"}, r"sparsify\.pattern: expected 'unstructured' or N:M"),
        ({"scope": "world"}, r"sparsify\.scope: expected one of layer, global"),
        ({"schedule": "square"}, r"sparsify\.schedule: expected one of cubic"),
        ({"start": 0.6, "end": 0.5}, r"sparsify\.start, sparsify\.end"),
        ({"num_edits": 0}, r"sparsify\.num_edits"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        WeightSparsity(**arguments)


def test_a_compiled_network_becomes_sparse() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    module: Any = pl.LightningModule()
    module.student = torch.compile(network, backend="eager")
    sparse = WeightSparsity(0.5, ignore=["0"])
    assert sparse.network(module) is network
    sparse.rehearse(sparse.network(module))
    with pytest.raises(EditError, match="layers"):
        WeightSparsity(pattern="2:4", ignore=["0", "1", "2"]).rehearse(network)

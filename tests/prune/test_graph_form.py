"""Networks with sizes written into their code are pruned on their captured graph, in a fit as anywhere else."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compress.data import keyed_loader
from compress.distill import Classification, Distiller, Hint, MovingAverage, SoftTarget
from compress.prune import StructuredPruning, apply_removal, find_groups, plan_removal
from compress.quantize import QuantizationAwareTraining
from compress.surgery import Captured, RandomStates, ResumePoint, history_of
from compress.surgery.capture import export_program
from tests.networks import trainer
from tests.prune.coupling.networks import Shuffled


class Written(nn.Module):
    """A head's width as a number in the code, BatchNorm with odd constants, dropout, a bare parameter, a branch."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16, eps=1e-3, momentum=0.3)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = nn.functional.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).view(-1, 16, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)  # sixteen places, four heads
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 16, 16)
        x = x + self.scale * self.proj(y)
        if self.training:
            x = x + 0 * torch.rand_like(x)
        return self.fc(self.dropout(x.mean(1)))


def data(num: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (num,), generator=generator)
    x = torch.randn(num, 1, 8, 8, generator=generator)
    x[:, 0, :3, :3] += (labels - 1.0)[:, None, None]
    return TensorDataset(x, labels)


def half(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    widths = {group.name: group.width // 2 for group in find_groups(network, inputs)}
    planned = plan_removal(network, inputs, widths)
    assert planned is not None
    return json.loads(json.dumps(planned))


def test_code_that_follows_shapes_keeps_its_class() -> None:
    network, x = Shuffled(), data()[:6][0]
    planned = half(network, (x,))
    assert planned["form"] == "module"
    assert type(apply_removal(network, planned)) is Shuffled


def test_a_captured_graph_is_smaller_trains_and_replays() -> None:
    torch.manual_seed(0)
    network, x = Written(), data()[:6][0]
    planned = half(network, (x,))
    assert planned["form"] == "graph"
    pruned = apply_removal(copy.deepcopy(network).train(), planned)
    assert isinstance(pruned, Captured)
    assert pruned.training
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in network.parameters())
    assert dict(pruned.named_parameters()).keys() == dict(network.named_parameters()).keys()
    before = {name: p.detach().clone() for name, p in pruned.named_parameters()}
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    pruned(data()[:][0]).square().mean().backward()  # another batch size
    optimizer.step()
    for name, parameter in pruned.named_parameters():
        assert not torch.equal(before[name], parameter), name
    replayed = apply_removal(copy.deepcopy(network), planned)
    replayed.load_state_dict(pruned.state_dict())
    assert torch.allclose(replayed.eval()(x), pruned.eval()(x), atol=1e-6)
    # A second removal, on the graph; then it can be exported again.
    again = half(pruned, (x,))
    twice = apply_removal(copy.deepcopy(pruned), again)
    assert twice(x).shape == pruned(x).shape
    program: Any = export_program(twice.eval(), (x,))
    assert torch.allclose(program.module()(x), twice(x), atol=1e-5)


def test_batchnorm_and_dropout_follow_the_mode() -> None:
    torch.manual_seed(0)
    network, (x, _) = Written(), data()[:24]
    pruned = apply_removal(network, half(network, (x,)))
    running = pruned.state_dict()["norm.running_mean"].clone()
    pruned.train()
    assert not torch.equal(pruned(x), pruned(x))
    assert not torch.equal(pruned.state_dict()["norm.running_mean"], running)
    pruned.eval()
    assert torch.equal(pruned(x), pruned(x))


class Stop(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise KeyboardInterrupt


def fit(folder: Path, *, stop: int | None = None, own: bool = False) -> Distiller:
    pl.seed_everything(0, verbose=False)
    path = folder / "resume.ckpt"
    module = Distiller(
        Written(),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        teacher=MovingAverage(0.9) if own else Written(),
        losses=[SoftTarget(weight=0.5), *([] if own else [Hint({"norm": "norm", "proj": "proj"})])],
    )
    callbacks: list[Callback] = [
        StructuredPruning(0.5, schedule="linear", start=0.2, end=0.4, num_edits=2, round_to=2),
        QuantizationAwareTraining(start=0.7),
        RandomStates(),
        *([Stop(stop)] if stop is not None else []),
        ResumePoint(path),
    ]
    run = trainer(max_epochs=10, callbacks=callbacks, enable_checkpointing=True)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        loader = keyed_loader(DataLoader(data(), batch_size=12, shuffle=True), seed=0)
        run.fit(module, loader, ckpt_path=path if path.exists() else None, weights_only=True)
    return module


def test_norms_that_were_frozen_are_so_after_a_replay() -> None:
    network, x = Written().train(), data()[:6][0]
    network.norm.eval()
    planned = half(network, (x,))
    again = apply_removal(Written().train(), planned)  # a resume replays before the hook that freezes has run
    again(x)
    assert torch.equal(again.get_buffer("norm.running_mean"), torch.zeros(8))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Distiller:
    return fit(tmp_path_factory.mktemp("whole"))


def test_a_fit_prunes_twice_and_quantises(whole: Distiller) -> None:
    assert [edit.kind for edit in history_of(whole)] == ["prune", "prune", "quantize"]
    assert [edit.data.get("form") for edit in history_of(whole)] == ["module", "graph", None]  # heads go last
    student = whole.student
    assert isinstance(student, Captured)
    assert student.get_parameter("qkv.weight").shape[0] == 24  # two of four heads
    assert student.get_parameter("stem.weight").shape[0] == 8


@pytest.mark.parametrize("stop", [*(pytest.param(stop, marks=pytest.mark.slow) for stop in (3, 5)), 8])
def test_resuming_is_bit_for_bit(whole: Distiller, stop: int, tmp_path: Path) -> None:
    fit(tmp_path, stop=stop)
    again = fit(tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_moving_average_is_pruned_along(tmp_path: Path) -> None:
    module = fit(tmp_path, own=True)
    assert module.teacher is not None
    assert module.teacher.get_parameter("qkv.weight").shape[0] == 24

"""Any optimiser, several of them, accumulation and mixed precision: weights move and moments stay through edits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, GradientAccumulationScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.surgery import history_of, progress
from compress.surgery.relink import relink_optimizer
from compress.surgery.slicing import apply_slices, slice_tensor
from tests.networks import Residual, loader, trainer
from tests.surgery.modules import Foreign, Make, Moved, pruning

SLICES = {"0.weight": {"0": [0, 2]}, "0.bias": {"0": [0, 2]}, "1.weight": {"1": [0, 2]}}


def split_by_decay(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Two groups, the second without weight decay, each in an order of its own."""
    given = list(parameters)
    groups = [
        {"params": [p for p in reversed(given) if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in given if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


MAKES: list[Make] = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True),
    lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    split_by_decay,
]


class Moments(Callback):
    """Compares all that the optimisers keep of the kept channels directly before and after each edit."""

    def __init__(self) -> None:
        self.expected: list[dict[str, dict[str, Any]]] | None = None
        self.compared: set[str] = set()
        self.num = 0

    def on_before_edit(self, trainer: pl.Trainer, pl_module: pl.LightningModule, edit: Any) -> None:
        self.expected = []
        for optimizer in trainer.optimizers:
            names = {id(p): name for name, p in pl_module.named_parameters()}
            self.expected.append(
                {
                    names[id(p)]: {key: _cut(value, p, names[id(p)], edit) for key, value in state.items()}
                    for p, state in optimizer.state.items()
                }
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.expected is None:
            return
        for optimizer, states in zip(trainer.optimizers, self.expected):
            assert {id(p) for p in optimizer.state} <= {id(p) for p in pl_module.parameters()}
            for name, state in states.items():
                got = optimizer.state[pl_module.get_parameter(name)]
                assert got.keys() == state.keys()
                for key, value in state.items():
                    assert torch.equal(torch.as_tensor(got[key]), torch.as_tensor(value)), (name, key)
                    self.compared.add(key)
        self.expected, self.num = None, self.num + 1


def _cut(value: Any, parameter: Tensor, name: str, edit: Any) -> Any:
    kept = edit.data["slices"].get(name.removeprefix("net."), {})
    if not torch.is_tensor(value) or value.dim() != parameter.dim():
        return value
    # Where a moment has been summed over a dimension (Adafactor), there is nothing to cut.
    return slice_tensor(value, {d: k for d, k in kept.items() if value.shape[int(d)] == parameter.shape[int(d)]})


@pytest.mark.parametrize(("make", "keys"), zip(MAKES, ["momentum", "max_exp_avg_sq", "row_var", "exp_avg"]))
def test_weights_move_and_moments_stay(make: Make, keys: str) -> None:
    torch.manual_seed(0)
    module, moved, moments = Foreign(make=make), Moved(), Moments()
    trainer(max_epochs=2, callbacks=[pruning(num_edits=2), moved, moments]).fit(module, loader())
    assert sorted(set(moved.widths), reverse=True) == [16, 12, 8]
    assert moved.stuck == []
    assert moments.num == 2
    assert any(key.startswith(keys) for key in moments.compared)


def test_lbfgs_begins_anew() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer, x = torch.optim.LBFGS(network.parameters(), lr=0.1), torch.randn(5, 3)

    def closure() -> float:
        optimizer.zero_grad()
        loss = network(x).square().sum()
        loss.backward()
        return float(loss)

    optimizer.step(closure)
    before = dict(network.named_parameters())
    apply_slices(network, SLICES, {})
    relink_optimizer(optimizer, before, dict(network.named_parameters()), SLICES)
    old = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer.step(closure)
    assert all(not torch.equal(a, b) for a, b in zip(old, network.parameters()))


def test_a_users_own_order_of_parameters_stays() -> None:
    """A resumed fit makes the optimiser anew, in the user's order, and restores its state by index."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    outside = nn.Parameter(torch.zeros(3))
    names = ["1.bias", "0.weight", "1.weight", "0.bias"]
    optimizer = torch.optim.SGD([*(network.get_parameter(name) for name in names), outside], lr=0.1)
    before = dict(network.named_parameters())
    apply_slices(network, SLICES, {})
    relink_optimizer(optimizer, before, dict(network.named_parameters()), SLICES)
    expected = [*(id(network.get_parameter(name)) for name in names), id(outside)]
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == expected


class Adversarial(pl.LightningModule):
    """Two optimisers and two schedulers, stepped by hand; gradients of the first are summed over two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = Residual(8)
        self.critic = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
        self.progress: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.progress.append(progress(self.trainer))
        first, second = self.optimizers()  # type: ignore[misc, attr-defined]
        outputs = self.net(batch[0])
        self.toggle_optimizer(second)
        second.zero_grad()
        self.manual_backward(self.critic(outputs.detach()).square().mean())
        second.step()
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        loss = nn.functional.cross_entropy(outputs, batch[1]) + 0.1 * self.critic(outputs).mean()
        self.manual_backward(loss)
        if batch_idx % 2:
            first.step()
            first.zero_grad()
        self.untoggle_optimizer(first)
        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers():  # type: ignore[union-attr]
                scheduler.step()  # type: ignore[call-arg, union-attr]

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        second = torch.optim.SGD(self.critic.parameters(), lr=1e-2, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (first, second)]


class Accumulated(Callback):
    """Edits with gradients under way: they must be there after it, cut along."""

    def __init__(self) -> None:
        self.expected: dict[str, Tensor] | None = None
        self.critic: list[Tensor] = []
        self.num = 0

    def on_before_edit(self, trainer: pl.Trainer, pl_module: Any, edit: Any) -> None:
        slices = edit.data["slices"]
        self.expected = {n: slice_tensor(p.grad, slices.get(n, {})) for n, p in pl_module.net.named_parameters()}
        self.critic = [state["momentum_buffer"] for state in trainer.optimizers[1].state.values()]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.expected is None:
            return
        assert batch_idx % 2
        for name, parameter in pl_module.net.named_parameters():
            assert torch.equal(parameter.grad, self.expected[name]), name
        now = [state["momentum_buffer"] for state in trainer.optimizers[1].state.values()]
        assert [id(tensor) for tensor in now] == [id(tensor) for tensor in self.critic]  # the other one is untouched
        self.num, self.expected = self.num + 1, None


def test_two_optimisers_stepped_by_hand() -> None:
    torch.manual_seed(0)
    module, accumulated, moments, moved = Adversarial(), Accumulated(), Moments(), Moved()
    # 16 batches: the edits fall on batches 5 and 7, with half of the gradients there.
    prune = pruning(start=0.3, end=0.43, num_edits=2)
    run = trainer(max_epochs=4, callbacks=[prune, accumulated, moments, moved])
    run.fit(module, loader())
    assert history_of(module).count("prune") == accumulated.num == moments.num == 2
    assert module.net.conv1.out_channels == 8
    assert module.progress == [i / 16 for i in range(16)]
    # In every second batch all weights move, in the others those of the critic alone.
    assert {name.partition(".")[0] for name in moved.stuck} == {"net"}
    per_batch = len(list(module.net.parameters()))
    assert len(moved.stuck) == 8 * per_batch
    assert [o.param_groups[0]["lr"] for o in run.optimizers] == [pytest.approx(1e-2 / 16)] * 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 2}, [i / 8 for i in range(8)]),
        ({"max_epochs": -1, "max_steps": 9}, [0, 1 / 9, 3 / 9, 4 / 9, 6 / 9, 7 / 9]),
        ({"max_epochs": 2, "max_steps": 6}, [0, 1 / 6, 3 / 6, 4 / 6]),
    ],
)
def test_progress_with_several_optimisers_follows_the_limit(arguments: dict[str, Any], expected: list[float]) -> None:
    module = Adversarial()
    trainer(**arguments).fit(module, loader())
    assert module.progress == pytest.approx(expected)
    assert module.progress == sorted(module.progress)


class Progress(Callback):
    """Notes progress wherever a callback may ask for it."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def _note(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.values.append(progress(trainer))

    on_train_start = on_train_epoch_start = on_train_batch_start = on_train_batch_end = on_train_epoch_end = _note


@pytest.mark.parametrize("make", [Foreign, Adversarial])
@pytest.mark.parametrize("scheduled", [True, False])
def test_progress_never_falls(make: Any, scheduled: bool) -> None:
    seen = Progress()
    if scheduled and make is Adversarial:
        return  # Lightning refuses it
    callbacks = [GradientAccumulationScheduler({0: 4, 1: 2, 2: 1})] if scheduled else []
    trainer(max_epochs=4, callbacks=[*callbacks, seen]).fit(make(), loader())
    assert seen.values == sorted(seen.values)
    assert seen.values[0] == 0
    assert 0.9 < seen.values[-1] <= 1


def test_mixed_precision_keeps_parameters_in_full() -> None:
    torch.manual_seed(0)
    module, moved = Foreign(), Moved()
    run = trainer(max_epochs=2, precision="bf16-mixed", callbacks=[pruning(num_edits=2), moved])
    run.fit(module, loader())
    assert moved.stuck == []
    assert module.net.get_parameter("conv1.weight").shape[0] == 8
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_a_gradient_scaler_goes_on_after_an_edit() -> None:
    """Its state belongs to the optimiser as an object, which stays: scaled steps before and after an edit."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(2):
        before = dict(network.named_parameters())
        old = {name: parameter.detach().clone() for name, parameter in before.items()}
        scaler.scale(network(torch.randn(5, 3)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(not torch.equal(old[name], parameter) for name, parameter in before.items())
        if step == 0:
            apply_slices(network, SLICES, {})
            relink_optimizer(optimizer, before, dict(network.named_parameters()), SLICES)
    assert scaler.get_scale() == 1024.0

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from compress.errors import EditError, RecipeError
from compress.models import BasicBlock
from compress.prune import CRITERIA, Removal, StructuredPruning, Target
from compress.surgery import Edit, history_of
from tests.networks import Residual, loader
from tests.networks import trainer as silent_trainer


class Foreign(pl.LightningModule):
    """A user's own module that knows nothing of us."""

    def __init__(self, network: nn.Module, optimizer: Any = torch.optim.AdamW, lr: float = 1e-2) -> None:
        super().__init__()
        self.backbone = network
        self._optimizer, self._lr = optimizer, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.parameters(), lr=self._lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)]


class Watch(Callback):
    """Checks after each step that every weight has moved."""

    def __init__(self) -> None:
        self.widths: list[int] = []
        self.stuck: list[str] = []
        self._before: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.widths.append(pl_module.backbone.conv1.out_channels)  # type: ignore[union-attr, arg-type]
        self.stuck += [n for n, p in pl_module.named_parameters() if torch.equal(p, self._before[n])]


def fit(module: pl.LightningModule, *callbacks: Callback, **arguments: Any) -> pl.Trainer:
    trainer = silent_trainer(**{"callbacks": list(callbacks), "max_epochs": 4, **arguments})
    trainer.fit(module, loader())
    return trainer


def pruning(**changes: Any) -> StructuredPruning:
    values = {"start": 0.2, "end": 0.6, "num_edits": 3, "round_to": 4, "schedule": "linear", **changes}
    return StructuredPruning(0.5, attribute="backbone", **values)


def test_a_foreign_module_shrinks_in_steps_and_all_weights_move() -> None:
    torch.manual_seed(0)
    module, watch = Foreign(Residual()), Watch()
    trainer = fit(module, pruning(), watch)
    assert sorted(set(watch.widths), reverse=True) == [32, 28, 20, 16]
    assert watch.stuck == []
    assert history_of(module).count("prune") == 3
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_accumulated_gradients_are_not_lost_in_an_edit() -> None:
    torch.manual_seed(0)
    module = Foreign(Residual())
    fit(module, pruning(), accumulate_grad_batches=2)
    assert module.backbone.conv1.out_channels == 16  # type: ignore[union-attr]


def test_one_shot_removes_everything_at_once() -> None:
    module, watch = Foreign(Residual()), Watch()
    fit(module, pruning(schedule="one_shot"), watch)
    assert sorted(set(watch.widths), reverse=True) == [32, 16]


def test_nothing_pruned_is_an_error() -> None:
    with pytest.raises(EditError, match=r"expected something to remove at ratio 0\.5, got nothing"):
        fit(Foreign(Residual()), pruning(round_to=64))


def test_wrong_attribute_lists_the_right_ones() -> None:
    with pytest.raises(EditError, match="Its networks are: backbone"):
        fit(Foreign(Residual()), StructuredPruning(attribute="modle"))


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if CRITERIA[name].needs != "weights"])
def test_criteria_see_what_the_fit_has_seen(criterion: str) -> None:
    torch.manual_seed(0)
    module, watch = Foreign(Residual()), Watch()
    fit(module, pruning(criterion=criterion), watch)
    assert sorted(set(watch.widths), reverse=True) == [32, 28, 20, 16]
    assert watch.stuck == []


@pytest.mark.parametrize("allocation", ["uniform", "global", "sensitivity"])
def test_a_target_is_approached_in_steps_and_met(allocation: str) -> None:
    torch.manual_seed(0)
    network = Residual()
    num = sum(p.numel() for p in network.parameters())
    module = Foreign(network)
    target = Target(params=0.4)
    fit(module, pruning(target=target, allocation=allocation, round_to=2))
    figures = [edit.data["target"] for edit in history_of(module)]
    left = sum(p.numel() for p in module.backbone.parameters())
    assert [entry["metric"] for entry in figures] == ["params"] * 3
    assert figures[-1]["wanted"] == pytest.approx(0.4 * num)
    assert figures[-1]["reached"] == left <= 0.4 * num
    assert left > 0.3 * num
    assert figures[0]["wanted"] > figures[1]["wanted"] > figures[2]["wanted"]


def test_a_target_out_of_reach_says_what_can_be_reached() -> None:
    with pytest.raises(EditError, match=r"prune\.target\.params"):
        fit(Foreign(Residual()), pruning(target=Target(params=0.001), min_width=8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"round_to": 64}, r"expected something to remove at ratio 0\.5, got nothing"),
        ({"target": Target(params=0.001), "min_width": 8}, r"prune\.target\.params"),
        (
            {"depth": 0.5},
            r"prune\.depth: expected residual blocks or layers that can be left out",
        ),
        ({"target": Target(params=1.0)}, r"prune\.target\.params: expected less than Residual costs now, got 1\.0"),
        ({"ignore": ["conv7"]}, r"prune\.ignore: expected names of layers, got 'conv7'"),
    ],
)
def test_a_rehearsal_fails_before_the_fit_would(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        pruning(**settings).rehearse(Residual(), [torch.randn(2, 1, 8, 8)])


def test_a_rehearsal_changes_nothing() -> None:
    network = Residual().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pruning(target=Target(latency_ms=1e-9), criterion="taylor").rehearse(network, [torch.randn(2, 1, 8, 8)])
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


class Zeros(Callback):
    """Counts channels of a layer that are zero after each step."""

    def __init__(self) -> None:
        self.num: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        weight = pl_module.backbone.conv1.weight  # type: ignore[union-attr]
        self.num.append(int((weight.detach().flatten(1) == 0).all(1).sum()))  # type: ignore[operator]


def test_soft_removal_holds_units_at_zero_and_cuts_once() -> None:
    torch.manual_seed(0)
    module, watch, zeros = Foreign(Residual()), Watch(), Zeros()
    fit(module, pruning(removal=Removal("soft")), watch, zeros)
    assert sorted(set(watch.widths), reverse=True) == [32, 16]
    assert sorted(set(zeros.num)) == [0, 4, 12]
    assert history_of(module).count("prune") == 1


class Doomed(Callback):
    """Measures what is about to be removed."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_edit(self, trainer: pl.Trainer, pl_module: pl.LightningModule, edit: Edit) -> None:
        weight: Any = pl_module.get_parameter("backbone.conv1.weight").detach()
        gone = sorted(set(range(len(weight))) - set(edit.data["slices"]["conv1.weight"]["0"]))
        self.norms.append(float(weight[gone].norm()))


@pytest.mark.parametrize("penalty", ["growing", "group_lasso"])
def test_doomed_units_are_pushed_towards_zero(penalty: str) -> None:
    norms = []
    for strength in (1e-9, 2.0):
        torch.manual_seed(0)
        module, doomed = Foreign(Residual(), torch.optim.SGD, lr=0.1), Doomed()
        removal = Removal(penalty=penalty, strength=strength, lead=0.4)
        fit(module, pruning(schedule="one_shot", start=0.5, removal=removal), doomed)
        norms += doomed.norms
        assert module.backbone.conv1.out_channels == 16  # type: ignore[union-attr]
    assert norms[1] < 0.7 * norms[0]


def test_statistics_are_recalibrated_after_each_edit() -> None:
    torch.manual_seed(0)
    module = Foreign(Residual())
    fit(module, pruning(schedule="one_shot", removal=Removal(recalibrate=4)))
    assert module.backbone.conv1.out_channels == 16  # type: ignore[union-attr]


def test_points_say_when_and_how_much() -> None:
    module, watch = Foreign(Residual()), Watch()
    fit(module, pruning(schedule=[[0.25, 0.25], [0.5, 1.0]]), watch)
    assert sorted(set(watch.widths), reverse=True) == [32, 28, 16]


class Deep(nn.Module):
    """Four residual blocks in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.Sequential(*[BasicBlock(16, 16) for _ in range(4)])
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def test_blocks_go_in_steps_with_channels() -> None:
    torch.manual_seed(0)
    module = Foreign(Deep())
    trainer = fit(module, pruning(depth=0.5, num_edits=2))
    kinds = [(len(edit.data.get("blocks", [])), bool(edit.data["slices"])) for edit in history_of(module)]
    assert kinds == [(1, False), (0, True), (1, False), (0, True)]
    left = {name.split(".")[2] for name, _ in module.named_parameters() if name.startswith("backbone.blocks")}
    assert len(left) == 2
    assert {id(p) for p in module.parameters()} == {id(p) for p in trainer.optimizers[0].param_groups[0]["params"]}


def test_an_edit_every_epoch() -> None:
    module = Foreign(Residual())
    fit(module, pruning(num_edits="1 epoch", start=0.0, end=0.5, round_to=1))
    assert history_of(module).count("prune") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, r"prune\.ratio: expected a value in \[0, 1\), got 1\.0"),
        ({"ratio": -0.1}, r"prune\.ratio"),
        ({"schedule": "quadratic"}, r"prune\.schedule: expected one of cubic, linear, cosine, one_shot"),
        ({"criterion": "luck"}, r"prune\.criterion: expected one of .*l2"),
        ({"allocation": "fair"}, r"prune\.allocation: expected one of uniform, global, sensitivity"),
        ({"heads": "half"}, r"prune\.heads: expected one of whole, width, got 'half'"),
        ({"depth": 1.0}, r"prune\.depth: expected a value in \[0, 1\), got 1\.0"),
        ({"min_width": 0}, r"prune\.min_width"),
        ({"start": 0.6, "end": 0.5}, r"prune\.start, prune\.end"),
        ({"end": 1.0}, r"prune\.start, prune\.end"),
        ({"num_edits": 0}, r"prune\.num_edits"),
        ({"round_to": 0}, r"prune\.round_to"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        StructuredPruning(**arguments)


def test_frozen_norms_stay_frozen_through_an_edit() -> None:
    torch.manual_seed(0)
    network = Residual()
    network.norm1.eval()
    before = network.norm1.running_mean.clone()  # type: ignore[union-attr]
    module = Foreign(network)
    fit(module, pruning(schedule="one_shot", removal=Removal(recalibrate=2)))
    kept = next(iter(history_of(module))).data["slices"]["norm1.running_mean"]["0"]
    assert not network.norm1.training
    assert torch.equal(network.norm1.running_mean, before[kept])  # type: ignore[arg-type]
    assert network.norm.training


class Heads(nn.Module):
    """One layer of attention over rows of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Linear(8, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[:, 0])
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.fc((x + self.proj(y)).mean(1))


@pytest.mark.parametrize(("heads", "widths"), [("whole", [2, 1]), ("width", [8, 4])])
def test_heads_go_whole_or_lose_width(heads: str, widths: list[int]) -> None:
    torch.manual_seed(0)
    module = Foreign(Heads())
    fit(module, pruning(heads=heads, schedule="one_shot", round_to=1))
    (edit,) = history_of(module)
    assert edit.data["widths"]["qkv"] == widths
    assert module.get_parameter("backbone.qkv.weight").shape == (24, 8)


class Plans(StructuredPruning):
    """Counts how often it plans."""

    num = 0

    def _plan(self, *arguments: Any) -> Edit | None:
        self.num += 1
        return super()._plan(*arguments)


def test_units_that_are_pushed_are_chosen_once_for_each_edit() -> None:
    # The second edit finds nothing more to remove.
    callback = Plans(
        0.5,
        schedule=[[0.3, 0.98], [0.7, 1.0]],
        round_to=8,
        removal=Removal(penalty="growing", lead=0.25),
        attribute="backbone",
    )
    fit(Foreign(Residual()), callback)
    assert callback.num == 2


def test_an_edit_that_overtakes_another_reaches_its_own_fraction() -> None:
    module = Foreign(Residual())
    removal = Removal(penalty="growing", lead=0.05)
    fit(module, pruning(schedule=[[0.52, 0.5], [0.55, 1.0]], removal=removal))  # sixteen steps: both at one
    assert module.backbone.conv1.out_channels == 16  # type: ignore[union-attr]


def test_a_fraction_counts_from_the_network_before_its_blocks_went() -> None:
    torch.manual_seed(0)
    network = Deep()
    num = sum(p.numel() for p in network.parameters())
    module = Foreign(network)
    fit(module, pruning(target=Target(params=0.4), depth=0.25, num_edits=2, round_to=1))
    figures = [edit.data["target"] for edit in history_of(module) if "target" in edit.data]
    assert {entry["original"] for entry in figures} == {num}
    assert figures[-1]["goal"] == figures[-1]["wanted"] == pytest.approx(0.4 * num)


def test_soft_removal_of_normalised_weights_stays_finite() -> None:
    torch.manual_seed(0)
    network = Residual()
    nn.utils.parametrizations.weight_norm(network.conv1)
    module = Foreign(network)
    fit(module, pruning(removal=Removal("soft")))
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in Residual().parameters())


def test_gradients_are_needed_before_the_first_choice() -> None:
    with pytest.raises(RecipeError, match=r"prune\.start: expected some steps before the first choice"):
        pruning(criterion="taylor", start=0.0)
    with pytest.raises(RecipeError, match=r"prune\.start"):
        pruning(criterion="taylor", start=0.05, removal=Removal(penalty="growing", lead=0.1))


def test_every_epoch_is_every_epoch_under_a_limit_of_steps() -> None:
    module = Foreign(Residual())
    # Sixteen steps are four epochs.
    fit(module, pruning(num_edits="1 epoch", start=0.0, end=0.5, round_to=1), max_epochs=-1, max_steps=16)
    assert history_of(module).count("prune") == 3

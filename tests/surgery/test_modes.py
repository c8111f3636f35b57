"""Modes of parts, before and after a network became a graph."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.quantize import QuantizationAwareTraining, calibrate, convert, prepare
from compress.surgery import Captured, capture
from compress.surgery.modes import modules_at_rest
from tests.networks import images, loader, trainer
from tests.surgery.modules import Foreign, SaveAfter, resumable


class Parts(nn.Module):
    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(rate))
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(rate))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.tail(self.body(x)).mean((2, 3)))


class Sampled(nn.Module):
    """Dropout in evaluation, too (Gal and Ghahramani 2016, arXiv:1506.02142)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.dropout(torch.relu(self.first(x)), 0.5, training=True))


POSITIONS = {
    torch.ops.aten.batch_norm.default: 5,
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
}


def modes(graph: Captured) -> dict[str, bool]:
    """Return what the graph's norms and dropouts are told, after a call, by the name of their module."""
    graph(images(4)[0])
    told = [(node, POSITIONS[node.target]) for node in graph.graph_module.graph.nodes if node.target in POSITIONS]
    return {[*node.meta["nn_module_stack"].values()][-1][0]: bool(node.args[position]) for node, position in told}


def expected(body: bool, tail: bool) -> dict[str, bool]:
    return {"body.1": body, "body.3": body, "tail.1": tail, "tail.3": tail}


@pytest.mark.parametrize("quantized", [False, True])
def test_a_part_in_evaluation_is_so_in_the_graph(quantized: bool) -> None:
    x = images(4)[0]
    graph = (prepare(Parts().train(), [x[:2]], "int8") if quantized else capture(Parts(), [x[:2]])).train()
    assert modes(graph) == expected(True, True)
    part: Any = graph.get_submodule("body")
    part.eval()
    before = graph.get_buffer("body.1.running_mean").clone(), graph.get_buffer("tail.1.running_mean").clone()
    assert modes(graph) == modes(copy.deepcopy(graph)) == expected(False, True)
    assert torch.equal(before[0], graph.get_buffer("body.1.running_mean"))
    assert not torch.equal(before[1], graph.get_buffer("tail.1.running_mean"))
    kept = [(module, module.training) for module in graph.modules()]
    assert modes(graph.eval()) == expected(False, False)
    for module, mode in kept:
        module.training = mode  # as Lightning does after validation
    assert modes(graph) == expected(False, True)
    part.train()
    assert modes(graph) == expected(True, True)
    part.eval()
    assert modes(graph.train()) == expected(True, True)  # as train() of a module
    assert modes(graph.eval()) == expected(False, False)


@pytest.mark.parametrize("quantized", [False, True])
def test_what_was_in_evaluation_before_stays_so(quantized: bool) -> None:
    network, x = Parts().train(), images(4)[0]
    network.body.eval()
    network.body[0].train()
    assert modules_at_rest(network) == ["body", "body.1", "body.2", "body.3"]
    assert modules_at_rest(network.eval()) == []
    network.train()
    network.body.eval()
    graph = prepare(network, [x[:2]], "int8") if quantized else capture(network, [x[:2]])
    for twin in (graph, copy.deepcopy(graph), graph.train()):
        assert modes(twin) == expected(False, True)
    if not quantized:
        assert modes(capture(graph, [x[:2]])) == expected(False, True)
    assert modes(graph.eval()) == expected(False, False)


def test_dropout_in_evaluation_is_left_where_the_code_says_so() -> None:
    torch.manual_seed(0)
    network, x = Sampled().eval(), torch.randn(16, 6)
    graph = capture(network, [x[:2]])
    prepared = prepare(network, [x[:2]], "int8")
    calibrate(prepared, [(x,)])
    for each in (graph.train(), graph.eval(), capture(graph, [x[:2]]), prepared.eval(), convert(prepared)):
        assert not torch.equal(each(x), each(x))
        torch.manual_seed(1)
        told = network(x)
        torch.manual_seed(1)
        assert float((each(x) - told).norm() / told.norm()) < 0.05


class FrozenFromTheStart(Foreign):
    def on_fit_start(self) -> None:
        self.net.get_submodule("body").eval()


class FrozenLater(Foreign):
    """Freezes a part from its second epoch on, and validates in between."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch >= 1:
            self.net.get_submodule("body").eval()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.net(batch[0])


@pytest.mark.parametrize("step", [3, 6])
def test_what_a_hook_has_frozen_stays_so_through_a_resume(step: int, tmp_path: Path) -> None:
    states = []
    for resumes in (False, True):
        pl.seed_everything(0, verbose=False)
        module = FrozenFromTheStart(Parts(0.0))  # no random numbers: a resume does not go on with them here
        qat = QuantizationAwareTraining(start=0.25, attribute="net")
        run = trainer(max_epochs=2, callbacks=[qat, SaveAfter(tmp_path, [step])])
        run.fit(module, resumable(), ckpt_path=tmp_path / f"step_{step}.ckpt" if resumes else None)
        assert isinstance(module.net, Captured)
        assert torch.equal(module.net.get_buffer("body.1.running_mean"), torch.zeros(8))
        assert {"body.1", "body.3"} <= set(module.net.frozen)
        states.append(module.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_part_that_a_hook_freezes_in_the_graph_stands_still() -> None:
    pl.seed_everything(0, verbose=False)
    module, means = FrozenLater(Parts()), []

    class Notes(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            means.append([module.net.get_buffer(f"{part}.1.running_mean").clone() for part in ("body", "tail")])

    qat = QuantizationAwareTraining(start=0.1, freeze_batchnorm=1.0, attribute="net")
    trainer(max_epochs=3, callbacks=[qat, Notes()]).fit(module, loader(), loader())
    assert isinstance(module.net, Captured)
    (first, moving), (then, moved), (last, _) = means
    assert torch.equal(first, then)
    assert torch.equal(first, last)
    assert not torch.equal(moving, moved)

"""Edits under torch.compile: names stay, the network is compiled anew, nothing runs a stale or an uncompiled form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging
from torch import nn
from torch._dynamo import OptimizedModule

from compress.distill import Classification, Distiller, MovingAverage, SoftTarget
from compress.quantize import QuantizationAwareTraining
from compress.surgery import Captured, history_of
from compress.surgery.compiled import original
from tests.networks import Residual, loader, trainer
from tests.prune.test_graph_form import Written
from tests.surgery.modules import Foreign, Moved, pruning


class Counting:
    """A backend that runs what it is given as it is, and notes the widths that it was asked to compile for."""

    def __init__(self) -> None:
        self.widths: list[int] = []
        self.calls = 0

    def __call__(self, graph_module: Any, inputs: list[Any]) -> Callable[..., Any]:
        shapes = [tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)]
        shapes += [tuple(p.shape) for p in graph_module.parameters()]
        self.widths += [s[0] for s in shapes if len(s) == 4 and s[2:] == (3, 3) and s[1] > 1 and s[0] >= s[1]][:1]

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph_module(*args)

        return run


class Calls(Callback):
    """Notes after each step how often compiled code has run, and that names of parameters stay."""

    def __init__(self, backend: Counting) -> None:
        self.backend = backend
        self.calls: list[int] = []
        self.names: set[tuple[str, ...]] = set()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.calls.append(self.backend.calls)
        self.names.add(tuple(name for name, _ in pl_module.named_parameters()))


def wrapped(network: nn.Module, backend: Any) -> tuple[Any, Foreign]:
    module = Foreign(torch.compile(network, backend=backend))  # type: ignore[arg-type]
    return module, module


def whole(network: nn.Module, backend: Any) -> tuple[Any, Foreign]:
    module = Foreign(network)
    return torch.compile(module, backend=backend), module


def in_place(network: nn.Module, backend: Any) -> tuple[Any, Foreign]:
    network.compile(backend=backend)
    module = Foreign(network)
    return module, module


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def seeded() -> nn.Module:
    torch.manual_seed(1)
    return Residual(8)


@pytest.fixture(scope="module")
def plain() -> Foreign:
    """What the same fit gives without a compiler."""
    module = Foreign(seeded())
    torch.manual_seed(0)
    trainer(max_epochs=3, callbacks=[pruning(num_edits=2)]).fit(module, loader(shuffle=False))
    return module


@pytest.mark.parametrize("way", [wrapped, whole, in_place])
def test_a_compiled_network_is_edited_and_compiled_anew(way: Any, plain: Foreign) -> None:
    backend, moved = Counting(), Moved()
    calls = Calls(backend)
    given, module = way(seeded(), backend)
    torch.manual_seed(0)
    trainer(max_epochs=3, callbacks=[pruning(num_edits=2), moved, calls]).fit(given, loader(shuffle=False))
    assert history_of(module).count("prune") == 2
    assert moved.stuck == []
    assert isinstance(module.net, OptimizedModule) == (way is wrapped)
    # Compiled for each width once, and run compiled at every step.
    assert list(dict.fromkeys(backend.widths)) == list(dict.fromkeys(moved.widths)) == [16, 12, 8]
    assert len(backend.widths) == 3
    assert all(later > earlier for earlier, later in zip([0, *calls.calls], calls.calls))
    assert len(calls.names) == 1
    expected = plain.net.state_dict()
    for name, tensor in original(module.net).state_dict().items():
        assert torch.allclose(tensor.float(), expected[name].float(), atol=1e-5), name


@pytest.mark.parametrize("way", [wrapped, whole, in_place])
def test_a_captured_graph_runs_compiled_too(way: Any) -> None:
    """Heads of an attention with its sizes written in: the network goes on as a graph, compiled by the same backend."""
    torch.manual_seed(1)
    backend = Counting()
    calls = Calls(backend)
    given, module = way(Written(), backend)
    run = trainer(max_epochs=3, callbacks=[pruning(num_edits=2), calls])
    run.fit(given, loader(), loader(num=12, shuffle=False))
    assert isinstance(original(module.net), Captured)
    assert isinstance(module.net, OptimizedModule) == (way is wrapped)
    assert [edit.data["form"] for edit in history_of(module)][-1] == "graph"
    assert all(later > earlier for earlier, later in zip([0, *calls.calls], calls.calls))
    assert len(calls.names) == 1
    # The graph that was compiled for training is not the one that validates.
    x = next(iter(loader(shuffle=False)))[0]
    module.eval()
    assert torch.equal(module.net(x), module.net(x))
    module.train()
    assert not torch.equal(module.net(x), module.net(x)), "dropout does not work"


def test_a_compiled_network_is_pruned_and_quantised() -> None:
    torch.manual_seed(0)
    backend = Counting()
    calls = Calls(backend)
    given, module = wrapped(Residual(8), backend)
    qat = QuantizationAwareTraining(start=0.6, attribute="net")
    trainer(max_epochs=1, callbacks=[pruning(num_edits=1, end=0.2), qat, calls]).fit(given, loader())
    assert [edit.kind for edit in history_of(module)] == ["prune", "quantize"]
    assert isinstance(original(module.net), Captured)
    assert all(later > earlier for earlier, later in zip([0, *calls.calls], calls.calls))
    assert len(calls.names) == 1


@pytest.mark.slow
def test_inductor_runs_an_edited_network() -> None:
    torch.manual_seed(0)
    given, _ = wrapped(Residual(8), "inductor")
    moved = Moved()
    trainer(max_epochs=2, callbacks=[pruning(num_edits=2), moved]).fit(given, loader())
    assert moved.stuck == []
    assert sorted(set(moved.widths), reverse=True) == [16, 12, 8]


def test_a_compiled_student_is_taught_by_its_own_average() -> None:
    torch.manual_seed(0)
    module = Distiller(
        torch.compile(Residual(8), backend="eager"),  # type: ignore[arg-type]
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        teacher=MovingAverage(0.9),
        losses=[SoftTarget(weight=0.5)],
    )
    prune = pruning(schedule="one_shot", attribute="student")
    trainer(max_epochs=1, callbacks=[prune, EMAWeightAveraging(decay=0.5)]).fit(module, loader())
    assert isinstance(module.student, OptimizedModule)
    assert module.teacher is not None
    shapes = {name: p.shape for name, p in original(module.student).named_parameters()}
    assert shapes["conv1.weight"][0] == 8
    assert {name: p.shape for name, p in module.teacher.named_parameters()} == shapes

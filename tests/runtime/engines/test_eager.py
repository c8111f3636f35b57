from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.runtime.engines.eager import EagerEngine, fold_constants
from compress.surgery.capture import export_program
from tests.export.programs import artifact, quantized


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("integers", torch.arange(6, dtype=torch.int8).reshape(2, 3))
        self.register_buffer("unused", torch.ones(3))
        self.integers: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weight = self.integers.to(torch.float32) * 0.5
        return torch.nn.functional.linear(x, weight) + weight.sum()


def test_what_depends_on_weights_alone_is_computed_once() -> None:
    inputs = torch.randn(5, 3)
    module = export_program(Scaled().eval(), [inputs]).module(check_guards=False)
    wanted = module(inputs)
    folded = fold_constants(module)
    assert torch.equal(folded(inputs), wanted)
    targets = {node.target for node in folded.graph.nodes if node.op == "call_function"}
    # Assertions stay: they have effects, as far as torch knows.
    assert targets - {torch.ops.aten._assert_tensor_metadata.default} == {
        torch.ops.aten.linear.default,
        torch.ops.aten.add.Tensor,
    }


def test_what_is_drawn_is_drawn_at_each_call() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(3))
            self.weight: Tensor

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(self.weight * 2) * self.weight

    inputs = torch.zeros(5, 3)
    folded = fold_constants(export_program(Noisy().eval(), [inputs]).module(check_guards=False))
    assert not torch.equal(folded(inputs), folded(inputs))
    products = [node for node in folded.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert len(products) == 1  # that of weights alone is computed once


def test_integers_become_floats_at_loading() -> None:
    engine = EagerEngine(artifact() / "program.pt2")
    plain = torch.export.load(artifact() / "program.pt2").module(check_guards=False)
    inputs = quantized().inputs
    assert torch.equal(engine([inputs])[0], plain(inputs))
    assert len(engine._program.graph.nodes) < len(plain.graph.nodes) * 0.7

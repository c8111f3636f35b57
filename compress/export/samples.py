"""Random inputs for a program of which nothing is known but its graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from compress.runtime.examples import example_sizes
from compress.runtime.manifest import TensorSpec

__all__ = ["are_drawn", "note_drawn", "random_inputs", "with_rows"]

_DRAWN = "example inputs are drawn"
_NUM = 64
_EMBEDDING = torch.ops.aten.embedding.default
_PASSED_THROUGH = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.to.dtype,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.clone.default,
}


def random_inputs(graph_module: GraphModule, specs: Sequence[TensorSpec], *, seed: int = 0) -> list[Tensor]:
    """Draw inputs, the same for the same seed.

    Floats are standard normal, as preprocessed inputs are. Integers that index an embedding are indices of its rows;
    all others are taken for masks: ones, then zeros, at least one of the first.

    Args:
        graph_module: Of the program, unlifted.
        specs: Its inputs, drawn of their typical sizes.
        seed: Of the draw.

    Returns:
        Tensors of shape (64, ...).
    """
    generator = torch.Generator().manual_seed(seed)
    return [_draw(spec, rows, generator) for spec, rows in zip(specs, _rows_of_inputs(graph_module))]


def with_rows(specs: Sequence[TensorSpec], program: ExportedProgram) -> tuple[TensorSpec, ...]:
    """Return inputs with the number of rows of the smallest embedding that their integers are indices of.

    Args:
        specs: Of the program's inputs.
        program: With all its embeddings.
    """
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, GraphModule)
    found = zip(specs, _rows_of_inputs(graph_module))
    return tuple(replace(spec, num_rows=rows) if "int" in spec.dtype else spec for spec, rows in found)


def note_drawn(program: ExportedProgram) -> None:
    """Note on a program that its example inputs are random: they say nothing of how large real ones are."""
    program.graph_module.meta[_DRAWN] = True


def are_drawn(program: ExportedProgram) -> bool:
    """Say whether a program's example inputs are random."""
    return bool(program.graph_module.meta.get(_DRAWN))


def _draw(spec: TensorSpec, rows: int | None, generator: torch.Generator) -> Tensor:
    shape = (_NUM, *example_sizes(spec))
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    if rows is not None:
        return torch.randint(rows, shape, generator=generator).to(dtype)
    length = torch.randint(1, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
    return (torch.arange(shape[-1]) < length).to(dtype)


def _rows_of_inputs(graph_module: GraphModule) -> list[int | None]:
    return [_num_rows(graph_module, node) for node in graph_module.graph.nodes if node.op == "placeholder"]


def _num_rows(graph_module: GraphModule, node: Node) -> int | None:
    """Return the rows of the smallest embedding that a value indexes."""
    found: list[int] = []
    for user in node.users:
        if user.target is _EMBEDDING and user.args[1] is node:
            found += _rows(graph_module, user.args[0])
        elif user.target in _PASSED_THROUGH:
            found += filter(None, [_num_rows(graph_module, user)])
    return min(found, default=None)


def _rows(graph_module: GraphModule, weight: object) -> list[int]:
    """Return the number of rows of an embedding's weight, found through what it is computed from."""
    while isinstance(weight, Node) and weight.op == "call_function":
        weight = weight.args[0]
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return []
    value: object = graph_module
    for part in str(weight.target).split("."):
        value = getattr(value, part)
    return [len(value)] if isinstance(value, Tensor) else []

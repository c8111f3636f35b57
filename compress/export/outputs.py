"""What a network gives: one tensor, or several in a tuple or dict, each with a row for each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from compress.errors import ExportError
from compress.export.graph import dtype_name, rewritten
from compress.runtime.manifest import TensorSpec
from compress.runtime.outputs import arranger
from compress.runtime.values import class_output
from compress.surgery.lengths import user_inputs

__all__ = ["Form", "Outputs", "first_rows", "flattened", "in_form", "named", "output_form", "structure_of"]

Outputs = np.ndarray | tuple[np.ndarray, ...] | dict[str, np.ndarray]
"""What a network gives, as arrays of shape (N, ...)."""

_TENSORS = (Tensor, np.ndarray)


@dataclass(frozen=True)
class Form:
    """The outputs of a program.

    Args:
        structure: ``"tuple"``, ``"dict"``, or ``None`` for a tensor by itself.
        specs: Of each, in order.
    """

    structure: str | None
    specs: tuple[TensorSpec, ...]

    @property
    def scores(self) -> TensorSpec:
        """The output by which classes are told: the one called ``logits``, else the first."""
        return self.specs[class_output([spec.name for spec in self.specs])]


def named(outputs: Any, where: str) -> dict[str, Any]:
    """Return outputs by the names that a manifest gives them.

    Args:
        outputs: A tensor (named ``output``), a tuple or list of such (``output_0``, ``output_1``, ...), or a mapping of
            such by their names, as Hugging Face's ``ModelOutput``; or arrays in place of tensors.
        where: What gave them, for messages.

    Raises:
        ExportError: when they are anything else, or there are none.

    Example:
        >>> sorted(named((torch.ones(1), torch.zeros(1)), "network"))
        ['output_0', 'output_1']
        >>> named({"logits": torch.ones(1), "hidden": (torch.ones(1),)}, "network")
        Traceback (most recent call last):
        ...
        compress.errors.ExportError: network: expected a tensor, or a tuple, list or dict of tensors by names, got
        one with tuple as 'hidden'. Return tensors alone: put a module around the network that picks them.
    """
    if isinstance(outputs, _TENSORS):
        return {"output": outputs}
    if isinstance(outputs, Mapping):
        found = dict(outputs)
    else:
        found = {f"output_{place}": value for place, value in enumerate(outputs if _is_sequence(outputs) else ())}
    others = [key for key, value in found.items() if not (isinstance(key, str) and isinstance(value, _TENSORS))]
    if others or not found:
        empty = "an empty one" if _is_sequence(outputs) or isinstance(outputs, Mapping) else type(outputs).__name__
        got = f"one with {type(found[others[0]]).__name__} as {others[0]!r}" if others else empty
        raise ExportError(
            f"{where}: expected a tensor, or a tuple, list or dict of tensors by names, got {got}. Return tensors "
            "alone: put a module around the network that picks them."
        )
    return found


def structure_of(outputs: Any) -> str | None:
    """Return the structure of outputs that ``named`` takes, as ``Form`` has it."""
    if isinstance(outputs, _TENSORS):
        return None
    return "dict" if isinstance(outputs, Mapping) else "tuple"


def first_rows(outputs: Outputs, num: int) -> Outputs:
    """Return the outputs of the first few samples, in the same structure."""
    found = named(outputs, "outputs")
    return arranger(structure_of(outputs), list(found))([value[:num] for value in found.values()])


def output_form(program: ExportedProgram) -> Form:
    """Return structure, names, dtypes and shapes of a program's outputs; what varies of these is ``None``.

    Raises:
        ExportError: when they are more than a tuple or dict of tensors, or one has no row for each sample or a dtype
            that numpy does not have.
    """
    given = _given(program)
    batch = next(value.shape[0] for _, value in user_inputs(program))
    specs = tuple(_spec(name, value, batch) for name, value in named(given, "network").items())
    return Form(structure_of(given), specs)


def flattened(program: ExportedProgram) -> ExportedProgram:
    """Return a program whose outputs are a tensor, tuple or list.

    Of a dict, or a class of another library, a serving process would have to know how it is made.
    """
    given = _given(program)
    return program if isinstance(given, Tensor) or type(given) in (tuple, list) else rewritten(program, _flatten)


def in_form(reference: Callable[..., Any], form: Form) -> Callable[..., Any]:
    """Return what gives the outputs of a module in a program's structure and order.

    Args:
        reference: The module.
        form: Of the program.

    Raises:
        ExportError: when called, where the module gives others.
    """
    names = [spec.name for spec in form.specs]
    arrange = arranger(form.structure, names)

    def call(*inputs: Any) -> Any:
        given = reference(*inputs)
        found = named(given, "reference")
        if structure_of(given) != form.structure or set(found) != set(names):
            raise ExportError(
                f"reference: expected {_described(form.structure, names)} as output, as the program gives, got "
                f"{_described(structure_of(given), list(found))}. Capture the program from a network that gives the "
                "same."
            )
        return arrange([found[name] for name in names])

    return call


def _is_sequence(outputs: Any) -> bool:
    return isinstance(outputs, tuple | list)


def _given(program: ExportedProgram) -> Any:
    """Return a program's outputs as it gives them, without values."""
    leaves = [
        node.meta["val"] if isinstance(node, Node) else node
        for spec, node in zip(program.graph_signature.output_specs, program.graph.output_node().args[0])
        if spec.kind == OutputKind.USER_OUTPUT
    ]
    return pytree.tree_unflatten(leaves, program.call_spec.out_spec)


def _spec(name: str, value: Tensor, batch: Any) -> TensorSpec:
    if not value.dim() or not _is_batch(value.shape[0], batch):
        found = ", ".join("N" if _is_batch(size, batch) else str(size).replace(str(batch), "N") for size in value.shape)
        raise ExportError(
            f"{name}: expected an output with a row for each sample, got shape ({found}). Leave it out of what forward "
            "returns, or give it the batch as its first dimension."
        )
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return TensorSpec(name, dtype_name(name, value), shape)


def _is_batch(size: Any, batch: Any) -> bool:
    if not (isinstance(size, torch.SymInt) and isinstance(batch, torch.SymInt)):
        return False
    # By values, since one size may be written in several ways.
    return all(size.node.expr.subs(batch.node.expr, number) == number for number in (5, 7))


def _flatten(graph_module: GraphModule) -> int:
    codegen: Any = graph_module.graph._codegen
    info = codegen.pytree_info
    spec = pytree.tree_structure((0,) * info.out_spec.num_leaves)
    codegen.pytree_info = info._replace(out_spec=spec)
    graph_module._out_spec = spec
    return 1


def _described(structure: str | None, names: Sequence[str]) -> str:
    if structure is None:
        return "one tensor"
    return f"a tuple of {len(names)}" if structure == "tuple" else f"a dict of {', '.join(names)}"

"""ExecuTorch's file: a small program of kernel calls, whose convolutions and matrix products are XNNPACK's."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._sympy.value_ranges import ValueRanges

from compress.errors import MissingPackageError, first_line
from compress.export.graph import largest_batch
from compress.export.products import RECURRENT
from compress.export.targets import Census, ExportSkippedError
from compress.export.xnnpack_graph import rewrite
from compress.surgery.capture import export_program

__all__ = ["FILE", "build", "count_kernels", "planned_batch", "requires"]

FILE = "model.pte"

_MATRIX = ("linear", "addmm", "mm", "bmm", "convolution", "baddbmm")
_ATEN = torch.ops.aten


def build(program: ExportedProgram, path: Path) -> Census:
    """Lower the program and count the kernels that XNNPACK makes of it.

    The file takes batches of up to ``planned_batch(program)``; the engine splits larger ones.

    Raises:
        ExportSkippedError: when ExecuTorch cannot lower it, or leaves quantised operators that nothing would run.
        MissingPackageError: when executorch is not installed.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
    except ImportError as error:
        raise MissingPackageError("executorch", "executorch") from error
    _check_recurrent(program)
    batch = planned_batch(program)
    signed = _signed(program, batch)
    try:
        with torch.no_grad(), _quiet():
            lowered = to_edge_transform_and_lower(signed, partitioner=[XnnpackPartitioner()])
            _check_left(lowered.exported_program())
            _limit(lowered.exported_program(), batch)
            settings = ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass())
            path.write_bytes(lowered.to_executorch(settings).buffer)
    except ExportSkippedError:
        raise
    except Exception as error:  # it raises many kinds; each means the same to the user
        raise ExportSkippedError(
            f"executorch: expected a program that it lowers, got: {first_line(error)}. Leave the target out."
        ) from error
    return count_kernels(lowered.exported_program())


def planned_batch(program: ExportedProgram, *, memory: int = 32 * 2**20) -> int:
    """Return how many samples go at once, up to 64: memory is planned for them, and taken on loading.

    Args:
        program: Captured with a dynamic batch dimension.
        memory: Bytes that one activation may take.
    """
    values = [value for node in program.graph.nodes for value in _tensors(node.meta.get("val"))]
    largest = max(map(_bytes_of_one_sample, values))
    batch = min(64, largest_batch(program) or 64)
    while batch > 1 and batch * largest > memory:
        batch //= 2
    return batch


def count_kernels(program: ExportedProgram) -> Census:
    """Count the matrix kernels of a lowered program: XNNPACK's, and those of ExecuTorch around them.

    Args:
        program: Whose quantised operators are all XNNPACK's. It takes integer weights to kernels of integers alone.
    """
    from executorch.backends.xnnpack.utils.quant_utils import is_tagged_as_implicit_q_dq

    int8, floats, others = Counter[str](), Counter[str](), Counter[str]()
    for graph_module, owner in _graphs(program):
        for node in graph_module.graph.nodes:
            name = _name(node)
            if name in _MATRIX:
                quantised = any(is_tagged_as_implicit_q_dq(value) for value in node.all_input_nodes)
                (int8 if quantised else floats)[f"{owner} {name}{' int8' if quantised else ''}"] += 1
            elif name.startswith("quantize_per") and not is_tagged_as_implicit_q_dq(node):
                others[name] += 1
            elif name == "choose_qparams":
                others["quantize as it comes"] += 1
    return Census(int8.total(), floats.total(), {**int8, **floats, **others}, others.total())


def requires() -> dict[str, Any]:
    """Return what a machine needs: nothing but ExecuTorch, whose XNNPACK picks its kernels on loading."""
    return {}


def _check_recurrent(program: ExportedProgram) -> None:
    kinds = sorted({node.target.__name__.partition(".")[0] for node in program.graph.nodes if node.target in RECURRENT})
    if kinds:
        raise ExportSkippedError(
            f"executorch: expected no recurrent layers, got {', '.join(kinds)}: it writes every step out, and has no "
            "kernel for their weights as integers. Leave the target out."
        )


def _signed(program: ExportedProgram, batch: int) -> ExportedProgram:
    """Capture the program as XNNPACK takes it, for no larger batches: XNNPACK takes memory for the largest at once."""
    graph_module = program.module(check_guards=False)
    rewrite(graph_module)
    inputs = [value[:2] for value in program.example_inputs[0]]
    return export_program(graph_module, inputs, largest_batch=max(batch, 3))  # 2 is that of the example, and no range


def _check_left(lowered: ExportedProgram) -> None:
    left = Counter(_name(node) for node in lowered.graph.nodes if "quantize" in _name(node))
    if left:
        found = ", ".join(f"{count} {name}" for name, count in left.items())
        raise ExportSkippedError(
            f"executorch: expected XNNPACK to take all that is quantised, got {found} left over, for which there is no "
            "kernel. Keep these layers in floats, or leave the target out."
        )


def _limit(lowered: ExportedProgram, batch: int) -> None:
    """Set the range of the batch size, for which memory is planned; lowering may have narrowed it by its examples."""
    for node in lowered.graph.nodes:
        for value in _tensors(node.meta.get("val")) if node.op == "placeholder" else ():
            for size in value.shape[:1]:
                if isinstance(size, torch.SymInt):
                    size.node.shape_env.var_to_range[size.node.expr] = ValueRanges(1, batch)


def _graphs(program: ExportedProgram) -> Iterator[tuple[GraphModule, str]]:
    yield program.graph_module, "portable"
    for module in program.graph_module.children():
        if hasattr(module, "original_module"):
            yield module.original_module.graph_module, "XNNPACK"


def _name(node: Node) -> str:
    """Return an operator's name, as ``linear``."""
    parts = str(getattr(node.target, "__name__", "")).split(".")  # of namespace, name and overload
    return parts[1] if node.op == "call_function" and len(parts) == 3 else ""


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _tensors(entry)


def _bytes_of_one_sample(value: torch.Tensor) -> int:
    """Return how large a value is for one sample, 0 where its size does not depend on how many there are."""
    size = value.numel()
    if not isinstance(size, torch.SymInt):
        return 0
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1))) * value.element_size()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the lowering's notes away from the user."""
    loggers = [logging.getLogger(name) for name in ("executorch", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)

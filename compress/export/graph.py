"""Exported programs before they are lowered: what they take, and small rewritings from program to program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from compress.errors import ExportError
from compress.runtime.manifest import Range, TensorSpec
from compress.surgery.capture import export_program
from compress.surgery.lengths import LARGEST_BATCH, Length, lengths_of, user_inputs

__all__ = [
    "LARGEST_NARROW",
    "drop_assertions",
    "drop_traces",
    "dtype_name",
    "flatten_attention",
    "flatten_strided",
    "has_narrow_weights",
    "input_specs",
    "largest_batch",
    "loosen_views",
    "rewritten",
    "spare_inputs",
    "weight_bytes",
    "widen_single_channels",
]

LARGEST_NARROW = 64
"""The largest weight of 7 bits, either way."""

_CONVOLUTIONS = {torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default}
_ACTIVATIONS = {torch.ops.aten.relu.default, torch.ops.aten.relu_.default, torch.ops.aten.gelu.default}
"""What Inductor's integer kernels of matrix products take in."""


def input_specs(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    """Return name, dtype and shape of a program's inputs; dynamic dimensions are ``None``, with the range of each.

    Raises:
        ExportError: when the batch dimension of an input is fixed, its dtype is none of numpy's, or it is not laid out
            contiguously.
    """
    specs: list[TensorSpec] = []
    examples, _ = program.example_inputs
    lengths = lengths_of(program)
    for index, (node, value) in enumerate(user_inputs(program)):
        shape = tuple(size if isinstance(size, int) else None for size in value.shape)
        if not shape or shape[0] is not None:
            raise ExportError(
                f"{node.name}: expected a dynamic batch dimension, got shape {shape}. Capture the program with "
                "dynamic_shapes={0: torch.export.Dim('batch')} for each input."
            )
        if not value.is_contiguous():
            raise ExportError(
                f"{node.name}: expected a contiguous example input, got strides {value.stride()}. "
                "Call .contiguous() on the inputs before capture."
            )
        ranges = {
            length.dimension: _range(length, number, examples[index].shape)
            for number, length in enumerate(lengths)
            if index in length.places(examples)
        }
        specs.append(TensorSpec(node.name, dtype_name(node.name, value), shape, ranges))
    return tuple(specs)


def weight_bytes(program: ExportedProgram) -> int:
    """Return how many bytes a program's weights and constants take; those that share memory, as tied ones, count once.

    Example:
        >>> weight_bytes(export_program(torch.nn.Linear(3, 2), [torch.ones(2, 3)]))
        32
    """
    values = [*program.state_dict.values(), *program.constants.values()]
    tensors = {(value.data_ptr(), value.nbytes) for value in values if isinstance(value, torch.Tensor)}
    return sum(size for _, size in tensors)


def dtype_name(name: str, value: torch.Tensor) -> str:
    """Return the name of a dtype, which is numpy's, too.

    Args:
        name: Of the input or output, for messages.
        value: Of it.

    Raises:
        ExportError: when numpy has no such dtype, as bfloat16: no artefact could say it.
    """
    dtype = str(value.dtype).removeprefix("torch.")
    try:
        torch.empty(0, dtype=value.dtype).numpy()
    except TypeError as error:
        raise ExportError(
            f"{name}: expected a dtype that numpy has, got {dtype}. Cast at the ends of forward, so that it takes and "
            "gives float32."
        ) from error
    return dtype


def _range(length: Length, number: int, example: torch.Size) -> Range:
    name = f"size{length.dimension}" + (f"_{number}" if number else "")
    return Range(name, length.smallest, length.largest, example[length.dimension])


def largest_batch(program: ExportedProgram) -> int | None:
    """Return the largest batch size that a program was captured for, or ``None`` without a limit."""
    limits: list[int] = []
    for _, value in user_inputs(program):
        size = value.shape[0]
        limit = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
        if limit is not None and limit.upper.is_Integer:
            limits.append(int(limit.upper))
    return min(limits, default=None)


def rewritten(program: ExportedProgram, rewrite: Callable[[GraphModule], int]) -> ExportedProgram:
    """Rewrite a copy of a program and capture it anew.

    Args:
        program: Left as it is.
        rewrite: Changes a graph module, unlifted, in place, and returns in how many places.

    Returns:
        The new program; the very same one when nothing was changed.
    """
    graph_module = program.module(check_guards=False)
    if not rewrite(graph_module):
        return program
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    args, _ = program.example_inputs
    most = largest_batch(program) or LARGEST_BATCH
    return export_program(graph_module, args, lengths=lengths_of(program), largest_batch=most)


def widen_single_channels(graph_module: GraphModule) -> int:
    """Give quantised convolutions with one input channel a second one that is zero, in place; return how many.

    With one channel a tensor is contiguous and channels-last at once. Inductor and oneDNN then disagree on the layout
    of what an int8 convolution gives, and its values come out in the wrong order (seen with torch 2.13).
    """
    changed = 0
    for node in list(graph_module.graph.nodes):
        if node.target in _CONVOLUTIONS and _is_dequantized(node.args[0]) and _is_dequantized(node.args[1]):
            changed += _widen(graph_module, node)
    return changed


def spare_inputs(graph_module: GraphModule) -> int:
    """Write sums that Inductor would let a quantised product's kernel add as ``product - (-other)``, in place.

    Where the other is an input, the caller's tensor would be overwritten; where an activation follows the product, its
    pass fails, since the kernel has taken that in already (seen with torch 2.13, torchao 0.18).

    Returns:
        How many.
    """
    changed = 0
    for node in list(graph_module.graph.nodes):
        if node.target is not torch.ops.aten.add.Tensor or node.kwargs:
            continue
        for value, product in (node.args, node.args[::-1]):
            if (_is_input(value) and _is_quantized_linear(product)) or _is_activated_linear(product):
                with graph_module.graph.inserting_before(node):
                    negative = graph_module.graph.call_function(torch.ops.aten.neg.default, (value,))
                node.target, node.args = torch.ops.aten.sub.Tensor, (product, negative)
                changed += 1
                break
    return changed


def flatten_strided(graph_module: GraphModule) -> int:
    """Give quantised products whose input is not contiguous a matrix of integers, in place; return how many.

    Of what is not contiguous, as ``nn.MultiheadAttention`` transposes it, Inductor makes a product of batches, and the
    pattern by which torchao finds an int8 kernel for that fails where a size varies (torch 2.13, torchao 0.18).
    """
    reshape = torch.ops.aten.reshape.default
    changed = 0
    for node in [node for node in graph_module.graph.nodes if _is_quantized_linear(node)]:
        source, value, made = node.args[0], node.args[0].meta["val"], node.meta["val"]
        if value.dim() <= 2 or value.is_contiguous():
            continue
        with graph_module.graph.inserting_before(node):
            flat = graph_module.graph.call_function(reshape, (source.args[0], [-1, value.shape[-1]]))
            floats = graph_module.graph.node_copy(source)
            sizes = [_size(node, dim) for dim in range(made.dim())]
        floats.update_arg(0, flat)
        node.update_arg(0, floats)
        with graph_module.graph.inserting_after(node):
            whole = graph_module.graph.call_function(reshape, (node, sizes))
        node.replace_all_uses_with(whole, delete_user_cb=lambda user, whole=whole: user is not whole)
        changed += 1
    return changed


def drop_assertions(program: ExportedProgram) -> None:
    """Drop what checks the device and type of tensors, in place: it fails once the program is moved."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
    program.graph_module.recompile()


def drop_traces(program: ExportedProgram) -> None:
    """Drop what nodes say of the source lines they come from, in place: it is bulky and holds paths of this machine."""
    for node in program.graph_module.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
            node.meta.pop(key, None)


def flatten_attention(graph_module: GraphModule) -> int:
    """Give attention over more than four dimensions four, in place, all that ONNX has; return how many there were."""
    attention, reshape = torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.reshape.default
    changed = 0
    for node in [node for node in graph_module.graph.nodes if node.target is attention]:
        shapes = [value.meta["val"].shape for value in (*node.args[:3], node)]
        masked = len(node.args) > 3 and node.args[3] is not None
        fixed = all(isinstance(size, int) for shape in shapes for size in shape[1:])
        alike = len({str(shape[:-3]) for shape in shapes[:3]}) == 1
        if masked or not fixed or not alike or min(map(len, shapes)) <= 4:
            continue
        for index, shape in enumerate(shapes[:3]):
            with graph_module.graph.inserting_before(node):
                flat = graph_module.graph.call_function(reshape, (node.args[index], [-1, *shape[-3:]]))
            node.update_arg(index, flat)
        with graph_module.graph.inserting_after(node):
            whole = graph_module.graph.call_function(reshape, (node, [-1, *shapes[3][1:]]))
        node.replace_all_uses_with(whole, delete_user_cb=lambda user, whole=whole: user is not whole)
        changed += 1
    return changed


def has_narrow_weights(program: ExportedProgram) -> bool:
    """Say whether a quantised program has int8 weights, all of 7 bits.

    Without VNNI, x86 adds two products of uint8 and int8 in 16 bits: 2 * 255 * 64 fits, 2 * 255 * 127 does not.
    """
    tables = _looked_up(program)
    tensors = [value for name, value in {**program.state_dict, **program.constants}.items() if name not in tables]
    integers = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int8]
    weights = [tensor for tensor in integers if tensor.dim() > 1]
    return bool(weights) and all(int(weight.short().abs().amax()) <= LARGEST_NARROW for weight in weights)


def _looked_up(program: ExportedProgram) -> set[str]:
    """Return the names of tables, which nothing is multiplied by."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return {
        names[node.args[0].name]
        for node in program.graph.nodes
        if node.target is torch.ops.aten.embedding.default and node.args[0].name in names
    }


def loosen_views(graph_module: GraphModule) -> None:
    """Let views copy, in place: strides are those of the kernels that ran at capture, and attention has several."""
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    graph_module.recompile()


def _widen(graph_module: GraphModule, convolution: Node) -> bool:
    activation, weight = convolution.args[0], convolution.args[1]
    assert isinstance(activation, Node)
    assert isinstance(weight, Node)
    holder = weight.args[0]
    if not isinstance(holder, Node) or holder.op != "get_attr":
        return False
    owner, _, leaf = str(holder.target).rpartition(".")
    value = getattr(graph_module.get_submodule(owner), leaf)
    groups = convolution.args[6] if len(convolution.args) > 6 else 1
    if value.shape[1] != 1 or groups != 1:
        return False
    padding = [0] * (2 * (value.dim() - 2)) + [0, 1]
    wide = f"{str(holder.target).replace('.', '_')}_widened"
    # The channel's weights are zero: whatever number its values stand for, it adds nothing.
    graph_module.register_buffer(wide, F.pad(value.detach(), padding))
    # Nodes of its own, since others may read the narrow ones.
    with graph_module.graph.inserting_before(convolution):
        padded = graph_module.graph.call_function(
            torch.ops.aten.constant_pad_nd.default, (activation.args[0], padding, 0)
        )
        kernel = graph_module.graph.get_attr(wide)
        copies = [graph_module.graph.node_copy(node) for node in (activation, weight)]
    for index, (copy, integers) in enumerate(zip(copies, (padded, kernel))):
        copy.update_arg(0, integers)
        convolution.update_arg(index, copy)
    return True


def _size(product: Node, dim: int) -> Any:
    """Return a size of what a product gives: a number, or the node of its input's."""
    size = product.meta["val"].shape[dim]
    source: Any = product.args[0]
    return size if isinstance(size, int) else product.graph.call_function(torch.ops.aten.sym_size.int, (source, dim))


def _is_input(value: Any) -> bool:
    return isinstance(value, Node) and value.op == "placeholder"


def _is_quantized_linear(value: Any) -> bool:
    return (
        isinstance(value, Node)
        and value.target is torch.ops.aten.linear.default
        and all(map(_is_dequantized, value.args[:2]))
    )


def _is_activated_linear(value: Any) -> bool:
    return isinstance(value, Node) and value.target in _ACTIVATIONS and _is_quantized_linear(value.args[0])


def _is_dequantized(node: Any) -> bool:
    return isinstance(node, Node) and "dequantize_per" in str(node.target)

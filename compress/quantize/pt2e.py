"""A network into its fake-quantised form and from there into integers, by PT2E."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from compress.errors import CaptureError
from compress.quantize.calibrate import calibrate
from compress.quantize.fakes.finite import check_numbers, check_ranges
from compress.quantize.fakes.specs import guard_ranges
from compress.quantize.graph.annotate import is_product, layer_of, weights_of
from compress.quantize.graph.attention import spell_out_attention
from compress.quantize.graph.embeddings import round_embeddings, store_embeddings
from compress.quantize.graph.factors import divide_weights, factors_without_zeros
from compress.quantize.graph.fold import drop_unused, fold_norms, hide_norms, run_folded, show_norms, store_weights
from compress.quantize.graph.fusion import fused_kinds_alone
from compress.quantize.graph.normalize import normalize
from compress.quantize.layers import Assignment, make_assignment, read_assignment
from compress.quantize.parametrize import begin_rounding, make_permanent, parametrize
from compress.quantize.quantizer import make_quantizer, resolve_layers, rounds_attention, without_dynamic_notes
from compress.quantize.schemes import Scheme
from compress.surgery import Captured, Edit, capture
from compress.surgery.lengths import Length, read_lengths
from compress.surgery.slicing import check_shapes

__all__ = [
    "convert",
    "deployed_form",
    "describe_inputs",
    "example_tensors",
    "num_quantized",
    "prepare",
    "replay_quantize",
]

_BATCH_NORM = torch.ops.aten.batch_norm.default
WAY_OUT = "Or round layer by layer, without a graph, in training: quantize.fallback: parametrize."


def prepare(
    network: nn.Module,
    inputs: Sequence[Tensor],
    scheme: str | Scheme | Assignment,
    *,
    layers: Mapping[str, str | Scheme] | None = None,
    keep: Sequence[str] = (),
    first_last: str | Scheme | None = None,
    lengths: Sequence[Length] = (),
    frozen: Iterable[str] | None = None,
) -> Captured:
    """Capture a network and put fake quantization around what the scheme quantises.

    Args:
        network: A float network; its parameters are shared with the result, under the same names.
        inputs: Example inputs, at least two samples each.
        scheme: A name in ``SCHEMES``, ``w4a8`` and the like, a scheme of yours; or all that follows in one.
        layers: Schemes of layers by patterns of their names, as ``{"stages.0.*": "w4a8", "fc": "float"}``; of several
            that match the last one counts.
        keep: Patterns of layers that stay in floating point: ``float`` in ``layers``, after all others.
        first_last: Scheme of the first and the last layer; by default what the scheme says.
        lengths: Sizes beyond the batch that may vary.
        frozen: Names of modules, each by its own, that stay in evaluation for good; by default those that are, in a
            network in training.

    Returns:
        A module that trains like the network, seeing what int8 will do to it.

    Raises:
        CaptureError: when the network cannot be captured, or nothing in it can be quantised.
        RecipeError: when a scheme is unknown, or a pattern matches no layer that could be quantised.
    """
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    if not isinstance(scheme, Assignment):
        scheme = make_assignment(scheme, layers=layers, keep=keep, first_last=first_last)
    try:
        captured = capture(network, inputs, lengths=lengths, frozen=frozen).train()
    except CaptureError as error:
        raise CaptureError(f"{error} {WAY_OUT}") from error
    captured.sync_mode()  # PT2E's patterns of convolutions and BatchNorms are those of training
    normalize(captured.graph_module)
    schemes = resolve_layers(scheme, captured.graph_module)
    if rounds_attention(scheme):
        spell_out_attention(captured.graph_module, schemes)
    if scheme.embeddings:
        round_embeddings(captured.graph_module, schemes)
    quantizer = make_quantizer(scheme.scheme, schemes, captured.graph_module)
    _check_norms(captured.graph_module)
    norms = _norm_constants(captured.graph_module)
    try:
        with fused_kinds_alone():
            graph_module = prepare_qat_pt2e(captured.graph_module, quantizer)
    except Exception as error:  # a pattern that the quantizer stumbles on; any kind of exception
        raise CaptureError(
            f"quantize: expected a network that PT2E can prepare, got {type(network).__name__}: "
            f"{type(error).__name__}: {error}. Leave quantize out, or rewrite the layer that the message names. "
            f"{WAY_OUT}"
        ) from error
    _restore_norm_constants(graph_module, norms)
    factors_without_zeros(graph_module)
    for module in graph_module.modules():
        if hasattr(module, "fake_quant_enabled"):
            guard_ranges(module)
    prepared = Captured(graph_module, frozen=captured.frozen, lighten=_lighten).train(network.training)
    if num_quantized(prepared) == 0:
        raise CaptureError(
            f"quantize: expected convolutions or linear layers that scheme {scheme.scheme.name!r} can quantise, "
            f"got none in {type(network).__name__}. Leave quantize out."
        )
    return prepared


def _lighten(graph_module: GraphModule, training: bool) -> None:
    if training:
        divide_weights(graph_module)
    else:
        run_folded(graph_module)


def convert(prepared: Captured) -> Captured:
    """Turn a fake-quantised network into one that quantises for good; the argument stays as it is.

    Args:
        prepared: From ``prepare``, trained.

    Returns:
        A network in eval mode whose weights are int8 and whose BatchNorms are folded away.

    Raises:
        EditError: when a parameter, a statistic or a range is not finite.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    from compress.quantize.fakes.fake import write_clips
    from compress.quantize.fakes.lsq import settle_steps

    check_numbers(prepared)
    check_ranges(prepared.graph_module)
    twin = copy.deepcopy(prepared).cpu().eval()
    twin.sync_mode()
    begin_rounding(twin.graph_module)
    settle_steps(twin.graph_module)
    _as_trained(twin.graph_module)
    fold_norms(twin.graph_module)
    store_weights(twin.graph_module)
    hide_norms(twin.graph_module)
    without_dynamic_notes(twin.graph_module)
    converted = convert_pt2e(twin.graph_module)
    show_norms(converted)
    write_clips(converted)
    store_embeddings(converted)
    drop_unused(converted)
    return Captured(converted).eval()


def deployed_form(trained: nn.Module, inputs: Sequence[Tensor], *, lengths: Sequence[Length] = ()) -> nn.Module:
    """Turn a network that was trained with fake quantization into the form that is deployed.

    Args:
        trained: From ``prepare`` or ``parametrize``; it stays as it is.
        inputs: Examples, two samples each.
        lengths: Sizes beyond the batch that vary; a graph knows its own.
    """
    return convert(trained) if isinstance(trained, Captured) else make_permanent(trained, inputs, lengths=lengths)


def describe_inputs(inputs: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Describe example inputs as plain data, enough to make inputs of the same form at replay.

    Example:
        >>> describe_inputs([torch.zeros(2, 3)])
        [{'shape': [2, 3], 'dtype': 'float32'}]
    """
    return [{"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")} for tensor in inputs]


def example_tensors(edit: Edit) -> list[Tensor]:
    """Return inputs of the form that an edit describes, all zeros."""
    return [torch.zeros(given["shape"], dtype=getattr(torch, given["dtype"])) for given in edit.data["inputs"]]


def replay_quantize(
    network: nn.Module, edit: Edit, *, batches: Sequence[Sequence[Tensor]] = (), prepared: Captured | None = None
) -> nn.Module:
    """Carry out an edit of kind ``"quantize"``.

    Args:
        network: Left untouched where the edit does not fit.
        edit: What to repeat.
        batches: Inputs to start learned steps from; none where they are about to be loaded.
        prepared: What ``prepare`` has made of the network by the edit, where it has been asked already.

    Raises:
        EditError: when this is not the network that was quantised; it is then untouched.
        CaptureError: when PT2E cannot prepare it, and the edit does not say to go without.
    """
    check_shapes(network, edit.data.get("shapes"))
    if edit.data.get("fallback"):
        return parametrize(network, read_assignment(edit.data))
    device = next(network.parameters()).device
    inputs = [tensor.to(device) for tensor in example_tensors(edit)]
    if prepared is None:
        assignment, lengths = read_assignment(edit.data), read_lengths(edit.data.get("lengths", ()))
        prepared = prepare(network, inputs, assignment, lengths=lengths, frozen=edit.data.get("frozen"))
    prepared = prepared.to(device)
    if batches:
        calibrate(prepared, batches)
    if edit.data.get("learn_steps"):
        from compress.quantize.fakes.lsq import learn_steps

        learn_steps(prepared)
    return prepared


def num_quantized(prepared: Captured) -> int:
    """Count the convolutions, matrix products and recurrent layers whose weights pass fake quantizers."""
    graph_module = prepared.graph_module
    return sum(
        is_product(node) and all(_is_fake_quantizer(graph_module, weight) for weight in weights_of(node))
        for node in graph_module.graph.nodes
    )


def _is_fake_quantizer(graph_module: GraphModule, node: Any) -> bool:
    if not (isinstance(node, Node) and node.op == "call_module"):
        return False
    return hasattr(graph_module.get_submodule(str(node.target)), "fake_quant_enabled")


def _as_trained(graph_module: GraphModule) -> None:
    """Let conversion take the scales that fake quantization has used.

    PT2E would compute them again, of weights by another formula (half of 255 steps, not 128 below and 127 above zero),
    and one in ten weights would become another integer than the one that was trained.
    """
    module: Any
    for module in graph_module.modules():
        if hasattr(module, "fake_quant_enabled"):
            module.calculate_qparams = lambda own=module: (own.scale.detach(), own.zero_point.long())


def _set_eps(norm: Node, eps: float) -> None:
    """Write a BatchNorm's eps where it stands, and where its variance scales a weight."""
    norm.update_arg(7, eps)
    for user in list(norm.args[4].users):  # type: ignore[union-attr]
        if user.target is torch.ops.aten.add.Tensor:
            user.update_arg(1, eps)


def _norm_constants(graph_module: GraphModule) -> dict[str, tuple[float, float]]:
    # By the name of the running variance, since preparation makes new nodes.
    return {
        str(node.args[4].target): (node.args[6], node.args[7])
        for node in graph_module.graph.nodes
        if _has_statistics(node)
    }


def _check_norms(graph_module: GraphModule) -> None:
    """Refuse what PT2E's fused pattern would compute with statistics or factors that are not there, or of others."""
    for node in graph_module.graph.nodes:
        layer: Any = node.args[0] if node.target is _BATCH_NORM else None
        if layer is None or "conv" not in str(layer.target):
            continue
        if node.args[4] is None:
            lacks, do = "running statistics", "Set track_running_stats=True"
        elif None in node.args[1:3]:
            lacks, do = "factors and biases of their own", "Set affine=True"
        elif "transpose" in str(layer.target) and _groups_of(layer) > 1:
            raise CaptureError(
                f"quantize: expected transposed convolutions of one group in front of BatchNorms, got "
                f"{layer_of(layer)!r} with {_groups_of(layer)}. Set groups=1, or leave quantize out."
            )
        else:
            continue
        raise CaptureError(
            f"quantize: expected BatchNorms with {lacks} behind convolutions, got {layer_of(node)!r} without. {do}, or "
            "leave quantize out."
        )


def _groups_of(transposed: Any) -> int:
    return int(transposed.args[6]) if len(transposed.args) > 6 else 1


def _has_statistics(node: Node) -> bool:
    return node.target is _BATCH_NORM and node.args[4] is not None


def _restore_norm_constants(graph_module: GraphModule, norms: Mapping[str, tuple[float, float]]) -> None:
    """Undo that PT2E's fused pattern has momentum 0.1 and eps 1e-5 written in (pytorch/ao#2980)."""
    for node in graph_module.graph.nodes:
        if not _has_statistics(node):
            continue
        momentum, eps = norms[str(node.args[4].target)]
        node.update_arg(6, momentum)
        _set_eps(node, eps)
    graph_module.recompile()

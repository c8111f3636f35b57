"""From an assignment of schemes to the PT2E quantizer that annotates a graph with fake quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from compress.quantize.fakes.specs import activation_spec, weight_spec, x86_config
from compress.quantize.graph.annotate import RECURRENT, annotate_rest, layer_of, lookups, products, weights_of
from compress.quantize.graph.attention import SPELT_OUT, activation_products
from compress.quantize.layers import Assignment
from compress.quantize.schemes import FLOAT, Scheme

__all__ = ["make_quantizer", "resolve_layers", "rounds_attention", "without_dynamic_notes"]

_LINEAR = torch.ops.aten.linear.default
_NOTE = "quantization_annotation"


def resolve_layers(assignment: Assignment, graph_module: GraphModule) -> dict[str, Scheme]:
    """Return the scheme of each module that has weights to quantise, or products of activations that shall be.

    Raises:
        RecipeError: when a pattern matches no layer that could be quantised.
    """
    return assignment.resolve(
        list(map(layer_of, products(graph_module))),
        list(map(layer_of, lookups(graph_module))),
        list(map(layer_of, activation_products(graph_module))) if rounds_attention(assignment) else [],
    )


def rounds_attention(assignment: Assignment) -> bool:
    """Say whether products of activations are rounded somewhere, which takes ranges for most layers."""
    return _is_static(assignment.scheme) and any(scheme.attention for scheme in assignment.schemes)


def make_quantizer(main: Scheme, schemes: Mapping[str, Scheme], graph_module: GraphModule) -> Any:
    """Return a PT2E quantizer that carries schemes out on a graph.

    With integers on both sides of products, what runs in integers around them is what x86 can fuse; otherwise products
    alone are annotated.

    Args:
        main: Of most layers.
        schemes: From ``resolve_layers``.
        graph_module: Normalised.
    """
    names = dict.fromkeys(map(layer_of, products(graph_module)))
    of_products = {name: schemes[name] for name in names}
    return _fusing(main, of_products, schemes) if _is_static(main) else _products_alone(of_products)


def without_dynamic_notes(graph_module: GraphModule) -> None:
    """Drop the notes on dynamic inputs, which PT2E looks for in the graph that a copy was made of, and in vain."""
    for node in products(graph_module):
        note = node.meta.get(_NOTE)
        if note is not None:
            specs = {
                source: spec for source, spec in note.input_qspec_map.items() if not getattr(spec, "is_dynamic", False)
            }
            node.meta[_NOTE] = replace(note, input_qspec_map=specs)


def _is_static(scheme: Scheme) -> bool:
    return scheme.integer_products and not scheme.dynamic


def _fusing(main: Scheme, schemes: Mapping[str, Scheme], all_schemes: Mapping[str, Scheme]) -> Any:
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    base = x86_config(main.symmetric)
    quantizer = X86InductorQuantizer().set_global(base)
    for name, scheme in schemes.items():
        if scheme.weight_bits is None:
            quantizer.set_module_name_qconfig(name, None)
    mixed = any(activation_spec(scheme) != base.input_activation for scheme in schemes.values() if scheme.weight_bits)
    annotate = quantizer.annotate

    def annotated(graph_module: GraphModule) -> GraphModule:
        annotate(graph_module)
        for node in graph_module.graph.nodes:
            if any(map(_is_integral, getattr(node.meta.get(_NOTE), "input_qspec_map", None) or ())):
                del node.meta[_NOTE]
        annotate_rest(graph_module, base, [name for name, scheme in schemes.items() if scheme.weight_bits is None])
        for node in products(graph_module):
            if _NOTE in node.meta:
                _note(node, node.meta[_NOTE], schemes)
        for node in activation_products(graph_module):
            _note_both(node, all_schemes.get(layer_of(node), FLOAT))
        if mixed:
            _drop_outputs(graph_module)
        return graph_module

    quantizer.annotate = annotated
    return quantizer


def _products_alone(schemes: Mapping[str, Scheme]) -> Any:
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer

    class ProductQuantizer(Quantizer):  # type: ignore[misc]
        def annotate(self, graph_module: GraphModule) -> GraphModule:
            for node in products(graph_module):
                _note(node, QuantizationAnnotation(_annotated=True), schemes)
            return graph_module

        def validate(self, model: GraphModule) -> None:
            pass  # what PT2E asks of a quantizer; there is nothing that the annotations could get wrong

    return ProductQuantizer()


def _note(node: Node, note: Any, schemes: Mapping[str, Scheme]) -> None:
    """Note on a product what its layer's scheme says; a note with nothing inside goes: PT2E's fusion trips over it."""
    scheme = schemes[layer_of(node)]
    if scheme.linear_only and node.target is not _LINEAR:
        scheme = FLOAT
    inputs = [] if node.target in RECURRENT else [node.args[0]]
    wanted = dict.fromkeys(inputs, activation_spec(scheme)) | dict.fromkeys(weights_of(node), weight_spec(scheme))
    note.input_qspec_map = {**note.input_qspec_map, **wanted}
    node.meta[_NOTE] = note
    if scheme.weight_bits is None:
        del node.meta[_NOTE]


def _note_both(node: Node, scheme: Scheme) -> None:
    """Note on a product of activations that both are to be rounded; a fused one has none but its inputs to show."""
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

    if scheme.attention and node.target in SPELT_OUT:
        factors = dict.fromkeys(node.args[:2], activation_spec(scheme))
        node.meta[_NOTE] = QuantizationAnnotation(input_qspec_map=factors, _annotated=True)


def _drop_outputs(graph_module: GraphModule) -> None:
    """Where products differ in what they take, a value is rounded for each that takes it and not when it is made."""
    for node in graph_module.graph.nodes:
        note = node.meta.get(_NOTE)
        if note is not None and hasattr(note.output_qspec, "qscheme"):  # not what a pool shares with its input
            note.output_qspec = None


def _is_integral(node: Node) -> bool:
    value = getattr(node, "meta", {}).get("val")
    return isinstance(value, torch.Tensor) and not value.dtype.is_floating_point

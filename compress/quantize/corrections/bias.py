"""Bias correction: quantization's mean error of each channel, taken out of the layer's bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.progress import track
from torch import Tensor
from torch.fx import GraphModule, Node

from compress.quantize.corrections.channels import parameter, used_once
from compress.quantize.corrections.lockstep import Layer, Side, evaluation, float_twin, lockstep, quantized_layers
from compress.surgery import Captured

__all__ = ["correct_biases"]


def correct_biases(
    prepared: Captured,
    batches: Sequence[Sequence[Tensor]],
    *,
    reference: Captured | None = None,
    progress: bool = False,
) -> int:
    r"""Shift each channel of each quantised layer so that its mean is that of the float network.

    .. math:: b \leftarrow b + E[y] - E[\tilde y]          Nagel et al. 2019, arXiv:1906.04721, section 4.2

    The means are measured, before the nonlinearity, layer after layer with the layers before already corrected. A
    BatchNorm behind a convolution takes the shift; a layer with neither it nor a bias stays.

    Args:
        prepared: A calibrated network; its biases change in place.
        batches: Inputs of the network, a tuple of tensors each. All that is still needed of their activations is held.
        reference: The float network, in the same graph; else the prepared one without rounding.
        progress: Whether to show a progress bar.

    Returns:
        How many layers have been corrected.

    Raises:
        DataError: when there is no data.
    """
    reference = reference or float_twin(prepared)
    shifted = {}
    for layer in quantized_layers(prepared.graph_module):
        name = _bias(prepared.graph_module, layer)
        if name is not None:
            shifted[layer.last] = layer, parameter(prepared.graph_module, name)
    with evaluation(prepared, reference):
        quantized, exact = Side(prepared.graph_module, batches), Side(reference.graph_module, batches)
        places = ((node, twin) for node, twin in lockstep(quantized, exact) if node in shifted)
        for node, twin in track(places, "correcting biases", len(shifted), transient=True, disable=not progress):
            layer, bias = shifted[node]
            missing = _missing(exact.all(twin), quantized.all(node), layer.channel)
            bias += missing.to(bias)
            for values in quantized.values:
                values[node] = values[node] + _along(missing, values[node], layer.channel)
    return len(shifted)


def _bias(graph_module: GraphModule, layer: Layer) -> str | None:
    """Return the name of what shifts a layer's outputs."""
    node, position = (layer.last, 2) if layer.behind else (layer.product, 2)
    bias = node.args[position] if len(node.args) > position else None
    if not isinstance(bias, Node) or bias.op != "get_attr" or not used_once(graph_module, [str(bias.target)]):
        return None
    return str(bias.target)


def _missing(exact: Sequence[Tensor], rounded: Sequence[Tensor], channel: int) -> Tensor:
    """Return each channel's mean error; a value counts the same in a long batch as in a short one."""
    errors = [(one - other).movedim(channel, 0).flatten(1) for one, other in zip(exact, rounded)]
    return torch.cat(errors, 1).mean(1)


def _along(means: Tensor, values: Tensor, channel: int) -> Tensor:
    shape = [1] * values.dim()
    shape[channel] = -1
    return means.to(values).view(shape)

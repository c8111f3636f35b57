"""What a network costs: parameters, multiply-accumulates, bytes, widths."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress.measure.modes import kept_modes

__all__ = ["macs", "num_bytes", "num_params", "widths"]


def num_params(network: nn.Module) -> int:
    """Count the parameters, shared ones once.

    Example:
        >>> num_params(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in network.parameters())


def macs(network: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Count the multiply-accumulates of one forward pass, in eval mode.

    Convolutions, matrix products, recurrent layers and attention count; element-wise operations do not.

    Args:
        network: Each of its modules is left in the mode it was in.
        inputs: Inputs of that pass; give a batch of one to get the cost of a sample.

    Example:
        >>> macs(nn.Linear(3, 2), [torch.ones(1, 3)])
        6
    """
    counter = FlopCounterMode(display=False, custom_mapping=_MORE)
    with kept_modes(network, training=False), torch.no_grad(), _without_fused_layers(), counter:
        network(*inputs)
    return counter.get_total_flops() // 2


def num_bytes(network: nn.Module) -> int:
    """Return the size of the network's weights as ``torch.save`` writes them.

    Example:
        >>> num_bytes(nn.Linear(100, 100)) > 100 * 100 * 4
        True
    """
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def widths(network: nn.Module) -> dict[str, int]:
    """Return the number of outputs of each convolution and linear layer, by the layer's name.

    Works on captured graphs too, whose layers are bare holders of parameters.

    Example:
        >>> widths(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        {'0': 2}
    """
    found = {}
    for name, parameter in network.named_parameters():
        layer, _, leaf = name.rpartition(".")
        module = network.get_submodule(layer)
        if leaf == "weight" and parameter.dim() > 1 and not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                found[layer] = parameter.shape[1] * module.groups
            else:
                found[layer] = parameter.shape[0]
    return found


def _matrix_vector(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _sum_and_matrix_vector(_: Any, matrix: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * prod(matrix)


def _bilinear(first: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * first[0] * prod(weight)


# Floating-point operations of products that torch's counter does not know, from the shapes of their arguments.
_MORE: dict[Any, Any] = {
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: _sum_and_matrix_vector,
    torch.ops.aten._trilinear: _bilinear,
}


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Take PyTorch's plain paths: the flop counter sees nothing of a fused LSTM, encoder layer or CPU attention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these flags warn about TF32 on machines without Intel GPUs
            with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)

"""PT2E's fusion of convolutions and BatchNorms, without what costs time and changes nothing.

torchao captures three patterns for each of four kinds of convolution every time, half a second a pattern, and looks for
all of them. Here it looks for the kinds that a graph has, and a process captures a pattern once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule
from torch.nn import functional

__all__ = ["fused_kinds_alone"]

_ATEN = torch.ops.aten
_OPERATORS: dict[Callable[..., Any], tuple[Any, ...]] = {
    functional.conv1d: (_ATEN.conv1d.default, _ATEN.conv1d.padding),
    functional.conv2d: (_ATEN.conv2d.default, _ATEN.conv2d.padding),
    functional.conv_transpose1d: (_ATEN.conv_transpose1d.default,),
    functional.conv_transpose2d: (_ATEN.conv_transpose2d.input,),
}


_CAPTURED: dict[tuple[Any, ...], GraphModule] = {}


@contextmanager
def fused_kinds_alone() -> Iterator[None]:
    """Have torchao look for the patterns of those convolutions alone that the graph has; results are the same."""
    from torchao.quantization.pt2e import qat_utils

    fuse = qat_utils._fuse_conv_bn_qat_helper  # torchao has no public place to say so
    capture = qat_utils._get_aten_graph_module_for_pattern

    def fuse_if_present(graph_module: GraphModule, kind: Callable[..., Any], *others: Any, **more: Any) -> GraphModule:
        targets = {node.target for node in graph_module.graph.nodes}
        if targets.isdisjoint(_OPERATORS.get(kind, targets)):
            return graph_module
        numbers = itertools.count()

        def capture_once(pattern: Any, inputs: Any, is_cuda: bool) -> GraphModule:
            # Patterns are made anew in every call, always in the same order.
            settings = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
            key = (kind, next(numbers), is_cuda, *settings)
            if key not in _CAPTURED:
                _CAPTURED[key] = capture(pattern, inputs, is_cuda)
            return copy.deepcopy(_CAPTURED[key])

        qat_utils._get_aten_graph_module_for_pattern = capture_once
        return fuse(graph_module, kind, *others, **more)  # type: ignore[no-any-return]

    qat_utils._fuse_conv_bn_qat_helper = fuse_if_present
    try:
        yield
    finally:
        qat_utils._fuse_conv_bn_qat_helper = fuse
        qat_utils._get_aten_graph_module_for_pattern = capture

"""One layer as a network of its own, to be timed: in ONNX Runtime, and in torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from compress.errors import MissingPackageError
from compress.runtime.engines import make_engine

__all__ = ["LAYER_CALLS", "Layer"]

Call = Callable[[], object]


@dataclass(frozen=True)
class Layer:
    """What tells how long a layer takes.

    Args:
        kind: ``conv``, ``linear``, ``product``, or ``nothing``: a call that computes nothing.
        read: Input channels of a convolution (of a group, where ``groups`` says so), or what is summed over.
        made: Output channels, or columns.
        rows: Rows of a linear layer or of each matrix of a product.
        batch: Samples of a convolution, or matrices of a product.
        groups: Of a convolution.
        repeat: How many times it runs one after the other, as in a recurrent layer.
        fixed: Kernel, stride and the like of a convolution, as JSON.
    """

    kind: str
    read: int = 1
    made: int = 1
    rows: int = 1
    batch: int = 1
    groups: int = 1
    repeat: int = 1
    fixed: str = "{}"

    @property
    def key(self) -> str:
        """A text that stands for it in a file; how often it runs does not matter there."""
        given = {name: value for name, value in asdict(self).items() if name not in ("repeat", "fixed") and value != 1}
        return json.dumps({**given, **self.settings}, sort_keys=True)

    @property
    def settings(self) -> dict[str, Any]:
        """Kernel, stride and the like."""
        return json.loads(self.fixed)

    def image_shape(self) -> tuple[int, ...]:
        """Return the input's shape of a convolution."""
        grouped = self.groups if not self.settings["transposed"] else 1
        return (self.batch, self.read * grouped, *self.settings["image"])

    def kernel_shape(self) -> tuple[int, ...]:
        """Return the weight's shape of a convolution."""
        sizes = (self.read, self.made) if self.settings["transposed"] else (self.made, self.read)
        return (*sizes, *self.settings["kernel"])


def in_onnxruntime(layer: Layer, folder: Path, threads: int | None) -> Call:
    """Return a call of a layer in ONNX Runtime.

    Raises:
        MissingPackageError: when onnx or onnxruntime is not installed.
    """
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise MissingPackageError("onnx") from error
    inputs, weights, node = _ONNX[layer.kind](layer)
    graph = helper.make_graph(
        [helper.make_node(node[0], [*inputs, *weights], ["y"], **node[1])],
        "layer",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(_filled(shape), name) for name, shape in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "layer.onnx"
    onnx.save(model, str(path))
    engine = make_engine("onnxruntime", path, num_threads=threads)
    arrays = [_filled(shape) for shape in inputs.values()]
    return lambda: engine(arrays)


def in_torch(layer: Layer, folder: Path, threads: int | None) -> Call:
    """Return a call of a layer in torch, operator by operator; threads are the process's."""
    inputs, weights, _ = _ONNX[layer.kind](layer)
    tensors = [torch.from_numpy(_filled(shape)) for shape in (*inputs.values(), *weights.values())]
    run = _torch_call(layer, tensors)

    def call() -> object:
        with torch.inference_mode():
            return run()

    return call


LAYER_CALLS: dict[str, Callable[[Layer, Path, int | None], Call]] = {
    "onnxruntime": in_onnxruntime,
    "eager": in_torch,
}
"""Engine to what makes a call of a single layer."""


def _filled(shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, 0.01, dtype=np.float32)


def _torch_call(layer: Layer, tensors: list[torch.Tensor]) -> Call:
    if layer.kind == "nothing":
        return lambda: tensors[0]
    if layer.kind != "conv":
        return lambda: torch.matmul(tensors[0], tensors[1])
    settings = layer.settings
    rank = len(settings["kernel"])
    # Torch takes one padding for both sides; where they differ, the larger one is near enough.
    padding = [max(pair) for pair in settings["padding"]]
    common = {"stride": settings["stride"], "padding": padding, "dilation": settings["dilation"]}
    if settings["transposed"]:
        common["output_padding"] = settings["output_padding"]
    name = f"conv{'_transpose' if settings['transposed'] else ''}{rank}d"
    convolution: Callable[..., torch.Tensor] = getattr(F, name)
    return lambda: convolution(*tensors, groups=layer.groups, **common)


Shapes = Mapping[str, tuple[int, ...]]


def _linear(layer: Layer) -> tuple[Shapes, Shapes, tuple[str, dict[str, Any]]]:
    return {"x": (layer.rows, layer.read)}, {"w": (layer.read, layer.made)}, ("MatMul", {})


def _product(layer: Layer) -> tuple[Shapes, Shapes, tuple[str, dict[str, Any]]]:
    left, right = (layer.batch, layer.rows, layer.read), (layer.batch, layer.read, layer.made)
    return {"a": left, "b": right}, {}, ("MatMul", {})


def _nothing(layer: Layer) -> tuple[Shapes, Shapes, tuple[str, dict[str, Any]]]:
    return {"x": (1, 1)}, {}, ("Identity", {})


def _convolution(layer: Layer) -> tuple[Shapes, Shapes, tuple[str, dict[str, Any]]]:
    settings = layer.settings
    before, after = zip(*settings["padding"])
    attributes = {
        "kernel_shape": settings["kernel"],
        "strides": settings["stride"],
        "dilations": settings["dilation"],
        "pads": [*before, *after],
        "group": layer.groups,
    }
    if settings["transposed"]:
        attributes["output_padding"] = settings["output_padding"]
    operator = "ConvTranspose" if settings["transposed"] else "Conv"
    return {"x": layer.image_shape()}, {"w": layer.kernel_shape()}, (operator, attributes)


_ONNX: dict[str, Callable[[Layer], tuple[Shapes, Shapes, tuple[str, dict[str, Any]]]]] = {
    "conv": _convolution,
    "linear": _linear,
    "product": _product,
    "nothing": _nothing,
}

"""Fake quantization layer by layer: what is left for networks that PT2E cannot capture.

Wherever code reads the ``weight`` of a layer, it gets what comes back from integers, and a hook rounds what the layer
takes. ``torch.nn.utils.parametrize`` does the former, but gives parameters other names: optimisers' groups, masks of
sparse weights and averages know them by name, so here each keeps its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from types import new_class
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from compress.errors import CaptureError, RecipeError
from compress.quantize.fakes.finite import check_numbers
from compress.quantize.fakes.specs import activation_spec, fake_quantizer, weight_spec
from compress.quantize.graph.fold import drop_unused, fold_into_scales
from compress.quantize.layers import Assignment
from compress.quantize.schemes import Scheme
from compress.surgery import Captured
from compress.surgery.capture import export_program
from compress.surgery.lengths import Length

__all__ = ["begin_rounding", "check_schemes", "freeze", "make_permanent", "parametrize", "rounded_layers"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def check_schemes(assignment: Assignment) -> None:
    """Refuse what cannot be done layer by layer.

    Raises:
        RecipeError: for dynamic ranges, groups of weights, and floats.
    """
    if others := [scheme.name for scheme in assignment.schemes if not scheme.fixed_steps]:
        raise RecipeError(
            "quantize.fallback: expected schemes of integers with one step for a tensor or a channel, got "
            f"{', '.join(others)}. Choose another quantize.scheme, such as int8, or leave the fallback out."
        )


def parametrize(network: nn.Module, assignment: Assignment) -> nn.Module:
    """Put fake quantization into the linear and convolutional layers of a network, in place.

    Transposed convolutions of one group are among them; what ``nn.MultiheadAttention`` and recurrent layers multiply
    stays in floats. The first and the last layer are those that the network registers first and last.

    Args:
        network: Its parameters keep their names; it is left untouched where something does not fit.
        assignment: Which layer gets which scheme.

    Returns:
        The same network: its layers learn ranges in training, and hold still in evaluation.

    Raises:
        RecipeError: when a scheme does not fit, a pattern matches no layer, or a layer's weight is computed from other
            parameters.
        CaptureError: when nothing in the network can be quantised.
    """
    check_schemes(assignment)
    layers = {name: module for name, module in network.named_modules() if _axis(module) is not None}
    tables = [name for name, module in network.named_modules() if isinstance(module, nn.Embedding)]  # stay in floats
    anywhere = [name for name, _ in network.named_modules()] if any(s.attention for s in assignment.schemes) else []
    schemes = assignment.resolve(list(layers), tables, anywhere)
    chosen = {name: schemes[name] for name, module in layers.items() if _fits(module, schemes[name])}
    if not chosen:
        raise CaptureError(
            f"quantize: expected convolutions or linear layers that scheme {assignment.scheme.name!r} can quantise, "
            f"got none in {type(network).__name__}. Leave quantize out."
        )
    for name in chosen:
        if not isinstance(layers[name]._parameters.get("weight"), nn.Parameter):
            raise RecipeError(
                f"quantize.fallback: expected layers with a weight of their own, got {name!r}, whose weight is "
                "computed from other parameters. Make it a parameter first, or name the layer in quantize.keep."
            )
    for name, scheme in chosen.items():
        _round(layers[name], scheme)
    return network


def rounded_layers(network: nn.Module) -> dict[str, Any]:
    """Return the layers that ``parametrize`` has changed, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, _Rounded)}


def freeze(network: nn.Module, frozen: bool) -> None:
    """Let BatchNorm statistics and ranges stand still in training, or move again.

    Args:
        network: Captured and prepared, or from ``parametrize``.
        frozen: Whether they stand still; call it before each step, since Lightning restores modes.
    """
    if isinstance(network, Captured):
        network.freeze_batchnorm = frozen
        return
    module: Any
    for module in network.modules():
        if isinstance(module, _Rounded):
            module._ranges_frozen = frozen
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training if frozen else _is_held(module)):
            module.training, vars(module)["_held"] = not frozen, frozen


def _is_held(norm: Any) -> bool:
    """Say whether it was frozen here, and not by whoever wrote the network."""
    return getattr(norm, "_held", False)


def set_rounding(network: nn.Module, on: bool) -> None:
    """Let fake quantizers round, or observe alone."""
    module: Any
    for module in network.modules():
        if hasattr(module, "fake_quant_enabled"):
            module.fake_quant_enabled[0] = int(on)


def begin_rounding(network: nn.Module) -> bool:
    """Let fake quantizers that observe alone round, by what they have seen; say whether there were any.

    In training, the next batch makes a scale of a range. Where a fit or what a checkpoint holds ends while ranges alone
    are learned there is none, and scales are still those that fake quantizers are made with.

    Args:
        network: From ``prepare`` or ``parametrize``.
    """
    modules: list[Any] = [module for module in network.modules() if hasattr(module, "fake_quant_enabled")]
    waiting = [module for module in modules if not module.fake_quant_enabled[0]]
    for module in waiting:
        module.fake_quant_enabled[0] = 1
        if hasattr(module, "follow"):
            module.follow()
    return bool(waiting)


def make_permanent(network: nn.Module, inputs: Sequence[Tensor], *, lengths: Sequence[Length] = ()) -> nn.Module:
    """Turn fake quantization into integers times scales; the argument stays as it is.

    Where ranges are unknown, since no batch has reached a layer, it is left in floats.

    Args:
        network: From ``parametrize``, trained.
        inputs: Examples, two samples each, with which the result is captured, by running its code: branches that
            depend on data cannot be captured that way either.
        lengths: Sizes beyond the batch that vary.

    Returns:
        In evaluation: a graph with BatchNorms folded into the scales in front of them; the network itself, its weights
        int8, where it cannot be captured.

    Raises:
        EditError: when a parameter or a statistic is not finite.
    """
    check_numbers(network)
    twin = copy.deepcopy(network).cpu().eval()
    begin_rounding(twin)
    for layer in rounded_layers(twin).values():
        _store(layer)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer would pass its inputs by
    try:
        program = export_program(twin, [tensor.cpu() for tensor in inputs], lengths=lengths, strict=False)
    except CaptureError:
        return twin
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    captured = Captured(program.module(check_guards=False)).eval()
    fold_into_scales(captured.graph_module)
    drop_unused(captured.graph_module)
    return captured


class _Rounded:
    """What a layer becomes in training; its own class comes second."""

    _plain: type[nn.Module]
    _parameters: dict[str, Any]
    _ranges_frozen = False
    training: bool
    weight_fake_quant: Any
    input_fake_quant: Any

    @property
    def weight(self) -> Tensor:
        return self._through(self.weight_fake_quant, self._parameters["weight"])

    def _take(self, x: Tensor) -> Tensor:
        return x if self.input_fake_quant is None else self._through(self.input_fake_quant, x)

    def _through(self, fake: Any, x: Tensor) -> Tensor:
        learning = self.training and not self._ranges_frozen
        if bool(fake.observer_enabled[0]) != learning:
            fake.observer_enabled[0] = int(learning)
        if not learning and fake.fake_quant_enabled[0] and not _is_known(fake):
            return x  # no batch has come here yet
        rounded: Tensor = fake(x).to(x.dtype)
        return rounded


class _Stored:
    """What it becomes in the end."""

    _plain: type[nn.Module]
    stored_weight: Any
    stored_input: Any

    @property
    def weight(self) -> Tensor:
        values: Tensor = self.stored_weight()
        return values

    def _take(self, x: Tensor) -> Tensor:
        values: Tensor = x if self.stored_input is None else self.stored_input(x)
        return values


class _StoredWeight(nn.Module):
    """Integers and a scale for each channel, from a weight and the fake quantizer that it was trained with."""

    def __init__(self, weight: Tensor, fake: Any, axis: int) -> None:
        super().__init__()
        rounded = fake(weight)  # makes the scale of the range
        self.axis, self.limits = axis, (int(fake.quant_min), int(fake.quant_max))
        shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
        self.register_buffer("integers", (rounded / fake.scale.view(shape)).round().to(torch.int8))
        self.register_buffer("scale", fake.scale.clone())
        self.register_buffer("zero", torch.zeros_like(fake.scale, dtype=torch.int64))

    def forward(self) -> Tensor:
        values: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.integers, self.scale, self.zero, self.axis, *self.limits, torch.int8
        )
        return values


class _StoredInput(nn.Module):
    """To integers and back, as a fake quantizer did it."""

    def __init__(self, fake: Any) -> None:
        super().__init__()
        fake(torch.zeros(1))
        scale, zero, low, high = float(fake.scale), int(fake.zero_point), int(fake.quant_min), int(fake.quant_max)
        self.how = scale, zero, low, high, fake.dtype
        kind = torch.iinfo(fake.dtype)
        self.clip: tuple[float | None, float] | None = None
        if high - low < kind.max - kind.min - 1:  # engines clip at the ends of the type
            self.clip = None if low == kind.min else (low - zero) * scale, (high - zero) * scale

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.clip is None else x.clamp(*self.clip)
        integers = torch.ops.quantized_decomposed.quantize_per_tensor(x, *self.how)
        values: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor(integers, *self.how)
        return values


def _axis(module: nn.Module) -> int | None:
    """Return the dimension of a weight's output channels, ``None`` for what is not quantised."""
    if isinstance(module, _TRANSPOSED):
        return 1 if module.groups == 1 else None
    # The code of nn.MultiheadAttention reads the weights of this one, and never calls it.
    is_layer = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and not isinstance(
        module, NonDynamicallyQuantizableLinear
    )
    return 0 if is_layer else None


def _fits(module: nn.Module, scheme: Scheme) -> bool:
    return scheme.weight_bits is not None and (isinstance(module, nn.Linear) or not scheme.linear_only)


def _round(layer: Any, scheme: Scheme) -> None:
    device, training = layer.weight.device, layer.training
    spec = activation_spec(scheme)
    layer.weight_fake_quant = fake_quantizer(weight_spec(scheme), axis=_axis(layer)).to(device)
    layer.input_fake_quant = None if spec is None else fake_quantizer(spec).to(device)
    layer.register_forward_pre_hook(_round_input, with_kwargs=True)
    plain: Any = type(layer)
    layer.__class__ = _as(_Rounded, plain)
    layer.train(training)


@torch.no_grad()
def _store(layer: Any) -> None:
    """Replace a layer's weight by integers and their scale."""
    weights, inputs = layer.weight_fake_quant, layer.input_fake_quant
    del layer.weight_fake_quant, layer.input_fake_quant
    if not _is_known(weights):
        _forget_hook(layer)
        layer.__class__ = layer._plain
        return
    for fake in filter(None, (weights, inputs)):
        fake.observer_enabled[0] = 0
    layer.stored_weight = _StoredWeight(layer._parameters.pop("weight"), weights, _axis(layer) or 0)
    layer.stored_input = _StoredInput(inputs) if inputs is not None and _is_known(inputs) else None
    layer.__class__ = _as(_Stored, layer._plain)


def _round_input(layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (layer._take(args[0]), *args[1:]), named
    first = next(iter(named))
    return args, {**named, first: layer._take(named[first])}


def _forget_hook(layer: Any) -> None:
    for number in [number for number, hook in layer._forward_pre_hooks.items() if hook is _round_input]:
        del layer._forward_pre_hooks[number]
        layer._forward_pre_hooks_with_kwargs.pop(number, None)


@cache
def _as(form: type, plain: Any) -> type:
    """Return a layer's class in one of the forms above."""
    return new_class(
        f"{form.__name__[1:]}{plain.__name__}", (form, plain), exec_body=lambda own: own.update(_plain=plain)
    )


def _is_known(fake: Any) -> bool:
    high = fake.activation_post_process.max_val
    return bool(high.numel()) and bool(torch.isfinite(high).all())

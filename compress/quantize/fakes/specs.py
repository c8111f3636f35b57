"""What PT2E is told of a tensor that a scheme quantises: type, range of integers, and how both are learned."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from compress.quantize.ranges import around_zero
from compress.quantize.schemes import Scheme

__all__ = ["activation_spec", "fake_quantizer", "guard_ranges", "weight_spec", "x86_config"]


@cache
def x86_config(symmetric: bool) -> Any:
    """Return the configuration for what x86 has instructions for: uint8 from 0 to 255, or to 254 with zero at 127.

    The second is the symmetric int8 of other engines, shifted to what x86 takes.
    """
    from torchao.quantization.pt2e import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import get_default_x86_inductor_quantization_config

    config = get_default_x86_inductor_quantization_config(is_qat=True)
    activation = _following(config.input_activation, MovingAverageMinMaxObserver)
    if symmetric:
        activation = replace(activation, qscheme=torch.per_tensor_symmetric, quant_max=254)
    weight = _following(config.weight, MovingAveragePerChannelMinMaxObserver)
    return replace(config, input_activation=activation, output_activation=activation, weight=weight)


@cache
def activation_spec(scheme: Scheme) -> Any:
    """Return what a scheme makes of a product's input, ``None`` where it stays as it is."""
    from torchao.quantization.pt2e import MovingAverageMinMaxObserver as Observer

    from compress.quantize.fakes.fake import DynamicFakeQuantize, Float8FakeQuantize, RangeFakeQuantize

    whole = x86_config(scheme.symmetric).input_activation
    if scheme.activation_bits is None:
        return None
    if scheme.dynamic:
        fake = DynamicFakeQuantize.with_args(observer=Observer.with_args(averaging_constant=1))
        return replace(whole, is_dynamic=True, observer_or_fake_quant_ctr=fake)
    if scheme.number == "float":
        return _many(whole, Float8FakeQuantize.with_args(observer=Observer))
    if scheme.activation_bits == 16:
        return _many(whole, RangeFakeQuantize.with_args(observer=Observer))
    if scheme.activation_bits == 8:
        return whole
    largest = 2**scheme.activation_bits - (2 if scheme.symmetric else 1)
    fake = RangeFakeQuantize.with_args(observer=Observer)
    return replace(whole, quant_max=largest, observer_or_fake_quant_ctr=fake)


@cache
def weight_spec(scheme: Scheme) -> Any:
    """Return what a scheme makes of a product's weight, ``None`` where it stays as it is."""
    from torchao.quantization.pt2e import MovingAveragePerChannelMinMaxObserver as Extremes

    from compress.quantize.fakes.fake import (
        Float8FakeQuantize,
        GroupFakeQuantize,
        LeastSquaresObserver,
        RangeFakeQuantize,
    )

    whole = x86_config(scheme.symmetric).weight
    if scheme.weight_bits is None:
        return None
    if scheme.number == "float":
        last = Extremes.with_args(averaging_constant=1)
        return _many(whole, Float8FakeQuantize.with_args(observer=last))
    half = 2 ** (scheme.weight_bits - 1)
    few = replace(whole, quant_min=-half, quant_max=half - 1)
    if scheme.group_size is not None:
        fake = GroupFakeQuantize.with_args(observer=LeastSquaresObserver, group_size=scheme.group_size)
        return replace(few, observer_or_fake_quant_ctr=fake)
    if scheme.weight_bits == 8:
        return whole
    return replace(few, observer_or_fake_quant_ctr=RangeFakeQuantize.with_args(observer=LeastSquaresObserver))


def fake_quantizer(spec: Any, *, axis: int | None = None) -> Any:
    """Return a module that fake-quantises as a specification says, its range guarded; PT2E makes its own.

    Args:
        spec: From ``activation_spec`` or ``weight_spec``.
        axis: Dimension of a weight's output channels; ``None`` for an activation.
    """
    names = ("dtype", "quant_min", "quant_max", "qscheme")
    arguments = {name: getattr(spec, name) for name in names} | ({} if axis is None else {"ch_axis": axis})
    module = spec.observer_or_fake_quant_ctr.with_args(**arguments)()
    guard_ranges(module)
    return module


def guard_ranges(module: Any) -> None:
    """Let a fake quantizer compute in float32 and keep its zero where the scheme has it."""
    module.register_forward_pre_hook(_in_float32)
    if hasattr(module, "scale_of"):
        return  # has no zero point to be kept at zero
    if module.qscheme == torch.per_tensor_symmetric:
        module.register_forward_pre_hook(_around_zero)
    if module.qscheme == torch.per_channel_symmetric:
        module.register_forward_pre_hook(_rows_around_zero)


def _following(spec: Any, observer: Any) -> Any:
    """As PT2E has it, by a fake quantizer of ours."""
    from compress.quantize.fakes.moving import MovingFakeQuantize

    return replace(spec, observer_or_fake_quant_ctr=MovingFakeQuantize.with_args(observer=observer))


def _many(spec: Any, fake: Any) -> Any:
    """As many integers as 16 bits have, zero in the middle."""
    symmetric = torch.per_channel_symmetric if spec.ch_axis is not None else torch.per_tensor_symmetric
    return replace(
        spec,
        dtype=torch.int16,
        quant_min=-(2**15) + 1,
        quant_max=2**15 - 1,
        qscheme=symmetric,
        observer_or_fake_quant_ctr=fake,
    )


def _in_float32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Under autocast, what a linear layer gives is bfloat16, in which observers cannot keep their ranges.
    return tuple(tensor.float() for tensor in inputs)


def _around_zero(module: Any, inputs: tuple[Tensor, ...]) -> None:
    """Keep a symmetric range symmetric: of values that are never negative, the kernel would make an affine one."""
    low, high = module.activation_post_process.min_val, module.activation_post_process.max_val
    if torch.isinf(high).any() and module.observer_enabled[0]:  # nothing seen yet
        _start(low, high, *torch.aminmax(inputs[0].detach()))
    widened = torch.minimum(low, -high.abs().clamp(min=torch.finfo(torch.float32).tiny))
    low.copy_(torch.where(torch.isinf(high), low, widened))


def _rows_around_zero(module: Any, inputs: tuple[Tensor, ...]) -> None:
    """Let no row's range lie on one side of zero, neither at the first step nor at a later one."""
    low, high = module.activation_post_process.min_val, module.activation_post_process.max_val
    if not low.numel() or torch.isinf(high).any():
        rows = inputs[0].detach().movedim(module.ch_axis, 0).flatten(1)
        if not low.numel():
            low.resize_(len(rows)).fill_(torch.inf)
            high.resize_(len(rows)).fill_(-torch.inf)
            module.scale.resize_(len(rows)).fill_(1.0)  # the kernel would, where it finds no range
            module.zero_point.resize_(len(rows)).zero_()
        _start(low, high, rows.amin(1), rows.amax(1))
    for buffer, value in zip((low, high), around_zero(low, high)):
        buffer.copy_(value)


def _start(low: Tensor, high: Tensor, least: Tensor, most: Tensor) -> None:
    """Let ranges that have seen nothing begin with the extremes of a batch, in place, where these are finite."""
    new = torch.isinf(high) & torch.isfinite(least) & torch.isfinite(most)
    low.copy_(torch.where(new, least, low))
    high.copy_(torch.where(new, most, high))

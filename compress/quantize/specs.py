"""What PT2E is told of a tensor that a scheme quantises: type, range of integers, and how both are learned."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from compress.quantize.schemes import Scheme

__all__ = ["activation_spec", "weight_spec", "x86_config"]


@cache
def x86_config(symmetric: bool) -> Any:
    """Return the configuration for what x86 has instructions for: uint8 from 0 to 255, or to 254 with zero at 127.

    The second is the symmetric int8 of other engines, shifted to what x86 takes.
    """
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import get_default_x86_inductor_quantization_config

    config = get_default_x86_inductor_quantization_config(is_qat=True)
    if not symmetric:
        return config
    activation = replace(config.input_activation, qscheme=torch.per_tensor_symmetric, quant_max=254)
    return replace(config, input_activation=activation, output_activation=activation)


@cache
def activation_spec(scheme: Scheme) -> Any:
    """Return what a scheme makes of a product's input, ``None`` where it stays as it is."""
    from torchao.quantization.pt2e import MovingAverageMinMaxObserver as Observer

    from compress.quantize.fake import DynamicFakeQuantize, Float8FakeQuantize, RangeFakeQuantize

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

    from compress.quantize.fake import Float8FakeQuantize, GroupFakeQuantize, LeastSquaresObserver, RangeFakeQuantize

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

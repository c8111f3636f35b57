"""The zoo's check of quantization: int8 after training, of the whole network and after pruning 30 %, and its export."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import build, first_output
from zoo_prune import kept_units
from zoo_table import LEAST_COSINE, least_cosine

from compress.export.targets import onnxruntime
from compress.prune import apply_removal, describe_removal, score_groups, study
from compress.prune.planner import least
from compress.quantize import calibrate, convert, coverage, prepare
from compress.runtime.engines import make_engine
from compress.surgery import Captured
from compress.surgery.capture import export_program

__all__ = ["quantize"]

_LEAST_MOMENT = 0.01
"""Of a BatchNorm's channel, as a part of the mean of all: less would make rounding of dead channels large."""


def quantize(name: str, row: dict[str, Any]) -> None:
    """Prepare, calibrate on one batch, convert and export, before and after pruning; compare outputs with float32.

    ONNX Runtime has to agree with the converted program.

    Where rounding the weights alone turns the output far, too, four times as far from float32 is right. The converted
    program has to agree with what it comes from in every network, and ONNX Runtime with that, or lack no more than
    twice what the converted program does of itself when its inputs move by half a step of 8 bits: ONNX Runtime rounds
    otherwise at sums, pools and activations on the way, too.

    Args:
        name: Of the architecture.
        row: Gets the figures; ``pruned`` has those after pruning.

    Raises:
        Exception: whatever fails.
    """
    network, inputs = build(name)
    _settle(network, inputs)
    failures = []
    for prefix, part in (("", row), ("pruned: ", row.setdefault("pruned", {}))):
        try:
            measured = _pruned(network, inputs) if prefix else copy.deepcopy(network)
            _export(_quantize(measured, inputs, part), inputs, part)
        except Exception as error:
            failures.append(RuntimeError(f"{prefix}{error}") if prefix else error)
    if failures:
        raise failures[0]


def _settle(network: nn.Module, inputs: Any) -> None:
    """Have BatchNorms scale what they see to a second moment of one, and give layers that start as zeros some weights.

    Fresh networks do neither, and some give outputs of 1e-9, or zeros, which no scheme's steps can hold. Means are not
    taken away: random layers give nearly the same for every input, and what is left of that is rounding, made large.
    For the same reason a channel that sees next to nothing stays small.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
        norms = [module for module in network.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        hooks = [norm.register_forward_pre_hook(_scale) for norm in norms]
        network(*inputs)
    for hook in hooks:
        hook.remove()


def _scale(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if isinstance(norm.running_var, Tensor):
        others = [dimension for dimension in range(inputs[0].dim()) if dimension != 1]
        moments = inputs[0].square().mean(others)
        norm.running_var.copy_(moments.clamp(min=_LEAST_MOMENT * float(moments.mean())))


def _pruned(network: nn.Module, inputs: Any) -> nn.Module:
    anatomy = study(network, inputs)
    kept = {name: kept_units(width) for name, width in anatomy.widths.items()}
    data = describe_removal(anatomy, least(score_groups(anatomy, "l2"), kept))
    return network if data is None else apply_removal(network, data)


def _quantize(network: nn.Module, inputs: Any, row: dict[str, Any]) -> Captured:
    with torch.no_grad():  # some keep what they have computed, and a copy cannot have a graph of gradients
        tensors = [_FirstOutput(network.eval())(*inputs), _FirstOutput(_rounded(network))(*inputs)]
    prepared = prepare(network if isinstance(network, Captured) else _FirstOutput(network).eval(), inputs, "int8")
    calibrate(prepared, [inputs], ranges="minmax")
    found = coverage(prepared, inputs)
    row |= {"share": found.share, "reasons": found.reasons}
    result = convert(prepared)
    for integers in (prepared.eval(), result):
        with torch.no_grad():
            tensors.append(first_output(integers(*inputs)).double())
    expected, weights_alone, fake, converted = (tensor.detach().double().flatten(1) for tensor in tensors)
    row |= {"cosine": _cosine(fake, expected), "snr_db": _snr(fake, expected), "converted": _cosine(converted, fake)}
    alone = _cosine(weights_alone, expected)
    row["weights_alone"] = alone if math.isfinite(alone) else 0.0  # nothing is left of it
    _judge(row, "cosine", "of fake-quantised with float32", least=least_cosine(row["weights_alone"]))
    _judge(row, "converted", "of converted with fake-quantised")
    return result


def _export(converted: Captured, inputs: Any, row: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / onnxruntime.FILE
        census = onnxruntime.build(export_program(converted, inputs), file)
        row["kernels"] = [census.int8_kernels, census.float_kernels]
        (got,) = make_engine("onnxruntime", file, num_threads=1)([tensor.numpy() for tensor in inputs])
    with torch.no_grad():
        expected, moved = (first_output(converted(*each)).double().flatten(1) for each in (inputs, _moved(inputs)))
    row["exported"] = _cosine(torch.from_numpy(got).double().flatten(1), expected)
    row["moved"] = _cosine(moved, expected)
    _judge(row, "exported", "of ONNX Runtime with converted", least=min(LEAST_COSINE, 2 * row["moved"] - 1))


def _moved(inputs: Any) -> list[Tensor]:
    """Inputs that differ by at most half of a 255th of their range; numbers of tokens are left alone."""
    generator = torch.Generator().manual_seed(0)
    return [
        tensor + (torch.rand(tensor.shape, generator=generator) - 0.5) * (tensor.max() - tensor.min()) / 255
        if tensor.is_floating_point()
        else tensor
        for tensor in inputs
    ]


def _judge(row: dict[str, Any], key: str, pair: str, least: float = LEAST_COSINE) -> None:
    assert row[key] >= least, f"cosine {pair} of {row[key]:.3f}, expected {least:.3f}"


def _rounded(network: nn.Module) -> nn.Module:
    """Copy a network with nothing but its weights rounded, 8 bits for each row: what any scheme does at the least.

    Some networks of random weights make of that an output that has nothing to do with the one in floats.
    """
    rounded = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.dim() > 1:
                step = (
                    parameter.flatten(1).abs().amax(1).clamp(min=1e-12).reshape(-1, *[1] * (parameter.dim() - 1)) / 127
                )
                parameter.copy_((parameter / step).round() * step)
    return rounded


class _FirstOutput(nn.Module):
    """The first tensor that a network gives; other outputs need no quantization."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        return first_output(self.network(*inputs))


def _cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first, second).mean())


def _snr(got: Tensor, expected: Tensor) -> float:
    noise = (got - expected).norm().clamp(min=1e-30)
    return float(20 * torch.log10(expected.norm() / noise))

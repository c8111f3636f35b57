"""The zoo's check of quantization: int8 after training, of the whole network and after pruning 30 %."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import build, first_output
from zoo_prune import kept_units

from compress.prune import apply_removal, describe_removal, score_groups, study
from compress.prune.planner import least
from compress.quantize import calibrate, convert, coverage, prepare
from compress.surgery import Captured

__all__ = ["quantize"]

_LEAST_COSINE = 0.95  # with float32, random weights


def quantize(name: str, row: dict[str, Any]) -> None:
    """Prepare, calibrate on one batch and convert, before and after pruning; compare outputs with float32.

    Args:
        name: Of the architecture.
        row: Gets the figures; ``pruned`` has those after pruning.

    Raises:
        Exception: whatever fails.
    """
    network, inputs = build(name)
    _settle(network, inputs)
    _quantize(copy.deepcopy(network), inputs, row)
    row["pruned"] = {}
    try:
        _quantize(_pruned(network, inputs), inputs, row["pruned"])
    except Exception as error:
        raise RuntimeError(f"pruned: {error}") from error


def _settle(network: nn.Module, inputs: Any) -> None:
    """Give BatchNorms the batch's statistics, and layers that start as zeros some weights.

    Fresh networks lack both, and some give outputs of 1e-9, or zeros, which no scheme's steps can hold.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
        norms = [module for module in network.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        network(*inputs)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
    network.eval()


def _pruned(network: nn.Module, inputs: Any) -> nn.Module:
    anatomy = study(network, inputs)
    kept = {name: kept_units(width) for name, width in anatomy.widths.items()}
    data = describe_removal(anatomy, least(score_groups(anatomy, "l2"), kept))
    return network if data is None else apply_removal(network, data)


def _quantize(network: nn.Module, inputs: Any, row: dict[str, Any]) -> None:
    tensors = [_FirstOutput(network.eval())(*inputs)]
    prepared = prepare(network if isinstance(network, Captured) else _FirstOutput(network).eval(), inputs, "int8")
    calibrate(prepared, [inputs], ranges="minmax")
    found = coverage(prepared, inputs)
    row |= {"share": found.share, "reasons": found.reasons}
    for integers in (prepared.eval(), convert(prepared)):
        with torch.no_grad():
            tensors.append(first_output(integers(*inputs)).double())
    expected, fake, converted = (tensor.detach().double().flatten(1) for tensor in tensors)
    row |= {"cosine": _cosine(fake, expected), "snr_db": _snr(fake, expected), "converted": _cosine(converted, fake)}
    assert row["cosine"] >= _LEAST_COSINE, f"cosine with float32 of {row['cosine']:.3f}"
    assert row["converted"] >= _LEAST_COSINE, f"cosine of converted with fake-quantised of {row['converted']:.3f}"


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

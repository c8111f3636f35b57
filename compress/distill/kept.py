"""Which channels of a student's activations survive an edit, so that what was learned on them can be cut along."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.distill.features import FeatureTaps
from compress.distill.lesson import View
from compress.surgery import Edit

__all__ = ["kept_channels"]

log = logging.getLogger(__name__)


def kept_channels(
    network: nn.Module,
    edit: Edit,
    apply: Callable[[nn.Module, Edit], nn.Module],
    observe: Callable[[nn.Module], View],
) -> dict[str, list[int]]:
    """Find the kept channels of activations by trying the edit on a copy.

    The copy has random weights, in float64, and what the edit removes is silenced: every kept channel then has the same
    values before and after, and no two channels are alike. Where a layer mixes channels (LayerNorm), this does not
    hold, and the first channels are taken instead, with a warning.

    Args:
        network: Before the edit; it is left alone.
        edit: Has slices of the network's parameters, and may leave out blocks.
        apply: Carries out the edit.
        observe: Runs a network in float64 and returns its activations.

    Returns:
        Kept channel indices by layer, for layers whose number of channels changes.
    """
    slices = edit.data.get("slices", {})
    if not slices:
        return {}
    twin = copy.deepcopy(network).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            parameter.copy_((values + 0.5) / fan_in)
            for dim, kept in slices.get(name, {}).items():
                if parameter.dim() > 1:
                    gone = [i for i in range(parameter.shape[int(dim)]) if i not in set(kept)]
                    parameter.index_fill_(int(dim), torch.tensor(gone, device=parameter.device, dtype=torch.long), 0.0)
        if edit.data.get("blocks"):
            # Leaving out a block changes all values behind it, and no channel of what is left: it goes first.
            twin = apply(twin, Edit(edit.kind, {**edit.data, "slices": {}, "attributes": {}}))
            edit = Edit(edit.kind, {**edit.data, "blocks": [], "shapes": None})
        before = observe(twin).features
        after = observe(apply(twin, edit)).features
    result = {}
    for name in before:
        dim = next((d for d in range(1, before[name].dim()) if before[name].shape[d] != after[name].shape[d]), None)
        if dim is not None:
            result[name] = _align(name, before[name].movedim(dim, 0).flatten(1), after[name].movedim(dim, 0).flatten(1))
    return result


def _align(name: str, before: Tensor, after: Tensor) -> list[int]:
    kept: list[int] = []
    position = 0
    for row in after:
        alike = [i for i in range(position, len(before)) if torch.allclose(before[i], row, rtol=1e-6, atol=1e-12)]
        if not alike:
            log.warning("%s: its channels are mixed across the edit; what was learned on them starts anew", name)
            return list(range(len(after)))
        kept.append(alike[0])
        position = alike[0] + 1
    return kept


def double_inputs(inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return inputs in float64 where they are numbers, made positive so that no ReLU silences a channel."""
    return [_double(x) for x in inputs], {name: _double(x) for name, x in named.items()}


def _double(x: Tensor) -> Tensor:
    return x.double().abs() + 0.1 if x.is_floating_point() else x


def observer(taps: FeatureTaps, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> Callable[[nn.Module], View]:
    """Return what runs a network on example inputs, as ``kept_channels`` wants it."""
    given, by_name = double_inputs(inputs, named)
    return lambda network: taps(network, *given, **by_name)

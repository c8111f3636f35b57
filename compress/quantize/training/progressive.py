"""Bits that fall while a network trains: it meets coarse integers after it is used to fine ones.

Only what has fewer than 8 bits in the end takes part. The bits follow from progress alone, so a fit that resumes has
them without keeping any.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from torch.fx import Node

from compress.errors import RecipeError
from compress.quantize.graph.annotate import is_product, layer_of, weights_of
from compress.quantize.parametrize import rounded_layers
from compress.surgery import Captured

__all__ = ["Stages", "quantized_layers", "quantizers", "set_bits", "set_stages"]


@dataclass(frozen=True)
class Stages:
    """How many bits from when on (Zhuang et al. 2018, arXiv:1711.00205, section 3.2).

    Args:
        bits: Falling; the last are those of the scheme. What has more in the end than a stage says has its own, and so
            has everything in the last.
        at: Progress in [0, 1] from which on each holds, rising; the first also holds before.
        order: Patterns of layers, those that bear few bits best first: between two stages they change one pattern after
            the other, the last of them when the stage begins. Layers that none matches change with the last.

    Raises:
        RecipeError: when the two do not fit each other.

    Example:
        >>> stages = Stages(bits=[16, 8, 4], at=[0.5, 0.6, 0.75])
        >>> [stages.bits_at(progress) for progress in (0.1, 0.5, 0.7, 0.8)]
        [16, 16, 8, 4]
        >>> stages = Stages(bits=[8, 4], at=[0.5, 0.7], order=["fc", "stages.*"])
        >>> stages.bits_at(0.65, place=0), stages.bits_at(0.65, place=1), stages.bits_at(0.7, place=1)
        (4, 8, 4)
    """

    bits: Sequence[int]
    at: Sequence[float]
    order: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.bits or len(self.bits) != len(self.at):
            raise RecipeError(
                f"quantize.progressive: expected as many bits as times, got {len(self.bits)} and {len(self.at)}. "
                "Write bits: [16, 8, 4] and at: [0.5, 0.6, 0.75], say."
            )
        if list(self.bits) != sorted(set(self.bits), reverse=True) or not 2 <= self.bits[-1] <= self.bits[0] <= 16:
            raise RecipeError(
                f"quantize.progressive.bits: expected falling numbers from 16 to 2, got {list(self.bits)}. "
                "Write [16, 8, 4], say."
            )
        if list(self.at) != sorted(set(self.at)) or not 0 <= self.at[0] <= self.at[-1] <= 1:
            raise RecipeError(
                f"quantize.progressive.at: expected rising values in [0, 1], got {list(self.at)}. "
                "Write [0.5, 0.6, 0.75], say."
            )

        if self.order and len(self.bits) < 2:
            raise RecipeError(
                "quantize.progressive.order: expected two stages at least, between which layers change, got one. "
                "Write bits: [8, 4] and at: [0.5, 0.75], say."
            )

    def bits_at(self, progress: float, place: int | None = None) -> int:
        """Return the bits in force.

        Args:
            progress: In [0, 1].
            place: Of the layers' pattern in ``order``; by default the last.
        """
        share = 1.0 if place is None or not self.order else (place + 1) / len(self.order)
        # The last of them by its own number: a sum of fractions would miss it by rounding.
        begins = [now if share == 1 else before + share * (now - before) for before, now in pairwise(self.at)]
        return self.bits[sum(begin <= progress for begin in begins)]


def quantizers(prepared: nn.Module, order: Sequence[str] = ()) -> list[list[Any]]:
    """Return the fake quantizers of each pattern of layers, those of what they multiply.

    Args:
        prepared: From ``prepare`` or ``parametrize``.
        order: Patterns of layers; a layer belongs to the first that matches it, and to the last without any. Without
            patterns, all are one.

    Raises:
        RecipeError: when a pattern matches no layer that is quantised.
    """
    every = [module for module in prepared.modules() if hasattr(module, "fake_quant_enabled")]
    if not order:
        return [every]
    places: dict[int, int] = {}
    layers = []
    for layer, own in _layers(prepared):
        layers.append(layer)
        matching = (place for place, pattern in enumerate(order) if fnmatch.fnmatchcase(layer, pattern))
        place = next(matching, len(order) - 1)
        for module in own:  # one that several layers share changes with the last of them
            places[id(module)] = max(place, places.get(id(module), 0))
    for pattern in order:
        if not fnmatch.filter(layers, pattern):
            raise RecipeError(
                f"quantize.progressive.order: expected patterns of quantised layers, got {pattern!r}. "
                f"The layers are: {', '.join(dict.fromkeys(layers))}."
            )
    groups: list[list[Any]] = [[] for _ in order]
    for module in every:
        groups[places.get(id(module), len(order) - 1)].append(module)
    return groups


def quantized_layers(prepared: nn.Module, layers: Iterable[str]) -> list[str]:
    """Return those of some layers whose products are rounded, which ``quantizers`` finds by their names.

    Args:
        prepared: From ``prepare`` or ``parametrize``.
        layers: Names.
    """
    found = {layer for layer, _ in _layers(prepared)}
    return [layer for layer in layers if fnmatch.filter(found, layer)]


def set_bits(fake_quantizers: Iterable[Any], bits: int) -> None:
    """Let fake quantizers of few bits round to finer integers over the same range, or to their own again.

    Args:
        fake_quantizers: From ``quantizers``.
        bits: As many or more than a fake quantizer has of its own; with fewer it keeps its own.
    """
    for module in fake_quantizers:
        if "own_limits" not in module.__dict__:
            module.own_limits = int(module.quant_min), int(module.quant_max)
        limits = _limits(module.own_limits, bits)
        if limits == (module.quant_min, module.quant_max):
            continue
        for holder in (module, getattr(module, "activation_post_process", module)):
            holder.quant_min, holder.quant_max = limits
        if hasattr(module, "follow"):  # there may be no pass before it is converted
            module.follow()


def set_stages(stages: Stages, groups: Sequence[Iterable[Any]], progress: float) -> None:
    """Give each group of fake quantizers its bits; in the end each has its own, be they fewer than most weights'."""
    for place, group in enumerate(groups):
        bits = stages.bits_at(progress, place)
        set_bits(group, 0 if bits == stages.bits[-1] else bits)


def _layers(prepared: nn.Module) -> Iterator[tuple[str, list[Any]]]:
    """Yield the names of quantised layers with the fake quantizers of what they multiply."""
    if not isinstance(prepared, Captured):
        for name, layer in rounded_layers(prepared).items():
            yield name, [module for module in layer.children() if hasattr(module, "fake_quant_enabled")]
        return
    for node in prepared.graph_module.graph.nodes:
        if is_product(node):
            factors = [node.args[0], *weights_of(node)]
            if own := list(filter(None, (_module(prepared, factor) for factor in factors))):
                yield layer_of(node), own


def _module(prepared: Captured, factor: Any) -> Any:
    """Return the fake quantizer that makes a factor, if one does."""
    if not isinstance(factor, Node) or factor.op != "call_module":
        return None
    module = prepared.graph_module.get_submodule(str(factor.target))
    return module if hasattr(module, "fake_quant_enabled") else None


def _limits(own: tuple[int, int], bits: int) -> tuple[int, int]:
    """Return the ends of a grid like another one, with more bits.

    Example:
        >>> _limits((-8, 7), 8), _limits((0, 14), 8), _limits((-128, 127), 16), _limits((-8, 7), 3)
        ((-128, 127), (0, 254), (-128, 127), (-8, 7))
    """
    low, high = own
    own_bits = (high - low).bit_length()
    if own_bits >= 8 or bits <= own_bits:
        return own
    if low < 0:
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - (1 << own_bits) + high

"""What is quantised and how, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.errors import RecipeError

__all__ = ["SCHEMES", "Scheme", "get_scheme"]


@dataclass(frozen=True)
class Scheme:
    """A named way of quantising.

    Args:
        name: What a recipe calls it.
        description: One line for people.
        quantizer: Returns the PT2E quantizer that annotates a graph with fake quantization.
    """

    name: str
    description: str
    quantizer: Callable[[], Any]


def _x86() -> Any:
    """Uint8 is what x86 has instructions for; all of its range is used."""
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))


def _portable() -> Any:
    """From 0 to 254 with zero at 127: the symmetric int8 of other engines, shifted to what x86 takes."""
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    config = get_default_x86_inductor_quantization_config(is_qat=True)
    activation = replace(config.input_activation, qscheme=torch.per_tensor_symmetric, quant_max=254)
    return X86InductorQuantizer().set_global(replace(config, input_activation=activation, output_activation=activation))


SCHEMES = {
    scheme.name: scheme
    for scheme in [
        Scheme("int8", "int8 weights per output channel, uint8 affine activations per tensor", _x86),
        Scheme("int8_portable", "the same with symmetric activations, which every engine takes", _portable),
    ]
}


def get_scheme(name: str) -> Scheme:
    """Return a scheme by name.

    Raises:
        RecipeError: when there is none of that name.

    Example:
        >>> get_scheme("int8").name
        'int8'
    """
    if name not in SCHEMES:
        raise RecipeError(f"quantize.scheme: expected one of {', '.join(sorted(SCHEMES))}, got {name!r}. Choose one.")
    return SCHEMES[name]

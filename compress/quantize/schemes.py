"""What is quantised and how, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compress.errors import RecipeError

__all__ = ["SCHEMES", "Scheme", "get_scheme"]


@dataclass(frozen=True)
class Scheme:
    """A named way of quantising.

    Args:
        name: What a recipe calls it.
        description: One line for people.
        quantizer: Returns the PT2E quantizer that annotates a graph, for quantization-aware training.
    """

    name: str
    description: str
    quantizer: Callable[[], Any]


def _x86() -> Any:
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))


SCHEMES = {
    scheme.name: scheme
    for scheme in [
        Scheme("int8", "int8 weights per output channel, uint8 affine activations per tensor", _x86),
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

"""What is quantised and how, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from compress.errors import RecipeError

__all__ = ["FLOAT", "SCHEMES", "Scheme", "get_scheme", "read_scheme", "register", "write_scheme"]

# Where no engine has a kernel, or its kernel gives other numbers: Inductor's int8 products of dynamic activations were
# 14 % off on a network of three linear layers (torch 2.13, torchao 0.18).
_NO_KERNEL = ("eager",)
_LOW_BITS = re.compile(r"w([2-8])a([2-8])")


@dataclass(frozen=True)
class Scheme:
    """A named way of quantising convolutions and matrix products.

    Weights are symmetric, with a scale for each output channel or for each group of its inputs. Sums, pools and what
    else passes integers on keep 8 bits of activations when products have fewer.

    Args:
        name: What a recipe calls it.
        description: One line for people.
        weight_bits: Bits of weights, 2 to 8; ``None`` for floating point.
        activation_bits: Bits of what a product takes, 2 to 8 or 16; ``None`` for floating point.
        number: What the bits are: ``int``, or ``float`` for float8 with 4 bits of exponent (e4m3).
        symmetric: Whether activations have zero in the middle of their range.
        dynamic: Whether the range of activations is that of each batch, found at run time.
        group_size: How many inputs of an output channel share a scale, in linear layers; ``None`` for all. A layer
            whose inputs this does not divide has one scale for all of them.
        linear_only: Whether convolutions stay in floating point.
        attention: Whether attention's two products, of activations alone, take integers, too.
        first_last: Scheme of the first and the last layer, unless a recipe says otherwise; ``None`` for this one.
        engines: Those that can run it; ``None`` for every one.

    Raises:
        RecipeError: when there is no such number, or what it is said of does not have it.
    """

    name: str
    description: str
    weight_bits: int | None = 8
    activation_bits: int | None = 8
    number: str = "int"
    symmetric: bool = False
    dynamic: bool = False
    group_size: int | None = None
    linear_only: bool = False
    attention: bool = False
    first_last: str | None = None
    engines: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if mistake := next(_mistakes(self), None):
            raise RecipeError(f"{self.name}.{mistake}")

    @property
    def integer_products(self) -> bool:
        """Whether products take integers on both sides."""
        return self.number == "int" and self.activation_bits is not None and self.activation_bits <= 8

    @property
    def has_kernels(self) -> bool:
        """Whether some engine computes products in integers."""
        return self.integer_products and self.has_engines

    @property
    def has_engines(self) -> bool:
        """Whether an engine that computes in integers can run it, be it in floats."""
        return self.engines != _NO_KERNEL

    @property
    def fixed_steps(self) -> bool:
        """Whether integers have a step for each channel of a weight and for each activation, which could be learned."""
        return self.number == "int" and not self.dynamic and self.group_size is None


def _mistakes(scheme: Scheme) -> Iterator[str]:
    weights, activations = scheme.weight_bits, scheme.activation_bits
    if scheme.number not in ("int", "float"):
        yield f"number: expected int or float, got {scheme.number!r}. Choose one."
    if scheme.number == "float" and (weights, activations) != (8, 8):
        yield f"weight_bits: expected 8 bits of weights and activations for float8, got {weights} and {activations}."
    if weights is not None and not 2 <= weights <= 8:
        yield f"weight_bits: expected 2 to 8 or none, got {weights}. Use 4, say."
    if activations is not None and not (2 <= activations <= 8 or activations == 16):
        yield f"activation_bits: expected 2 to 8, 16 or none, got {activations}. Use 8, say."
    if weights is None and activations is not None:
        yield f"weight_bits: expected bits where activations have some ({activations}), got none. Use 8, say."
    if scheme.dynamic and (activations != 8 or scheme.number != "int"):
        yield f"dynamic: expected 8-bit integers as activations, got {activations} bits. Leave dynamic out."
    if scheme.dynamic and not scheme.linear_only:
        yield "linear_only: expected true for a dynamic scheme, got false. No engine has convolutions of that kind."
    if scheme.attention and (scheme.dynamic or not scheme.integer_products):
        yield "attention: expected it with 2 to 8 bits of activations by calibration, got others. Leave it out."
    if scheme.group_size is not None and (scheme.group_size < 2 or scheme.number != "int"):
        yield f"group_size: expected at least 2, of integers, got {scheme.group_size}. Use 32, 64 or 128."


SCHEMES: dict[str, Scheme] = {}


def register(scheme: Scheme) -> Scheme:
    """Let recipes name a scheme.

    Raises:
        RecipeError: when another one has its name.

    Example:
        >>> mine = register(Scheme("w3a8_symmetric", "3 bits for weights", weight_bits=3, symmetric=True))
        >>> get_scheme("w3a8_symmetric") is mine
        True
        >>> _ = SCHEMES.pop("w3a8_symmetric")
    """
    if SCHEMES.get(scheme.name, scheme) != scheme or _LOW_BITS.fullmatch(scheme.name):
        raise RecipeError(f"register: expected a name of its own, got {scheme.name!r}. Choose another one.")
    return SCHEMES.setdefault(scheme.name, scheme)


FLOAT = register(Scheme("float", "nothing, for single layers", None, None))
for _scheme in (
    Scheme("int8", "int8 weights per output channel, uint8 affine activations per tensor: best on x86"),
    Scheme(
        "int8_reduced",
        "the same with 7-bit weights, whose sums no x86 processor overflows: the one for processors without VNNI",
        weight_bits=7,
    ),
    Scheme("int8_portable", "int8 with activations symmetric around zero, which every engine takes", symmetric=True),
    Scheme(
        "int8_attention",
        "int8_portable, and attention's two products in integers, too, where the engine can",
        symmetric=True,
        attention=True,
    ),
    Scheme(
        "int8_dynamic",
        "linear layers: int8 weights, activations by the range of each batch, no calibration; runs in floating point",
        dynamic=True,
        linear_only=True,
        engines=_NO_KERNEL,
    ),
    Scheme(
        "int8_weights",
        "int8 weights per output channel alone; products are in floating point",
        activation_bits=None,
        engines=("eager", "aoti", "onnxruntime"),
    ),
    *(
        Scheme(
            "int4_weights" if size == 32 else f"int4_weights_{size}",
            f"linear layers: 4-bit weights alone, a scale for each {size} of a channel; stored as int8",
            weight_bits=4,
            activation_bits=None,
            group_size=size,
            linear_only=True,
            engines=("eager", "onnxruntime"),
        )
        for size in (32, 64, 128)
    ),
    Scheme(
        "int16x8",
        "int8 weights, int16 activations, for targets that have it; here it runs in floating point",
        activation_bits=16,
        symmetric=True,
        engines=_NO_KERNEL,
    ),
    Scheme(
        "fp8",
        "float8 (e4m3) weights per output channel and activations per tensor; here products are in floating point",
        number="float",
        symmetric=True,
        engines=_NO_KERNEL,
    ),
):
    register(_scheme)


def get_scheme(name: str | Scheme) -> Scheme:
    """Return a scheme by name.

    Args:
        name: A key of ``SCHEMES``, or ``w4a8`` and the like: bits of weights, bits of activations.

    Raises:
        RecipeError: when there is none of that name.

    Example:
        >>> get_scheme("w4a8").weight_bits
        4
    """
    if isinstance(name, Scheme):
        return name
    if name in SCHEMES:
        return SCHEMES[name]
    if match := _LOW_BITS.fullmatch(name):
        weights, activations = map(int, match.groups())
        text = f"{weights}-bit weights, {activations}-bit activations, stored and run as int8"
        return Scheme(name, text, weights, activations, first_last="int8")
    raise RecipeError(
        f"quantize.scheme: expected one of {', '.join(sorted(SCHEMES))}, or w4a8 and the like (2 to 8 bits), "
        f"got {name!r}. Choose one."
    )


def write_scheme(scheme: Scheme) -> dict[str, Any]:
    """Return a scheme as plain data."""
    return {**asdict(scheme), "engines": None if scheme.engines is None else list(scheme.engines)}


def read_scheme(data: Mapping[str, Any]) -> Scheme:
    """Return the scheme that plain data describe.

    Example:
        >>> read_scheme(write_scheme(get_scheme("w4a8"))) == get_scheme("w4a8")
        True
    """
    known = {field.name for field in fields(Scheme)}
    values = {key: value for key, value in data.items() if key in known}
    if values.get("engines") is not None:
        values["engines"] = tuple(values["engines"])
    return Scheme(**values)


def table() -> Iterator[str]:
    """Yield the lines of the table of schemes, in Markdown."""
    yield "| Scheme | What is quantised | Engines |"
    yield "|---|---|---|"
    for scheme in SCHEMES.values():
        yield f"| `{scheme.name}` | {scheme.description} | {', '.join(scheme.engines or ('all',))} |"
    few = "2 to 8 bits of weights and of activations, stored and run as int8; the first and the last layer keep `int8`"
    yield f"| `w4a8`, ... | {few} | all |"

"""Which layer gets which scheme: patterns of names, and the first and the last layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from compress.errors import RecipeError
from compress.quantize.schemes import FLOAT, Scheme, get_scheme, read_scheme, write_scheme

__all__ = ["Assignment", "engine_mistakes", "make_assignment", "read_assignment", "write_assignment"]


@dataclass(frozen=True)
class Assignment:
    """A scheme for most layers, and others for some.

    Args:
        scheme: Of layers that nothing else is said about.
        layers: Patterns of layer names and their schemes; of several that match the last one counts.
        first_last: Scheme of the first and the last layer, unless a pattern matches them.
        embeddings: Whether embeddings are rounded, too, as they once were not.
    """

    scheme: Scheme
    layers: Mapping[str, Scheme] = field(default_factory=dict)
    first_last: Scheme | None = None
    embeddings: bool = True

    @property
    def schemes(self) -> list[Scheme]:
        """The schemes that are named, each once."""
        ends = [] if self.first_last is None else [self.first_last]
        return list(dict.fromkeys([self.scheme, *self.layers.values(), *ends]))

    @property
    def integer_products(self) -> bool:
        """Whether most products take integers, for which a compiled graph then has kernels."""
        return self.scheme.integer_products

    @property
    def has_kernels(self) -> bool:
        """Whether some engine that runs every scheme computes the products of one of them in integers."""
        return any(scheme.has_kernels for scheme in self.schemes) and all(scheme.has_engines for scheme in self.schemes)

    def resolve(
        self, names: Sequence[str], lookups: Sequence[str] = (), attentions: Sequence[str] = ()
    ) -> dict[str, Scheme]:
        """Return the scheme of each layer.

        Args:
            names: The layers with a convolution or matrix product, in the order in which they compute.
            lookups: Embeddings, which get what the first and the last layer get. A pattern that matches others, too,
                gives them no fewer than 8 bits.
            attentions: Modules with products of activations, which are never the first or the last layer.

        Raises:
            RecipeError: when a pattern matches no layer.

        Example:
            >>> make_assignment("w4a8", layers={"b": "float"}).resolve(["a", "b", "c", "d"])["c"].name
            'w4a8'
        """
        names = list(dict.fromkeys(names))
        chosen = dict.fromkeys(names, self.scheme)
        tables = set(lookups) - set(names)
        if self.first_last is not None and names:
            chosen[names[0]] = chosen[names[-1]] = self.first_last
        for name in lookups:
            chosen.setdefault(name, self.first_last or self.scheme)
        for name in attentions:
            chosen.setdefault(name, self.scheme)
        for pattern, scheme in self.layers.items():
            matching = [name for name in chosen if fnmatch.fnmatchcase(name, pattern)]
            if not matching:
                raise RecipeError(
                    f"quantize.layers, quantize.keep: expected patterns of layers with a product or a table, got "
                    f"{pattern!r}. The layers are: {', '.join(chosen)}."
                )
            if (scheme.weight_bits or 8) < 8 and not tables.issuperset(matching):
                matching = [name for name in matching if name not in tables]
            chosen.update(dict.fromkeys(matching, scheme))
        return chosen


def make_assignment(
    scheme: str | Scheme,
    *,
    layers: Mapping[str, str | Scheme] | None = None,
    keep: Sequence[str] = (),
    first_last: str | Scheme | None = None,
) -> Assignment:
    """Return the assignment that a recipe's words stand for.

    Args:
        scheme: Of most layers.
        layers: Patterns of layer names and their schemes; ``float`` leaves a layer as it is.
        keep: Patterns of layers that stay in floating point: ``float`` in ``layers``, after all others.
        first_last: Of the first and the last layer; by default what the scheme says.

    Raises:
        RecipeError: when a scheme is unknown, or patterns are no list.
    """
    if isinstance(keep, str):
        raise RecipeError(f"quantize.keep: expected a list of patterns, got {keep!r}. Write [{keep}].")
    if not isinstance(layers or {}, Mapping):
        raise RecipeError(f"quantize.layers: expected schemes by pattern, got {layers!r}. Name a scheme for each.")
    chosen = get_scheme(scheme)
    ends = chosen.first_last if first_last is None else first_last
    return Assignment(
        chosen,
        {pattern: get_scheme(name) for pattern, name in (layers or {}).items()} | dict.fromkeys(keep, FLOAT),
        None if ends is None else get_scheme(ends),
    )


def engine_mistakes(assignment: Assignment, targets: Sequence[str]) -> Iterator[str]:
    """Yield, in words, each scheme that some engine cannot run.

    Args:
        assignment: What is quantised.
        targets: Names of engines.

    Example:
        >>> list(engine_mistakes(make_assignment("int8"), ["onnxruntime"]))
        []
    """
    for scheme in assignment.schemes:
        unknown = [engine for engine in targets if scheme.engines is not None and engine not in scheme.engines]
        if unknown:
            assert scheme.engines is not None
            yield (
                f"export.targets: expected engines that run the scheme {scheme.name!r} ({', '.join(scheme.engines)}), "
                f"got {', '.join(unknown)}. Leave them out, or choose another quantize.scheme."
            )


def write_assignment(assignment: Assignment) -> dict[str, Any]:
    """Return an assignment as plain data, the schemes themselves included: a name may mean another one later."""
    return {
        "scheme": assignment.scheme.name,
        "definition": write_scheme(assignment.scheme),
        "layers": {pattern: write_scheme(scheme) for pattern, scheme in assignment.layers.items()},
        "first_last": None if assignment.first_last is None else write_scheme(assignment.first_last),
        "embeddings": assignment.embeddings,
    }


def read_assignment(data: Mapping[str, Any]) -> Assignment:
    """Return the assignment that plain data describe; ``keep`` and a bare name are how they were once written."""
    if "definition" not in data:
        return replace(make_assignment(data["scheme"], keep=data.get("keep", ())), embeddings=False)
    return Assignment(
        read_scheme(data["definition"]),
        {pattern: read_scheme(scheme) for pattern, scheme in data["layers"].items()},
        None if data["first_last"] is None else read_scheme(data["first_last"]),
        data.get("embeddings", False),
    )

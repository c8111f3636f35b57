"""A network that another library's function makes: Hugging Face, timm, torchvision, torch.hub."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from compress.errors import MissingPackageError, RecipeError
from compress.libraries import import_library

__all__ = ["Constructed"]

_EXTRAS = {"timm": "zoo", "torchvision": "zoo", "transformers": "zoo"}


class Constructed(nn.Module):
    """A network that a function returns, for recipes, which name classes; as a student or as a teacher.

    It is that network, not a box around it: layers, weights and attributes have their names there, e.g.
    ``layer3.1.conv2``. Its class is made for it, and inherits from ``Constructed`` and from the network's class.

    Args:
        constructor: Dotted name, e.g. ``timm.create_model``, ``torchvision.models.resnet50`` or
            ``transformers.AutoModelForSequenceClassification.from_pretrained``.
        arguments: Its keyword arguments; ``*`` holds a list of positional ones. An argument that is itself
            ``{"constructor": ..., "arguments": ...}`` is made first: a configuration of Hugging Face, say.
        output: Entry or attribute of what the network returns, e.g. ``logits``; all of it without one.
        replace: Layers to put in the place of others, by name, each as ``{"constructor": ..., "arguments": ...}``:
            a stem for small images, say.

    Raises:
        RecipeError: when there is no such function, it refuses its arguments, or returns no network; or when there is
            no layer to replace.
        MissingPackageError: when its package is not installed.

    Example:
        >>> Constructed("torch.nn.Linear", {"in_features": 2, "out_features": 3})
        Constructed(torch.nn.Linear: Linear(in_features=2, out_features=3, bias=True))
    """

    def __init__(
        self,
        constructor: str,
        arguments: dict[str, Any] | None = None,
        output: str | None = None,
        replace: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        network = _make(constructor, arguments or {})
        if not isinstance(network, nn.Module):
            raise RecipeError(
                f"Constructed.constructor: expected a function that returns a network, got {type(network).__name__} "
                f"from {constructor}. Name another."
            )
        if isinstance(network, GraphModule | torch.jit.ScriptModule):
            raise RecipeError(
                "Constructed.constructor: expected a function that returns a network of Python code, got a traced or "
                f"scripted one from {constructor}. Save it with torch.export.save and use ProgramTeacher."
            )
        for name, layer in (replace or {}).items():
            _replace(network, name, layer)
        self.__dict__.update(network.__dict__)
        # A name that no network uses for one of its own.
        self._constructed = (constructor, output)
        self.__class__ = _joined(type(network))  # type: ignore[arg-type]
        self.train()  # Hugging Face's begin in evaluation, and a fit leaves modes as they are

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Return what the network returns, or its entry ``output``."""
        # Its own class, and this one, come before the network's.
        outputs = super().forward(*inputs, **named)
        output = self._constructed[1]
        if output is None:
            return dict(outputs) if isinstance(outputs, Mapping) else outputs
        return outputs[output] if isinstance(outputs, Mapping) else getattr(outputs, output)

    def __repr__(self) -> str:
        return f"Constructed({self._constructed[0]}: {super().__repr__()})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class has no name of its own under which a copy or another process could find it.
        return _empty, (type(self).__mro__[2],), self.__getstate__()


@cache
def _joined(kind: type[nn.Module]) -> type[Constructed]:
    return type(kind.__name__, (Constructed, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _empty(kind: type[nn.Module]) -> Constructed:
    made = _joined(kind)  # type: ignore[arg-type]
    return made.__new__(made)


def _replace(network: nn.Module, name: str, description: Any) -> None:
    layer = _argument(description)
    if not isinstance(layer, nn.Module):
        raise RecipeError(
            f"Constructed.replace: expected a layer as {{constructor: ..., arguments: ...}} for {name}, "
            f"got {description!r}. Name a function that returns one, e.g. torch.nn.Identity."
        )
    layers = [known for known, _ in network.named_modules() if known]
    if name not in layers:
        raise RecipeError(
            f"Constructed.replace: expected names of layers of {type(network).__name__}, got {name!r}. "
            f"They are: {', '.join(layers)}."
        )
    network.set_submodule(name, layer)


def _make(constructor: Any, arguments: Mapping[str, Any]) -> Any:
    """Call a function by its dotted name; arguments that describe calls are made first."""
    function = _find(constructor)
    given = {name: _argument(value) for name, value in arguments.items()}
    try:
        return function(*given.pop("*", ()), **given)
    except Exception as error:  # whatever another library raises
        raise RecipeError(
            f"Constructed.arguments: expected arguments of {constructor}, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}. Try the call in Python."
        ) from error


def _argument(value: Any) -> Any:
    if isinstance(value, list):
        return [_argument(entry) for entry in value]
    if isinstance(value, dict) and "constructor" in value and value.keys() <= {"constructor", "arguments"}:
        return _make(value["constructor"], value.get("arguments") or {})
    return value


def _find(dotted: str) -> Any:
    """Return what a dotted name means: a package, then attributes."""
    parts = dotted.split(".")
    package = parts[0]
    try:
        import_library(package)
    except ModuleNotFoundError as error:
        if package in _EXTRAS:
            raise MissingPackageError(package, _EXTRAS[package]) from error
        raise RecipeError(
            f"Constructed.constructor: expected a function of an installed package, got {dotted!r}. Install {package}."
        ) from error
    except Exception as error:  # a package that does not fit the others
        raise RecipeError(
            f"Constructed.constructor: expected a package that can be imported, got {type(error).__name__} from "
            f"{package}: {' '.join(str(error).split())[:300]}. Install versions that fit each other."
        ) from error
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_library(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
            return found
        except (ImportError, AttributeError):
            continue
    raise RecipeError(
        f"Constructed.constructor: expected a dotted name such as timm.create_model, got {dotted!r}. "
        "Check its spelling."
    )

"""A teacher that another library's function makes: Hugging Face, timm, torchvision, torch.hub."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from compress.errors import MissingPackageError, RecipeError

__all__ = ["Constructed"]

_EXTRAS = {"timm": "zoo", "torchvision": "zoo", "transformers": "zoo"}


class Constructed(nn.Module):
    """A network that a function returns, for recipes, which name classes.

    Its layers are named as in that network, e.g. ``layer3.1.conv2``.

    Args:
        constructor: Dotted name, e.g. ``timm.create_model``, ``torchvision.models.resnet50`` or
            ``transformers.AutoModelForSequenceClassification.from_pretrained``.
        arguments: Its keyword arguments; ``*`` holds a list of positional ones.
        output: Entry or attribute of what the network returns, e.g. ``logits``; all of it without one.

    Raises:
        RecipeError: when there is no such function, it refuses its arguments, or returns no network.
        MissingPackageError: when its package is not installed.

    Example:
        >>> Constructed("torch.nn.Linear", {"in_features": 2, "out_features": 3})
        Constructed(torch.nn.Linear: Linear(in_features=2, out_features=3, bias=True))
    """

    def __init__(self, constructor: str, arguments: dict[str, Any] | None = None, output: str | None = None) -> None:
        super().__init__()
        given = dict(arguments or {})
        function = _find(constructor)
        try:
            network = function(*given.pop("*", ()), **given)
        except Exception as error:  # whatever another library raises
            raise RecipeError(
                f"teacher.model.arguments: expected arguments of {constructor}, got {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}. Try the call in Python."
            ) from error
        if not isinstance(network, nn.Module):
            raise RecipeError(
                f"teacher.model.constructor: expected a function that returns a network, got {type(network).__name__} "
                f"from {constructor}. Name another."
            )
        self.constructor = constructor
        self.output = output
        # Its own registries, so that layers and weights are named as in the network, and moved together with it.
        self._made = (network,)
        self._parameters, self._buffers, self._modules = network._parameters, network._buffers, network._modules
        self._non_persistent_buffers_set = network._non_persistent_buffers_set

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Return what the network returns, or its entry ``output``."""
        outputs = self._made[0](*inputs, **named)
        if self.output is None:
            return dict(outputs) if isinstance(outputs, Mapping) else outputs
        if isinstance(outputs, Mapping):
            return outputs[self.output]
        return getattr(outputs, self.output)

    def train(self, mode: bool = True) -> Constructed:
        """Set the mode of the network, too."""
        self._made[0].train(mode)
        return super().train(mode)

    def __repr__(self) -> str:
        return f"Constructed({self.constructor}: {self._made[0]!r})"


def _find(dotted: str) -> Any:
    """Return what a dotted name means: a package, then attributes."""
    parts = dotted.split(".")
    package = parts[0]
    try:
        import_module(package)
    except ImportError as error:
        if package in _EXTRAS:
            raise MissingPackageError(package, _EXTRAS[package]) from error
        raise RecipeError(
            f"teacher.model.constructor: expected a function of an installed package, got {dotted!r}. "
            f"Install {package}."
        ) from error
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
            return found
        except (ImportError, AttributeError):
            continue
    raise RecipeError(
        f"teacher.model.constructor: expected a dotted name such as timm.create_model, got {dotted!r}. "
        "Check its spelling."
    )

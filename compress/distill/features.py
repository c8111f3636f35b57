"""Feature taps: named activations of any network, whether it is a module, compiled, or a captured graph."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.distill.lesson import View, pick
from compress.errors import RecipeError
from compress.surgery import Captured
from compress.surgery.taps import layer_names

__all__ = ["FeatureTaps", "find_layers"]


def find_layers(network: nn.Module, pattern: str, *, where: str = "layers") -> list[str]:
    """Return the names of a network's layers that match a pattern.

    Args:
        network: Any module.
        pattern: A name such as ``layer3.1.conv2``; ``*`` and ``?`` stand for anything within one part between dots.
            ``:1`` or ``:name`` at the end takes that entry of a layer that returns several tensors.
        where: What the error speaks of.

    Raises:
        RecipeError: when nothing matches; the message lists near names.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        >>> find_layers(net, "1.*")
        ['1.0', '1.1']
    """
    path, _, entry = pattern.partition(":")
    names = _names(network)
    parts = path.split(".")
    found = [
        name for name in names if len(name.split(".")) == len(parts) and all(map(fnmatchcase, name.split("."), parts))
    ]
    if not found:
        near = difflib.get_close_matches(path, names, n=5, cutoff=0.4) or names[:5]
        raise RecipeError(
            f"{where}: expected a layer of {type(network).__name__}, got {pattern!r}. "
            f"{'Near names: ' + ', '.join(near) if near else 'It has no layers'}."
        )
    return [f"{name}:{entry}" if entry else name for name in found]


class FeatureTaps:
    """Runs a network and collects what some of its layers return.

    On a module, forward hooks do it, for the time of the call; on a compiled module they stay, since compiled code
    knows only the hooks it was traced with; on a captured graph the activations are extra outputs.

    Args:
        names: Names from ``find_layers``.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._seen: dict[str, Any] = {}
        self._compiled: tuple[nn.Module, list[RemovableHandle]] | None = None

    def __call__(self, network: nn.Module, *inputs: Tensor, **named: Tensor) -> View:
        """Run the network.

        Args:
            network: Has the layers that were named.
            inputs: Given to it by position.
            named: Given to it by keyword.

        Raises:
            RecipeError: when a layer gave nothing.
        """
        return self.through(network, network, *inputs, **named)

    def through(self, call: Callable[..., Any], network: nn.Module, *inputs: Tensor, **named: Tensor) -> View:
        """Run the network by a call of something that runs it."""
        if not self.names:
            return View(call(*inputs, **named))
        if isinstance(network, Captured):
            paths = [_path(name) for name in self.names]
            outputs, features = network.forward_with_features(list(dict.fromkeys(paths)), *inputs, **named)
            return View(outputs, {name: features[path] for name, path in zip(self.names, paths)})
        self._seen.clear()
        with self._hooks(network):
            outputs = call(*inputs, **named)
        missing = [name for name in self.names if _path(name) not in self._seen]
        if missing:
            raise RecipeError(
                f"layers: expected activations of {', '.join(missing)}, got none: {type(network).__name__} did not "
                "call them. Name layers that its forward goes through."
            )
        features = {name: pick(self._seen[_path(name)], name.partition(":")[2] or None) for name in self.names}
        self._seen.clear()
        return View(outputs, features)

    @contextmanager
    def _hooks(self, network: nn.Module) -> Iterator[None]:
        compiled = any("_orig_mod" in name for name, _ in network.named_children()) or (
            getattr(network, "_compiled_call_impl", None) is not None
        )
        if compiled:
            if self._compiled is None or self._compiled[0] is not network:
                torch.compiler.reset()  # code that was compiled without these hooks would never call them
                self._compiled = (network, self._attach(network))
            yield
            return
        handles = self._attach(network)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, network: nn.Module) -> list[RemovableHandle]:
        layers: Mapping[str, nn.Module] = {_plain(name): layer for name, layer in network.named_modules()}
        paths = dict.fromkeys(_path(name) for name in self.names)
        return [layers[path].register_forward_hook(self._keep(path)) for path in paths if path in layers]

    def _keep(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        seen = self._seen

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[path] = output

        return hook


def _names(network: nn.Module) -> list[str]:
    if isinstance(network, Captured):
        return layer_names(network.graph_module)
    return [_plain(name) for name, _ in network.named_modules() if _plain(name)]


def _path(name: str) -> str:
    return name.partition(":")[0]


def _plain(name: str) -> str:
    """Return a name without what ``torch.compile`` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")

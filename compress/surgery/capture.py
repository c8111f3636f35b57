"""A network as an exported graph that still trains: the form in which quantization works on it.

A captured graph has train or eval behaviour written into its operators, and PyTorch's own switches for it lose
BatchNorm's ``eps`` and ``momentum`` and are bypassed when Lightning restores modes by assignment. ``Captured``
therefore derives the graph's mode from its own ``training`` attribute at every call.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from compress.errors import CaptureError, DataError
from compress.measure.modes import kept_modes
from compress.surgery.blame import layer_and_line
from compress.surgery.devices import device_of, follow_device, move_constants
from compress.surgery.lengths import LARGEST_BATCH, Length, check_sizes, dynamic_shapes, sizes_of
from compress.surgery.modes import modules_at_rest, note_constants, owner_of, rests, set_mode
from compress.surgery.recurrent import kept_whole
from compress.surgery.taps import twin_graph, with_features

__all__ = ["Captured", "capture", "export_program"]


def export_program(
    network: nn.Module,
    inputs: Sequence[Tensor],
    *,
    lengths: Sequence[Length] = (),
    strict: bool = True,
    largest_batch: int = LARGEST_BATCH,
) -> torch.export.ExportedProgram:
    """Capture a network with ``torch.export``, the batch dimension dynamic.

    Args:
        network: In the mode that the graph shall start in.
        inputs: Example inputs, at least two samples in dimension 0 of each.
        lengths: Further sizes that may vary, as that of a sequence.
        strict: Whether the network's code is read; otherwise it is run, and what it does beside tensors is not noticed.
        largest_batch: Samples that the graph takes at most, for what takes memory for as many; at least 3.

    Raises:
        CaptureError: when the network cannot be captured; the message names the reason and, where known, the layer.
    """
    if isinstance(network, Captured):
        if any(hasattr(module, "fake_quant_enabled") for module in network.modules()):
            raise CaptureError(
                "capture: expected a network that is in floats or in integers, got one that rounds to be trained. Give "
                "what the callback's converted holds, or compress.quantize.convert makes of it."
            )
        network.sync_mode()
        network = network.graph_module
    sizes = dynamic_shapes(inputs, lengths, largest_batch=largest_batch)
    try:
        shapes = _like_arguments(network, sizes)
        with kept_whole(lengths):
            return torch.export.export(network, tuple(inputs), dynamic_shapes=shapes, strict=strict)
    except Exception as error:  # torch.export raises many kinds; each means the same to the user
        wanted = " and ".join(["a dynamic batch", *map(str, lengths)])
        reason = _reason(error, named=bool(lengths)) + layer_and_line(network, error)
        raise CaptureError(
            f"capture: expected a network that torch.export can capture with {wanted}, "
            f"got {type(network).__name__}: {reason}. Move data-dependent control flow and fixed batch sizes out of it."
        ) from error


def _reason(error: Exception, *, named: bool) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Of sizes that cannot vary, torch says which and why in a list below the first line.
    details = [line.removeprefix("- ") for line in lines if line.startswith("- ")] if named else []
    return " ".join([*lines[:1], *dict.fromkeys(details)][:3]) or type(error).__name__


def _like_arguments(network: nn.Module, values: list[Any]) -> tuple[Any, ...]:
    """Arrange one value for each input as the network's arguments are: those that ``*args`` takes are one tuple."""
    kinds = [parameter.kind for parameter in inspect.signature(network.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(values)
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    rest = values[named:]
    return (*values[:named], tuple(rest)) if rest else tuple(values)


def capture(
    network: nn.Module,
    inputs: Sequence[Tensor],
    *,
    mode: str = "eval",
    lengths: Sequence[Length] = (),
    frozen: Iterable[str] | None = None,
) -> Captured:
    """Return a network as a trainable graph with the same parameters under the same names.

    Args:
        network: Its parameters are shared, not copied.
        inputs: Example inputs, at least two samples in dimension 0 of each.
        mode: ``"train"`` or ``"eval"``: which branch of the user's own ``if self.training`` becomes part of the graph;
            with ``"train"`` a random one, as stochastic depth, stays in what is deployed. Dropout and BatchNorm follow
            ``.training`` either way, unless the code tells them something else than this mode.
        lengths: Sizes beyond the batch that may vary; inputs of other sizes than the example's are refused elsewhere.
        frozen: Names of modules, each by its own, that stay in evaluation for good; by default those that are, in a
            network in training.

    Raises:
        CaptureError: when the network cannot be captured, or has a BatchNorm without a momentum.

    Example:
        >>> net = capture(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), [torch.ones(2, 3)])
        >>> bool((net.eval()(torch.ones(5, 3)) == net(torch.ones(5, 3))).all())
        True
        >>> [name for name, _ in net.named_parameters()]
        ['0.weight', '0.bias']
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
            raise CaptureError(
                f"capture: expected BatchNorms with a momentum, got none in {name!r}. Its statistics would stand still "
                "in a graph. Set a number, e.g. 0.1."
            )
    resting = {*(modules_at_rest(network) if frozen is None else frozen)}
    if isinstance(network, Captured):
        resting |= network.frozen
    with kept_modes(network, training=mode == "train"):
        program = export_program(network, inputs, lengths=lengths)
    graph_module = program.module(check_guards=False)
    note_constants(graph_module, training=mode == "train")
    return Captured(graph_module, frozen=resting).train(network.training)


class _NotPickledError(CaptureError, pickle.PicklingError):
    """What ``pickle`` raises, too: Lightning leaves out hyperparameters that cannot be pickled."""


class Captured(nn.Module):
    """A graph that follows ``.training``, with the parameter names of the network it was captured from.

    Its parts with parameters or buffers are modules of their old names, and have modes: BatchNorm and dropout of a part
    in evaluation are in evaluation.

    Args:
        graph_module: From ``torch.export``, or what PT2E made of such a one.
        frozen: Names of the modules, of the network that was captured, that stay in evaluation in training, too.
        lighten: Rewrites a graph, in place, into one that computes the same in less time, told whether for training;
            what runs is a graph of its own that has been rewritten, while ``graph_module`` stays as it is.

    Attributes:
        freeze_batchnorm: While true, BatchNorm uses its running statistics and observers stand still in training too.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        *,
        frozen: Iterable[str] = (),
        lighten: Callable[[GraphModule, bool], None] | None = None,
    ) -> None:
        super().__init__()
        self.frozen = frozenset(frozen)
        self.lighten = lighten
        # Shared registries, not a child: state_dict keys and parameter names stay what they were before capture.
        self._parameters, self._buffers, self._modules = (
            graph_module._parameters,
            graph_module._buffers,
            graph_module._modules,
        )
        self._graph_module = (graph_module,)
        self._names = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
        self._sizes = sizes_of(graph_module)
        self._tapped: tuple[tuple[tuple[str, ...], bool], GraphModule] | None = None
        self.freeze_batchnorm = False
        self._compile: Callable[..., Any] | None = None
        self._derived: dict[tuple[bool, bool, frozenset[str]], Callable[..., Any]] = {}

    @property
    def graph_module(self) -> GraphModule:
        """The graph itself."""
        return self._graph_module[0]

    @torch.compiler.disable(recursive=False)  # the mode is written into the graph: it compiles one for each itself
    def forward(self, /, *inputs: Tensor, **named: Tensor) -> Any:
        """Run the graph in the mode that ``training`` says.

        Args:
            inputs: Those that the network was captured with, in their order.
            named: The rest of them, by the names that the network's ``forward`` has.

        Raises:
            DataError: when one is missing or was not there at capture, or when a size that is not among the lengths is
                another one than the example's.
        """
        inputs = self._arrange(inputs, named)
        modes = self.sync_mode()
        if self._compile is None and self.lighten is None:
            return self.graph_module(*inputs)
        resting = frozenset(name for name, training in modes.items() if not training) if self.training else frozenset()
        mode = (self.training, self._learning, resting)
        if mode not in self._derived:
            twin = self._twin()
            self._derived[mode] = twin if self._compile is None else self._compile(twin)
        return self._derived[mode](*inputs)

    def _arrange(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return all inputs in the graph's order, checked."""
        if named:
            rest = self._names[len(inputs) :]
            if set(rest) != set(named):
                raise DataError(
                    f"captured network: expected the inputs {', '.join(self._names)}, with which it was captured, got "
                    f"{len(inputs)} by position and {', '.join(named)} by name. Give these and no others."
                )
            inputs = (*inputs, *(named[name] for name in rest))
        if self._sizes:
            check_sizes(inputs, self._sizes)
        return inputs

    def _twin(self) -> GraphModule:
        """Return a graph of its own that runs in place of this one in the present mode."""
        twin = twin_graph(self.graph_module)
        if self.lighten is not None:
            self.lighten(twin, self.training)
        return twin

    def compile_with(self, compile: Callable[..., Any]) -> None:
        """Run compiled from now on.

        Args:
            compile: Makes a faster module of one, as ``torch.compile`` does.
        """
        self._compile, self._derived = compile, {}

    def forward_with_features(
        self, names: Sequence[str], /, *inputs: Tensor, **named: Tensor
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the graph and return its outputs and the activations of named layers.

        Args:
            names: Names of modules in the network that was captured.
            inputs: As for ``forward``.
            named: As for ``forward``.

        Raises:
            CaptureError: when a layer has left no operator in the graph.
            DataError: as ``forward``.
        """
        inputs = self._arrange(inputs, named)
        self.sync_mode()
        key = tuple(names), self.training
        if self._tapped is None or self._tapped[0] != key:
            # In evaluation as it is written: norms that were folded away could not be tapped.
            graph = self._twin() if self.training else twin_graph(self.graph_module)
            self._tapped = (key, with_features(graph, names))
            self.sync_mode()
        outputs, features = self._tapped[1](*inputs)
        return outputs, dict(zip(names, features))

    def forget_taps(self) -> None:
        """Build what was derived from the graph anew at the next call, after the graph has been changed."""
        self._tapped, self._derived = None, {}

    def train(self, mode: bool = True) -> Captured:
        """Set ``training``, of parts, too, as ``nn.Module`` does; the graph follows at the next call."""
        self.training = mode
        if mode:  # in evaluation parts are so whatever they say, and keep it: exported modules refuse .train()
            for module in self._modules.values():
                for part in module.modules() if module is not None else ():
                    part.training = True
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Captured:
        """Move with ``to`` and the like; what stands in the graph of the device moves along."""
        old = device_of(self.graph_module)
        super()._apply(fn, recurse)
        replaced = move_constants(self.graph_module, fn)
        new = device_of(self.graph_module)
        if old is not None and new is not None and old != new:
            replaced |= follow_device(self.graph_module, old, new)
        if replaced:
            self.forget_taps()
        return self

    def sync_mode(self) -> dict[str, bool]:
        """Write modes and ``freeze_batchnorm`` into the graph where they differ from what stands there.

        Returns:
            The modes of parts, by name.
        """
        learning, modes = self._learning, {}
        for name, module in self.named_modules():
            if module is self:
                continue
            modes[name] = module.training
            enabled = getattr(module, "observer_enabled", None)
            if isinstance(enabled, Tensor) and bool(enabled[0]) != learning:
                # Otherwise validation data would move the activation ranges.
                enabled[0] = int(learning)
        for graph_module in (self.graph_module, *([self._tapped[1]] if self._tapped else [])):
            set_mode(graph_module, self.frozen, modes, training=self.training, learning=learning)
        return modes

    def rests(self, node: Node) -> bool:
        """Say whether a norm or dropout of the graph is in evaluation although the whole may be in training."""
        modes = {name: module.training for name, module in self.named_modules() if module is not self}
        return rests(owner_of(node), self.frozen, modes)

    @property
    def _learning(self) -> bool:
        return self.training and not self.freeze_batchnorm

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled: a graph cannot be, and would say so by a RecursionError or of some local object."""
        raise _NotPickledError(
            "captured network: expected to be saved by its state_dict, got pickled as a whole. Save its state_dict() "
            "with the history of edits that made it (compress.surgery.save_snapshot), or the program that "
            "export_program gives."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        twin = Captured(copy.deepcopy(self.graph_module, memo), frozen=self.frozen, lighten=self.lighten)
        twin.training, twin.freeze_batchnorm = self.training, self.freeze_batchnorm
        modes = {name: module.training for name, module in self.named_modules()}
        for name, module in twin.named_modules():  # a graph that is copied makes its modules anew
            module.training = modes.get(name, True)
        return twin

"""The zoo's check of couplings: for every group, the network with a unit's slices at zero computes what is left of it.

Both sides run on the exported graph, without a copy of the weights: one reads them with removed slices at zero, the
other without these slices and with new sizes written in. Where a normalisation, softmax or mean runs over something
that is removed, the masked network runs it over what is kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from zoo_models import build, first_output
from zoo_prune import kept_units

from compress.prune import Group, apply_removal, describe_removal, study
from compress.prune.coupling import Coupling, resize
from compress.prune.coupling.resize import _Left
from compress.prune.coupling.walk import Labels

__all__ = ["masked_is_shrunk"]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Largest difference between both outputs, relative to the largest output."""

EFFECT = 1e-3
"""What a removal must change of the output, or float32 is too coarse to see a mistake."""

_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "_weight_norm", "linalg_vector_norm", "norm")
_OVER_KEPT = frozenset([*_NORMS, "softmax", "_softmax", "log_softmax", "mean", "var", "var_mean", "std", "std_mean"])

Gone = dict[tuple[str, int], set[int]]
Choice = Sequence[tuple[Group, Tensor]]


def masked_is_shrunk(name: str, row: dict[str, Any]) -> None:
    """Compare both for a part of the units of each group in turn, and in float64 for all groups together.

    A group that differs in float32 by more than rounding may explain, or that hardly matters to the output, is compared
    in float64, which decides. The edit of the network itself, for all groups together, must give what the masked one
    does, too.

    Args:
        name: Of the architecture.
        row: Gets the number of groups, the largest errors, how many groups were compared in float64, how many are
            ``silent`` even there, and those that differ.

    Raises:
        AssertionError: when a group differs.
    """
    network, inputs = build(name)
    randomise(network, inputs)
    anatomy = study(network, inputs)
    graph, coupling = anatomy.graph, anatomy.coupling
    generator = torch.Generator().manual_seed(0)
    chosen = {key: _some(group, generator) for key, group in anatomy.groups.items() if group.width > 1}
    picks = [(anatomy.groups[key], units) for key, units in chosen.items()]
    single, double = _Pair(graph, coupling, inputs, torch.float32), _Pair(graph, coupling, inputs, torch.float64)
    errors, rechecked, silent, wrong = [], [], 0, []
    for pick in picks:
        error, effect = single.compare([pick])
        if not error <= TOLERANCE[torch.float32] or not effect > EFFECT:
            again, effect = double.compare([pick])
            rechecked.append(again)
            silent += not effect > 1e3 * TOLERANCE[torch.float64]
            if not again <= TOLERANCE[torch.float64]:
                wrong.append(f"{pick[0].name}: {again:.1e}")
        errors.append(error)
    data = describe_removal(anatomy, chosen)
    assert data is not None, "nothing can be removed"
    edited = apply_removal(network, data).eval()
    with torch.no_grad():
        row["edit_error"] = _difference(first_output(edited(*inputs)), single.masked(picks))
    together, _ = double.compare(picks)
    if not together <= TOLERANCE[torch.float64]:
        wrong.append(f"all groups together: {together:.1e}")
    row |= {"groups": len(picks), "error32": max(errors), "error64": max([*rechecked, together])}
    row |= {"rechecked": len(rechecked), "silent": silent, "wrong": wrong}
    assert not wrong, "; ".join(wrong)
    assert row["edit_error"] <= 1e-3, f"the edited network differs by {row['edit_error']:.1e}"


def randomise(network: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Give every vector and every constant tensor values at which no mistake can hide.

    As made, scales are one, shifts zero, layer scales 1e-6, and the last normalisation of a block may be zero. Running
    statistics become roughly those of the inputs, or a deep network's signal would fade.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if not tensor.is_floating_point() or tensor.dim() == 0:
                continue
            drawn = torch.rand(tensor.shape, generator=generator)
            if name.endswith("bias") and tensor.dim() == 1:
                tensor.copy_(0.4 * drawn - 0.2)
            elif isinstance(tensor, nn.Parameter):
                if max(tensor.shape) == tensor.numel():
                    tensor.copy_(0.5 + drawn)
                elif tensor.std() < 1e-4:
                    tensor.copy_((2 * drawn - 1) / math.sqrt(tensor[0].numel()))
        norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train().momentum = 1.0
        network(*inputs)
        for norm in norms:
            norm.eval()
            if norm.running_var is not None:
                norm.running_var.clamp_(min=1e-2).mul_(0.5 + torch.rand(norm.running_var.shape, generator=generator))


class _Pair:
    """The masked and the shrunk network of one precision."""

    def __init__(self, graph: GraphModule, coupling: Coupling, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.graph, self.coupling, self.dtype = graph, coupling, dtype
        self.inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        self._whole: Tensor | None = None

    def compare(self, choice: Choice) -> tuple[float, float]:
        """Return the difference between both networks and what the removal changes, relative to the output."""
        masked = self.masked(choice)
        shrunk = first_output(_Run(self._small, self.dtype, self._gone, cut=True).run(*self.inputs))
        if self._whole is None:
            self._whole = first_output(_Run(self.graph, self.dtype, {}, cut=False).run(*self.inputs))
        return _difference(shrunk, masked), _difference(self._whole, masked)

    def masked(self, choice: Choice) -> Tensor:
        """Return the output with a choice's slices at zero."""
        self._gone, removed = _removal(self.coupling, choice)
        shared = {id(tensor): tensor for tensor in [*self.graph.parameters(), *self.graph.buffers()]}
        small = copy.deepcopy(self.graph, shared)
        labels = copy.copy(self.coupling.labels)
        labels.values = {
            twin: labels.values[node] for node, twin in _nodes(self.graph, small) if node in self.coupling.labels.values
        }
        resize(small, labels, removed)
        self._small = small
        narrow = dict(_nodes(self.graph, small))
        left = _Left(self.coupling.labels.units, removed)
        run = _Run(
            self.graph, self.dtype, self._gone, cut=False, over_kept=_OverKept(self.coupling.labels, left, narrow)
        )
        return first_output(run.run(*self.inputs))


def _nodes(graph: GraphModule, twin: GraphModule) -> Iterator[tuple[Node, Node]]:
    """Yield the nodes of a graph and of its copy, those of regions inside it included."""
    for one, other in zip(graph.modules(), twin.modules()):
        if isinstance(one, GraphModule) and isinstance(other, GraphModule):
            yield from zip(one.graph.nodes, other.graph.nodes)


class _OverKept:
    """Runs an operator on what is kept of its inputs."""

    def __init__(self, labels: Labels, left: _Left, narrow: Mapping[Node, Node]) -> None:
        self.labels, self.left, self.narrow = labels, left, narrow

    def applies(self, node: Node) -> bool:
        return str(node.target).removeprefix("aten.").partition(".")[0] in _OVER_KEPT

    def __call__(self, node: Node, args: Sequence[Any], cast: Any) -> Any:
        narrow = self.narrow[node]
        given = [self._kept(arg, source) if isinstance(source, Node) else arg for arg, source in zip(args, node.args)]
        plain = [value if isinstance(source, Node) else source for value, source in zip(given, narrow.args)]
        result = node.target(*cast(plain), **cast(narrow.kwargs))  # type: ignore[operator]
        value = self.labels.values[node]
        if isinstance(result, tuple):
            return tuple(self._scattered(one, of) for one, of in zip(result, value))
        return self._scattered(result, value)

    def _kept(self, value: Tensor, node: Node) -> Tensor:
        for dim, keep in enumerate(self.left.kept(self.labels.values[node])):
            if keep is not None:
                value = value.index_select(dim, keep.nonzero()[:, 0])
        return value

    def _scattered(self, result: Tensor, value: Any) -> Tensor:
        for dim, keep in enumerate(self.left.kept(value)):
            if keep is not None:
                shape = [*result.shape]
                shape[dim] = len(keep)
                result = result.new_zeros(shape).index_copy(dim, keep.nonzero()[:, 0], result)
        return result


class _Run(Interpreter):
    """Runs a graph with some slices of its tensors cut out or at zero."""

    def __init__(
        self, graph: GraphModule, dtype: torch.dtype, gone: Gone, *, cut: bool, over_kept: _OverKept | None = None
    ) -> None:
        super().__init__(graph)
        self.dtype, self.gone, self.is_cut, self.over_kept = dtype, gone, cut, over_kept
        owned = [*graph.named_parameters(), *graph.named_buffers()]
        self.names = {id(tensor): name for name, tensor in reversed(owned)}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, **kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().get_attr(target, args, kwargs)
        if not isinstance(found, Tensor):
            return found
        name = self.names.get(id(found))
        if found.is_floating_point():
            found = found.detach().to(self.dtype)
        for (tensor, dim), indices in self.gone.items():
            if tensor == name:
                if self.is_cut:
                    kept = [i for i in range(found.shape[dim]) if i not in indices]
                    found = found.index_select(dim, torch.tensor(kept))
                else:
                    found = found.index_fill(dim, torch.tensor(sorted(indices)), 0.0)
        return found

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and self.over_kept is not None and self.over_kept.applies(n):
            return self.over_kept(n, self.fetch_args_kwargs_from_env(n)[0], self._cast)
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        inner = next((i for i, arg in enumerate(args) if isinstance(arg, GraphModule)), None)
        if inner is not None:  # a region under no_grad or autocast
            return _Run(args[inner], self.dtype, {}, cut=False, over_kept=self.over_kept).run(*args[inner + 1 :])
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None  # it holds for one precision only
        return super().call_function(target, self._cast(args), self._cast(kwargs))

    def _cast(self, given: Any) -> Any:
        """Replace precisions that are written into the graph."""
        if self.dtype == torch.float32:
            return given
        if isinstance(given, dict):
            return dict(zip(given, self._cast(list(given.values()))))
        return [self.dtype if isinstance(value, torch.dtype) and value == torch.float32 else value for value in given]


def _some(group: Group, generator: torch.Generator) -> Tensor:
    """Return the indices of a part of a group's units, one at least and not all."""
    return torch.randperm(group.width, generator=generator)[: group.width - kept_units(group.width)]


def _removal(coupling: Coupling, choice: Choice) -> tuple[Gone, Tensor]:
    """Return the slices that go and their labels."""
    gone: Gone = {}
    removed = []
    for group, units in choice:
        for (tensor, dim), indices in group.slots.items():
            gone.setdefault((tensor, dim), set()).update(indices[units].flatten().tolist())
        (tensor, dim), indices = next(iter(group.slots.items()))
        removed.append(coupling.labels.tensors[tensor][dim][indices[units][:, 0]])
    return gone, torch.cat(removed)


def _difference(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return math.inf
    return float((got - expected).abs().max() / expected.abs().max())

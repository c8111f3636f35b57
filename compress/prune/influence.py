"""How much each block does: a criterion for whole blocks, measured on data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from compress.errors import EditError
from compress.prune.anatomy import Anatomy
from compress.prune.blocks import Block, find_blocks, read_blocks
from compress.prune.coupling.values import Value, axes
from compress.surgery import Captured

__all__ = ["block_influence"]


def block_influence(anatomy: Anatomy, batches: Iterable[Tensor | Sequence[Tensor]]) -> dict[str, float]:
    r"""Return how much each block turns what it is given; the least matters least.

    .. math:: 1 - \operatorname{mean} \frac{x^T y}{\|x\| \|y\|}          Men et al. 2024, arXiv:2403.03853, equation 1

    The mean is over samples and places; x and y are vectors of channels.

    Args:
        anatomy: The network.
        batches: Inputs of the network, of any batch size.

    Returns:
        For each of ``find_blocks`` a value in [0, 2].

    Raises:
        EditError: when there is no batch.
    """
    twin = Captured(copy.deepcopy(anatomy.graph)).eval()
    twin.sync_mode()
    blocks = {name: block for name, block in read_blocks(twin.graph_module).items() if name in find_blocks(anatomy)}
    values = {node.name: value for node, value in anatomy.coupling.labels.values.items()}
    dims = {name: _channels(values.get(block.result.name)) for name, block in blocks.items()}
    recorder = _Recorder(twin.graph_module, blocks, dims)
    total, num = dict.fromkeys(blocks, 0.0), 0
    with torch.no_grad():
        for piece, size in _pieces(batches, anatomy.inputs):
            recorder.cosines.clear()
            recorder.run(*piece)
            num += size
            for name, cosine in recorder.cosines.items():
                total[name] += size * float(cosine)
    if num == 0:
        raise EditError("prune: expected batches to measure blocks on, got none. Give at least one.")
    return {name: 1 - value / num for name, value in total.items()}


def _channels(value: Any) -> int | None:
    """Return the dimension along which the weights say that channels lie, where there is one."""
    dims = {d for labels in value.fields for d in axes(labels)} if isinstance(value, Value) else set()
    return dims.pop() if len(dims) == 1 else None


def _pieces(batches: Iterable[Tensor | Sequence[Tensor]], like: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], int]]:
    """Cut batches to the size that the graph was exported with; the last piece is filled up with copies."""
    size = len(like[0])
    for batch in batches:
        tensors = [batch] if isinstance(batch, Tensor) else list(batch)
        for first in range(0, len(tensors[0]), size):
            piece = [tensor[first : first + size].to(own.device) for tensor, own in zip(tensors, like, strict=True)]
            num = len(piece[0])
            rows = torch.arange(size, device=like[0].device) % num
            yield [tensor[rows] for tensor in piece], num


class _Recorder(Interpreter):
    """Runs a graph and compares what blocks are given with what they make of it."""

    def __init__(self, graph_module: GraphModule, blocks: Mapping[str, Block], dims: Mapping[str, int | None]) -> None:
        super().__init__(graph_module)
        self.cosines: dict[str, Tensor] = {}
        self._dims = dims
        self._results = {block.result: block for block in blocks.values()}
        self._sources = {block.source for block in blocks.values()}
        self._given: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        block = self._results.get(n)
        if block is not None:
            dim = self._dims[block.name]
            if dim is None:
                dim = 2 if value.dim() == 3 else 1
            # Of all samples and places alike, wherever the network has its batch; copies that fill up a piece count.
            cosine = torch.cosine_similarity(self._given[block.source].float(), value.float(), dim=dim)
            self.cosines[block.name] = cosine.mean()
        if n in self._sources:
            self._given[n] = value.clone()  # operators that work in place may change it
        return value

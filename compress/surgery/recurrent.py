"""Recurrent layers of any number of steps: while a program is traced, torch would unroll them to count its shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import meta_table
from torch._subclasses.fake_impls import _deregister_op_impl, register_op_impl
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.surgery.lengths import Length

__all__ = ["kept_whole"]


@contextmanager
def kept_whole(lengths: Sequence[Length]) -> Iterator[None]:
    """Within it, shapes of an LSTM's or a GRU's outputs are written down instead of traced step by step.

    Tracing (torch 2.13) gets the shapes by running the layer's decomposition, a loop over the steps, which makes their
    number a constant; there is no public way to give an operator other shapes.

    Args:
        lengths: Of the program that is traced; nothing is done for one without.
    """
    if not lengths:
        yield
        return
    tables = [(operator, shapes, dict(operator.py_kernels)) for operator, shapes in _SHAPES.items()]
    try:
        for operator, shapes, kernels in tables:
            _set(operator, dict.fromkeys(kernels, shapes))
            meta_table[operator] = shapes  # else the decomposition comes before the rule
            register_op_impl(operator)(_rule(shapes))
        yield
    finally:
        for operator, _, kernels in tables:
            _set(operator, kernels)
            meta_table.pop(operator, None)
            _deregister_op_impl(operator)


def _set(operator: Any, kernels: dict[Any, Callable[..., Any]]) -> None:
    operator.py_kernels.update(kernels)
    operator._dispatch_cache.clear()


def _rule(shapes: Callable[..., Any]) -> Callable[..., Any]:
    def rule(mode: FakeTensorMode, operator: Any, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return shapes(*args, **kwargs)

    return rule


def _lstm(
    x: Tensor,
    state: Sequence[Tensor],
    parameters: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, state[0], bidirectional, batch_first), torch.empty_like(state[0]), torch.empty_like(state[1])


def _gru(
    x: Tensor,
    state: Tensor,
    parameters: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, state, bidirectional, batch_first), torch.empty_like(state)


def _outputs(x: Tensor, state: Tensor, bidirectional: bool, batch_first: bool) -> Tensor:
    first, second = x.shape[:2]
    width = state.shape[-1] * (2 if bidirectional else 1)
    # The kernel goes along the steps, and turns its result when the batch shall come first.
    return x.new_empty((second, first, width)).transpose(0, 1) if batch_first else x.new_empty((first, second, width))


_SHAPES: dict[Any, Callable[..., Any]] = {torch.ops.aten.lstm.input: _lstm, torch.ops.aten.gru.input: _gru}

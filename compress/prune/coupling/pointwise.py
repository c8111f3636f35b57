"""Rules of operators that act on each element, or on the elements along one dimension: labels pass through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compress.prune.coupling.context import Context, Rule, operators
from compress.prune.coupling.units import Block
from compress.prune.coupling.values import Value, axes

__all__ = ["RULES", "pointwise"]

aten = torch.ops.aten


def pointwise(context: Context, *args: Any, **kwargs: Any) -> Value:
    """Unite the labels of all tensors that meet."""
    values = [value for value in [*args, *kwargs.values()] if isinstance(value, Value)]
    rank = len(context.shapes[0])
    letters = [f"d{i}" for i in range(rank)]
    operands = [(value, letters[rank - len(value.shape) :]) for value in values]
    result = context.combine(operands, letters)
    result.uniform = frozenset(
        dim
        for dim, size in enumerate(context.shapes[0])
        if size > 1 and all(_uniform(value, dim - rank + len(value.shape)) for value in values)
    )
    result.parents = values
    return result


def _uniform(value: Value, dim: int) -> bool:
    return dim < 0 or value.shape[dim] == 1 or dim in value.uniform


def batch_norm(context: Context, x: Value, *statistics: Any) -> Value:
    """Scale, shift and statistics belong to the channels."""
    letters = [f"d{i}" for i in range(len(x.shape))]
    return context.combine(
        [(x, letters), *((value, [letters[1]]) for value in statistics if isinstance(value, Value))], letters
    )


def instance_norm(context: Context, x: Value, *statistics: Any) -> Value:
    """Likewise; positions must stay."""
    return batch_norm(context, context.stay(x, range(2, len(x.shape)), "it normalises over positions"), *statistics)


def layer_norm(context: Context, x: Value, normalized: Sequence[int], *affine: Any) -> Value:
    """Scale and shift belong to what is normalised over."""
    rank = len(x.shape)
    letters = [f"d{i}" for i in range(rank)]
    own = letters[rank - len(normalized) :]
    return context.combine([(x, letters), *((value, own) for value in affine if isinstance(value, Value))], letters)


def group_norm(context: Context, x: Value, num_groups: int, *affine: Any) -> Value:
    """Channels go with the whole of their group."""
    for labels in x.fields:
        if axes(labels) == (1,):
            rows = labels.flatten().view(num_groups, -1)
            if num_groups > 1 and rows.shape[1] > 1:
                context.units.blocks.append(Block(rows, rows=0, where=context.where))
    return batch_norm(context, x, *affine)


def along(context: Context, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Return a value of the same labels (softmax: what is left is normalised over what is left)."""
    return Value(context.shapes[0], x.fields, uniform=x.uniform, parents=[x])


def ordered(context: Context, x: Value, *args: Any, dim: int = -1, **kwargs: Any) -> Any:
    """Sorting and sums along a dimension: all of it must stay."""
    dims = [arg for arg in args[:1] if isinstance(arg, int)]
    value = context.stay(x, [dims[0] if dims else dim], "the order along a dimension counts")
    results = [Value(shape, value.fields) for shape in context.shapes]
    return results[0] if len(results) == 1 else results


def glu(context: Context, x: Value, dim: int = -1) -> Value:
    """Gate one half of a dimension with the other."""
    dim %= len(x.shape)
    half = x.shape[dim] // 2
    parts = []
    for start in (0, half):
        fields = [labels.narrow(dim, start, half) if labels.shape[dim] > 1 else labels for labels in x.fields]
        shape = (*x.shape[:dim], half, *x.shape[dim + 1 :])
        parts.append(Value(shape, fields))
    return pointwise(context, *parts)


# Those that torch does not mark as point-wise.
_POINTWISE = """
    hardswish.default hardsigmoid.default hardtanh.default relu6.default mish.default leaky_relu.default elu.default
    celu.default selu.default softplus.default gelu.default silu.default log_sigmoid.default threshold.default
    hardshrink.default softshrink.default where.self where.ScalarSelf where.ScalarOther where.Scalar lerp.Scalar
    lerp.Tensor addcmul.default addcdiv.default masked_fill.Scalar masked_fill.Tensor float_power.Tensor_Scalar
    clamp.default clamp.Tensor clamp_min.default clamp_max.default
"""

_SAME = """
    dropout.default dropout_.default feature_dropout.default alpha_dropout.default contiguous.default clone.default
    to.dtype to.device to.dtype_layout to.other _to_copy.default type_as.default detach.default detach_.default
    lift_fresh_copy.default alias.default rrelu.default
"""

RULES: dict[Any, Rule] = {
    aten.batch_norm.default: lambda context, x, w, b, mean, var, *rest: batch_norm(context, x, w, b, mean, var),
    aten.instance_norm.default: lambda context, x, w, b, mean, var, *rest: instance_norm(context, x, w, b, mean, var),
    aten.layer_norm.default: lambda context, x, shape, w=None, b=None, *rest: layer_norm(context, x, shape, w, b),
    aten.rms_norm.default: lambda context, x, shape, w=None, *rest: layer_norm(context, x, shape, w),
    aten.group_norm.default: lambda context, x, num, w=None, b=None, *rest: group_norm(context, x, num, w, b),
    aten.softmax.int: along,
    aten._softmax.default: along,
    aten.log_softmax.int: along,
    aten.glu.default: glu,
    aten.prelu.default: lambda context, x, weight: batch_norm(context, x, *([weight] if weight.shape[0] > 1 else [])),
    aten.cumsum.default: ordered,
    aten.cumprod.default: ordered,
    aten.sort.default: ordered,
    aten.topk.default: lambda context, x, k, dim=-1, *rest: ordered(context, x, dim),
    aten.argsort.default: ordered,
    **dict.fromkeys(operators(_SAME), along),
    **dict.fromkeys(operators(_POINTWISE), pointwise),
}

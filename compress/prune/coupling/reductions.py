"""Rules of operators that sum, pool or resize: labels along what they reduce end there, positions must stay."""

from __future__ import annotations

from typing import Any

from compress.prune.coupling.context import Context, Rule, operators
from compress.prune.coupling.values import Value

__all__ = ["RULES"]


def reduced(context: Context, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Sum, mean, norm or maximum over some dimensions: what is left is reduced over what is left."""
    rank = len(x.shape)
    dims = range(rank) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    gone = {d % rank for d in dims} if rank else set()
    letters = [f"d{i}" for i in range(rank)]
    inner = Context(context.units, context.node, [tuple(s for d, s in enumerate(x.shape) if d not in gone)])
    value = inner.combine([(x, letters)], [letter for d, letter in enumerate(letters) if d not in gone])
    fields = value.fields
    if keepdim:
        for d in sorted(gone):
            fields = [labels.unsqueeze(d) for labels in fields]
    results = [Value(shape, fields) for shape in context.shapes]
    return results[0] if len(results) == 1 else results


def spatial(num: int | None = None) -> Rule:
    """Return the rule of pooling and resizing: labels along the last dimensions must stay, others pass."""

    def rule(context: Context, x: Value, *args: Any, **kwargs: Any) -> Any:
        count = len(x.shape) - 2 if num is None else num
        value = context.stay(x, range(len(x.shape) - count, len(x.shape)), "positions are pooled or resized")
        results = [Value(shape, value.fields) for shape in context.shapes]
        return results[0] if len(results) == 1 else results

    return rule


def _norm(context: Context, x: Value, order: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    return reduced(context, x, dim, keepdim)


def _variance(context: Context, x: Value, dim: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    # var.dim(x, dim, unbiased, keepdim), var.correction(x, dim, *, correction, keepdim)
    keep = args[1] if len(args) > 1 else keepdim
    return reduced(context, x, dim, keep)


_POOLS = {
    1: """avg_pool1d.default max_pool1d.default adaptive_avg_pool1d.default adaptive_max_pool1d.default
        upsample_nearest1d.vec upsample_linear1d.vec upsample_nearest1d.default upsample_linear1d.default""",
    2: """avg_pool2d.default max_pool2d.default max_pool2d_with_indices.default adaptive_avg_pool2d.default
        adaptive_max_pool2d.default upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec
        upsample_nearest2d.default upsample_bilinear2d.default upsample_bicubic2d.default grid_sampler.default
        upsample_nearest_exact2d.vec _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec""",
    3: "avg_pool3d.default max_pool3d.default adaptive_avg_pool3d.default adaptive_max_pool3d.default",
}

_REDUCTIONS = """
    mean.dim mean.default sum.dim_IntList sum.default amax.default amin.default max.dim min.dim max.default min.default
    argmax.default argmin.default prod.dim_int all.dim any.dim logsumexp.default all.default any.default
"""

RULES: dict[Any, Rule] = {
    **{op: spatial(num) for num, names in _POOLS.items() for op in operators(names)},
    **dict.fromkeys(operators(_REDUCTIONS), reduced),
    **dict.fromkeys(operators("linalg_vector_norm.default norm.ScalarOpt_dim norm.Scalar"), _norm),
    **dict.fromkeys(
        operators("var.dim var.correction std.dim std.correction var_mean.dim var_mean.correction var.default"),
        _variance,
    ),
}

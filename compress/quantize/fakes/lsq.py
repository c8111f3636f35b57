"""Steps of integers that are learned with the weights (LSQ, Esser et al. 2019, arXiv:1902.08153)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import FakeQuantizeBase

from compress.errors import RecipeError
from compress.quantize.fakes.moving import least_step
from compress.quantize.fakes.rounding import round_rows, round_to_steps
from compress.quantize.graph.factors import scaled_convolutions
from compress.quantize.graph.normalize import constant_of
from compress.surgery import Captured

__all__ = ["LearnedFakeQuantize", "fake_quantize", "learn_steps", "settle_steps"]


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    factor: float = 1.0,
) -> Tensor:
    r"""Round to integers and back, with a gradient for the size of a step.

    .. math::
        \hat x = s \, (\lfloor \operatorname{clip}(x / s, -Q_N, Q_P) \rceil), \quad
        \frac{\partial \hat x}{\partial s} = \begin{cases}
            -x / s + \lfloor x / s \rceil & -Q_N < x / s < Q_P \\
            -Q_N & x / s \le -Q_N \\
            Q_P & x / s \ge Q_P \end{cases}

    and :math:`\partial \hat x / \partial x` is 1 inside the range and 0 outside (equations 1 to 5), where
    :math:`-Q_N` and :math:`Q_P` are ``quant_min`` and ``quant_max`` less the zero point.

    Args:
        x: Any shape, float32.
        scale: The size of a step: shape (1,), or (C,) with one for each index of dimension ``axis``; positive.
        zero_point: The integer for zero, of the shape of ``scale``, int32.
        quant_min: The least integer.
        quant_max: The largest.
        axis: Dimension of the channels, ``None`` for one step for all.
        factor: What the gradient of ``scale`` is multiplied with.

    Example:
        >>> s = torch.tensor([0.5], requires_grad=True)
        >>> z = torch.tensor([0], dtype=torch.int32)
        >>> y = fake_quantize(torch.tensor([-9.0, 0.7, 9.0]), s, z, quant_min=-4, quant_max=3)
        >>> y.tolist(), round(float(torch.autograd.grad(y.sum(), s)[0]), 4)
        ([-2.0, 0.5, 1.5], -1.4)
    """
    return _Rounded.apply(x, scale, zero_point, quant_min, quant_max, axis, factor)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, axis: int | None, factor: float
    ) -> Tensor:
        # Rounded as converted networks do it, to the bit; PyTorch's own gradient for a step is another one
        # where a value lies outside by less than half a step.
        if axis is None:
            y = round_to_steps(x, scale, zero, low, high)
        else:
            y = round_rows(x, scale, zero, low, high, axis=axis)
        ctx.save_for_backward(x, y, scale, zero)
        ctx.limits = low, high, axis, factor
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, zero = ctx.saved_tensors
        low, high, axis, factor = ctx.limits
        (gradient,) = gradients
        shape = [1] * x.dim()
        if axis is not None:
            shape[axis] = -1
        step = scale.view(shape)
        least, most = low - zero.view(shape), high - zero.view(shape)
        place = x / step
        inside = (place > least) & (place < most)
        of_step = torch.where(inside, y / step - place, torch.maximum(torch.minimum(place, most), least))
        others = [dim for dim in range(x.dim()) if dim != axis]
        to_step = (gradient * of_step).sum(others) if others else gradient * of_step
        return gradient * inside, factor * to_step.reshape(scale.shape), None, None, None, None, None


class _Steps(torch.autograd.Function):
    """The step of a logarithm: a change of the logarithm by the gradient changes the step by the step's gradient.

    The step that is meant is that of a weight which has not been scaled yet: ``1 / norm`` of what comes out.
    """

    @staticmethod
    def forward(ctx: Any, logarithm: Tensor, start: Tensor, norm: Tensor, factor: float) -> Tensor:
        scale = start * logarithm.exp()
        ctx.save_for_backward(scale, norm)
        ctx.factor = factor
        return scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale, norm = ctx.saved_tensors
        return ctx.factor * (gradients[0] * norm) / (scale / norm), None, None, None


class LearnedFakeQuantize(FakeQuantizeBase):  # type: ignore[misc]
    r"""Fake quantization whose steps are a parameter.

    The gradient of a step is scaled by :math:`1 / \sqrt{N Q_P}`, N the values that one step serves: those of a weight's
    channel, or an activation's in one sample (section 2.2 of the paper); by :math:`1 / Q_P^2` where that is less. The
    paper's factor is meant for few bits and for steps that start at :math:`2 \langle |x| \rangle / \sqrt{Q_P}`. Ours
    start at the range over :math:`Q_P`, far smaller in 8 bits, and would be thrown beyond all measure by SGD and take
    the whole of a norm at which gradients are clipped. By the other factor the range, :math:`s Q_P`, moves as a weight
    with its gradient would.

    The parameter is the logarithm of what the step has become, relative to where it started. SGD moves steps by it as
    the paper says, to first order: the gradient is divided by the step, not multiplied. Adam, whose updates are of the
    size of the learning rate whatever the gradient, moves a step by that fraction of itself; on the step itself, an
    update would be as large as an int8 step is. Weight decay draws steps to where they started.

    Where a norm's factor scales the weight before it is rounded, the step grows and shrinks with it, from
    ``follow_norm`` on: it is a step of the weight as it stands, as in the paper. Else a factor that moves on, as that
    of a residual block which begins as nothing, or of statistics not settled yet, would leave the weight to a few
    integers, or clip it.

    Args:
        given: PT2E's module, which has seen data or not yet.
        shape: Of what is quantised, ``x[0]`` of an activation.
        device: Where the parameter lives.
    """

    start: Tensor
    zero_point: Tensor
    norm: Tensor | None

    def __init__(self, given: Any, shape: torch.Size, device: torch.device) -> None:
        nn.Module.__init__(self)  # the base class would make switches on the device, to be waited for at every call
        self.fake_quant_enabled, self.observer_enabled = [1], [0]
        observer = given.activation_post_process
        self.quant_min, self.quant_max = self.started = int(observer.quant_min), int(observer.quant_max)
        self.dtype, self.qscheme, self.ch_axis = given.dtype, given.qscheme, given.ch_axis
        self.is_per_channel, self.is_dynamic = given.is_per_channel, False
        num = shape[self.ch_axis] if self.is_per_channel else 1
        self.num_values = shape.numel() // num
        seen = given.scale.numel() == num
        start = given.scale.detach().float() if seen else torch.ones(num)
        zero = given.zero_point.detach() if seen else torch.zeros(num)
        if self._is_symmetric:  # PyTorch's kernel puts it at an end where it has seen zeros alone
            zero = torch.full_like(zero, (self.quant_min + self.quant_max + 1) // 2)
        self.register_buffer("start", start.clone().to(device))
        self.register_buffer("norm", None)
        self.settled: Tensor | None = None
        self.register_buffer("zero_point", zero.clone().to(device, torch.int32))
        self.log_scale = nn.Parameter(torch.zeros(num, device=device))

    @property
    def scale(self) -> Tensor:
        """The steps, shape (C,), or (1,) where there is one for all; by the factors they started at, until settled."""
        return self.steps(self.settled)

    def steps(self, factors: Tensor | None = None) -> Tensor:
        """Return the steps of a weight that has been scaled by a norm's factors, shape (C,)."""
        norm = torch.ones_like(self.start) if self.norm is None else self.norm
        scale: Tensor = _Steps.apply(self.log_scale, self.start / self._finer, norm, self.factor)
        if factors is None:
            return scale
        scale = scale * (factors.abs() / norm)
        return torch.maximum(scale, least_step(scale))

    def follow_norm(self, factors: Tensor, seen: Tensor, largest: Tensor) -> None:
        """Let steps go with a norm's factors from here on.

        Args:
            factors: As they are, one in place of zero, shape (C,).
            seen: Where they are not zero, so that the weight has had a range, shape (C,).
            largest: The largest magnitude in each channel of the weight before it is scaled, shape (C,).
        """
        self.norm = factors.abs().to(self.start)
        asked = largest.to(self.start) / self.quant_max * self.norm
        # Small factors have come to the least step there is, which would grow with them.
        fits = seen.to(asked.device) & (self.start < 2 * asked)
        self.start = torch.where(fits | (asked == 0), self.start, asked)

    @property
    def zero(self) -> Tensor:
        """The integer for zero, of the shape of ``scale``, int32."""
        return (self.zero_point * self._finer).round().to(torch.int32)

    @property
    def _finer(self) -> float:
        """How many steps one of those that it started with has become."""
        low, high = self.started
        return (self.quant_max - self.quant_min) / (high - low)

    @property
    def factor(self) -> float:
        """What the gradient of a step is multiplied with."""
        levels = self.quant_max - self.quant_min
        most = levels // 2 if self._is_symmetric else levels
        return min((self.num_values * most) ** -0.5, most**-2.0)

    @property
    def _is_symmetric(self) -> bool:
        return self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point."""
        return self.scale.detach(), self.zero.long()

    def forward(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        """Round, unless switched off; factors are those that a norm has scaled a weight with."""
        if not self.fake_quant_enabled[0]:
            return x
        axis = self.ch_axis if self.is_per_channel else None
        limits: Any = {"quant_min": self.quant_min, "quant_max": self.quant_max, "axis": axis}
        return fake_quantize(x.float(), self.steps(factors), self.zero, **limits)


def learn_steps(prepared: Captured) -> Captured:
    """Make the steps of a prepared network parameters, in place; they start at what ``calibrate`` found.

    Args:
        prepared: From ``prepare``; not calibrated, where its steps are about to be loaded.

    Returns:
        The same network.

    Raises:
        RecipeError: when the scheme has other than integers with steps of their own, known before they are used.
    """
    graph_module: GraphModule = prepared.graph_module
    device = next(graph_module.parameters()).device
    learned: dict[int, LearnedFakeQuantize] = {}
    for node in graph_module.graph.nodes:
        given: Any = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if hasattr(given, "fake_quant_enabled") and not isinstance(given, LearnedFakeQuantize):
            if hasattr(given, "convert") or given.is_dynamic:
                raise RecipeError(
                    "quantize.learn_steps: expected integers with one step for a tensor or a channel, got "
                    f"{type(given).__name__}. Leave learn_steps out with dynamic schemes, groups and floats."
                )
            shape = node.args[0].meta["val"].shape
            if id(given) not in learned:  # one module may stand under several names
                learned[id(given)] = LearnedFakeQuantize(given, shape if given.is_per_channel else shape[1:], device)
            graph_module.set_submodule(str(node.target), learned[id(given)])
    _follow_factors(graph_module)
    prepared.forget_taps()
    return prepared


def settle_steps(graph_module: GraphModule) -> None:
    """Let steps be those of the factors that norms have now, in place, before norms are folded away."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and len(node.args) == 2:
            module: Any = graph_module.get_submodule(str(node.target))
            if isinstance(module, LearnedFakeQuantize):
                module.settled = constant_of(graph_module, node.args[1])
                node.args = node.args[:1]
    graph_module.recompile()


def _follow_factors(graph_module: GraphModule) -> None:
    """Give the fake quantizers of weights that norms scale the factors, too."""
    for convolution, rows, _ in scaled_convolutions(graph_module):
        fake = convolution.args[1]
        module: Any = graph_module.get_submodule(str(fake.target)) if fake.op == "call_module" else None
        if not (isinstance(module, LearnedFakeQuantize) and module.is_per_channel) or len(fake.args) == 2:
            continue
        given = rows.args[0], rows.args[0].args[0], fake.args[0].args[0]
        factors, seen, weight = (constant_of(graph_module, node) for node in given)
        if factors.numel() != module.start.numel():
            continue
        if module.norm is None:  # it may serve at several places
            module.follow_norm(factors, seen, weight.abs().movedim(module.ch_axis, 0).flatten(1).amax(1))
        fake.args = (fake.args[0], rows.args[0])
    graph_module.recompile()

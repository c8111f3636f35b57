"""Fake quantization by PyTorch's fused kernel, over ranges that move with the values: what int8 is trained with."""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization.pt2e import FusedMovingAvgObsFakeQuantize

from compress.quantize.fakes.fake import scale_of
from compress.quantize.fakes.finite import keep_finite
from compress.quantize.fakes.rounding import round_rows, round_to_steps

__all__ = ["MovingFakeQuantize", "least_step"]

_LEAST_STEP = 6.2e-5  # PyTorch's fused kernel makes none below 6.1e-5 on a CPU
_LEAST_OF_LARGEST = 2.0**-12


def least_step(steps: Tensor) -> Tensor:
    """Return the least step that a row of weights may have, shape (), by those of all rows.

    Engines count biases in it, in 32 bits.

    Args:
        steps: Shape (C,).

    Example:
        >>> least_step(torch.tensor([0.0, 0.125])), least_step(torch.tensor([0.0, 64.0]))
        (tensor(3.0518e-05), tensor(6.2000e-05))
    """
    return (steps.detach().amax() * _LEAST_OF_LARGEST).clamp(max=_LEAST_STEP)


class MovingFakeQuantize(FusedMovingAvgObsFakeQuantize):  # type: ignore[misc]
    """PT2E's fake quantization over a range that moves with the values, quicker on a CPU and by steps of any size.

    PyTorch's fused kernel finds the range and the steps. On a CPU it makes no steps below 6.1e-5, of which small
    weights would get a few; then they are found here. A row of weights far below the others of its layer keeps wider
    steps, since engines count biases in them, in 32 bits.

    Values that are not finite move no range. NaN stays NaN, so that a step is left out where a scaler watches gradients
    and a run that has diverged is seen to have.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return values as they come back from integers, same shape."""
        if not x.numel():
            return super().forward(x)  # type: ignore[no-any-return]
        if x.device.type != "cpu":
            return self._kernel(x)
        if torch.compiler.is_compiling():
            rounded = self._kernel(x)
            return self._round(x) if self._narrow() else rounded
        seen = x.detach()
        if self.is_per_channel or not self.fake_quant_enabled:
            if not _is_finite(torch.stack(torch.aminmax(seen))):
                return x
            rounded = self._fused(x)
            return self._round(x) if self._narrow() else rounded
        extremes = torch.stack(torch.aminmax(seen)) if self.observer_enabled else seen.new_zeros(1)
        if not _is_finite(extremes):
            observer = self.activation_post_process
            extremes = torch.stack([observer.min_val, observer.max_val])  # an average stays where it meets itself
            if not _is_finite(extremes):
                return x
        super().forward(extremes)
        self._narrow()
        return self._round(x)

    @torch.no_grad()
    def follow(self) -> bool:
        """Set the scale by the range, as the next pass in evaluation would, and say whether one is known."""
        high = self.activation_post_process.max_val
        if not (high.numel() and _is_finite(high)):
            return False
        observes = self.observer_enabled.clone()
        self.observer_enabled[0] = 0
        self(high.new_zeros([*[1] * self.ch_axis, len(high), 1] if self.is_per_channel else [1]))
        self.observer_enabled.copy_(observes)
        return True

    def _kernel(self, x: Tensor) -> Tensor:
        """Leave all to the fused kernel, but for NaN, of which it makes an integer where ranges stand still."""
        observer = self.activation_post_process
        buffers = observer.min_val, observer.max_val, self.scale, self.zero_point
        before = [buffer.clone() for buffer in buffers]
        rounded = self._fused(x)
        keep_finite(buffers, before)
        return torch.where(x.isnan(), x, rounded)

    def _fused(self, x: Tensor) -> Tensor:
        """Call PyTorch's kernel, which finds ranges of channels in the first dimension alone."""
        if not self.is_per_channel or self.ch_axis == 0:
            return super().forward(x)  # type: ignore[no-any-return]
        axis, observer = self.ch_axis, self.activation_post_process
        rounded: Tensor = torch.fused_moving_avg_obs_fake_quant(
            x.movedim(axis, 0).contiguous(),
            self.observer_enabled,
            self.fake_quant_enabled,
            observer.min_val,
            observer.max_val,
            self.scale,
            self.zero_point,
            observer.averaging_constant,
            self.quant_min,
            self.quant_max,
            0,
            True,
            self.is_symmetric_quant,
        )
        return rounded.movedim(0, axis)

    def _narrow(self) -> bool:
        """Make steps as small as the range asks, where the kernel has made larger ones; say whether it had."""
        if not self.fake_quant_enabled or not (self.scale < _LEAST_STEP).any():
            return False
        low, high = self.activation_post_process.min_val, self.activation_post_process.max_val
        symmetric = self.is_symmetric_quant
        scale, zero_point = scale_of(low, high, self.quant_min, self.quant_max, symmetric=symmetric)
        self.scale.copy_(torch.maximum(scale, least_step(scale)))
        self.zero_point.copy_(zero_point)
        return True

    def _round(self, x: Tensor) -> Tensor:
        limits = self.quant_min, self.quant_max
        if self.is_per_channel:
            return round_rows(x, self.scale, self.zero_point, *limits, axis=self.ch_axis)
        return round_to_steps(x, self.scale, self.zero_point, *limits)


def _is_finite(extremes: Tensor) -> bool:
    return bool(torch.isfinite(extremes).all())

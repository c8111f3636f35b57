"""What makes post-training quantization better, by name: some before a network is captured, some after calibration."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from compress.errors import DataError, RecipeError
from compress.quantize.corrections.adaround import adaround
from compress.quantize.corrections.bias import correct_biases
from compress.quantize.corrections.equalize import equalize
from compress.quantize.corrections.lockstep import float_twin
from compress.quantize.corrections.smooth import smooth, smoothable
from compress.surgery import Captured, capture
from compress.surgery.lengths import Length

__all__ = ["IMPROVEMENTS", "improve_network", "improve_prepared", "in_order", "rehearse_improvements"]

# In the order in which they work.
IMPROVEMENTS = ("equalize", "smooth", "adaround", "bias")

Batches = Sequence[Sequence[Tensor]]


def in_order(names: Sequence[str]) -> tuple[str, ...]:
    """Return improvements in the order in which they work, each once.

    Raises:
        RecipeError: when there is none of a name.

    Example:
        >>> in_order(["bias", "equalize"])
        ('equalize', 'bias')
    """
    for name in [names] if isinstance(names, str) else names:
        if name not in IMPROVEMENTS or isinstance(names, str):
            raise RecipeError(
                f"quantize.improve: expected some of {', '.join(IMPROVEMENTS)}, got {name!r}. Choose from these."
            )
    return tuple(name for name in IMPROVEMENTS if name in names)


def improve_network(
    network: nn.Module, batches: Batches, names: Sequence[str], *, lengths: Sequence[Length] = ()
) -> dict[str, int]:
    """Make a float network easier to quantise, its function unchanged (``equalize``, ``smooth``).

    Args:
        network: Its parameters change in place.
        batches: Its inputs, a tuple of tensors each.
        names: Of ``IMPROVEMENTS``; those that work after calibration are left to ``improve_prepared``.
        lengths: Sizes beyond the batch that vary.

    Returns:
        At how many places each has worked.

    Raises:
        RecipeError: when there is none of a name.
        CaptureError: when the network cannot be captured.
        DataError: when there is no data, or an activation is not finite.
    """
    names = [name for name in in_order(names) if name in ("equalize", "smooth")]
    if not names:
        return {}
    batches = list(batches)  # they pass several times, and a loader may draw another order each time
    if not batches:
        raise DataError("quantize.improve: expected at least one batch, got none. Give the training data's loader.")
    captured = capture(network, _two_samples(batches[0]), lengths=lengths)
    return {name: equalize(captured) if name == "equalize" else smooth(captured, batches) for name in names}


def improve_prepared(
    prepared: Captured, batches: Batches, names: Sequence[str], *, progress: bool = False
) -> dict[str, int]:
    """Bring a calibrated network's layers nearer to what they give in floating point (``adaround``, ``bias``).

    Args:
        prepared: From ``prepare`` and ``calibrate``; its parameters change in place.
        batches: Its inputs, a tuple of tensors each.
        names: Of ``IMPROVEMENTS``; those that work before are left to ``improve_network``.
        progress: Whether to show progress bars.

    Returns:
        How many layers each has changed.

    Raises:
        RecipeError: when there is none of a name.
        DataError: when there is no data.
    """
    works = {"adaround": adaround, "bias": correct_biases}
    names = [name for name in in_order(names) if name in works]
    if not names:
        return {}
    batches = list(batches)
    reference = float_twin(prepared)  # with the weights as they were trained, whatever comes first
    return {name: works[name](prepared, batches, reference=reference, progress=progress) for name in names}


def rehearse_improvements(
    network: nn.Module, inputs: Sequence[Tensor], names: Sequence[str], *, lengths: Sequence[Length] = ()
) -> None:
    """Find out whether a network has what improvements work on.

    Args:
        network: Parameters may change in place: give a copy.
        inputs: Example inputs.
        names: Of ``IMPROVEMENTS``.
        lengths: Sizes beyond the batch that vary.

    Raises:
        RecipeError: when one of them would change nothing.
        CaptureError: when the network cannot be captured.
    """
    if not {"equalize", "smooth"} & set(names):
        return
    captured = capture(network, _two_samples(inputs), lengths=lengths)
    if "equalize" in names and not equalize(captured):
        raise RecipeError(
            "quantize.improve: expected layers in a row with ReLU between for 'equalize', got none. Leave it out."
        )
    if "smooth" in names and not smoothable(captured.graph_module):
        raise RecipeError(
            "quantize.improve: expected norms whose outputs linears alone read for 'smooth', got none. Leave it out."
        )


def _two_samples(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [tensor[:2] if len(tensor) > 1 else tensor.expand(2, *tensor.shape[1:]) for tensor in inputs]

"""Inputs that do not all have the samples in dimension 0, which every capture takes for the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from compress.errors import CaptureError

__all__ = ["blaming_samples", "check_samples"]


def check_samples(inputs: Sequence[Tensor]) -> None:
    """Make sure that inputs have as many samples each.

    Args:
        inputs: Shapes (N, ...).

    Raises:
        CaptureError: when they do not.
    """
    if len({tensor.shape[:1] for tensor in inputs}) > 1:
        raise CaptureError(_message(inputs))


@contextmanager
def blaming_samples(inputs: Sequence[Tensor]) -> Iterator[None]:
    """Name unequal numbers of samples where a capture with parts of these inputs fails within the context.

    Not before: of a prototype for each class, say, two rows are an example as good as any, and no batch is missed.

    Args:
        inputs: Of which two samples each are examples.

    Raises:
        CaptureError: in place of another, when the numbers differ.
    """
    try:
        yield
    except CaptureError as error:
        if len({tensor.shape[:1] for tensor in inputs}) > 1:
            raise CaptureError(f"{_message(inputs)} ({error})") from error
        raise


def _message(inputs: Sequence[Tensor]) -> str:
    shapes = " and ".join(str(tuple(tensor.shape)) for tensor in inputs)
    return (
        "inputs: expected the samples in dimension 0 of each, which is taken for the batch, got shapes "
        f"{shapes}. Repeat for each sample what all have in common, or keep it in the network as a buffer."
    )

"""Outputs written where the caller wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import ArtifactError
from compress.runtime.manifest import Manifest
from compress.runtime.outputs import call, kind_of
from compress.runtime.sizes import described

if TYPE_CHECKING:
    from compress.runtime.engines import Engine

__all__ = ["check_buffers", "fill", "may_overlap"]


def check_buffers(out: Any, manifest: Manifest, kind: str, num: int) -> list[Any]:
    """Return buffers in the order of the outputs, without gradients, once each takes its output of a batch.

    Args:
        out: Array or tensor; of an artefact whose outputs come in a tuple or dict, one of them for each, in a tuple,
            list or mapping.
        manifest: Of the artefact.
        kind: What the inputs are, ``"numpy"`` or ``"torch"``.
        num: Samples in the batch.

    Raises:
        ArtifactError: when number, names, kind, shape or dtype is not the outputs', one cannot be written, or two lie
            in the same memory.
    """
    buffers = [out] if manifest.structure is None else _in_order(out, manifest)
    for place, buffer in enumerate(buffers):
        _check(buffer, manifest, place, kind, num)
    for first, second in combinations(range(len(buffers)), 2):
        if _shared(buffers[first], buffers[second]):
            raise ArtifactError(
                f"{_where(manifest, second)}: expected memory of its own, got some of {_where(manifest, first)}. Make "
                "one for each output."
            )
    return [buffer if isinstance(buffer, np.ndarray) else buffer.detach() for buffer in buffers]


def may_overlap(inputs: Sequence[Any], buffers: Sequence[Any]) -> bool:
    """Say whether writing to a buffer might change an input.

    Args:
        inputs: Arrays or tensors.
        buffers: Of their kind.
    """
    return any(_overlap(x, out) for x, out in product(inputs, buffers))


def fill(engine: Engine, inputs: Sequence[Any], buffers: Sequence[Any], manifest: Manifest) -> None:
    """Run a batch into buffers: the engine writes there where it can, else its outputs are copied.

    Args:
        engine: What runs it.
        inputs: Arrays or tensors, one of the artefact's inputs each.
        buffers: Arrays or tensors of the inputs' kind that ``check_buffers`` has seen, on other memory.
        manifest: Of the artefact.

    Raises:
        ArtifactError: when a size of a buffer that varies is not the output's.
    """
    into = getattr(engine, "into", None)
    memory = [_memory(value) for value in (*inputs, *buffers)]
    varying = [spec for spec in manifest.outputs if None in spec.shape[1:]]
    if into is not None and not varying and all(array is not None for array in memory):
        into(memory[: len(inputs)], memory[len(inputs) :])
        return
    for place, (found, buffer) in enumerate(zip(call(engine, inputs), buffers)):
        if found.shape != buffer.shape:
            raise ArtifactError(
                f"{_where(manifest, place)}: expected shape {tuple(found.shape)}, got {tuple(buffer.shape)}. Make one "
                "of that shape."
            )
        buffer[...] = found


def _in_order(out: Any, manifest: Manifest) -> list[Any]:
    names = [spec.name for spec in manifest.outputs]
    if isinstance(out, Mapping):
        if set(out) != set(names):
            raise ArtifactError(
                f"out: expected {', '.join(names)}, got {', '.join(map(str, out)) or 'none'}. Give one for each output."
            )
        return [out[name] for name in names]
    if not isinstance(out, tuple | list) or len(out) != len(names):
        got = len(out) if isinstance(out, tuple | list) else type(out).__name__
        raise ArtifactError(
            f"out: expected {len(names)} buffers ({', '.join(names)}) in a tuple, list or mapping, got {got}. "
            "Give one for each output."
        )
    return list(out)


def _check(buffer: Any, manifest: Manifest, place: int, kind: str, num: int) -> None:
    if kind_of(buffer) != kind:
        raise ArtifactError(
            f"{_where(manifest, place)}: expected what the inputs are, got {kind_of(buffer)}. Give an array for arrays."
        )
    spec = manifest.outputs[place]
    shape, dtype = tuple(buffer.shape), str(buffer.dtype).removeprefix("torch.")
    fits = len(shape) == len(spec.shape) and all(wanted in (None, size) for wanted, size in zip(spec.shape, shape))
    if not fits or shape[0] != num:
        raise ArtifactError(
            f"{_where(manifest, place)}: expected shape {described(spec)} with N = {num}, got {shape}. Make one of "
            "that shape."
        )
    if dtype != spec.dtype:
        raise ArtifactError(
            f"{_where(manifest, place)}: expected dtype {spec.dtype}, got {dtype}. Make one of that dtype."
        )
    if isinstance(buffer, np.ndarray) and not buffer.flags.writeable:
        raise ArtifactError(
            f"{_where(manifest, place)}: expected memory that can be written, got an array that is read-only. Make a "
            "new one."
        )


def _where(manifest: Manifest, place: int) -> str:
    """Return how a caller reaches a buffer, for messages."""
    if manifest.structure is None:
        return "out"
    return f"out[{manifest.outputs[place].name!r}]" if manifest.structure == "dict" else f"out[{place}]"


def _overlap(x: Any, out: Any) -> bool:
    read, written = _array(x), _array(out)
    if read is not None and written is not None:
        return np.may_share_memory(read, written)
    if read is not None or written is not None:
        return False
    return bool(x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr())


def _shared(first: Any, second: Any) -> bool:
    """Say whether two buffers have a value in common."""
    one, other = _array(first), _array(second)
    if one is not None and other is not None:
        return np.may_share_memory(one, other) and np.shares_memory(one, other)
    # Of a GPU's memory only where both begin and end is looked at.
    spans = [(value.data_ptr(), value.data_ptr() + _num_bytes(value)) for value in (first, second)]
    return bool(first.device == second.device and max(spans)[0] < min(end for _, end in spans))


def _num_bytes(value: Any) -> int:
    """Return the length of the memory from a tensor's first value to its last."""
    return int((1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride()))) * value.element_size())


def _memory(value: Any) -> np.ndarray | None:
    """Return an array on the same memory, where the host reads it in order."""
    array = _array(value)
    return array if array is not None and array.flags.c_contiguous else None


def _array(value: Any) -> np.ndarray | None:
    """Return an array on the same memory, where that is the host's."""
    if isinstance(value, np.ndarray):
        return value
    found: np.ndarray | None = value.detach().numpy() if value.device.type == "cpu" else None
    return found

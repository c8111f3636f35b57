"""Calls of a network on a GPU: batches padded to a few sizes, each of which is one CUDA graph."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from compress.runtime.engines.aliases import owned

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["BUCKETS", "OnCUDA", "bucket_of"]

BUCKETS = (1, 2, 4, 8, 16, 32)
"""Batch sizes that are captured as graphs: below, starting kernels takes longer than running them."""

_SETTINGS = Lock()  # torch's switches hold for the whole process
_MOST_GRAPHS = 32  # each keeps its inputs, outputs and what lies between; where lengths vary there is no end of them
_WARMUPS = 3  # libraries choose and allocate in the first calls, which cannot be captured


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    pinned: list[Tensor]  # of the inputs' shapes, on the host, where the GPU can read by itself
    outputs: list[Tensor]


class OnCUDA:
    """Runs batches on the current GPU.

    A batch of up to 32 samples is copied into the inputs of the graph of the smallest size that holds it, whose other
    samples are whatever was there: where samples do not see each other, nothing changes. From the host it goes there by
    way of memory that is pinned, and so do the outputs on their way back. Larger batches, and those
    whose graphs cannot be captured or would be one too many, run kernel by kernel. All calls take turns on a stream of
    their own, ordered after the caller's stream and before what the caller does next; the host waits only for outputs
    on the CPU.

    Args:
        run: From a list of tensors on the GPU, contiguous, to a list of outputs there; a row for each sample.
        fills: Whether a batch may be filled up with other samples; without, each size has a graph of its own.
        constants: Where the memory starts of what outputs may be views of, from ``storages``.
    """

    takes = "cuda"

    def __init__(
        self, run: Callable[[list[Any]], Sequence[Any]], *, fills: bool = True, constants: Collection[int] = ()
    ) -> None:
        import torch

        self._torch = torch
        self._run = run
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device)
        self._graphs: dict[tuple[tuple[int, ...], ...], _Graph] = {}
        self._fills = fills
        self._constants = constants
        self._captures = True
        self._pool: Any = None
        self._lock = Lock()

    @property
    def threads(self) -> int:
        """Threads of one call: the one that starts kernels."""
        return 1

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a batch of tensors, on the device of the first of them."""
        torch = self._torch
        with self._lock, torch.no_grad(), torch.cuda.device(self._device):
            caller = torch.cuda.current_stream()
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                outputs = self._on_stream(inputs)
                if inputs[0].device.type == "cpu":
                    outputs = [value.to("cpu", non_blocking=True) for value in outputs]
                    self._stream.synchronize()
                    return outputs
            caller.wait_stream(self._stream)
            if inputs[0].device != self._device:
                outputs = [value.to(inputs[0].device) for value in outputs]
        for value in inputs:
            if value.is_cuda:
                value.record_stream(self._stream)
        for value in outputs:
            if value.device == self._device:
                value.record_stream(caller)
        return outputs

    def _on_stream(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        num = len(inputs[0])
        bucket = bucket_of(num)
        if bucket and not self._fills:
            bucket = num
        graph = self._graph(inputs, bucket) if bucket else None
        if graph is None:
            given = [value.detach().to(self._device, non_blocking=True) for value in inputs]
            return owned(self._exactly(given), given, self._constants)
        waits = inputs[0].device.type == "cpu"  # the host, for the outputs, and with them for these copies
        for place, pinned, value in zip(graph.inputs, graph.pinned, inputs):
            source = pinned[:num].copy_(value) if waits and not value.is_cuda else value
            place[:num].copy_(source, non_blocking=waits or value.is_cuda)
        graph.graph.replay()
        # The next call writes over the graph's own.
        return [value[:num].clone() for value in graph.outputs]

    def _graph(self, inputs: Sequence[Tensor], bucket: int) -> _Graph | None:
        key = tuple((bucket, *value.shape[1:]) for value in inputs)
        if key not in self._graphs and self._captures and len(self._graphs) < _MOST_GRAPHS:
            places = [
                self._torch.zeros(shape, dtype=value.dtype, device=self._device) for shape, value in zip(key, inputs)
            ]
            for place, value in zip(places, inputs):
                place[: len(value)].copy_(value)
            try:
                self._graphs[key] = self._capture(places)
            except RuntimeError:  # something in it needs the host
                self._stop_capturing()
        return self._graphs.get(key)

    def _capture(self, places: list[Tensor]) -> _Graph:
        torch = self._torch
        for _ in range(_WARMUPS):
            self._exactly(places, search=True)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = list(self._exactly(places, search=True))
        pinned = [torch.empty(place.shape, dtype=place.dtype, pin_memory=True) for place in places]
        return _Graph(graph, places, pinned, outputs)

    def _stop_capturing(self) -> None:
        """Leave a capture that failed half-way, which torch does not do of itself, and begin no other."""
        self._captures = False
        if self._pool is not None:
            with suppress(RuntimeError):
                self._torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        self._pool = None

    def _exactly(self, inputs: list[Tensor], *, search: bool = False) -> Sequence[Tensor]:
        """Run convolutions in the precision that the program says: by default they take TF32 for float32.

        Args:
            inputs: On the GPU.
            search: Whether cuDNN may try its kernels and choose, once for each shape.
        """
        cudnn = self._torch.backends.cudnn
        flags = {"enabled": True, "benchmark": search, "deterministic": cudnn.deterministic, "allow_tf32": False}
        with _SETTINGS, cudnn.flags(**flags):
            return self._run([value.reshape(-1).view(value.shape) for value in inputs])


def bucket_of(num: int) -> int | None:
    """Return the size of the graph for a batch, or ``None`` where there is none.

    Example:
        >>> bucket_of(1), bucket_of(3), bucket_of(32), bucket_of(33)
        (1, 4, 32, None)
    """
    place = bisect_left(BUCKETS, num)
    return BUCKETS[place] if place < len(BUCKETS) else None

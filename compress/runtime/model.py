"""The small wrapper that serves an artefact."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import numpy as np

from compress.errors import ArtifactError
from compress.runtime.benchmark import measure_engines, torch_threads_kept
from compress.runtime.buffers import check_buffers, fill, may_overlap
from compress.runtime.classes import check_classes, check_scores, scores
from compress.runtime.dispatch import Times, load_each, picker
from compress.runtime.engines import Engine
from compress.runtime.inputs import check_dense, check_rows, in_order, raw_inputs
from compress.runtime.manifest import Manifest
from compress.runtime.outputs import arranger, call, join, kind_of
from compress.runtime.sizes import described, wrong_size
from compress.runtime.text import Encode

__all__ = ["CompactModel"]


_FORM = ("shape", "dtype", "layout", "device")
_MOST_FORMS = 1024  # kinds, shapes and dtypes that are known to fit: looking closely takes as long as a small network


class _NotPickledError(ArtifactError, pickle.PicklingError):
    """What ``pickle`` raises, too: Lightning leaves out hyperparameters that cannot be pickled."""


class CompactModel:
    """A compact network behind one call, whatever engine runs it.

    Made by ``compress.load``. Call it with tensors or arrays of shape (N, ...): the outputs are of the same kind, in a
    tuple or dict where the network gave them so.

    Args:
        manifest: What the artefact says of itself.
        runs: The engines that serve, loaded, by name.
        make: Loads an engine by name, with a number of threads other than its own where one follows.
        engines: Names of all engines that can run here.
        serves: Which of ``runs`` serves, by batch size; a batch is served as the nearest size by ratio.
        times: What that was chosen by.
        encode: Turns texts into inputs, where the artefact holds a tokenizer.

    Attributes:
        engine: Name of the engine that serves a single sample.
        engines_by_batch: Names of the engines that serve, by batch size, where these were measured.
        times: Median milliseconds by batch size and engine, as measured on the first load; empty where there was no
            choice.
    """

    def __init__(
        self,
        manifest: Manifest,
        runs: Mapping[str, Engine],
        make: Callable[..., Engine],
        *,
        engines: Sequence[str],
        serves: Mapping[int, str],
        times: Times | None = None,
        encode: Encode | None = None,
    ) -> None:
        self.manifest = manifest
        self.engines = tuple(engines)
        self.engines_by_batch = dict(serves)
        self.times: Times = times or {}
        self._looks_up = any(spec.num_rows is not None for spec in manifest.inputs)
        self._varies = any(spec.ranges for spec in manifest.inputs)
        self._encode = encode
        self._make = make
        self._runs = dict(runs)
        self._pick = picker(serves)
        self._arrange = arranger(manifest.structure, [spec.name for spec in manifest.outputs])
        self._checked: set[tuple[object, ...]] = set()
        self.engine = self._pick(1)

    def __call__(self, *inputs: Any, out: Any = None) -> Any:
        """Run a batch.

        Args:
            inputs: One tensor or array for each input of the manifest; any batch size. Or all of them in one tuple or
                list, or by the manifest's names in one mapping.
            out: Array or tensor, as the inputs, of the output's shape and dtype, that is written to and returned:
                ``onnxruntime`` and ``openvino`` compute into it, the output of others is copied. Of large outputs,
                memory that is used again saves what it takes to get new one. Of a tuple or dict of outputs, one for
                each, in a tuple, list or mapping.

        Returns:
            The output, shape (N, ...): a tensor for tensors, on their device; an array for arrays. Where the network
            gives several, a tuple of such, or a dict by the manifest's names, as ``manifest.structure`` says.

        Raises:
            ArtifactError: when number, names, shape or dtype of inputs or buffer is not what the manifest says, or a
                token is beyond the network's vocabulary.
        """
        if len(inputs) == 1 and isinstance(inputs[0], Mapping | tuple | list):
            inputs = in_order(inputs[0], self.manifest)
        self._check(inputs)
        if self._looks_up:
            check_rows(inputs, self.manifest.inputs)
        num, largest = len(inputs[0]), self.manifest.max_batch or len(inputs[0])
        if out is not None:
            return self._into(inputs, out, num, largest)
        if num <= largest:
            return self._arrange(self._serve(inputs, num))
        parts = [[value[i : i + largest] for value in inputs] for i in range(0, num, largest)]
        return self._arrange(join([self._serve(part, len(part[0])) for part in parts]))

    def predict(self, raw: Any) -> tuple[list[str] | list[int], np.ndarray]:
        """Predict labels for raw values, with the manifest's preprocessing, by the largest output of each sample.

        Of several outputs, the one called ``logits`` counts, else the first.

        Args:
            raw: Array of shape (N, H, W), (N, C, H, W) or whatever the input has, values as they are stored; a list of
                texts, where the artefact holds a tokenizer; or an array for each input, by the manifest's names.

        Returns:
            Labels (class numbers where the manifest has none), and probabilities of shape (N, classes).

        Raises:
            ArtifactError: when that output is not of shape (N, classes), the shape of the values does not fit, values
                or what the network makes of them are not finite, or the artefact holds no tokenizer for texts.
            MissingPackageError: when texts are given and ``tokenizers`` is not installed.
        """
        check_classes(self.manifest)
        outputs = self(*raw_inputs(raw, self.manifest, self._encode))
        logits = np.asarray(scores(outputs, self.manifest), dtype=np.float64)
        check_scores(logits, self.manifest)
        exponents = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = exponents / exponents.sum(-1, keepdims=True)
        best = probabilities.argmax(-1)
        names = self.manifest.labels
        return [names[i] for i in best] if names else [int(i) for i in best], probabilities

    def benchmark(
        self,
        batch_sizes: Sequence[int] = (1, 32),
        *,
        threads: Sequence[int] | None = None,
        seconds: float = 1.0,
        progress: bool = False,
        beside: Mapping[str, Callable[[], Engine]] | None = None,
    ) -> list[dict[str, Any]]:
        """Measure all engines that can run here, interleaved.

        Args:
            batch_sizes: Batch sizes.
            threads: Numbers of threads, measured one after the other, with engines loaded anew; without, that which
                each engine has. Some libraries have one number for the whole process: nothing else should run.
            seconds: Time for each engine at each batch size and number of threads.
            progress: Whether to show a progress bar.
            beside: What makes further ones, by name, that the artefact does not have: something to compare with.

        Returns:
            Rows with ``batch, engine, threads, p50_ms, p95_ms, samples_per_second``, which is by the median, and
            ``reason``: of an engine that does not run such a batch, or not with so many threads, there is that alone.

        Raises:
            ArtifactError: when a number is not positive, or a batch larger than the artefact takes at once.
        """
        before = {name: run.threads for name, run in self._runs.items()}

        def engines(num: int | None, reasons: dict[str, str]) -> dict[str, Engine]:
            if num is None:
                found = {name: self._runs.get(name) or self._make(name) for name in self.engines}
            else:
                found = load_each(self.engines, lambda name: self._make(name, num), reasons)
            return {**found, **{name: make() for name, make in (beside or {}).items()}}

        with torch_threads_kept() if threads else nullcontext():
            rows = measure_engines(
                engines,
                self.manifest,
                batch_sizes=batch_sizes,
                threads=threads or [None],
                seconds=seconds,
                progress=progress,
            )
        for name, num in before.items() if threads else ():
            self._make(name, num)  # gives the process the threads that those which serve were loaded with
        return rows

    def engine_for(self, batch: int) -> str:
        """Return the name of the engine that serves a batch of so many samples."""
        largest = self.manifest.max_batch
        return self._pick(batch if largest is None else min(batch, largest))

    @property
    def threads(self) -> int:
        """Threads of one call, with a single sample."""
        return self._runs[self.engine].threads

    def __reduce__(self) -> NoReturn:
        raise _NotPickledError(
            f"{self.manifest.name}: expected a model that stays in its process, got one to copy or to pickle. Load the "
            "artefact in each process."
        )

    def __repr__(self) -> str:
        several = f", engines_by_batch={self.engines_by_batch}" if len(self._runs) > 1 else ""
        scheme = self.manifest.scheme
        return f"CompactModel({self.manifest.name!r}, engine={self.engine!r}, scheme={scheme!r}{several})"

    def _serve(self, inputs: Sequence[Any], num: int) -> list[Any]:
        return call(self._runs[self._pick(num)], inputs)

    def _into(self, inputs: Sequence[Any], out: Any, num: int, largest: int) -> Any:
        buffers = check_buffers(out, self.manifest, kind_of(inputs[0]), num)
        if may_overlap(inputs, buffers):  # else an engine that writes there as it computes would read what it wrote
            inputs = [value.copy() if isinstance(value, np.ndarray) else value.clone() for value in inputs]
        if num <= largest:
            fill(self._runs[self._pick(num)], inputs, buffers, self.manifest)
            return out
        for i in range(0, num, largest):
            part = [value[i : i + largest] for value in inputs]
            places = [buffer[i : i + largest] for buffer in buffers]
            fill(self._runs[self._pick(len(part[0]))], part, places, self.manifest)
        return out

    def _check(self, inputs: Sequence[Any]) -> None:
        form = tuple([(type(value), *[getattr(value, key, None) for key in _FORM]) for value in inputs])
        if form in self._checked:
            return
        self._check_each(inputs)
        if len(self._checked) < _MOST_FORMS:
            self._checked.add(form)

    def _check_each(self, inputs: Sequence[Any]) -> None:
        specs = self.manifest.inputs
        if len(inputs) != len(specs):
            names = ", ".join(spec.name for spec in specs)
            raise ArtifactError(f"inputs: expected {len(specs)} ({names}), got {len(inputs)}. Give one for each.")
        kinds = {kind_of(value) for value in inputs}
        if kinds not in ({"numpy"}, {"torch"}):
            raise ArtifactError(f"inputs: expected arrays or tensors, got {', '.join(sorted(kinds))}. Convert them.")
        if "torch" in kinds:
            check_dense(inputs, specs)
        if len({len(value) if value.ndim else 0 for value in inputs}) > 1:
            raise ArtifactError("inputs: expected the same batch size for all, got several. Cut or repeat them.")
        for spec, value in zip(specs, inputs):
            shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
            fits = len(shape) == len(spec.shape) and all(w in (None, s) for w, s in zip(spec.shape, shape))
            if not fits or shape[:1] == (0,):
                raise ArtifactError(f"{spec.name}: expected shape {described(spec)}, got {shape}. Reshape the input.")
            if dtype != spec.dtype:
                raise ArtifactError(f"{spec.name}: expected dtype {spec.dtype}, got {dtype}. Convert the input.")
        reason = wrong_size(specs, [value.shape for value in inputs]) if self._varies else None
        if reason:
            raise ArtifactError(reason)

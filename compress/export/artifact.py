"""Build an artefact's files, check them against the trained module, and only then put the artefact in its place."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.export import ExportedProgram

from compress.errors import ExportError
from compress.export.gates import Gates, failures
from compress.export.targets import TARGETS, ExportSkippedError
from compress.measure.agreement import agreement
from compress.measure.machine import versions
from compress.runtime.engines import make_engine
from compress.runtime.manifest import Manifest, Target, TensorSpec, read_manifest, sha256

__all__ = ["export_artifact"]

_BATCH = 63  # divides no usual N: the last batch is smaller, so a fixed batch size cannot go unnoticed


def export_artifact(
    program: ExportedProgram,
    directory: str | Path,
    *,
    targets: Sequence[str],
    reference: Callable[..., Tensor],
    held_out: Sequence[Tensor],
    scheme: str | None = None,
    gates: Gates | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Manifest:
    """Export a network for several engines.

    Args:
        program: The network in the form that is deployed, captured with a dynamic batch dimension.
        directory: The artefact, which must not exist; it appears when everything has passed.
        targets: Names among ``TARGETS``.
        reference: The trained module in eval mode, whose outputs are what must come out.
        held_out: Inputs that were not trained on, shape (N, ...) each.
        scheme: The quantization scheme, when the program is quantised.
        gates: What each target must pass.
        metadata: ``name, task, labels, preprocessing, metrics, history`` for the manifest.
        progress: Whether to show a progress bar.

    Returns:
        The manifest as written.

    Raises:
        ExportError: when a target fails a gate, or none can be built; nothing is left behind.
    """
    directory, gates = Path(directory), gates or Gates()
    if directory.exists():
        raise ExportError(f"{directory}: expected no artefact yet, got one. Choose another directory or move it away.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        with torch.no_grad():
            wanted = _batched(lambda batch: [reference(*batch)], held_out)
        built, skipped = _build_all(program, temporary, targets, wanted, held_out, scheme, gates, progress)
        manifest = Manifest(
            **{"name": directory.name, "task": "unknown", **(metadata or {})},
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            inputs=_specs(_input_names(program), held_out),
            outputs=_specs(_output_names(program), [torch.from_numpy(wanted)]),
            targets=built,
            scheme=scheme,
            versions=versions(),
            skipped=skipped,
        )
        (temporary / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1))
        temporary.chmod(0o755)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read_manifest(directory)


def _build_all(
    program: ExportedProgram,
    folder: Path,
    targets: Sequence[str],
    wanted: np.ndarray,
    held_out: Sequence[Tensor],
    scheme: str | None,
    gates: Gates,
    progress: bool,
) -> tuple[dict[str, Target], dict[str, str]]:
    built: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    failed: list[str] = []
    bar = Progress(transient=True) if progress else nullcontext()
    with bar:
        task = bar.add_task("", total=len(targets)) if isinstance(bar, Progress) else None
        for engine in targets:
            if isinstance(bar, Progress) and task is not None:
                bar.update(task, description=f"building and checking {engine}")
            target = import_module(TARGETS[engine])
            path = folder / target.FILE
            try:
                target.build(program, path)
            except ExportSkippedError as reason:
                skipped[engine] = str(reason)
                warnings.warn(f"{reason} Going on with the other targets.", stacklevel=4)
            else:
                census = target.census(path)
                runner = make_engine(engine, path)
                inputs = held_out if runner.takes == "torch" else [tensor.numpy() for tensor in held_out]
                agrees = agreement(wanted, _batched(runner, inputs))
                failed += failures(engine, gates, census, agrees, quantized=scheme is not None)
                built[engine] = Target(
                    file=target.FILE,
                    bytes=path.stat().st_size,
                    sha256=sha256(path),
                    census=asdict(census) if census else {},
                    agreement=asdict(agrees),
                    requires=target.requires(),
                )
            if isinstance(bar, Progress) and task is not None:
                bar.advance(task)
    if failed:
        raise ExportError(
            "\n".join([*failed, "Nothing was written. Train longer, loosen the gate, or leave the target out of export.targets."])
        )
    if not built:
        raise ExportError(f"export: expected at least one target, got none: {'; '.join(skipped.values())}")
    return built, skipped


def _batched(run: Callable[[list[Any]], Sequence[Any]], inputs: Sequence[Any]) -> np.ndarray:
    num = len(inputs[0])
    parts = [np.asarray(run([x[i : i + _BATCH] for x in inputs])[0]) for i in range(0, num, _BATCH)]
    return np.concatenate(parts)


def _input_names(program: ExportedProgram) -> list[str]:
    return list(program.graph_signature.user_inputs)  # type: ignore[arg-type]


def _output_names(program: ExportedProgram) -> list[str]:
    return [f"output_{index}" for index in range(len(program.graph_signature.user_outputs))]


def _specs(names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name, str(tensor.dtype).removeprefix("torch."), (None, *tensor.shape[1:]))
        for name, tensor in zip(names, tensors)
    )

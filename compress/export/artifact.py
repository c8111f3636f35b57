"""Build an artefact's files, check them against the trained module, and only then put the artefact in its place."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from compress.errors import ArtifactError, ExportError, MissingPackageError
from compress.export.building import Job, announced, build_target
from compress.export.gates import Gates, few_integers
from compress.export.graph import input_specs, largest_batch
from compress.export.options import Options, option_mistakes
from compress.export.outputs import flattened, in_form, output_form
from compress.export.parity import check_inputs, compare, other_sizes, reference_outputs
from compress.export.passes import clean_up
from compress.export.products import products
from compress.export.targets import IN_INTEGERS, TARGETS, Census, ExportSkippedError
from compress.measure.machine import versions
from compress.runtime.manifest import (
    Manifest,
    Target,
    TensorSpec,
    check_text,
    manifest_text,
    preprocesses_text,
    read_manifest,
    sha256,
)
from compress.runtime.text import make_encoder
from compress.runtime.trust import sign
from compress.runtime.values import check_labels, check_scaling
from compress.surgery.lengths import lengths_of

__all__ = ["export_artifact"]


def export_artifact(
    program: ExportedProgram,
    directory: str | Path,
    *,
    targets: Sequence[str],
    reference: Callable[..., Any],
    held_out: Sequence[Tensor],
    scheme: str | None = None,
    gates: Gates | None = None,
    metadata: Mapping[str, Any] | None = None,
    options: Options | None = None,
    files: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Manifest:
    """Export a network for several engines.

    Args:
        program: The network in the form that is deployed, captured with a dynamic batch dimension, and with whatever
            other sizes may vary (``export_program(..., lengths=...)``). It gives a tensor, or a tuple, list or dict of
            tensors, of shape (N, ...) each.
        directory: The artefact, which must not exist; it appears when everything has passed.
        targets: Names among ``TARGETS``.
        reference: The trained module in eval mode, whose outputs are what must come out.
        held_out: Inputs that were not trained on, shape (N, ...) each.
        scheme: The quantization scheme, when the program is quantised.
        gates: What each target must pass.
        metadata: ``name, task, labels, preprocessing, metrics, history`` for the manifest.
        options: What targets are told, by name, as ``{"aoti": {"max_autotune": True}}``.
        files: Texts of the files that preprocessing names, by the name that each gets in the artefact.
        progress: Whether to show a progress bar.

    Returns:
        The manifest as written.

    Raises:
        ExportError: when a target or an option is unknown, the network gives anything but tensors with a row for each
            sample, a target fails a gate, none can be built, or none computes in integers as the gates ask; nothing is
            left behind. One that alone computes in floats is left out.
    """
    directory, gates = Path(directory), gates or Gates()
    if directory.exists():
        raise ExportError(f"{directory}: expected no artefact yet, got one. Choose another directory or move it away.")
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        raise ExportError(f"export.targets: expected names among {', '.join(TARGETS)}, got {', '.join(unknown)}.")
    if mistakes := list(option_mistakes(options or {}, targets)):
        raise ExportError("\n".join(mistakes))
    inputs = input_specs(program)
    form = output_form(program)
    check_inputs(inputs, held_out)
    _check_preprocessing((metadata or {}).get("preprocessing") or {}, inputs, files or {})
    reference = in_form(reference, form)
    wanted = reference_outputs(reference, held_out)
    _check_labels((metadata or {}).get("labels"), form.scores.shape)
    program, cleanup = clean_up(flattened(program))
    others = other_sizes(reference, held_out, lengths_of(program))
    job = Job(program, products(program), held_out, wanted, scheme is not None, gates, others, options=options or {})
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for name, text in (files or {}).items():
            (temporary / name).write_bytes(text.encode())
        built, skipped = _build_all(targets, job, temporary, progress=progress)
        manifest = Manifest(
            **{"name": directory.name, "task": "unknown", **(metadata or {})},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            inputs=inputs,
            outputs=form.specs,
            structure=form.structure,
            max_batch=largest_batch(program),
            targets=built,
            scheme=scheme,
            versions=versions(),
            skipped=skipped,
            cleanup=cleanup.to_dict(),
            products=[asdict(product) for product in job.work],
            agreement=asdict(compare(program, wanted, held_out)),
            gates=asdict(gates),
            files={name: sha256(temporary / name) for name in files or {}},
        )
        (temporary / "manifest.json").write_text(manifest_text(manifest))
        sign(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read_manifest(directory)


def _check_labels(labels: Sequence[str] | None, shape: Sequence[int | None]) -> None:
    try:
        check_labels(labels, shape)
    except ValueError as error:
        raise ExportError(f"labels: expected a name for each class, got {error}. Name all, or none.") from error


def _check_preprocessing(steps: Mapping[str, Any], inputs: Sequence[TensorSpec], files: Mapping[str, str]) -> None:
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise ExportError(f"files: expected names within the artefact, got {', '.join(outside)}. Leave out folders.")
    if not steps:
        return
    try:
        if preprocesses_text(steps):
            check_text(steps, inputs, files)
            make_encoder(files[steps["tokenizer"]], steps)([""])
        else:
            check_scaling(steps, inputs[0].shape)
    except (ArtifactError, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"preprocessing: expected what turns {'texts' if preprocesses_text(steps) else 'stored values'} into the "
            f"network's inputs, got {type(error).__name__}: {error}. See compress.data.Tokenizer or Digits."
        ) from error


def _build_all(
    targets: Sequence[str], job: Job, folder: Path, *, progress: bool
) -> tuple[dict[str, Target], dict[str, str]]:
    """Build what can be; what an engine does not take, or would compute in floats, is left out with the reason."""
    built: dict[str, Target] = {}
    reasons: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    for engine in announced(targets, progress=progress):
        try:
            built[engine], reasons[engine] = build_target(engine, job, folder)
        except (ExportSkippedError, MissingPackageError) as error:
            skipped[engine] = str(error)
    if job.gates.min_int8_fraction > 0 and any(product.quantized for product in job.work):
        floats, reason = _in_floats(built, skipped, job)
        if reason:
            reasons["export"] = [reason]
        for engine, text in floats.items():
            reasons[engine].remove(text)
            if not reasons[engine]:
                _remove(built.pop(engine), folder)
                skipped[engine] = text
    for reason in skipped.values():
        warnings.warn(f"{reason} Going on with the other targets.", stacklevel=4)
    if failed := [reason for each in reasons.values() for reason in each]:
        failed.append("Nothing was written. Train longer, loosen the gate, or leave the target out of export.targets.")
        raise ExportError("\n".join(failed))
    if not built:
        reason = "; ".join(skipped.values()) or "no targets"
        raise ExportError(f"export: expected at least one target, got none: {reason}. Add one to export.targets.")
    return built, skipped


def _in_floats(built: Mapping[str, Target], skipped: Mapping[str, str], job: Job) -> tuple[dict[str, str], str | None]:
    """Return what targets lack in int8 that others have, and what is wrong where none has."""
    counted = {engine: Census(**target.census) for engine, target in built.items() if target.census}
    found = {engine: few_integers(engine, job.gates, census) for engine, census in counted.items()}
    few = {engine: text for engine, text in found.items() if text}
    if len(few) < len(found):
        return few, None
    if found or not built or not IN_INTEGERS.isdisjoint(built):
        return {}, None  # all of them fail, or nobody has counted
    others = " ".join(["", *skipped.values()])
    return {}, (
        f"export.min_int8_fraction: expected at least {job.gates.min_int8_fraction:g} of the multiply-accumulates in "
        f"int8, got targets that compute in floats: {', '.join(built)}. Add another to export.targets, as onnxruntime, "
        f"or set export.min_int8_fraction: 0.{others}"
    )


def _remove(target: Target, folder: Path) -> None:
    for name in (target.file, *target.parts):
        (folder / name).unlink()

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

from compress.errors import ExportError, MissingPackageError
from compress.export.building import Job, announced, build_target
from compress.export.gates import Gates, few_integers
from compress.export.graph import input_specs, largest_batch
from compress.export.metadata import check_names, checked_metadata
from compress.export.options import Options, option_mistakes
from compress.export.outputs import flattened, in_form, output_form
from compress.export.parity import check_inputs, compare, other_sizes, reference_outputs
from compress.export.passes import clean_up
from compress.export.products import products
from compress.export.refused import check_operators
from compress.export.samples import with_rows
from compress.export.targets import IN_INTEGERS, TARGETS, Census, ExportSkippedError
from compress.measure.machine import versions
from compress.runtime.manifest import Manifest, Target, manifest_text, parse_manifest, sha256
from compress.runtime.trust import sign
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
        metadata: ``name, task, labels, preprocessing, metrics, history`` for the manifest, or some of them.
        options: What targets are told, by name, as ``{"aoti": {"max_autotune": True}}``.
        files: Texts of the files that preprocessing names, by the name that each gets in the artefact.
        progress: Whether to show a progress bar.

    Returns:
        The manifest as written.

    Raises:
        ExportError: when a target or an option is unknown, no manifest holds the metadata, a file cannot have its name,
            the network draws random numbers or gives anything but tensors with a row for each sample, a target fails a
            gate, none can be built, or none computes in integers as the gates ask; nothing is left behind. One that
            alone computes in floats is left out.
    """
    directory, gates = Path(directory), gates or Gates()
    if os.path.lexists(directory):  # a link that leads nowhere is there, too
        raise ExportError(f"{directory}: expected no artefact yet, got one. Choose another directory or move it away.")
    if not isinstance(program, ExportedProgram):
        raise ExportError(
            f"program: expected what compress.export.export_program makes of a network, got {type(program).__name__}. "
            "Give that."
        )
    if getattr(reference, "training", False):
        raise ExportError("reference: expected a module in eval mode, got one in training mode. Call its eval().")
    for name, given, single in (("targets", targets, str), ("held_out", held_out, Tensor)):
        if isinstance(given, single):
            raise ExportError(f"{name}: expected a list of {single.__name__}, got one alone. Put it in a list.")
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        raise ExportError(f"export.targets: expected names among {', '.join(TARGETS)}, got {', '.join(unknown)}.")
    if mistakes := list(option_mistakes(options or {}, targets)):
        raise ExportError("\n".join(mistakes))
    check_operators(program)
    inputs = with_rows(input_specs(program), program)
    form = output_form(program)
    check_inputs(inputs, held_out)
    files = files or {}
    check_names(list(files))
    metadata = checked_metadata(metadata or {}, inputs, form, files)
    reference = in_form(reference, form)
    wanted = reference_outputs(reference, held_out)
    program, cleanup = clean_up(flattened(program))
    others = other_sizes(reference, held_out, lengths_of(program))
    job = Job(program, products(program), held_out, wanted, scheme is not None, gates, others, options=options or {})
    if scheme is None and any(product.quantized for product in job.work):
        raise ExportError(
            "scheme: expected the name of one for a program in integers, got none. Say scheme='int8', say."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for name, text in files.items():
            (temporary / name).write_bytes(text.encode())
        built, skipped = _build_all(targets, job, temporary, progress=progress)
        manifest = Manifest(
            **{"name": directory.name, "task": "unknown", **metadata},
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
            files={name: sha256(temporary / name) for name in files},
        )
        content = manifest_text(manifest).encode()
        manifest = parse_manifest(content, directory)  # what cannot be read back does not take its place
        (temporary / "manifest.json").write_bytes(content)
        sign(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


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
        ways = ["loosen the gate that is named", "or leave the target out of export.targets."]
        if not all("export.min_int8_fraction" in reason for reason in failed):  # which training cannot change
            ways.insert(0, "train longer")
        failed.append(f"Nothing was written. {', '.join(ways).capitalize()}")
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

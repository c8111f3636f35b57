"""Turn the final network into a checked artefact, and add targets to one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text
from torch import Tensor
from torch.export import ExportedProgram

from compress.errors import ArtifactError, ExportError, RecipeError
from compress.export import Gates, export_artifact
from compress.export import convert as add_targets
from compress.export.options import Options
from compress.export.products import products
from compress.measure.machine import has_vnni
from compress.pipeline.rundir import RunDirectory
from compress.quantize.layers import Assignment, engine_mistakes, read_assignment
from compress.runtime import Manifest, read_manifest
from compress.surgery.capture import export_program

__all__ = ["convert", "export", "wide_without_vnni"]

_ADVICE = (
    "This processor has no VNNI: with quantize.scheme int8_reduced (7-bit weights) ONNX Runtime would be faster here, "
    "and aoti and openvino would compute in integers."
)


def export(run: RunDirectory) -> None:
    """Build the artefact from ``final.pt`` and check it against the trained network.

    Leaves ``artifact/``; one that was there is replaced when the new one has passed.

    Raises:
        ExportError: when an engine cannot run the scheme, or a target fails a gate; no artefact is left then.
    """
    run.console.rule(Text("export", "bold"))
    network, history = run.final
    settings, data = run.recipe.export, run.recipe.data
    inputs = run.held_out
    quantized = next((read_assignment(edit.data) for edit in history if edit.kind == "quantize"), None)
    if quantized is None and run.recipe.quantize is not None:
        raise ExportError(
            f"quantize: expected a network that was quantised, got one in floats: training ended before progress "
            f"{run.recipe.quantize.start}, quantize.start. Train longer, start earlier, or leave quantize out."
        )
    _check_engines(quantized, settings.targets)
    metrics = run.read_json("test")["final"] if (run.path / "test.json").exists() else {}
    if quantized is not None and (note := _dropped_gate(quantized, settings.min_int8_fraction)):
        run.console.print(note, soft_wrap=True)
    fresh = run.path / "artifact.new"
    shutil.rmtree(fresh, ignore_errors=True)
    program = export_program(run.deployed, tuple(tensor[:2] for tensor in inputs), lengths=settings.lengths)
    manifest = export_artifact(
        program,
        fresh,
        targets=settings.targets,
        options=settings.options,
        reference=network,
        held_out=inputs,
        scheme=None if quantized is None else quantized.scheme.name,
        gates=Gates(
            max_relative_error=settings.max_relative_error,
            min_top1_agreement=settings.min_top1_agreement,
            min_int8_fraction=_gate(quantized, program, settings.min_int8_fraction),
        ),
        metadata={
            "name": run.recipe.name,
            "task": type(run.recipe.task).__name__.lower(),
            "labels": getattr(data, "labels", None),
            "preprocessing": getattr(data, "preprocessing", None),
            "metrics": metrics,
            "history": history.to_list(),
        },
        files=getattr(data, "preprocessing_files", None),
        progress=True,
    )
    shutil.rmtree(run.artifact, ignore_errors=True)
    os.replace(fresh, run.artifact)
    run.console.print(f"artefact: {run.artifact} ({', '.join(manifest.targets)})", soft_wrap=True)
    if quantized is not None and wide_without_vnni(quantized):
        run.console.print(_ADVICE, soft_wrap=True)


def wide_without_vnni(quantized: Assignment) -> bool:
    """Say whether integer weights have 8 bits, on a processor that is fast and exact with 7 alone."""
    return quantized.integer_products and quantized.scheme.weight_bits == 8 and not has_vnni()


def convert(
    path: str | Path,
    targets: Sequence[str],
    *,
    inputs: Sequence[Tensor] | None = None,
    options: Options | None = None,
    replace: bool = False,
    trust: bool = False,
) -> Manifest:
    """Add targets to an artefact, with a progress bar, unless its scheme is one that their engines cannot run.

    Args:
        path: The artefact's directory.
        targets: Names of engines.
        inputs: What to compare on; random values without.
        options: What targets are told, by name.
        replace: Whether targets that are there may be built anew.
        trust: Load its portable program though it was built elsewhere.

    Raises:
        CompressError: as ``compress.export.convert`` does.
    """
    data = [edit.get("data") for edit in read_manifest(path).history if edit["kind"] == "quantize"]
    try:
        _check_engines(read_assignment(data[0]) if data and data[0] else None, targets)
    except (AttributeError, KeyError, TypeError, ValueError, RecipeError) as error:
        raise ArtifactError(
            f"{Path(path) / 'manifest.json'}: expected a history that says what is quantised, got "
            f"{type(error).__name__}: {error}. Export again."
        ) from error
    return add_targets(path, targets, inputs=inputs, options=options, replace=replace, trust=trust, progress=True)


def _gate(quantized: Assignment | None, program: ExportedProgram, wanted: float) -> float:
    """Return the share of the work to ask for in integers: where a few layers alone are in them, of what these do."""
    if quantized is None or not quantized.has_kernels:
        return 0.0
    if quantized.scheme.has_kernels:
        return wanted
    found = products(program)
    rounded = sum(product.macs for product in found if product.quantized)
    return wanted * rounded / max(1, sum(product.macs for product in found))


def _dropped_gate(quantized: Assignment, wanted: float) -> str | None:
    """Say that integer kernels are not asked for where no engine has any to be missed."""
    if quantized.has_kernels or wanted == 0:
        return None
    names = ", ".join(scheme.name for scheme in quantized.schemes)
    return (
        f"export.min_int8_fraction: {wanted:g} is not asked of this network. No engine that runs its schemes ({names}) "
        "multiplies in integers."
    )


def _check_engines(quantized: Assignment | None, targets: Sequence[str]) -> None:
    if quantized is not None and (mistakes := list(engine_mistakes(quantized, targets))):
        raise ExportError("\n".join(mistakes))

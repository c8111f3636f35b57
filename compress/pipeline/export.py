"""Turn the final network into a checked artefact."""

from __future__ import annotations

import os
import shutil

from compress.errors import ExportError
from compress.export import Gates, export_artifact
from compress.pipeline.rundir import RunDirectory
from compress.quantize.layers import engine_mistakes, read_assignment
from compress.surgery.capture import export_program

__all__ = ["export"]


def export(run: RunDirectory) -> None:
    """Build the artefact from ``final.pt`` and check it against the trained network.

    Leaves ``artifact/``; one that was there is replaced when the new one has passed.

    Raises:
        ExportError: when an engine cannot run the scheme, or a target fails a gate; no artefact is left then.
    """
    run.console.rule("[bold]export[/]")
    network, history = run.network("final")
    settings, data = run.recipe.export, run.recipe.data
    inputs = run.held_out
    quantized = next((read_assignment(edit.data) for edit in history if edit.kind == "quantize"), None)
    if quantized is not None and (mistakes := list(engine_mistakes(quantized, settings.targets))):
        raise ExportError("\n".join(mistakes))
    metrics = run.read_json("test")["final"] if (run.path / "test.json").exists() else {}
    fresh = run.path / "artifact.new"
    shutil.rmtree(fresh, ignore_errors=True)
    manifest = export_artifact(
        export_program(run.deployed, tuple(tensor[:2] for tensor in inputs)),
        fresh,
        targets=settings.targets,
        reference=network,
        held_out=inputs,
        scheme=None if quantized is None else quantized.scheme.name,
        gates=Gates(
            max_relative_error=settings.max_relative_error,
            min_top1_agreement=settings.min_top1_agreement,
            # A scheme that leaves products in floating point has no integer kernels to be missed.
            min_int8_fraction=settings.min_int8_fraction if quantized and quantized.integer_products else 0,
        ),
        metadata={
            "name": run.recipe.name,
            "task": type(run.recipe.task).__name__.lower(),
            "labels": getattr(data, "labels", None),
            "preprocessing": getattr(data, "preprocessing", None),
            "metrics": metrics,
            "history": history.to_list(),
        },
        progress=True,
    )
    shutil.rmtree(run.artifact, ignore_errors=True)
    os.replace(fresh, run.artifact)
    run.console.print(f"artefact: {run.artifact} ({', '.join(manifest.targets)})")

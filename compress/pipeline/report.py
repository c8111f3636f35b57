"""Put what the steps measured into one honest picture."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.text import Text

from compress.measure.cost import widths
from compress.measure.machine import describe_machine
from compress.measure.reporting.report import LatencyRow, Report, Stage, Target, report_table, write_report
from compress.pipeline.bits import read_bits
from compress.pipeline.mixed import read_mixed
from compress.pipeline.rundir import RunDirectory
from compress.pipeline.sensitivity import read_sensitivity
from compress.surgery import History

__all__ = ["report"]


def report(run: RunDirectory) -> None:
    """Write ``report.json`` and ``report.html``, print the table and log it where the recipe says."""
    run.console.rule(Text("report", "bold"))
    tested, measured = run.read_json("test"), run.read_json("bench")
    _, history = run.final
    scheme = any(edit.kind == "quantize" for edit in history)
    names = {
        "teacher": "teacher",
        "baseline": "student alone",
        "distilled": "distilled",
        "pruned": "pruned",
        "final": _final_name(run),
    }
    stages = [
        _stage(names.get(stage, stage), tested[stage], measured[stage])
        for stage in run.stages()
        if not (stage == "final" and scheme)  # the artefact stands for it
    ]
    artifact = measured["artifact"]
    stages.append(_stage("int8 artefact" if scheme else "artefact", artifact["metrics"], artifact))
    result = Report(
        recipe=run.recipe.name,
        command=run.command,
        seed=run.recipe.seed,
        task_metric=run.recipe.task.metric,
        stages=stages,
        curves=_curves(run),
        widths=_widths(run) if run.recipe.prune is not None else [],
        machine=describe_machine(),
        notes=_notes(run, tested),
        sensitivity=read_sensitivity(run),
        bits=read_bits(run),
        mixed=read_mixed(run),
        target=_target(history),
    )
    html = write_report(result, run.path)
    run.console.print(report_table(result))
    _log(run, result)
    run.console.print(f"report: {Path(html)}", soft_wrap=True)


def _stage(name: str, metrics: dict[str, float], measured: dict[str, Any]) -> Stage:
    return Stage(
        name=name,
        metrics=metrics,
        num_params=measured["num_params"],
        macs=measured["macs"],
        bytes=measured["bytes"],
        peak_memory=measured["peak_memory"],
        latency=[LatencyRow(**row) for row in measured["latency"]],
        artifact_bytes=measured.get("artifact_bytes"),
    )


def _final_name(run: RunDirectory) -> str:
    return "pruned" if run.recipe.prune is not None else "distilled" if run.recipe.teacher is not None else "student"


def _curves(run: RunDirectory) -> dict[str, list[list[float]]]:
    curves = {}
    for phase in ("teacher", *(stage for stage in run.stages() if "assistant" in stage), "baseline", "student"):
        if (run.path / "logs" / f"{phase}.json").exists():
            for name, points in run.read_json(f"logs/{phase}").items():
                curves[f"{phase}: {name}"] = points
    return curves


def _widths(run: RunDirectory) -> list[dict[str, Any]]:
    before = widths(run.recipe.student)
    after = widths(run.network("pruned")[0] if run.snapshot("pruned").exists() else run.final[0])
    return [{"layer": name, "before": before[name], "after": after[name]} for name in before if name in after]


def _target(history: History) -> Target | None:
    """Return what the last edit with a target says of it."""
    targets = [edit.data["target"] for edit in history if edit.data.get("target")]
    if not targets:
        return None
    last = targets[-1]
    # An edit on the way may have met the goal already, with nothing left for the last one.
    return Target(**{entry.name: last.get(entry.name) for entry in fields(Target)} | {"wanted": last["goal"]})


def _notes(run: RunDirectory, tested: dict[str, Any]) -> list[str]:
    recipe = run.recipe
    notes = [
        f"Test split measured once per stage, last-epoch weights, one seed ({recipe.seed}).",
        "Latency: all networks interleaved in one process; teacher to pruned in eager fp32.",
        "Bytes: state_dict on disk for stages, for the artefact the files that the serving engines load.",
        "Peak memory: growth of a fresh process that loads and runs it; for the artefact with its engine's library, "
        "for the other stages without torch's.",
    ]
    if "baseline" in tested:
        notes.append(
            "Student alone: the same student from the same initial weights, trained on labels for the same epochs."
        )
    if recipe.sparsify is not None:
        notes.append(_zeros(run))
    if recipe.prune is not None and recipe.teacher is not None:
        notes.append(
            f"Distilled: the student just before its first removal, at {recipe.prune.first_edit:.0%} of the epochs; "
            "the learning rate has not come down yet."
        )
    return notes


def _zeros(run: RunDirectory) -> str:
    """Say how many weights are zero in the end, and what that is good for."""
    weights = {name: weight for name, weight in run.final[0].named_parameters() if weight.dim() > 1}
    shares = {name: float((weight == 0).float().mean()) for name, weight in weights.items()}
    sparse = {name: share for name, share in shares.items() if share > 0}
    total = sum(shares[name] * weights[name].numel() for name in weights) / sum(w.numel() for w in weights.values())
    layers = ", ".join(f"{name.removesuffix('.weight')} {share:.0%}" for name, share in sparse.items())
    return (
        f"Sparse weights: {total:.1%} of all matrices and kernels are zero ({layers or 'none'}). The engines run them "
        "as dense ones: latency and bytes are those of a dense network."
    )


def _log(run: RunDirectory, result: Report) -> None:
    """Log the table's figures to the recipe's loggers (TensorBoard, W&B)."""
    logger = run.recipe.trainer.get("logger")
    loggers = [] if not logger or logger is True else logger if isinstance(logger, list | tuple) else [logger]
    for entry in loggers:
        for stage in result.stages:
            key = stage.name.replace(" ", "_")
            figures = {f"report/{key}/{name}": value for name, value in stage.metrics.items()}
            figures[f"report/{key}/bytes"] = float(stage.bytes)
            figures |= {f"report/{key}/p50_ms_batch_{row.batch}_{row.engine}": row.p50_ms for row in stage.latency}
            entry.log_metrics(figures)
        entry.finalize("success")

"""Commands on artefacts."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.cli.common import check_writable, no_more, quiet
from compress.cli.steps import step
from compress.errors import RecipeError, RunError
from compress.files import write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from compress.runtime import CompactModel
    from compress.runtime.engines import Engine

__all__ = ["bench", "convert", "predict"]

_OURS = Path(__file__).parents[1]  # what other libraries warn of is their chatter
_OF_ARTIFACTS = ("batch_sizes", "threads", "seconds", "json", "plot", "trust")


def bench(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    """Measure a run's stages, or an artefact's engines beside the network in floats."""
    path = Path(options.path)
    if not (path / "manifest.json").exists():
        if not (path / "recipe.yaml").exists():
            raise RunError(
                f"{path}: expected a run directory with a recipe.yaml or an artefact with a manifest.json, "
                "got neither. Give what 'compress run' or 'compress export' has written."
            )
        given = [f"--{name}" for name in _OF_ARTIFACTS if getattr(options, name) not in (None, False)]
        if given:
            raise RecipeError(
                f"bench: expected an artefact beside {', '.join(given)}, got {options.path}. "
                f"Give {options.path}/artifact, or leave them out."
            )
        step(options, rest, console)
        return
    no_more("bench", rest)
    plot = options.plot or "bench.png"
    check_writable("--json", options.json)
    check_writable("--plot", plot)
    quiet()
    from compress.measure.machine import describe_machine
    from compress.measure.reporting.engines import (
        check_picture,
        engines_failed,
        engines_note,
        engines_table,
        save_engines,
    )
    from compress.runtime import load

    check_picture(plot)
    machine = describe_machine()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = load(options.path, trust=options.trust)
    said = [str(entry.message) for entry in caught if _OURS in Path(entry.filename).parents]
    rows = model.benchmark(
        options.batch_sizes or (1, 32),
        threads=options.threads or sorted({1, int(machine["cores"])}),
        seconds=1.0 if options.seconds is None else options.seconds,
        progress=True,
        beside=_in_floats(path, model),
    )
    about = {
        "artifact": options.path,
        "name": model.manifest.name,
        "scheme": model.manifest.scheme,
        "machine": machine,
        "engines_by_batch": model.engines_by_batch,
        "left_out": [text for text in said if text.startswith("left out")],
    }
    console.print(engines_table(rows, about))
    for text in (engines_note(rows, about), *engines_failed(rows), *said):
        console.print(text, soft_wrap=True)
    if options.json:
        write_json(options.json, {**about, "rows": rows})
    console.print(f"plot: {save_engines(rows, about, plot)}", soft_wrap=True)


def _in_floats(path: Path, model: CompactModel) -> dict[str, Callable[[], Engine]]:
    """Return what makes the network in float32, where the artefact is in integers and its program may be loaded."""
    if model.manifest.scheme is None or "eager" not in model.engines:
        return {}
    from compress.export.unrounded import UnroundedEngine
    from compress.measure.reporting.engines import FLOATS

    engine = UnroundedEngine(path / model.manifest.targets["eager"].file)
    return {FLOATS: lambda: engine} if engine.is_float else {}


def convert(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    """Add targets to an artefact."""
    no_more("convert", rest)
    quiet()
    import torch

    from compress.pipeline import convert

    inputs = [torch.from_numpy(_array(file)) for file in options.inputs] if options.inputs else None
    manifest = convert(
        _artifact(options.path),
        options.target,
        inputs=inputs,
        options=_target_options(options.options),
        replace=options.replace,
        trust=options.trust,
    )
    table = Table("target", "bytes", "relative error", "top-1 agreement", "compared on")
    for name in dict.fromkeys(options.target):
        target = manifest.targets[name]
        found = target.agreement
        on = f"{found['num_samples']} inputs, {found['inputs']}"
        table.add_row(name, f"{target.bytes:,}", f"{found['relative_error']:.2g}", f"{found['top1_agreement']:.3f}", on)
    console.print(table)


def _target_options(text: str | None) -> dict[str, dict[str, Any]]:
    import yaml

    try:
        found = yaml.safe_load(text or "{}")
    except yaml.YAMLError as error:
        raise RecipeError(f"--options: expected YAML, got {text}: {error}. Quote it in the shell.") from error
    if not (isinstance(found, dict) and all(isinstance(given, dict) for given in found.values())):
        raise RecipeError(
            f"--options: expected a mapping for each target, got {text}. Write '{{aoti: {{max_autotune: true}}}}'."
        )
    return found


def predict(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    """Predict labels for what is in files."""
    from compress.runtime import load
    from compress.runtime.samples import best_classes, read_lines, read_samples

    no_more("predict", rest)
    check_writable("--json", options.json)
    model = load(_artifact(options.path), engine=options.engine, trust=options.trust)
    found: list[dict[str, Any]] = []
    batches = (
        read_lines(sys.stdin.buffer, "standard input", model.manifest)
        if options.inputs == "-" and not options.resize
        else read_samples(options.inputs, model.manifest, resize=options.resize)
    )
    for names, values in batches:
        probabilities = model.predict(values)[1]
        for name, row, classes in zip(names, probabilities, best_classes(probabilities, options.top_k)):
            labels = model.manifest.labels or range(len(row))
            best = [{"label": str(labels[index]), "probability": float(row[index])} for index in classes]
            found.append({"input": name, **best[0]} | ({"top": best} if options.top_k > 1 else {}))
    if options.json:
        write_json(options.json, found)
        return
    table = Table("input", "label", "probability")
    for entry in found:
        for rank, best in enumerate(entry.get("top", [entry])):
            cells = [entry["input"] if rank == 0 else "", best["label"], f"{best['probability']:.3f}"]
            table.add_row(*map(Text, cells), end_section=rank + 1 == options.top_k > 1)
    console.print(table)


def _artifact(path: str) -> Path:
    """Return an artefact's directory, given it or its run's."""
    inside = Path(path) / "artifact"
    return inside if inside.is_dir() else Path(path)


def _array(file: str) -> np.ndarray:
    import numpy as np

    try:
        array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of several")
        return array
    except Exception as error:  # of a damaged file numpy raises anything
        raise RunError(f"{file}: expected an array saved by numpy.save, got {error}. Give a .npy file.") from error

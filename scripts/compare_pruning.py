"""Prune the student of a recipe to several latencies with several seeds, beside one-shot uniform pruning.

Each run is a run directory of its own: what is done stays done, and a run that was stopped goes on. The pruned networks
are then timed in one interleaved run on the engine of the target; only the last row of each run touches the test set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console

from compress.files import write_json

RECIPE = "recipes/fashion_mnist_prune.yaml"
BUDGET = ["--baseline", "false", "--data.init_args.num_train", "20000"]

METHODS: dict[str, list[str]] = {
    "global, gradual": [],
    "uniform, one shot": ["--prune.schedule", "one_shot", "--prune.allocation", "uniform", "--prune.criterion", "l2"],
}


def main() -> None:
    """Do what is missing, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_pruning"), help="folder of the runs")
    parser.add_argument("--targets", type=float, nargs="+", required=True, metavar="MS", help="latencies wanted, in ms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("recipes/pruning.json"), help="figures")
    parser.add_argument("--plot", type=Path, default=Path("recipes/pruning.png"), help="accuracy against latency")
    options, overrides = parser.parse_known_args()
    console = Console(markup=False)
    folders: dict[tuple[str, float, int], Path] = {}
    for seed in options.seeds:
        folders["dense", 0.0, seed] = options.runs / "dense" / str(seed)
        for target in options.targets:
            for method in METHODS:
                folders[method, target, seed] = options.runs / _slug(method) / f"{target:g}" / str(seed)
    for (method, target, seed), folder in folders.items():
        if (folder / "test.json").exists():
            continue
        console.rule(f"{method}, {target:g} ms, seed {seed}")
        prune = ["--prune", "null"] if method == "dense" else ["--prune.target.latency_ms", f"{target:g}"]
        words = [*BUDGET, "--seed", str(seed), *prune, *METHODS.get(method, []), *overrides]
        _compress("fit", folder, words)
        subprocess.run([sys.executable, "-m", "compress.cli", "test", str(folder)], check=True)
    rows = _rows(folders)
    write_json(options.output, rows)
    _plot(rows, options.plot)
    console.print(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown, mean and standard deviation over seeds."""
    lines = [
        "| Method | Wanted, ms | Reached in the fit, ms | In one run, ms | Accuracy, % | MACs, M | Seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, target in dict.fromkeys((row["method"], row["target"]) for row in rows):
        own = [row for row in rows if (row["method"], row["target"]) == (method, target)]
        cells = [method, f"{target:g}" if target else ""]
        cells += [_spread([row[key] for row in own if row[key] is not None], ".3f") for key in ("reached", "ms")]
        cells += [_spread([row["accuracy"] for row in own], ".2f"), _spread([row["macs"] / 1e6 for row in own], ".1f")]
        lines.append(f"| {' | '.join([*cells, str(len(own))])} |")
    return "\n".join(lines)


def _compress(step: str, folder: Path, words: Sequence[str]) -> None:
    """Begin a run, or go on with it."""
    began = (folder / "recipe.yaml").exists()
    where = ["--resume", str(folder)] if began else [RECIPE, "--run_dir", str(folder), *words]
    subprocess.run([sys.executable, "-m", "compress.cli", step, *where], check=True)


def _rows(folders: dict[tuple[str, float, int], Path]) -> list[dict[str, Any]]:
    """Measure all networks in one interleaved run, and read what their runs have written."""
    import torch

    from compress.measure import macs
    from compress.measure.latency import time_calls
    from compress.pipeline import open_run
    from compress.prune.allocation.latency.cost import network_call
    from compress.prune.allocation.latency.store import typical_ms

    runs = {key: open_run(folder, console=Console(quiet=True)) for key, folder in folders.items()}
    # All of them as a pruned one was timed in its fit: the same engine, batch and threads.
    timed = next(run.recipe.prune.wishes.target for run in runs.values() if run.recipe.prune)
    rows, calls = [], {}
    for (method, target, seed), run in runs.items():
        folder = folders[method, target, seed]
        network, history = run.network("final")
        image = torch.randn(1, 1, 28, 28)
        calls[f"{method} {target} {seed}"] = network_call(network, (image.repeat(2, 1, 1, 1),), timed)
        figures = [edit.data["target"] for edit in history if "target" in edit.data]
        rows.append(
            {
                "method": method,
                "target": target,
                "seed": seed,
                "accuracy": 100 * json.loads((folder / "test.json").read_text())["final"]["accuracy"],
                "reached": figures[-1]["reached"] if figures else None,
                "macs": macs(network, (image,)),
            }
        )
    measured = time_calls(calls, seconds=4.0, progress=True)
    for row, times in zip(rows, measured.values()):
        row["ms"] = typical_ms(times)  # as a target counts them
    return rows


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 4))
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        points = []
        for target in sorted({row["target"] for row in own}):
            each = [row for row in own if row["target"] == target]
            accuracies = [row["accuracy"] for row in each]
            deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            points.append((statistics.mean(row["ms"] for row in each), statistics.mean(accuracies), deviation))
        axis.errorbar(*zip(*sorted(points)), fmt="o-", capsize=3, label=method)
    axis.set_xlabel("latency at batch 1, ms (undisturbed, ONNX Runtime, float32, one thread)")
    axis.set_ylabel("test accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def _slug(method: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in method.lower()).strip("_")


if __name__ == "__main__":
    main()

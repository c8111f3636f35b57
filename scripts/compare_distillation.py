"""Train the student of a recipe with several methods and seeds, and tabulate test accuracy as mean and deviation.

Each run is a run directory of its own: what is done stays done, and a run that was stopped goes on. All runs share one
teacher, trained by the first of them. Only the last row of each run touches the test set, once.
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

from rich.console import Console

from compress.files import write_json

RECIPE = "recipes/fashion_mnist_kd.yaml"

ALONE = "student alone"
LOSS = "compress.distill."

# Method: overrides of the recipe. A list of losses is replaced as a whole, so each entry says all it needs.
METHODS: dict[str, list[str]] = {
    ALONE: ["--teacher", "null"],
    "soft targets (KD)": [],
    "decoupled (DKD)": [
        "--distill.losses",
        json.dumps([{"class_path": f"{LOSS}DecoupledSoftTarget", "init_args": {"weight": 0.5, "beta": 2.0}}]),
    ],
    "DIST": [
        "--distill.losses",
        json.dumps([{"class_path": f"{LOSS}DIST", "init_args": {"weight": 0.8, "beta": 2.0, "gamma": 2.0}}]),
    ],
    "KD + attention transfer": [
        "--distill.losses",
        json.dumps(
            [
                {"class_path": f"{LOSS}SoftTarget"},
                {
                    "class_path": f"{LOSS}AttentionTransfer",
                    "init_args": {"layers": {"stages.1": "stages.1", "stages.2": "stages.2"}, "weight": 50.0},
                },
            ]
        ),
    ],
    "KD, cached teacher": ["--teacher.cache", "true", "--teacher.cache_views", "2"],
}


def main() -> None:
    """Do what is missing, write the figures and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_distillation"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--output", type=Path, default=Path("recipes/distillation.json"), help="figures")
    options, overrides = parser.parse_known_args()
    console = Console(markup=False)
    teacher = options.runs / "teacher" / "checkpoints" / "teacher.pt"
    if not (options.runs / "teacher" / "test.json").exists():
        console.rule("teacher")
        _compress("fit", options.runs / "teacher", ["--baseline", "false", "--trainer.max_epochs", "1", *overrides])
        _test(options.runs / "teacher")
    for seed in options.seeds:
        for method in options.methods:
            folder = options.runs / _slug(method) / str(seed)
            if (folder / "test.json").exists():
                continue
            console.rule(f"{method}, seed {seed}")
            words = ["--baseline", "false", "--seed", str(seed), *overrides, *METHODS[method]]
            if METHODS[method][:2] != ["--teacher", "null"]:
                words += ["--teacher.checkpoint", str(teacher)]
            _compress("fit", folder, words)
            _test(folder)
    rows = _rows(options.runs)
    write_json(options.output, rows)
    console.print(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown, mean and standard deviation over seeds."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row["accuracy"])
    lines = ["| Method | Accuracy, % | Against alone, points | Seeds |", "|---|---:|---:|---:|"]
    for method, accuracies in found.items():
        gain = ""
        if method not in ("teacher", ALONE) and ALONE in found:
            gain = f"{statistics.mean(accuracies) - statistics.mean(found[ALONE]):+.2f}"
        lines.append(f"| {method} | {_spread(accuracies)} | {gain} | {len(accuracies)} |")
    return "\n".join(lines)


def _compress(step: str, folder: Path, words: Sequence[str]) -> None:
    """Begin a run, or go on with it."""
    began = (folder / "recipe.yaml").exists()
    where = ["--resume", str(folder)] if began else [RECIPE, "--run_dir", str(folder), *words]
    subprocess.run([sys.executable, "-m", "compress.cli", step, *where], check=True)


def _test(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "compress.cli", "test", str(folder)], check=True)


def _rows(runs: Path) -> list[dict[str, Any]]:
    """Read what all runs have written."""
    rows = [{"method": "teacher", "seed": 0, "accuracy": _accuracy(runs / "teacher", "teacher")}]
    for method in METHODS:
        for folder in sorted((runs / _slug(method)).glob("*/"), key=lambda folder: int(folder.name)):
            if (folder / "test.json").exists():
                rows.append({"method": method, "seed": int(folder.name), "accuracy": _accuracy(folder, "final")})
    return rows


def _accuracy(folder: Path, stage: str) -> float:
    return 100 * json.loads((folder / "test.json").read_text())[stage]["accuracy"]


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def _slug(method: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in method.lower()).strip("_")


if __name__ == "__main__":
    main()

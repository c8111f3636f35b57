"""Train the student of a recipe with several methods and seeds, and tabulate test accuracy as mean and deviation.

Each run is a run directory of its own: what is done stays done, and a run that was stopped goes on. All runs share one
teacher, trained by the first of them. Only the last row of each run touches the test set, once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

RECIPE = "recipes/fashion_mnist_kd.yaml"

LOSS = "compress.distill."

# Method: overrides of the recipe. A list of losses is replaced as a whole, so each entry says all it needs.
METHODS: dict[str, list[str]] = {
    "student alone": ["--teacher", "null"],
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
    """Do what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_distillation"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--output", type=Path, default=Path("recipes/RESULTS.md"), help="the table")
    options, overrides = parser.parse_known_args()
    console = Console()
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
    text = _table(options.runs, options.seeds)
    temporary = options.output.with_name(options.output.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, options.output)
    console.print(text)


def _compress(step: str, folder: Path, words: Sequence[str]) -> None:
    """Begin a run, or go on with it."""
    began = (folder / "recipe.yaml").exists()
    where = ["--resume", str(folder)] if began else [RECIPE, "--run_dir", str(folder), *words]
    subprocess.run([sys.executable, "-m", "compress.cli", step, *where], check=True)


def _test(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "compress.cli", "test", str(folder)], check=True)


def _table(runs: Path, seeds: Sequence[int]) -> str:
    alone = _accuracies(runs, "student alone", seeds)
    rows, commands = [], []
    for method, words in METHODS.items():
        found = _accuracies(runs, method, seeds)
        if not found:
            continue
        gain = ""
        if alone and method != "student alone":
            difference = statistics.mean(found) - statistics.mean(alone)
            gain = f"{difference:+.2f}" + ("" if difference > 0 else ": no better than alone")
        rows.append(f"| {method} | {_spread(found)} | {gain} | {len(found)} |")
        shown = words if words[:2] == ["--teacher", "null"] else [*words, "--teacher.checkpoint", "TEACHER"]
        commands += [f"# {method}", f"compress fit {RECIPE} --baseline false --seed SEED {shlex.join(shown)}", ""]
    teacher = json.loads((runs / "teacher" / "test.json").read_text())["teacher"]["accuracy"]
    return "\n".join(
        [
            "# Results",
            "",
            f"`{RECIPE}`: accuracy on the 10,000 test images of Fashion-MNIST in percent, mean ± standard deviation "
            "over seeds. A seed decides the student's initial weights; images, their order and augmentation are the "
            "same in all runs. Students: 20 thousand parameters, 8 epochs on 20,000 images, weights of the last epoch; "
            "the test set is looked at once, after the fit. One teacher, of 2.7 million parameters, taught them all: "
            f"{100 * teacher:.2f} %. The losses' weights are those of the commands and were not tuned on the test set.",
            "",
            "| Method | Accuracy | Against alone | Seeds |",
            "|---|---|---|---|",
            *rows,
            "",
            "All of it: `python scripts/compare_distillation.py`; what is done stays done when it is stopped. One by "
            "one, where TEACHER is `checkpoints/teacher.pt` of a run that has trained it, and "
            "`compress test RUN_DIR` measures the test set after each:",
            "",
            "```bash",
            *commands[:-1],
            "```",
            "",
        ]
    )


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def _accuracies(runs: Path, method: str, seeds: Sequence[int]) -> list[float]:
    files = [runs / _slug(method) / str(seed) / "test.json" for seed in seeds]
    return [100 * json.loads(file.read_text())["final"]["accuracy"] for file in files if file.exists()]


def _slug(method: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in method.lower()).strip("_")


if __name__ == "__main__":
    main()

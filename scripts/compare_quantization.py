"""Quantise the trained student of a recipe in several ways and seeds, beside fp32 with the same extra epochs.

Each seed trains in fp32 once; every way goes on from those weights for the same extra epochs, at the same learning
rates. Post-training quantization is the end of the fp32 run: the network before it is the fp32 row, and the teacher of
the variant that is distilled. What counts is the accuracy of the converted network, in integers; that of the
fake-quantised one stands beside it. Each run is a run directory of its own: what is done stays done, and a run that was
stopped goes on. Table and plot tell of all recipes that have been run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml
from rich.console import Console

from compress.files import write_json


@dataclass(frozen=True)
class Study:
    """A recipe and its budget.

    Args:
        epochs: From scratch, in fp32, once a seed.
        more: Epochs that each variant goes on.
        rate: The optimiser's learning rate then.
        words: Overrides of all runs.
        few: Overrides of runs with few bits.
    """

    epochs: int
    more: int
    rate: float
    words: tuple[str, ...] = ()
    few: tuple[str, ...] = ()


STUDIES = {
    "fashion_mnist_quantize": Study(epochs=4, more=2, rate=0.01, words=("--data.init_args.num_train", "20000")),
    "sst2_minilm_quantize": Study(
        epochs=2,
        more=1,
        rate=2e-5,
        words=("--data.init_args.length", "32", "--data.init_args.num_train", "2000"),
    ),
    "ecg5000_lstm_quantize": Study(
        epochs=40,
        more=15,
        rate=1e-3,
        few=("--quantize.first_last", "w4a8"),  # it has a first and a last layer alone
    ),
}

SOFT_TARGET = {"class_path": "compress.distill.SoftTarget", "init_args": {"temperature": 4.0, "weight": 0.9}}
DISTILLED = "QAT int8 + KD"

# Variant: overrides of the recipe. Fake quantization works from the first extra step on, or not at all.
VARIANTS: dict[str, list[str]] = {
    "PTQ int8": ["--quantize.start", "1"],
    "QAT int8": ["--quantize.start", "0"],
    DISTILLED: ["--quantize.start", "0", "--distill.losses", json.dumps([SOFT_TARGET])],
    "QAT w4a8, direct": ["--quantize.start", "0", "--quantize.scheme", "w4a8"],
    "QAT w4a8, progressive": [
        *("--quantize.start", "0", "--quantize.scheme", "w4a8"),
        *("--quantize.progressive", '{"bits": [8, 6, 5, 4], "at": [0.0, 0.2, 0.35, 0.5]}'),
    ],
}
FLOAT, FLOAT_FROM = "fp32", "PTQ int8"


def main() -> None:
    """Do what is missing for one recipe, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=list(STUDIES), help="what to quantise; its overrides may follow")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_quantization"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--epochs", type=int, help="from scratch (default: the study's)")
    parser.add_argument("--more", type=int, help="extra epochs of each variant (default: the study's)")
    parser.add_argument("--output", type=Path, default=Path("recipes/quantization.json"), help="figures")
    parser.add_argument("--plot", type=Path, default=Path("recipes/quantization.png"), help="accuracy by variant")
    options, overrides = parser.parse_known_args()
    study, console = STUDIES[options.recipe], Console(markup=False)
    words = ["--baseline", "false", *study.words, *overrides]
    for seed in options.seeds:
        first = options.runs / options.recipe / "first" / str(seed)
        if not (first / "checkpoints" / "final.pt").exists():
            console.rule(f"{options.recipe}, fp32, seed {seed}")
            own = ["--quantize", "null", "--trainer.max_epochs", str(options.epochs or study.epochs)]
            _fit(options.recipe, first, [*words, "--seed", str(seed), *own])
        start = ["--student_checkpoint", str(first / "checkpoints" / "final.pt")]
        start += ["--trainer.max_epochs", str(options.more or study.more)]
        start += ["--optimizer.init_args.lr", str(study.rate), "--quantize.freeze_batchnorm", "0.8"]
        for variant in options.variants:
            folder = options.runs / options.recipe / _slug(variant) / str(seed)
            if (folder / "fake_quantised.json").exists():
                continue
            console.rule(f"{options.recipe}, {variant}, seed {seed}")
            own = [*VARIANTS[variant], *(study.few if "w4a8" in VARIANTS[variant] else ())]
            if variant == DISTILLED:
                teacher = _teacher(options.runs / options.recipe / _slug(FLOAT_FROM) / str(seed))
                own += ["--teacher", json.dumps(teacher)]
            _fit(options.recipe, folder, [*words, "--seed", str(seed), *start, *own])
            _test(folder)
    rows = _rows(options.runs)
    write_json(options.output, rows)
    _plot(rows, options.plot)
    console.print(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown: mean and standard deviation over seeds, and the mean difference within a seed."""
    lines = [
        "| Recipe | Variant | Accuracy, % | Against fp32, points | Fake-quantised, % | Seeds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for recipe, variant in dict.fromkeys((row["recipe"], row["variant"]) for row in rows):
        own = [row for row in rows if (row["recipe"], row["variant"]) == (recipe, variant)]
        gains = [row["accuracy"] - row["fp32"] for row in own if row["fp32"] is not None and variant != FLOAT]
        fake = [row["fake_quantised"] for row in own if row["fake_quantised"] is not None]
        cells = [recipe, variant, _spread([row["accuracy"] for row in own], ".2f"), _spread(gains, "+.2f")]
        lines.append(f"| {' | '.join([*cells, _spread(fake, '.2f'), str(len(own))])} |")
    return "\n".join(lines)


def _teacher(float_run: Path) -> dict[str, Any]:
    """Return the network that went on in fp32, which a variant learns from."""
    student = yaml.safe_load((float_run / "recipe.yaml").read_text())["student"]
    return {"model": student, "checkpoint": str((float_run / "checkpoints" / "distilled.pt").resolve())}


def _fit(recipe: str, folder: Path, words: Sequence[str]) -> None:
    """Begin a run, or go on with it."""
    began = (folder / "recipe.yaml").exists()
    where = ["--resume", str(folder)] if began else [recipe, "--run_dir", str(folder), *words]
    subprocess.run([sys.executable, "-m", "compress.cli", "fit", *where], check=True)


def _test(folder: Path) -> None:
    """Judge what is deployed, and the fake-quantised network that was trained, on the test split."""
    if not (folder / "test.json").exists():
        subprocess.run([sys.executable, "-m", "compress.cli", "test", str(folder)], check=True)
    from compress.libraries import mend_torchvision

    mend_torchvision()
    from compress.pipeline import open_run
    from compress.pipeline.test import test_network

    run = open_run(folder, console=Console(quiet=True))
    run.write_json("fake_quantised", test_network(run, run.network("final")[0]))


def _rows(runs: Path) -> list[dict[str, Any]]:
    """Read what all runs have written."""
    rows = []
    for recipe in STUDIES:
        for variant in (FLOAT, *VARIANTS):
            source = FLOAT_FROM if variant == FLOAT else variant
            folders = sorted((runs / recipe / _slug(source)).glob("*/"), key=lambda folder: int(folder.name))
            for folder in folders:
                fake = _accuracy(folder / "fake_quantised.json")
                if fake is None:
                    continue  # not finished
                stage = "distilled" if variant == FLOAT else "final"
                rows.append(
                    {
                        "recipe": recipe,
                        "variant": variant,
                        "seed": int(folder.name),
                        "accuracy": _accuracy(folder / "test.json", stage),
                        "fake_quantised": None if variant == FLOAT else fake,
                        "fp32": _accuracy(runs / recipe / _slug(FLOAT_FROM) / folder.name / "test.json", "distilled"),
                    }
                )
    return rows


def _accuracy(file: Path, stage: str | None = None) -> float | None:
    if not file.exists():
        return None
    metrics = json.loads(file.read_text())
    return 100 * (metrics if stage is None else metrics[stage])["accuracy"]


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    figure, axes = plt.subplots(1, len(recipes), figsize=(4 * len(recipes), 4), squeeze=False)
    for axis, recipe in zip(axes[0], recipes):
        own = [row for row in rows if row["recipe"] == recipe]
        variants = list(dict.fromkeys(row["variant"] for row in own))
        for place, variant in enumerate(variants):
            accuracies = [row["accuracy"] for row in own if row["variant"] == variant]
            deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            axis.plot([place] * len(accuracies), accuracies, "o", color="tab:gray", markersize=3)
            axis.errorbar([place], [statistics.mean(accuracies)], [deviation], fmt="o", capsize=4, color="tab:blue")
        axis.set_xticks(range(len(variants)), variants, rotation=40, ha="right")
        axis.set_title(recipe.removesuffix("_quantize"))
        axis.set_ylabel("test accuracy, %")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def _slug(variant: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in variant.lower()).strip("_")


if __name__ == "__main__":
    main()

"""Which commands there are, and what can follow each."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable

from compress import __version__
from compress.cli.artifacts import bench, convert, predict
from compress.cli.steps import cache_teacher, fit, recipes, run, sensitivity, step

__all__ = ["make_parser"]

_EXAMPLES = """\
examples:
  compress run recipes/digits.yaml                       the whole job: fit, test, export, bench, report
  compress run digits --prune.ratio 0.3 --seed 1         a shipped recipe by name, two keys overridden
  compress run digits --print_config                     the recipe with all its defaults, as YAML
  compress run --resume runs/digits/2026-01-01_12-00-00  go on with a run that was stopped
  compress cache-teacher digits                          a run's first step alone: store the teacher's outputs
  compress sensitivity digits                            what pruning or quantising each layer would cost
  compress export RUN_DIR --export.targets '[eager]'     one step again, with other settings
  compress convert ARTIFACT --target openvino            add a target from the artefact's portable program
  compress bench ARTIFACT                                latency of an artefact's engines on this machine
  compress predict ARTIFACT photos/ --top_k 3            labels and probabilities for a folder of images
  compress predict ARTIFACT reviews.txt                  the same for the text in each line; - reads standard input
"""


class _WholeOptions(argparse.HelpFormatter):
    """Help whose lines do not break within ``--print_config``."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(
            " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; each command's function is in ``command``."""
    parser = argparse.ArgumentParser(
        prog="compress",
        description="Distil, prune and quantise a network, and export it to a checked, fast artefact.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"compress {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, action: Callable[..., int | None], text: str, **options: object) -> argparse.ArgumentParser:
        entry = commands.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=_WholeOptions,
            **options,  # type: ignore[arg-type]
        )
        entry.set_defaults(command=action)
        return entry

    for name, action, text in [
        ("run", run, "fit, test, export, bench and report"),
        ("fit", fit, "train the stages of a recipe"),
        ("cache-teacher", cache_teacher, "begin a run by storing its teacher's outputs for every sample and view"),
    ]:
        entry = command(
            name,
            action,
            text,
            epilog=f"Any key of the recipe can follow by its dotted name: --prune.ratio 0.3 --trainer.max_epochs 5. "
            f"'compress {name} RECIPE --keys' lists them, '--print_config' shows the recipe with its defaults.",
        )
        entry.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file, or the name of a shipped recipe")
        entry.add_argument("--run_dir", metavar="DIR", help="new directory for the run (default: runs/RECIPE/TIME)")
        entry.add_argument("--resume", metavar="RUN_DIR", help="go on with a run that was stopped")
        entry.add_argument("--keys", action="store_true", help="list all keys of a recipe and leave")
    for name, text in [
        ("test", "measure every stage of a run on the test split"),
        ("export", "export a run's final network to an artefact"),
        ("report", "write a run's report.json and report.html and print the table"),
    ]:
        entry = command(name, step, text, epilog="Keys of the recipe can follow by their dotted names.")
        entry.add_argument("path", metavar="RUN_DIR")
        entry.set_defaults(step=name)
    entry = command(
        "bench",
        bench,
        "measure a run's stages, or an artefact's engines, on this machine",
        epilog="Of a run the stages are measured, for its report; keys of the recipe can follow by their dotted names. "
        "Of an artefact each engine is measured, interleaved, with each number of threads, beside 'eager': the "
        "artefact's program in float32, operator by operator. The options are for artefacts.",
    )
    entry.add_argument("path", metavar="RUN_DIR|ARTIFACT")
    entry.add_argument(
        "--batch_sizes", "--batch-sizes", type=int, nargs="+", metavar="N", help="samples in a call (default: 1 32)"
    )
    entry.add_argument("--threads", type=int, nargs="+", metavar="N", help="of a call (default: 1, and all cores)")
    entry.add_argument("--seconds", type=float, metavar="S", help="for each engine, batch and number of threads (1.0)")
    entry.add_argument("--json", metavar="FILE", help="write all figures there, with the machine's description")
    entry.add_argument("--plot", metavar="FILE", help="picture: .png, .svg or .pdf (default: bench.png)")
    entry.add_argument("--trust", action="store_true", help="let an artefact that was built elsewhere run its code")
    entry.set_defaults(step="bench")
    entry = command(
        "sensitivity",
        sensitivity,
        "measure how sensitive each layer is to pruning and to quantization, before either",
        epilog="The student is trained alone first, where the run does not have it; then each layer in turn has part "
        "of its units silenced, or its weights at few bits where the recipe quantises, and the network is judged on "
        "the validation split; with a latency, each layer in turn stays in floats and the others are integers. What is "
        "measured is kept after every point: the same command goes on. Keys of the recipe can follow by their dotted "
        "names; --trainer.limit_val_batches 10 judges on fewer batches.",
    )
    entry.add_argument(
        "recipe", metavar="RECIPE|RUN_DIR", help="YAML file, name of a shipped recipe, or a run's directory"
    )
    entry.add_argument("--run_dir", metavar="DIR", help="new directory for the run (default: runs/RECIPE/TIME)")
    entry.add_argument(
        "--ratios", type=float, nargs="+", metavar="R", help="fractions to silence (default: 0.1 0.25 0.5 0.75 0.9)"
    )
    entry.add_argument("--bits", type=int, nargs="+", metavar="B", help="bits of weights to try (default: 8 4 2)")
    entry.add_argument(
        "--average_bits", type=float, metavar="B", help="share bits out: so many for each weight on average, at most"
    )
    entry.add_argument(
        "--latency_ms",
        type=float,
        metavar="MS",
        help="measure each layer in integers and in floats, and leave in "
        "floats what a call of so many milliseconds has room for",
    )
    entry.add_argument("--latency", type=float, metavar="R", help="the same, as a fraction of the network in floats")
    entry.add_argument("--engine", default="onnxruntime", help="what a latency is measured on (default: onnxruntime)")
    entry.add_argument("--batch", type=int, default=1, metavar="N", help="samples of that call (default: 1)")
    entry.add_argument("--threads", type=int, metavar="N", help="threads of that call (default: the engine's)")
    entry = command(
        "convert",
        convert,
        "add targets to an artefact, from its portable program",
        epilog="Each is compared with the portable program and passes the gates of the export; all are added, or none. "
        "That may run code: an artefact from elsewhere needs --trust and is signed as this machine's afterwards.",
    )
    entry.add_argument("path", metavar="RUN_DIR|ARTIFACT")
    entry.add_argument("--target", action="append", required=True, metavar="ENGINE", help="engine to add; repeatable")
    entry.add_argument("--options", metavar="YAML", help="what targets are told, e.g. '{aoti: {max_autotune: true}}'")
    entry.add_argument("--replace", action="store_true", help="build targets anew that are there")
    entry.add_argument("--trust", action="store_true", help="load the program though it was built elsewhere")
    text = "what to compare on, an array for each input as the network takes it (default: random values)"
    entry.add_argument("--inputs", nargs="+", metavar="FILE.npy", help=text)
    entry = command(
        "predict",
        predict,
        "predict labels for images, texts, tables or arrays",
        epilog="Values go through the manifest's preprocessing, where it has one. An image becomes grey or RGB, as the "
        "input has channels. A .txt file has a text in each line, for an artefact that holds a tokenizer. A .csv file "
        "has a line of numbers for each sample; its first line may name the columns. An .npz file has an array for "
        "each input, by its name in the manifest.",
    )
    entry.add_argument("path", metavar="RUN_DIR|ARTIFACT")
    entry.add_argument(
        "inputs", metavar="INPUTS", help="image, folder of images, .txt, .csv, .npy or .npz; - for lines of text"
    )
    entry.add_argument("--top_k", "--top-k", type=int, default=1, metavar="K", help="show the K best labels (1)")
    entry.add_argument("--resize", action="store_true", help="bring images to the input's size; else that is an error")
    entry.add_argument("--engine", default="auto", help="engine to serve with (default: the fastest here)")
    entry.add_argument("--json", metavar="FILE", help="write JSON there instead of a table here")
    entry.add_argument("--trust", action="store_true", help="let an artefact that was built elsewhere run its code")
    command("recipes", recipes, "list the shipped recipes")
    return parser

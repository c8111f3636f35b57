"""The ``compress`` command."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from compress.errors import CompressError, RecipeError, RunError
from compress.libraries import mend_torchvision

if TYPE_CHECKING:
    import numpy as np

__all__ = ["main"]

_EXAMPLES = """\
examples:
  compress run recipes/digits.yaml                       the whole job: fit, test, export, bench, report
  compress run digits --prune.ratio 0.3 --seed 1         a shipped recipe by name, two keys overridden
  compress run digits --print_config                     the recipe with all its defaults, as YAML
  compress run --resume runs/digits/2026-01-01_12-00-00  go on with a run that was stopped
  compress cache-teacher digits                          a run's first step alone: store what its teacher says
  compress sensitivity digits                            what each layer's units are worth, before pruning any
  compress export RUN_DIR --export.targets '[eager]'     one step again, with other settings
  compress convert ARTIFACT --target openvino            add a target from the artefact's portable program
  compress bench ARTIFACT                                latency of an artefact's engines on this machine
  compress predict ARTIFACT images.npy                   labels and probabilities for raw inputs
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file or a pipe has no edge to wrap at
    sys.path.append(os.getcwd())  # so that class paths may name modules of the user's folder
    parser = _parser()
    options, rest = argparse.Namespace(command=None), list[str]()
    try:
        options, rest = parser.parse_known_args(words)
        if options.command is not _predict:  # all others import Lightning, and with it torchvision
            mend_torchvision()
        return options.command(options, rest, console) or 0
    except CompressError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        return 2
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        where = os.environ.get("COMPRESS_RUN_DIR")
        go_on = f" Go on with: {_go_on(options, rest, where)}" if where else ""
        Console(stderr=True).print(f"[bold yellow]interrupted.[/]{_escape(go_on)}", soft_wrap=True)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compress",
        description="Distil, prune and quantise a network, and export it to a checked, fast artefact.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, action: Callable[..., int | None], text: str, **options: object) -> argparse.ArgumentParser:
        entry = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **options)  # type: ignore[arg-type]
        entry.set_defaults(command=action)
        return entry

    for name, action, text in [
        ("run", _run, "fit, test, export, bench and report"),
        ("fit", _fit, "train the stages of a recipe"),
        ("cache-teacher", _cache_teacher, "begin a run by storing its teacher's outputs for every sample and view"),
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
        ("bench", "measure a run's stages, or an artefact's engines, on this machine"),
        ("report", "write a run's report.json and report.html and print the table"),
    ]:
        more = " --trust lets an artefact that was built elsewhere run its code." if name == "bench" else ""
        entry = command(name, _step, text, epilog=f"Keys of the recipe can follow by their dotted names.{more}")
        entry.add_argument("path", metavar="RUN_DIR" if name != "bench" else "RUN_DIR|ARTIFACT")
        entry.set_defaults(step=name)
    entry = command(
        "sensitivity",
        _sensitivity,
        "measure what each layer's least important units are worth, before pruning any",
        epilog="The student is trained alone first, where the run does not have it; then each layer in turn has part "
        "of its units silenced, or its weights at few bits where the recipe quantises, and the network is judged on "
        "the validation split. What is measured is kept after every point: the same command goes on. Keys of the "
        "recipe can follow by their dotted names; --trainer.limit_val_batches 10 judges on fewer batches.",
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
    entry = command(
        "convert",
        _convert,
        "add targets to an artefact, from its portable program",
        epilog="Each is compared with the portable program and passes the gates of the export; all are added, or none. "
        "That may run code: an artefact from elsewhere needs --trust and is signed as this machine's afterwards.",
    )
    entry.add_argument("path", metavar="RUN_DIR|ARTIFACT")
    entry.add_argument("--target", action="append", required=True, metavar="ENGINE", help="engine to add; repeatable")
    entry.add_argument("--replace", action="store_true", help="build targets anew that are there")
    entry.add_argument("--trust", action="store_true", help="load the program though it was built elsewhere")
    text = "what to compare on, an array for each input as the network takes it (default: random values)"
    entry.add_argument("--inputs", nargs="+", metavar="FILE.npy", help=text)
    entry = command("predict", _predict, "predict labels for raw inputs")
    entry.add_argument("path", metavar="RUN_DIR|ARTIFACT")
    entry.add_argument("inputs", metavar="INPUTS.npy", help="array of raw inputs, one a row")
    entry.add_argument("--engine", default="auto", help="engine to serve with (default: the fastest here)")
    entry.add_argument("--output", metavar="FILE", help="write JSON there instead of a table here")
    entry.add_argument("--trust", action="store_true", help="let an artefact that was built elsewhere run its code")
    command("recipes", _recipes, "list the shipped recipes")
    return parser


def _open(options: argparse.Namespace, rest: list[str], console: Console) -> object:
    from compress.pipeline import create_run, open_run
    from compress.recipe import find_recipe, make_parser, parse_recipe

    _quiet()
    if options.keys:
        make_parser(f"compress run {options.recipe or 'RECIPE'}").print_help()
        return None
    if options.resume is not None:
        if options.recipe is not None:
            raise RecipeError(
                f"--resume: expected no recipe beside it, got {options.recipe!r}. The run directory holds its recipe."
            )
        return open_run(options.resume, overrides=rest, console=console)
    if options.recipe is None:
        raise RecipeError(
            "recipe: expected a YAML file or the name of a shipped recipe, got none. See 'compress recipes'."
        )
    path = find_recipe(options.recipe)
    if any(word.startswith("--print_config") for word in rest):
        config, parser = parse_recipe(path, [word for word in rest if not word.startswith("--print_config")])
        print(parser.dump(config, skip_none=False))
        return None
    return create_run(path, overrides=rest, path=options.run_dir, console=console)


def _run(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    from compress.pipeline import RunDirectory, run

    opened = _open(options, rest, console)
    if isinstance(opened, RunDirectory):
        run(opened)


def _fit(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    from compress.pipeline import RunDirectory, fit

    opened = _open(options, rest, console)
    if isinstance(opened, RunDirectory):
        fit(opened)
        if opened.is_main_process:
            console.print(f"run directory: {opened.path}")


def _cache_teacher(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    from compress.pipeline import RunDirectory, cache_teacher

    opened = _open(options, rest if options.keys else [*rest, "--teacher.cache", "true"], console)
    if isinstance(opened, RunDirectory):
        cache_teacher(opened)
        # The recipe of a run that was there before does not know of the cache.
        words = " --teacher.cache true" if options.resume else ""
        go_on = f"compress run --resume {opened.path}{words}"
        console.print(f"run directory: {opened.path}. Go on with: {go_on}", soft_wrap=True)


def _sensitivity(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    from compress.pipeline import RunDirectory, sensitivity
    from compress.prune.sensitivity import RATIOS
    from compress.quantize.sensitivity import BITS

    if Path(options.recipe).is_dir():
        if options.run_dir is not None:
            raise RecipeError(
                f"--run_dir: expected none beside a run's directory, got {options.run_dir}. Leave it out."
            )
        source = {"recipe": None, "resume": options.recipe}
    else:
        source = {"recipe": options.recipe, "resume": None}
    opened = _open(argparse.Namespace(**source, run_dir=options.run_dir, keys=False), rest, console)
    if isinstance(opened, RunDirectory):
        sensitivity(
            opened,
            ratios=options.ratios or RATIOS,
            bits=options.bits or BITS,
            average_bits=options.average_bits,
        )
        if opened.is_main_process:
            console.print(f"run directory: {opened.path}", soft_wrap=True)


def _step(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    from compress.pipeline import STEPS, open_run

    _quiet()
    if options.step == "bench" and (Path(options.path) / "manifest.json").exists():
        _bench_artifact(options.path, rest, console)
        return
    run = open_run(options.path, overrides=rest, console=console)
    STEPS[options.step](run)


def _bench_artifact(path: str, rest: list[str], console: Console) -> None:
    from compress.runtime import load

    if set(rest) - {"--trust"}:
        raise RecipeError(f"bench: expected no more words after an artefact, got {' '.join(rest)}. Leave them out.")
    served = load(path, trust="--trust" in rest)
    table = Table(title=f"{path} (served: {served.engine})")
    for column in ("engine", "batch", "threads", "p50 ms", "p95 ms"):
        table.add_column(column, justify="right")
    for row in served.benchmark():
        table.add_row(
            row["engine"], str(row["batch"]), str(row["threads"]), f"{row['p50_ms']:.3f}", f"{row['p95_ms']:.3f}"
        )
    console.print(table)


def _convert(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    _no_more("convert", rest)
    _quiet()
    import torch

    from compress.pipeline import convert

    inputs = [torch.from_numpy(_array(file)) for file in options.inputs] if options.inputs else None
    manifest = convert(
        _artifact(options.path), options.target, inputs=inputs, replace=options.replace, trust=options.trust
    )
    table = Table("target", "bytes", "relative error", "top-1 agreement", "compared on")
    for name in dict.fromkeys(options.target):
        target = manifest.targets[name]
        found = target.agreement
        on = f"{found['num_samples']} inputs, {found['inputs']}"
        table.add_row(name, f"{target.bytes:,}", f"{found['relative_error']:.2g}", f"{found['top1_agreement']:.3f}", on)
    console.print(table)


def _predict(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    from compress.runtime import load

    _no_more("predict", rest)
    model = load(_artifact(options.path), engine=options.engine, trust=options.trust)
    labels, probabilities = model.predict(_array(options.inputs))
    rows = [{"label": str(label), "probability": float(p.max())} for label, p in zip(labels, probabilities)]
    if options.output:
        temporary = Path(options.output + ".tmp")
        temporary.write_text(json.dumps(rows, indent=1))
        os.replace(temporary, options.output)
        return
    table = Table("input", "label", "probability")
    for index, row in enumerate(rows):
        table.add_row(str(index), str(row["label"]), f"{row['probability']:.3f}")
    console.print(table)


def _no_more(command: str, rest: list[str]) -> None:
    if rest:
        raise RecipeError(f"{command}: expected no more words, got {' '.join(rest)}. See 'compress {command} --help'.")


def _artifact(path: str) -> Path:
    """Return an artefact's directory, given it or its run's."""
    inside = Path(path) / "artifact"
    return inside if inside.is_dir() else Path(path)


def _array(file: str) -> np.ndarray:
    import numpy as np

    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: expected an array saved by numpy.save, got {error}. Give a .npy file.") from error


def _recipes(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    from compress.recipe import shipped_recipes

    for name, path in shipped_recipes().items():
        first = path.read_text().splitlines()[0].lstrip("# ")
        console.print(f"[bold]{name}[/]  {first}  [dim]{path}[/]", soft_wrap=True)


def _go_on(options: argparse.Namespace, rest: list[str], run_dir: str) -> str:
    """Return the command that goes on with what was interrupted."""
    if options.command is not _sensitivity:
        return f"compress run --resume {run_dir}"
    words = ["compress", "sensitivity", run_dir]
    if Path(options.recipe).is_dir():  # a new run has them in its recipe
        words += rest
    return shlex.join([*words, "--ratios", *map(str, options.ratios)] if options.ratios else words)


def _quiet() -> None:
    """Keep other libraries' chatter away from what the user reads; they set their levels when they are imported."""
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "torchao", "torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not os.environ.get("WANDB_API_KEY"):
        os.environ.setdefault("WANDB_MODE", "offline")


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


if __name__ == "__main__":
    sys.exit(main())

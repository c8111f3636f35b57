"""Commands on recipes and runs."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from rich.console import Console
from rich.text import Text

from compress.cli.common import quiet
from compress.errors import RecipeError

__all__ = ["cache_teacher", "fit", "how_to_go_on", "recipes", "run", "sensitivity", "step"]

_TARGETS = ("latency_ms", "latency")
_CALL = ("engine", "batch", "threads")


def run(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    """Do a whole job, or go on with it."""
    from compress.pipeline import RunDirectory, run

    opened = _open(options, rest, console)
    if isinstance(opened, RunDirectory):
        run(opened)


def fit(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    """Train the stages of a recipe."""
    from compress.pipeline import RunDirectory, fit

    opened = _open(options, rest, console)
    if isinstance(opened, RunDirectory):
        fit(opened)
        if opened.is_main_process:
            console.print(f"run directory: {opened.path}", soft_wrap=True)


def cache_teacher(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    """Begin a run by storing its teacher's outputs."""
    from compress.pipeline import RunDirectory, cache_teacher

    opened = _open(options, rest if options.keys else [*rest, "--teacher.cache", "true"], console)
    if isinstance(opened, RunDirectory):
        cache_teacher(opened)
        # The recipe of a run that was there before does not know of the cache.
        words = " --teacher.cache true" if options.resume else ""
        go_on = f"compress run --resume {opened.path}{words}"
        console.print(f"run directory: {opened.path}. Go on with: {go_on}", soft_wrap=True)


def sensitivity(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    """Measure how sensitive each layer is to pruning and to quantization."""
    from compress.pipeline import Deadline, RunDirectory, sensitivity
    from compress.prune.sensitivity import RATIOS
    from compress.quantize.sensitivity import BITS

    deadline = None
    if options.latency_ms is not None or options.latency is not None:
        deadline = Deadline(**{name: getattr(options, name) for name in (*_TARGETS, *_CALL)})
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
            deadline=deadline,
        )
        if opened.is_main_process:
            console.print(f"run directory: {opened.path}", soft_wrap=True)


def step(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    """Do one step of a run."""
    from compress.pipeline import STEPS, open_run

    quiet()
    run = open_run(options.path, overrides=rest, console=console)
    STEPS[options.step](run)


def recipes(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    """List the shipped recipes."""
    from compress.recipe import shipped_recipes

    for name, path in shipped_recipes().items():
        first = path.read_text().splitlines()[0].lstrip("# ")
        console.print(Text.assemble((name, "bold"), f"  {first}  ", (str(path), "dim")), soft_wrap=True)


def how_to_go_on(options: argparse.Namespace, rest: list[str], run_dir: str) -> str:
    """Return the command that goes on with what was interrupted."""
    if options.command is not sensitivity:
        return f"compress run --resume {run_dir}"
    words = ["compress", "sensitivity", run_dir]
    if Path(options.recipe).is_dir():  # a new run has them in its recipe
        words += rest
    for name in ("ratios", "bits"):
        if values := getattr(options, name):
            words += [f"--{name}", *map(str, values)]
    given = [name for name in ("average_bits", *_TARGETS) if getattr(options, name) is not None]
    if set(given) & set(_TARGETS):
        given += [name for name in _CALL if getattr(options, name) is not None]
    for name in given:
        words += [f"--{name}", str(getattr(options, name))]
    return shlex.join(words)


def _open(options: argparse.Namespace, rest: list[str], console: Console) -> object:
    from compress.pipeline import create_run, open_run
    from compress.recipe import find_recipe, keys_of_a_recipe, parse_recipe

    quiet()
    if options.keys:
        print(keys_of_a_recipe())
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
    if shown := [word for word in rest if word.partition("=")[0] == "--print_config"]:
        flags = shown[-1].partition("=")[2]
        if flags not in ("", "skip_default"):
            raise RecipeError(
                f"--print_config: expected nothing more or =skip_default, got ={flags}. --keys explains the keys."
            )
        config, parser = parse_recipe(path, [word for word in rest if word not in shown])
        print(parser.dump(config, skip_none=False, skip_default=bool(flags)))
        return None
    return create_run(path, overrides=rest, path=options.run_dir, console=console)

"""A run directory: where every step of a run finds what the step before it left."""

from __future__ import annotations

import copy
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from torch import Tensor, nn

from compress.distill import read_batch
from compress.errors import RunError
from compress.files import write_json, write_text
from compress.pipeline.preflight import preflight
from compress.prune import replay_prune
from compress.quantize import deployed_form, replay_quantize
from compress.recipe import Recipe, build_recipe, parse_recipe
from compress.surgery import History, load_snapshot
from compress.surgery.lengths import read_lengths

__all__ = ["HANDLERS", "RunDirectory", "create_run", "open_run"]

Measurement = TypeVar("Measurement")

HANDLERS = {"prune": replay_prune, "quantize": replay_quantize}

# Processes that a launcher starts for the other ranks run the same command: they must land in the same directory.
_RANKS_SHARE = "COMPRESS_RUN_DIR"


@dataclass(frozen=True)
class RunDirectory:
    """A recipe and the files of one run of it.

    Args:
        path: The directory.
        recipe: What is run.
        console: Where progress is told.
    """

    path: Path
    recipe: Recipe
    console: Console

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files (rank 0)."""
        return getattr(rank_zero_only, "rank", 0) == 0

    @property
    def command(self) -> str:
        """The command that began the run."""
        return _header(self.path, "command") or "compress.run"

    @property
    def artifact(self) -> Path:
        """The artefact's directory."""
        return self.path / "artifact"

    def snapshot(self, stage: str) -> Path:
        """Return the file with the history and weights of a stage."""
        return self.path / "checkpoints" / f"{stage}.pt"

    def resume_point(self, phase: str) -> Path:
        """Return the full checkpoint from which a phase of the fit goes on."""
        return self.path / "checkpoints" / f"{phase}.last.ckpt"

    def json_file(self, name: str) -> Path:
        """Return the path of ``name.json``."""
        return self.path / f"{name}.json"

    def read_json(self, name: str) -> Any:
        """Return the content of ``name.json``.

        Raises:
            RunError: when the step that writes it has not been done.
        """
        path = self.json_file(name)
        if not path.exists():
            raise RunError(
                f"{path}: expected the result of an earlier step, got none. Run 'compress {name} {self.path}'."
            )
        return json.loads(path.read_text())

    def read_measurement(self, name: str, make: Callable[..., Measurement]) -> Measurement | None:
        """Return what ``name.json`` holds of a measurement, finished or not; none where there is no such file.

        Args:
            name: Of the measurement.
            make: Makes it from the file's values by their names.

        Raises:
            RunError: when the file is another one.
        """
        path = self.json_file(name)
        if not path.exists():
            return None
        try:
            return make(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{path}: expected a measurement of this version, got {type(error).__name__}: {error}. "
                f"Delete it and measure again: compress sensitivity {self.path}"
            ) from error

    def write_json(self, name: str, content: Any) -> None:
        """Write ``name.json``; it appears whole or not at all."""
        path = self.json_file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    def network(self, stage: str) -> tuple[nn.Module, History]:
        """Rebuild the network of a stage from its snapshot, in eval mode on the CPU.

        Raises:
            RunError: when the fit has not got there.
        """
        path = self.snapshot(stage)
        if not path.exists():
            raise RunError(
                f"{path}: expected the stage {stage!r} of the fit, got none. Run 'compress fit {self.path}'."
            )
        network, history = load_snapshot(path, copy.deepcopy(self._model(stage)).cpu(), HANDLERS)
        return network.eval(), history

    def _model(self, stage: str) -> nn.Module:
        spec = self.recipe.teacher
        if spec is not None and stage == "teacher":
            assert isinstance(spec.model, nn.Module)
            return spec.model
        if spec is not None and stage.startswith("assistant"):
            return spec.assistants[int(stage.removeprefix("assistant"))]
        return self.recipe.student

    @cached_property
    def held_out(self) -> tuple[Tensor, ...]:
        """Validation inputs, the first of the validation loader, shape (n, ...) each."""
        data, wanted = self.recipe.data, self.recipe.export.num_held_out
        data.prepare_data()
        data.setup("fit")
        batches: list[tuple[Tensor, ...]] = []
        for batch in data.val_dataloader():
            batches.append(read_batch(batch).inputs)
            if sum(len(inputs[0]) for inputs in batches) >= wanted:
                break
        return tuple(torch.cat(tensors)[:wanted] for tensors in zip(*batches))

    @cached_property
    def final(self) -> tuple[nn.Module, History]:
        """The network as it was trained to the end, in eval mode on the CPU, and its history; leave it as it is."""
        return self.network("final")

    @cached_property
    def deployed(self) -> nn.Module:
        """The final network in the form that is deployed: integers where it was quantised."""
        network, history = self.final
        edit = next((edit for edit in history if edit.kind == "quantize"), None)
        if edit is None:
            return network
        inputs = [tensor[:2] for tensor in self.held_out]
        return deployed_form(network, inputs, lengths=read_lengths(edit.data.get("lengths", ())))

    def stages(self) -> list[str]:
        """Return the stages of the fit that have a snapshot, in the order of the report."""
        assistants = range(len(self.recipe.teacher.assistants) if self.recipe.teacher is not None else 0)
        names = ["teacher", *(f"assistant{i}" for i in assistants), "baseline", "distilled", "pruned", "final"]
        return [name for name in names if self.snapshot(name).exists()]


def create_run(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    path: str | Path | None = None,
    console: Console | None = None,
) -> RunDirectory:
    """Make a new run directory.

    Args:
        recipe: A YAML file, or a recipe built in Python.
        overrides: Command-line words that override keys of the file.
        path: The directory; ``runs/<recipe>/<time>`` without one.
        console: Where progress is told.

    Raises:
        RunError: when the directory exists and is not empty.
        CompressError: when the recipe cannot be run; nothing is written then.
    """
    console = console or Console(markup=False)
    if isinstance(recipe, Recipe):
        built, text = recipe, None
    else:
        config, parser = parse_recipe(recipe, overrides)
        built = build_recipe(config, parser, name=Path(recipe).stem)
        command = shlex.join(["compress", "run", str(recipe), *overrides])
        text = f"# recipe: {built.name}\n# command: {command}\n{parser.dump(config)}"
    if getattr(rank_zero_only, "rank", 0):
        return RunDirectory(_directory_of_rank_zero(path), built, console)
    directory = Path(path) if path else Path("runs") / built.name / time.strftime("%Y-%m-%d_%H-%M-%S")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RunError(
            f"{directory}: expected a new or empty run directory, got one that exists. "
            f"Choose another --run_dir, or go on with: compress run --resume {directory}"
        )
    with console.status("checking data and networks"):
        preflight(built)
    directory.mkdir(parents=True, exist_ok=True)
    if text is not None:
        write_text(directory / "recipe.yaml", text)
    os.environ[_RANKS_SHARE] = str(directory.resolve())
    return RunDirectory(directory, built, console)


def open_run(path: str | Path, *, overrides: Sequence[str] = (), console: Console | None = None) -> RunDirectory:
    """Open an existing run directory, with the recipe that is kept in it.

    Args:
        path: The directory.
        overrides: Command-line words that override keys for what is done now.
        console: Where progress is told.

    Raises:
        RunError: when it is no run directory.
    """
    directory = Path(path)
    file = directory / "recipe.yaml"
    if not file.is_file():
        raise RunError(
            f"{directory}: expected a run directory with a recipe.yaml, got none. Start one: compress run RECIPE."
        )
    name = _header(directory, "recipe") or directory.parent.name
    config, parser = parse_recipe(file, overrides)
    os.environ[_RANKS_SHARE] = str(directory.resolve())
    return RunDirectory(directory, build_recipe(config, parser, name=name), console or Console(markup=False))


def _header(directory: Path, key: str) -> str | None:
    # What a run remembers beside its recipe stands in comments at the top of the file.
    file = directory / "recipe.yaml"
    lines = file.read_text().splitlines()[:2] if file.is_file() else []
    return next((line.removeprefix(f"# {key}: ") for line in lines if line.startswith(f"# {key}: ")), None)


def _directory_of_rank_zero(path: str | Path | None) -> Path:
    shared = path or os.environ.get(_RANKS_SHARE)
    if shared is None:
        raise RunError("run_dir: expected one directory for all ranks, got none. Give --run_dir.")
    return Path(shared)

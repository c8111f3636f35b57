"""What a recipe is, and how one is read from YAML and the command line; ``mistakes`` has what makes one invalid.

A recipe is a plain dataclass, so Python users build one from objects; a YAML file names the same objects by
``class_path`` and ``init_args``. Reading is jsonargparse's, as in LightningCLI.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from pytorch_lightning import LightningDataModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from compress.distill import (
    DistillationLoss,
    EarlierSelf,
    LearningRateSchedule,
    OwnTeacher,
    SoftTarget,
    Task,
)
from compress.errors import CompressError, RecipeError
from compress.prune import StructuredPruning, WeightSparsity
from compress.quantize import QuantizationAwareTraining
from compress.recipe.keys import KeysFormatter, chain, describe_keys, unknown_key
from compress.recipe.mistakes import mistakes
from compress.surgery.lengths import Length

__all__ = [
    "Distill",
    "Export",
    "Recipe",
    "Teacher",
    "build_recipe",
    "find_recipe",
    "keys_of_a_recipe",
    "make_parser",
    "parse_recipe",
    "shipped_recipes",
]


@dataclass
class Teacher:
    """What to learn from.

    Args:
        model: The network: yours, ``Constructed`` (Hugging Face, timm, torchvision), ``OnnxTeacher``,
            ``ProgramTeacher``, ``ArtifactTeacher``, an ``Ensemble`` of these; or ``MovingAverage`` or ``EarlierSelf``.
        checkpoint: File with its weights; without one the teacher is trained first, and kept for the next run.
        max_epochs: Epochs of that training, and of each assistant's; 0 when the model brings its weights along.
        precision: ``bf16`` or ``fp32``; without one, that of the Trainer.
        compile: Whether ``torch.compile`` makes it faster before it teaches.
        assistants: Networks between teacher and student, each taught by the one before it.
        cache: Whether its outputs are stored once and read in training.
        cache_views: Augmented views of each sample that are stored; the epochs take turns.
        cache_dtype: ``float16`` or ``float32``.
        cache_top_k: Store the largest k class probabilities and the rest's sum only.
        cache_dir: Folder of the stored outputs; by default one beside the kept teachers, named by what made them.
    """

    model: nn.Module | OwnTeacher
    checkpoint: str | None = None
    max_epochs: int = 10
    precision: str | None = None
    compile: bool = False
    assistants: list[nn.Module] = field(default_factory=list)
    cache: bool = False
    cache_views: int = 1
    cache_dtype: str = "float16"
    cache_top_k: int | None = None
    cache_dir: str | None = None


@dataclass
class Distill:
    """How the student is taught.

    Args:
        losses: Losses between student and teacher, each with its weight and, if you like, a schedule of it.
        task_weight: Weight of the loss against labels; by default what the losses between outputs leave of 1.
        channels_last: Give images to the networks in channels-last memory format: faster in bf16.
    """

    losses: list[DistillationLoss] = field(default_factory=lambda: [SoftTarget()])
    task_weight: float | None = None
    channels_last: bool = False


@dataclass
class Export:
    """What the artefact holds and what it must pass.

    Args:
        targets: Engines to build for.
        max_relative_error: Largest distance of an engine's outputs from the trained module's, relative to their norm.
        min_top1_agreement: Least fraction of held-out inputs on which an engine and the trained module agree.
        min_int8_fraction: Least fraction of the multiply-accumulates that a compiled graph must do in int8, when
            quantised.
        num_held_out: Validation inputs on which engines and the trained module are compared.
        lengths: Sizes beyond the batch that may vary, as that of a sequence, each with its range.
        options: What targets are told, by name, as ``{aoti: {max_autotune: true}}``.
    """

    targets: list[str] = field(default_factory=lambda: ["eager", "aoti", "onnxruntime"])
    max_relative_error: float = 0.1
    min_top1_agreement: float = 0.98
    min_int8_fraction: float = 0.5
    num_held_out: int = 512
    lengths: list[Length] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Recipe:
    """A model, a teacher, data, and the steps to take.

    Args:
        student: The network to compress.
        data: A LightningDataModule with train, validation and test loaders that give ``(inputs, targets)``.
        task: The loss against labels and the metrics.
        optimizer: Makes an optimiser from parameters.
        student_checkpoint: File with the weights that the student starts from, e.g. another run's
            ``checkpoints/final.pt``; its own without one.
        scheduler: A learning-rate schedule.
        teacher: The network to learn from; without one the student learns from labels alone.
        distill: How it is taught.
        prune: The pruning callback, or none.
        sparsify: The callback that makes single weights zero, or none.
        quantize: The quantization-aware training callback, or none.
        trainer: Arguments of ``pytorch_lightning.Trainer``.
        export: What the artefact holds and must pass.
        baseline: Also train the student alone for the same epochs, for comparison.
        seed: Of all random numbers.
        name: What the run is called.
        config: The recipe as parsed, when it came from a file.
    """

    student: nn.Module
    data: LightningDataModule
    task: Task
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    student_checkpoint: str | None = None
    scheduler: LearningRateSchedule | Callable[[Optimizer], LRScheduler] | None = None
    teacher: Teacher | None = None
    distill: Distill = field(default_factory=Distill)
    prune: StructuredPruning | None = None
    sparsify: WeightSparsity | None = None
    quantize: QuantizationAwareTraining | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    export: Export = field(default_factory=Export)
    baseline: bool = True
    seed: int = 0
    name: str = "recipe"
    config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if found := list(mistakes(self)):
            raise RecipeError("\n".join(found))


def make_parser(prog: str = "compress run RECIPE") -> ArgumentParser:
    """Return the parser that knows every key of a recipe."""
    parser = ArgumentParser(
        prog=prog,
        usage=argparse.SUPPRESS,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=KeysFormatter,
        description="Every key of a recipe can be overridden by its dotted name, e.g. --prune.ratio 0.3 "
        "--trainer.max_epochs 5 --teacher.model.init_args.width 32; --prune null leaves a section out, and "
        "--student.help compress.models.ResNet explains the keys of a class.",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="the recipe file")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--student", type=nn.Module, required=True, help="the network to compress")
    parser.add_argument(
        "--student_checkpoint", type=str | None, default=None, help="weights that the student starts from"
    )
    parser.add_argument(
        "--teacher",
        type=Teacher | Literal["self"] | None,
        default=None,
        help="the network to learn from; self: the student before it is quantised in the fit, or else pruned",
    )
    parser.add_argument("--data", type=LightningDataModule, required=True, help="the data module")
    parser.add_argument("--task", type=Task, required=True, help="loss against labels, and metrics")
    parser.add_argument("--distill", type=Distill, default=Distill(), help="how the student is taught")
    parser.add_argument("--prune", type=StructuredPruning | None, default=None, help="structured pruning")
    parser.add_argument("--sparsify", type=WeightSparsity | None, default=None, help="single weights at zero")
    parser.add_argument("--quantize", type=QuantizationAwareTraining | None, default=None, help="quantization")
    parser.add_argument(
        "--optimizer", type=Callable[[Iterable[nn.Parameter]], Optimizer], required=True, help="makes the optimiser"
    )
    parser.add_argument(
        "--scheduler",
        type=LearningRateSchedule | Callable[[Optimizer], LRScheduler] | None,
        default=None,
        help="learning-rate schedule",
    )
    parser.add_argument("--export", type=Export, default=Export(), help="what the artefact holds and must pass")
    parser.add_argument("--baseline", type=bool, default=True, help="also train the student alone, for comparison")
    parser.add_class_arguments(pl.Trainer, "trainer", instantiate=False)
    return parser


def keys_of_a_recipe() -> str:
    """Return a list of all keys, with what each does, its type and its default."""
    sections = {
        "teacher": Teacher,
        "prune": StructuredPruning,
        "sparsify": WeightSparsity,
        "quantize": QuantizationAwareTraining,
    }
    return describe_keys(make_parser(), sections)


def parse_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Namespace, ArgumentParser]:
    """Read a recipe file and apply overrides, without building anything.

    Args:
        path: A YAML file.
        overrides: Command-line words, e.g. ``["--prune.ratio", "0.3"]``.

    Returns:
        The parsed keys and the parser that can dump them.

    Raises:
        RecipeError: naming the key that is unknown, of a wrong type, or whose class path does not import.
    """
    parser = make_parser()
    try:
        return parser.parse_args(["--config", str(path), *overrides]), parser
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise RecipeError(unknown_key(error, parser) or f"{path}: {_plain(error)}") from error


def build_recipe(config: Namespace, parser: ArgumentParser, *, name: str) -> Recipe:
    """Build the objects that a parsed recipe names.

    Raises:
        RecipeError: when an object refuses its arguments, or keys contradict each other.
    """
    pl.seed_everything(config.seed, workers=True, verbose=False)
    plain = Namespace(config)
    plain.pop("config", None)
    try:
        built = parser.instantiate(config)
    except Exception as error:  # any constructor of any class
        for link in chain(error):  # jsonargparse wraps what is said of a key that may be null
            if isinstance(link, CompressError):
                raise link from link.__cause__
        raise RecipeError(f"recipe: expected arguments that build, got {_plain(error)}") from error
    names = {entry.name for entry in fields(Recipe)} - {"config", "name"}
    values = {key: value for key, value in vars(built).items() if key in names}
    values["trainer"] = vars(built.trainer)
    if built.teacher == "self":
        late = built.quantize is not None and built.quantize.start < 1
        values["teacher"] = Teacher(EarlierSelf("quantize" if late else None))
    return Recipe(**values, name=name, config=plain.as_dict())


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    folders = [Path(sys.prefix) / "share" / "compress" / "recipes", Path(__file__).parents[2] / "recipes"]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by path or by the name of a shipped one.

    Raises:
        RecipeError: when there is no such file; the message lists the shipped recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise RecipeError(
        f"recipe: expected a file or one of {', '.join(shipped)}, got {name!r}. Give the path of a YAML file."
    )


def _plain(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:800]

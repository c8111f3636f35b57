from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from compress.distill import Classification, SoftTarget, WarmupCosine
from compress.errors import RecipeError
from compress.prune import StructuredPruning
from compress.quantize import QuantizationAwareTraining
from compress.recipe import Distill, Export, Recipe, Teacher, build_recipe, find_recipe, parse_recipe, shipped_recipes

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_read_and_built(path: Path) -> None:
    recipe = build_recipe(*parse_recipe(path), name=path.stem)
    assert isinstance(recipe.student, nn.Module)
    assert recipe.teacher is not None
    assert path.read_text().startswith("# ")
    assert shipped_recipes()[path.stem].read_text() == path.read_text()
    optimizer = recipe.optimizer(recipe.student.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_class_paths_name_installed_modules(path: Path) -> None:
    def class_paths(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["class_path"]] if "class_path" in node else []
            return own + [found for value in node.values() for found in class_paths(value)]
        return [found for value in node for found in class_paths(value)] if isinstance(node, list) else []

    assert {name.split(".")[0] for name in class_paths(yaml.safe_load(path.read_text()))} <= {"compress", "torch"}


def test_overrides_reach_every_depth() -> None:
    words = ["--seed", "7", "--prune.ratio", "0.25", "--student.init_args.width", "8", "--trainer.max_epochs", "2"]
    words += ["--distill.losses.init_args.temperature", "9", "--quantize", "null", "--teacher.max_epochs", "1"]
    recipe = build_recipe(*parse_recipe(find_recipe("digits"), words), name="digits")
    assert recipe.seed == 7
    assert recipe.prune is not None
    assert recipe.prune.ratio == 0.25
    assert recipe.student.get_parameter("fc.weight").shape == (10, 32)
    assert recipe.trainer["max_epochs"] == 2
    assert recipe.distill.losses[0].temperature == 9
    assert recipe.quantize is None
    assert recipe.teacher is not None
    assert recipe.teacher.max_epochs == 1


def test_what_a_recipe_dumps_is_a_recipe(tmp_path: Path) -> None:
    config, parser = parse_recipe(find_recipe("digits"), ["--prune.ratio", "0.3"])
    (tmp_path / "again.yaml").write_text(parser.dump(config, skip_none=False))
    again, _ = parse_recipe(tmp_path / "again.yaml")
    assert parser.dump(again) == parser.dump(config)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--prun.ratio", "0.3"], "prun.ratio"),
        (["--prune.rato", "0.3"], "rato"),
        (["--seed", "many"], "seed"),
        (["--student.class_path", "torch.nn.Lin"], "torch.nn.Lin"),
        (["--student.class_path", "nowhere.Network"], "nowhere"),
        (["--student.init_args.widht", "3"], "widht"),
        (["--trainer.max_epoch", "3"], "max_epoch"),
        (["--distill.losses.init_args.temprature", "3"], "temprature"),
    ],
)
def test_wrong_keys_and_types_are_named(words: list[str], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        parse_recipe(find_recipe("digits"), words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prune.ratio", "3.0"], r"prune\.ratio: expected a value in \[0, 1\), got 3\.0"),
        (["--quantize.start", "0.5"], r"quantize\.start: expected a value after prune\.end \(0\.6\), got 0\.5"),
        (["--quantize.scheme", "int3"], r"quantize\.scheme: expected one of int8, got 'int3'"),
        (["--export.targets", "[aoti, tflite]"], r"export\.targets: expected names among .*, got tflite"),
        (["--export.min_top1_agreement", "98"], r"export\.min_top1_agreement: expected a value in \[0, 1\], got 98"),
        (["--data.init_args.batch_size", "0"], r"data\.batch_size"),
        (["--distill.losses.init_args.weight", "2"], r"distill\.losses\.weight"),
    ],
)
def test_values_out_of_range_are_named(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe(*parse_recipe(find_recipe("digits"), words), name="digits")


def test_all_contradictions_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(
            student=nn.Linear(2, 2),
            data=object(),  # type: ignore[arg-type]
            task=Classification(2),
            optimizer=torch.optim.Adam,  # type: ignore[arg-type]
            teacher=Teacher(nn.Linear(2, 2), max_epochs=0),
            prune=StructuredPruning(end=0.9),
            quantize=QuantizationAwareTraining(start=0.7),
            distill=Distill([SoftTarget(weight=0.7), SoftTarget(weight=0.7)]),
            export=Export(targets=[]),
        )
    for key in ("quantize.start", "trainer.max_epochs", "teacher.max_epochs", "distill.losses", "export.targets"):
        assert f"{key}: expected" in str(caught.value)


def test_python_objects_make_the_same_recipe() -> None:
    read = build_recipe(*parse_recipe(find_recipe("digits")), name="digits")
    assert isinstance(read.scheduler, WarmupCosine)
    assert isinstance(read.distill.losses[0], SoftTarget)
    assert isinstance(read.task, Classification)
    assert isinstance(read.prune, StructuredPruning)
    written = Recipe(
        student=read.student,
        data=read.data,
        task=Classification(10),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        scheduler=WarmupCosine(),
        prune=StructuredPruning(0.5),
        trainer={"max_epochs": 3},
    )
    assert written.baseline == read.baseline
    assert written.export.targets == read.export.targets


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="digits, fashion_mnist"):
        find_recipe("digit")

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from compress.distill import (
    Classification,
    Constructed,
    EarlierSelf,
    Ensemble,
    MovingAverage,
    MultiTask,
    OnnxTeacher,
    ResponseLoss,
    SoftTarget,
    WarmupCosine,
    losses,
)
from compress.errors import RecipeError
from compress.prune import StructuredPruning
from compress.quantize import QuantizationAwareTraining
from compress.recipe import Distill, Export, Recipe, Teacher, build_recipe, find_recipe, parse_recipe, shipped_recipes
from compress.surgery.lengths import Length

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def named(node: Any, key: str) -> set[str]:
    """Return the packages of all dotted names that stand under a key at any depth."""
    if isinstance(node, dict):
        own = {node[key].partition(".")[0]} if isinstance(node.get(key), str) else set()
        return own.union(*(named(value, key) for value in node.values()))
    return set().union(*(named(value, key) for value in node)) if isinstance(node, list) else set()


def small_bert(folder: Path) -> str:
    """Write a checkpoint of Hugging Face, in place of one from the hub."""
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_read_and_built(path: Path, tmp_path: Path) -> None:
    text, words = path.read_text(), []
    if "from_pretrained" in text and find_spec("transformers") is not None:
        words = ["--student.init_args.arguments.pretrained_model_name_or_path", small_bert(tmp_path)]
    parsed = parse_recipe(path, words)
    for library in sorted(named(yaml.safe_load(text), "constructor") - {"torch"}):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed: pip install -e '.[zoo]'; the recipe was read, not built")
    recipe = build_recipe(*parsed, name=path.stem)
    assert isinstance(recipe.student, nn.Module)
    assert recipe.teacher is not None or recipe.prune is not None or recipe.quantize is not None
    assert text.startswith("# ")
    assert shipped_recipes()[path.stem].read_text() == text
    optimizer = recipe.optimizer(recipe.student.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_class_paths_name_installed_modules(path: Path) -> None:
    text = yaml.safe_load(path.read_text())
    assert named(text, "class_path") <= {"compress", "torch"}
    assert named(text, "constructor") <= {"torch", "torchvision", "timm", "transformers"}  # torch, and the extra zoo


def test_overrides_reach_every_depth() -> None:
    words = ["--seed", "7", "--prune.ratio", "0.25", "--student.init_args.width", "8", "--trainer.max_epochs", "2"]
    words += ["--sparsify.pattern", "2:4"]
    words += ["--distill.losses.init_args.temperature", "9", "--quantize", "null", "--teacher.max_epochs", "1"]
    recipe = build_recipe(*parse_recipe(find_recipe("digits"), words), name="digits")
    assert recipe.seed == 7
    assert recipe.prune is not None
    assert recipe.prune.wishes.ratio == 0.25
    assert recipe.sparsify is not None
    assert recipe.sparsify.pattern == "2:4"
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
        (["--prun.ratio", "0.3"], r"prun\.ratio: expected a key .* Did you mean prune\.ratio\? "),
        (["--teachr", "null"], r"teachr: expected a key that there is, got an unknown one\. Did you mean teacher\?"),
        (["--prune.rato=0.3"], r"prune\.rato: expected a key .* Did you mean prune\.ratio\? "),
        (["--prune.target.latency_m", "3"], r"prune\.target\.latency_m: .* Did you mean prune\.target\.latency_ms\? "),
        (["--zzz", "1"], r"zzz: expected a key that there is, got an unknown one\. 'compress run --keys' lists all"),
        (["ratio"], r"recipe: expected keys as --prune\.ratio 0\.3, got ratio"),
        (["--seed", "many"], "seed"),
        (["--student.class_path", "torch.nn.Lin"], "torch.nn.Lin"),
        (["--student.class_path", "nowhere.Network"], "nowhere"),
        (["--student.init_args.widht", "3"], r"student\.widht: .* Did you mean student\.width\?"),
        (["--trainer.max_epoch", "3"], r"trainer\.max_epoch: .* Did you mean trainer\.max_epochs\?"),
        (["--distill.losses.init_args.temprature", "3"], r"Did you mean distill\.losses\.temperature\?"),
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
        (["--sparsify.ratio", "1.5"], r"sparsify\.ratio: expected a value in \[0, 1\), got 1\.5"),
        (["--sparsify.end", "0.8"], r"quantize\.start: expected a value after sparsify\.end \(0\.8\), got 0\.75"),
        (["--sparsify.attribute", "backbone"], r"sparsify\.attribute: expected 'student', got 'backbone'"),
        (["--quantize.scheme", "int3"], r"quantize\.scheme: expected one of .*int8.*, got 'int3'"),
        (["--quantize.layers", "{fc: int3}"], r"quantize\.scheme: expected one of .*int8.*, got 'int3'"),
        (["--quantize.scheme", "fp8"], r"export\.targets: expected engines that run the scheme 'fp8' \(eager\), got "),
        (["--export.targets", "[aoti, tflite]"], r"export\.targets: expected names among .*, got tflite"),
        (
            ["--export.lengths", "[{dimension: 2, smallest: 4, largest: 16}]"],
            r"export\.lengths: expected those of quantize\.lengths, got dimension 2 from 4 to 16",
        ),
        (["--export.min_top1_agreement", "98"], r"export\.min_top1_agreement: expected a value in \[0, 1\], got 98"),
        (["--data.init_args.batch_size", "0"], r"data\.batch_size"),
        (["--distill.losses.init_args.weight", "2"], r"distill\.losses: expected weights .* at most 1, got 2"),
        (["--distill.losses.init_args.weight", "-1"], r"distill\.losses\.weight: expected 0 or more, got -1"),
        (["--distill.task_weight", "-1"], r"distill\.task_weight: expected 0 or more, got -1"),
        (
            ["--export.targets", "[eager]"],
            r"export\.targets: expected one that computes in integers \(aoti, .*\), got eager\. Add",
        ),
        (
            ["--quantize.scheme", "int8_weights", "--quantize.layers", "{fc: int8}", "--export.targets", "[eager]"],
            r"export\.targets: expected one that computes in integers \(aoti, .*\), got eager\. Add",
        ),
        (
            ["--teacher", "self", "--prune", "null", "--quantize.start", "1"],
            r"teacher: expected an edit during the fit \(prune or quantize\), .*, got no such section",
        ),
        (["--teacher.max_epochs", "-1"], r"teacher\.max_epochs: expected 0 or more, got -1"),
        (["--teacher.precision", "int8"], r"teacher\.precision: expected bf16 or fp32, got 'int8'"),
        (["--teacher.cache_views", "0"], r"teacher\.cache_views: expected at least 1, got 0"),
        (["--teacher.cache_dtype", "int8"], r"teacher\.cache_dtype: expected float16 or float32, got 'int8'"),
    ],
)
def test_values_out_of_range_are_named(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"^{message}"):
        build_recipe(*parse_recipe(find_recipe("digits"), words), name="digits")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"teachr": None}, r"^teachr: .* Did you mean teacher\?"),
        ({"trainer": {"max_epoch": 3}}, r"^trainer\.max_epoch: .* Did you mean trainer\.max_epochs\?"),
        ({"prune": {"rato": 0.3}}, r"^prune\.rato: .* Did you mean prune\.ratio\?"),
    ],
)
def test_wrong_keys_of_a_file_are_named(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    text = yaml.safe_load(find_recipe("digits").read_text()) | section
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(RecipeError, match=message):
        parse_recipe(tmp_path / "recipe.yaml")


def test_lengths_are_read() -> None:
    words = ["--quantize", "null", "--export.lengths", "[{dimension: 2, smallest: 4, largest: 16}, {dimension: 3}]"]
    recipe = build_recipe(*parse_recipe(find_recipe("digits"), words), name="digits")
    assert recipe.export.lengths == [Length(2, 4, 16), Length(3)]
    words = ["--quantize.lengths", "[{dimension: 3, inputs: [0]}]", "--export.lengths", "[{dimension: 3, inputs: [0]}]"]
    recipe = build_recipe(*parse_recipe(find_recipe("digits"), words), name="digits")
    assert recipe.quantize is not None
    assert recipe.export.lengths == list(recipe.quantize.lengths) == [Length(3, inputs=[0])]


def test_all_contradictions_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(
            student=nn.Linear(2, 2),
            data=object(),  # type: ignore[arg-type]
            task=Classification(2),
            optimizer=torch.optim.Adam,  # type: ignore[arg-type]
            teacher=Teacher(nn.Linear(2, 2), max_epochs=-1),
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


ARGUMENTS: dict[str, dict[str, Any]] = {
    "ContrastiveRepresentation": {"layers": {"a": "b"}, "num_samples": 2000},
    **{name: {"layers": ["a"]} for name in ("Exits", "MaximumMeanDiscrepancy", "CorrelationAlignment")},
    **{name: {} for name in losses.__all__ if issubclass(getattr(losses, name), ResponseLoss)},
}
ABSTRACT = {"DistillationLoss", "FeatureLoss", "ResponseLoss"}


@pytest.mark.parametrize("name", sorted(set(losses.__all__) - ABSTRACT))
def test_every_loss_can_be_named_with_weight_and_schedule(name: str) -> None:
    schedule = {"class_path": "compress.distill.Decay", "init_args": {"start": 0.5}}
    arguments = {**ARGUMENTS.get(name, {"layers": {"a": "b"}}), "weight": 0.25, "schedule": schedule}
    words = ["--distill.losses", json.dumps([{"class_path": f"compress.distill.{name}", "init_args": arguments}])]
    (loss,) = build_recipe(*parse_recipe(find_recipe("digits"), words), name="digits").distill.losses
    assert type(loss).__name__ == name
    assert loss.weight_at(0.0) == 0.25
    assert loss.weight_at(1.0) == 0.0


LINEAR = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}}


@pytest.mark.parametrize(("quantize", "before"), [("null", None), ("{scheme: int8}", "quantize")])
def test_the_student_can_be_its_own_teacher(quantize: str, before: str | None) -> None:
    words = ["--teacher", "self", "--quantize", quantize]
    config, parser = parse_recipe(find_recipe("digits"), words)
    recipe = build_recipe(config, parser, name="digits")
    assert recipe.teacher is not None
    assert isinstance(recipe.teacher.model, EarlierSelf)
    assert recipe.teacher.model.before == before
    assert yaml.safe_load(parser.dump(config))["teacher"] == "self"


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (LINEAR, nn.Linear),
        ({"class_path": "compress.distill.Ensemble", "init_args": {"teachers": [LINEAR, LINEAR]}}, Ensemble),
        (
            {
                "class_path": "compress.distill.Constructed",
                "init_args": {"constructor": "torch.nn.Linear", "arguments": {"in_features": 2, "out_features": 2}},
            },
            Constructed,
        ),
        ({"class_path": "compress.distill.MovingAverage", "init_args": {"decay": 0.9}}, MovingAverage),
        ({"class_path": "compress.distill.EarlierSelf"}, EarlierSelf),
    ],
    ids=lambda value: value["class_path"] if isinstance(value, dict) else "",
)
def test_every_kind_of_teacher_can_be_named(model: dict[str, Any], kind: type, tmp_path: Path) -> None:
    text = yaml.safe_load(find_recipe("digits").read_text())
    text["teacher"] = {"model": model, "assistants": [LINEAR], "compile": True, "precision": "bf16"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(text))
    recipe = build_recipe(*parse_recipe(tmp_path / "recipe.yaml"), name="recipe")
    assert recipe.teacher is not None
    assert isinstance(recipe.teacher.model, kind)
    assert isinstance(recipe.teacher.assistants[0], nn.Linear)


def test_files_as_teachers_and_several_tasks(tmp_path: Path) -> None:
    text = yaml.safe_load(find_recipe("digits").read_text())
    (tmp_path / "teacher.onnx").write_bytes(b"")
    arguments = {"path": str(tmp_path / "teacher.onnx"), "layout": "NHWC", "scale": 2.0, "offset": [0.0, 1.0]}
    text["teacher"] = {"model": {"class_path": "compress.distill.OnnxTeacher", "init_args": arguments}, "max_epochs": 0}
    tasks = {
        "kind": {"class_path": "compress.distill.Classification", "init_args": {"num_classes": 3}},
        "size": {"class_path": "compress.distill.Regression"},
    }
    text["task"] = {"class_path": "compress.distill.MultiTask", "init_args": {"tasks": tasks, "weights": {"size": 2.0}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(text))
    recipe = build_recipe(*parse_recipe(tmp_path / "recipe.yaml"), name="recipe")
    assert recipe.teacher is not None
    assert isinstance(recipe.teacher.model, OnnxTeacher)
    assert isinstance(recipe.task, MultiTask)
    assert recipe.task.weights == {"kind": 1.0, "size": 2.0}


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"digits, .*fashion_mnist"):
        find_recipe("digit")

"""What is wrong between the keys of a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from compress.distill import EarlierSelf, OwnTeacher, check_weights
from compress.errors import RecipeError
from compress.export import TARGETS
from compress.export.options import option_mistakes
from compress.export.targets import IN_INTEGERS
from compress.quantize import QuantizationAwareTraining
from compress.quantize.layers import engine_mistakes

if TYPE_CHECKING:
    from compress.recipe import Export, Recipe, Teacher

__all__ = ["mistakes"]


def mistakes(recipe: Recipe) -> Iterable[str]:
    """Yield everything that is wrong between the keys, so that the user mends it in one go."""
    if recipe.prune is not None and recipe.quantize is not None and recipe.quantize.start <= recipe.prune.last_edit:
        yield (
            f"quantize.start: expected a value after prune.end ({recipe.prune.last_edit}), got "
            f"{recipe.quantize.start}. Quantised networks are not pruned: prune first, recover, then quantise."
        )
    if (
        recipe.sparsify is not None
        and recipe.quantize is not None
        and recipe.quantize.start <= recipe.sparsify.last_edit
    ):
        yield (
            f"quantize.start: expected a value after sparsify.end ({recipe.sparsify.last_edit}), "
            f"got {recipe.quantize.start}. Ranges are learned on the weights that stay: sparsify first."
        )
    if recipe.trainer.get("max_epochs") is None and recipe.trainer.get("max_steps", -1) in (-1, None):
        yield "trainer.max_epochs: expected a number of epochs, got none. Schedules need to know where training ends."
    if recipe.teacher is not None:
        yield from _teacher_mistakes(recipe.teacher)
        yield from _no_earlier_self(recipe)
    try:
        check_weights(recipe.distill.losses, recipe.distill.task_weight)
    except RecipeError as error:
        yield str(error)
    unknown = sorted(set(recipe.export.targets) - set(TARGETS))
    if unknown or not recipe.export.targets:
        yield (
            f"export.targets: expected names among {', '.join(TARGETS)}, got {', '.join(unknown) or 'none'}. "
            "Name at least one target."
        )
    else:
        yield from (f"export.{text}" for text in option_mistakes(recipe.export.options, recipe.export.targets))
    if recipe.quantize is not None:
        yield from engine_mistakes(recipe.quantize.assignment, recipe.export.targets)
        yield from _float_targets(recipe.quantize, recipe.export)
        trained = recipe.quantize.lengths
        if others := [str(own) for own in recipe.export.lengths if not any(each.holds(own) for each in trained)]:
            yield (
                f"export.lengths: expected those of quantize.lengths, got {', '.join(others)}. Other sizes are fixed "
                "in the graph that is trained: name in quantize.lengths all sizes that are exported."
            )
    for key in ("max_relative_error", "min_top1_agreement", "min_int8_fraction"):
        value = getattr(recipe.export, key)
        if not 0 <= value <= 1:
            yield f"export.{key}: expected a value in [0, 1], got {value}. It is a fraction."
    for editor in (recipe.prune, recipe.sparsify, recipe.quantize):
        if editor is not None and editor.attribute != "student":
            yield f"{editor.kind}.attribute: expected 'student', got {editor.attribute!r}. Leave it out of a recipe."


def _float_targets(quantize: QuantizationAwareTraining, export: Export) -> Iterable[str]:
    if quantize.assignment.has_kernels and export.min_int8_fraction > 0 and IN_INTEGERS.isdisjoint(export.targets):
        yield (
            f"export.targets: expected one that computes in integers ({', '.join(sorted(IN_INTEGERS))}), got "
            f"{', '.join(export.targets)}. Add one, or set export.min_int8_fraction: 0."
        )


def _no_earlier_self(recipe: Recipe) -> Iterable[str]:
    if recipe.teacher is None or not isinstance(recipe.teacher.model, EarlierSelf):
        return
    during = [editor.kind for editor in (recipe.prune, recipe.sparsify) if editor is not None]
    during += ["quantize"] if recipe.quantize is not None and recipe.quantize.start < 1 else []
    before = recipe.teacher.model.before
    if not during or before not in (None, *during):
        yield (
            f"teacher: expected an edit during the fit ({before or 'prune or quantize'}), before which there is an "
            f"earlier self, got {', '.join(during) or 'no such section'}. Start earlier, or leave the teacher out."
        )


def _teacher_mistakes(teacher: Teacher) -> Iterable[str]:
    if teacher.max_epochs < 0:
        yield f"teacher.max_epochs: expected 0 or more, got {teacher.max_epochs}. Use 10, say."
    if teacher.precision not in (None, "bf16", "fp32"):
        yield f"teacher.precision: expected bf16 or fp32, got {teacher.precision!r}. Leave it out for the Trainer's."
    if teacher.cache_dtype not in ("float16", "float32"):
        yield f"teacher.cache_dtype: expected float16 or float32, got {teacher.cache_dtype!r}. Choose one."
    if teacher.cache_views < 1:
        yield f"teacher.cache_views: expected at least 1, got {teacher.cache_views}. Use 1 without augmentation."
    if teacher.cache and isinstance(teacher.model, OwnTeacher):
        yield "teacher.cache: expected a network with fixed weights, got one that is made in the fit. Leave it out."

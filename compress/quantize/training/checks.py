"""Which settings of quantization-aware training contradict each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compress.errors import EditError, RecipeError
from compress.quantize.layers import Assignment, read_assignment
from compress.quantize.parametrize import check_schemes
from compress.quantize.ranges import RANGES
from compress.quantize.schemes import Scheme
from compress.quantize.training.progressive import Stages
from compress.surgery.lengths import Length

__all__ = ["check_precision", "check_settings", "check_training", "check_unchanged"]


def check_precision(network: nn.Module, attribute: str, precision: str) -> None:
    """Make sure that a fit keeps a network in float32, in which ranges are learned and fake quantizers compute.

    Args:
        network: About to be fitted; the Trainer has not cast it yet.
        attribute: The name of the LightningModule's attribute that holds it, for the error.
        precision: The Trainer's; mixed ones leave parameters in float32.

    Raises:
        EditError: when it does not.
    """
    do = "Use precision: 32-true or bf16-mixed."
    if precision.endswith("-true") and precision != "32-true":
        raise EditError(
            "trainer.precision: expected parameters in float32, in which fake quantization computes, got "
            f"{precision}. {do}"
        )
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise EditError(
                f"quantize: expected {attribute} in float32, in which fake quantization computes, got {name!r} in "
                f"{kind}. Call its float() before the fit. {do}"
            )


def check_training(network: nn.Module, attribute: str) -> None:
    """Make sure that a network that is to be trained in integers learns ranges.

    Args:
        network: When a fit begins, which leaves modes as they are.
        attribute: The name of the LightningModule's attribute that holds it, for the error.

    Raises:
        EditError: when it is in evaluation.
    """
    if not network.training:
        raise EditError(
            f"quantize: expected {attribute} in training mode, got it in evaluation, where ranges are not "
            "learned, and a fit leaves modes as they are. Call its train() before the fit."
        )


def check_unchanged(data: Mapping[str, Any], assignment: Assignment) -> None:
    """Make sure that a network is trained on in the integers that it has.

    Args:
        data: Of the edit that quantised it.
        assignment: Schemes of the layers that are asked for.

    Raises:
        EditError: when they are others.
    """
    has = replace(read_assignment(data), embeddings=assignment.embeddings)  # once they were left as they are
    if "definition" in data and has != assignment:
        names = has.scheme.name, assignment.scheme.name
        of = "{} and {}".format(*names) if names[0] != names[1] else f"{names[0]} with others for some layers"
        raise EditError(
            f"quantize: expected the schemes in which the network is quantised already, got others: {of}. Give the "
            "callback the same, or fit the network in floats."
        )


def check_settings(
    assignment: Assignment,
    *,
    start: float,
    observe: float,
    freeze: float,
    progressive: Stages | None,
    ranges: str,
    percentile: float,
    num_batches: int,
    learn_steps: bool,
    improve: Sequence[str],
    fallback: str | None,
    lengths: Sequence[Length],
) -> None:
    """Make sure that settings exist and go together.

    Args:
        assignment: Schemes of the layers.
        start: Progress from which on the network is prepared; 1 for none in integers.
        observe: For how much of the progress after that ranges alone are learned.
        freeze: Progress from which on ranges stand still.
        progressive: How many bits from when on.
        ranges: How a range follows from calibration data.
        percentile: How many of the values lie inside one, for that method.
        num_batches: Batches to calibrate with.
        learn_steps: Whether steps are parameters.
        improve: What makes post-training quantization better.
        fallback: What to do with a network that has no graph.
        lengths: Sizes that vary.

    Raises:
        RecipeError: when they do not.
    """
    _check_progress(start, observe, freeze)
    if ranges not in RANGES:
        raise RecipeError(f"quantize.ranges: expected one of {', '.join(RANGES)}, got {ranges!r}. Choose one.")
    if not 50 < percentile <= 100:
        raise RecipeError(f"quantize.percentile: expected more than 50, at most 100, got {percentile}. Use 99.99, say.")
    if num_batches < 1:
        raise RecipeError(f"quantize.num_batches: expected at least 1, got {num_batches}. Use 32, say.")
    if improve and start < 1:
        raise RecipeError(
            f"quantize.improve: expected quantize.start 1, got {start}. Training would undo what is improved "
            "without it: set start: 1, or leave improve out."
        )
    if learn_steps and start == 1:
        raise RecipeError(
            "quantize.learn_steps: expected training in integers, got start 1. Set start below 1, or leave it out."
        )
    if learn_steps and (others := [scheme.name for scheme in assignment.schemes if not scheme.fixed_steps]):
        raise RecipeError(
            "quantize.learn_steps: expected schemes of integers with a step for a channel or a tensor, got "
            f"{', '.join(others)}. Leave it out, or choose another quantize.scheme."
        )
    if learn_steps and observe > 0:
        raise RecipeError(
            "quantize.observe: expected none beside learn_steps, whose steps start at the first batch. Leave one out."
        )
    if fallback is not None:
        _check_fallback(fallback, assignment, learn_steps=learn_steps, improve=bool(improve))
    if not isinstance(lengths, Sequence) or not all(isinstance(length, Length) for length in lengths):
        raise RecipeError(f"quantize.lengths: expected a list of compress.export.Length, got {lengths!r}. Give such.")
    if progressive is not None:
        if not isinstance(progressive, Stages):
            raise RecipeError(
                f"quantize.progressive: expected compress.quantize.Stages, got {progressive!r}. Give one."
            )
        _check_stages(progressive, assignment, round(start + observe, 9), freeze)


def _check_progress(start: float, observe: float, freeze: float) -> None:
    """Make sure that fake quantization begins, rounds and stands still in this order."""
    if not 0 <= start <= 1:
        raise RecipeError(
            f"quantize.start: expected a value in [0, 1], got {start}. Use 0.7 for the last 30 %, or 1 to quantise "
            "after training."
        )
    if start < 1 and not start <= freeze <= 1:
        raise RecipeError(
            f"quantize.freeze_batchnorm: expected a value in [{start}, 1], got {freeze}. "
            "Freeze after quantization has started."
        )
    most = round(freeze - start, 9) if start < 1 else 0.0
    if not 0 <= observe <= most:
        raise RecipeError(
            f"quantize.observe: expected a value in [0, {most:g}], from start to freeze_batchnorm, got {observe}. "
            "Use 0.05, say, or leave it out."
        )
    if observe > 0 and round(start + observe, 9) >= 1:
        raise RecipeError(
            f"quantize.observe: expected a value below {round(1 - start, 9):g}, so that training rounds before it "
            f"ends, got {observe}. Use 0.05, say, or leave it out."
        )


def _check_stages(stages: Stages, assignment: Assignment, start: float, freeze: float) -> None:
    """Make sure that bits fall while ranges are learned, to those of the scheme."""
    if start == 1:
        raise RecipeError(
            "quantize.progressive: expected training in integers, got start 1. Set start below 1, or leave it out."
        )
    if not any(map(_has_few_bits, assignment.schemes)):
        names = ", ".join(scheme.name for scheme in assignment.schemes)
        raise RecipeError(
            f"quantize.progressive: expected a scheme of fewer than 8 bits, since others take no part, got {names}. "
            "Leave it out, or choose w4a8, say."
        )
    scheme = assignment.scheme
    if stages.bits[-1] != scheme.weight_bits:
        raise RecipeError(
            f"quantize.progressive: expected {scheme.weight_bits} bits in the end, those of scheme {scheme.name!r}, "
            f"got {stages.bits[-1]}. Change one of the two."
        )
    if not start <= stages.at[0] <= stages.at[-1] <= freeze:
        raise RecipeError(
            f"quantize.progressive.at: expected values in [{start}, {freeze}], from start to freeze_batchnorm, got "
            f"{list(stages.at)}. Ranges stand still on the last bits only."
        )


def _has_few_bits(scheme: Scheme) -> bool:
    return any(bits is not None and bits < 8 for bits in (scheme.weight_bits, scheme.activation_bits))


def _check_fallback(fallback: str, assignment: Assignment, **others: bool) -> None:
    if fallback != "parametrize":
        raise RecipeError(f"quantize.fallback: expected parametrize or null, got {fallback!r}. Choose one.")
    check_schemes(assignment)
    if given := [f"quantize.{key}" for key, value in others.items() if value]:
        raise RecipeError(
            f"quantize.fallback: expected none of what needs a graph beside it, got {', '.join(given)}. "
            "Leave one of the two out."
        )

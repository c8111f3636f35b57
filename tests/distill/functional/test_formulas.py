"""Every formula against the papers' sums: values, gradients, half precision, and what must hold for any input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.distill import functional as F
from compress.errors import RecipeError
from tests.distill.functional import references as R

T = 2.5
MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, True, True]])
TARGETS = torch.tensor([0, 3, -100])
KNOWN = torch.tensor([[0.3, -1.0], [math.nan, 0.0], [2.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
MARGIN = torch.tensor([-0.2, -0.7, 0.0], dtype=torch.float64)
VARIANCE = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A formula, its reference, and the shapes of student and teacher."""

    formula: Callable[[Tensor, Tensor], Tensor]
    reference: Callable[[Tensor, Tensor], float]
    student: tuple[int, ...]
    teacher: tuple[int, ...] = ()
    zero_when_equal: bool = True
    positive: bool = False


CASES = {
    "soft_target": Case(lambda s, t: F.soft_target(s, t, temperature=T), lambda s, t: R.soft_target(s, t, T), (3, 5)),
    "standardized_soft_target": Case(
        lambda s, t: F.standardized_soft_target(s, t, temperature=T),
        lambda s, t: R.standardized_soft_target(s, t, T),
        (3, 5),
    ),
    "decoupled": Case(
        lambda s, t: F.decoupled(s, t, TARGETS, alpha=0.7, beta=3.0, temperature=T),
        lambda s, t: R.decoupled(s, t, TARGETS, 0.7, 3.0, T),
        (3, 5),
    ),
    "dist": Case(
        lambda s, t: F.dist(s, t, beta=0.7, gamma=2.0, temperature=T), lambda s, t: R.dist(s, t, 0.7, 2.0, T), (4, 5)
    ),
    "logit_mse": Case(F.logit_mse, R.logit_mse, (3, 5)),
    "soft_labels": Case(
        lambda s, t: F.soft_labels(s, t, temperature=T),
        lambda s, t: R.soft_labels(s, t, T),
        (3, 5),
        zero_when_equal=False,
    ),
    "multi_label": Case(lambda s, t: F.multi_label(s, t, temperature=T), lambda s, t: R.multi_label(s, t, T), (3, 5)),
    "bounded_regression": Case(
        lambda s, t: F.bounded_regression(s, t, KNOWN, margin=0.1),
        lambda s, t: R.bounded_regression(s, t, KNOWN, 0.1),
        (4, 2),
        zero_when_equal=False,
    ),
    "token_soft_target": Case(
        lambda s, t: F.token_soft_target(s, t, MASK, temperature=T),
        lambda s, t: R.token_soft_target(s, t, MASK, T),
        (3, 4, 5),
    ),
    "cosine_embedding": Case(
        lambda s, t: F.cosine_embedding(s, t, MASK), lambda s, t: R.cosine_embedding(s, t, MASK), (3, 4, 5)
    ),
    "hidden_states": Case(
        lambda s, t: F.hidden_states(s, t, MASK), lambda s, t: R.hidden_states(s, t, MASK), (3, 4, 5)
    ),
    "attention_maps": Case(
        lambda s, t: F.attention_maps(s, t, MASK), lambda s, t: R.attention_maps(s, t, MASK), (3, 2, 4, 4)
    ),
    "self_attention_relation": Case(
        lambda s, t: F.self_attention_relation(s, t, num_heads=2, mask=MASK),
        lambda s, t: R.self_attention_relation(s, t, MASK, 2),
        (3, 4, 4),
        (3, 4, 6),
    ),
    "hint": Case(F.hint, R.hint, (2, 3, 4, 4)),
    "attention_transfer": Case(
        lambda s, t: F.attention_transfer(s, t, power=2.0),
        lambda s, t: R.attention_transfer(s, t, 2.0),
        (2, 3, 4, 4),
        (2, 5, 4, 4),
    ),
    "similarity_preserving": Case(F.similarity_preserving, R.similarity_preserving, (4, 3, 2, 2), (4, 5, 3, 3)),
    "neuron_selectivity_linear": Case(
        lambda s, t: F.neuron_selectivity(s, t, kernel="linear"),
        lambda s, t: R.neuron_selectivity(s, t, "linear"),
        (2, 3, 2, 2),
        (2, 4, 2, 2),
    ),
    "neuron_selectivity_polynomial": Case(
        F.neuron_selectivity, lambda s, t: R.neuron_selectivity(s, t, "polynomial"), (2, 3, 2, 2), (2, 4, 2, 2)
    ),
    "neuron_selectivity_gaussian": Case(
        lambda s, t: F.neuron_selectivity(s, t, kernel="gaussian"),
        lambda s, t: R.neuron_selectivity(s, t, "gaussian"),
        (2, 3, 2, 2),
        (2, 4, 2, 2),
    ),
    "flow": Case(
        lambda s, t: F.flow(s, s[:, :2, ::2, ::2], t, t[:, :2, ::2, ::2]),
        lambda s, t: R.flow(s, s[:, :2, ::2, ::2], t, t[:, :2, ::2, ::2]),
        (2, 3, 4, 4),
    ),
    "overhaul": Case(
        lambda s, t: F.overhaul(s, t, MARGIN),
        lambda s, t: R.overhaul(s, t, MARGIN),
        (2, 3, 3, 3),
        zero_when_equal=False,
    ),
    "hierarchical_context": Case(F.hierarchical_context, R.hierarchical_context, (2, 2, 8, 8)),
    "relational_distance": Case(F.relational_distance, R.relational_distance, (4, 3), (4, 5)),
    "relational_angle": Case(F.relational_angle, R.relational_angle, (4, 3), (4, 5)),
    "correlation_congruence": Case(
        lambda s, t: F.correlation_congruence(s, t, gamma=0.4, order=2),
        lambda s, t: R.correlation_congruence(s, t, 0.4, 2),
        (4, 3),
        (4, 5),
    ),
    "probabilistic_transfer": Case(F.probabilistic_transfer, R.probabilistic_transfer, (4, 3), (4, 5)),
    "variational": Case(
        lambda s, t: F.variational(t, s, VARIANCE),
        lambda s, t: R.variational(s, t, VARIANCE),
        (2, 3, 2, 2),
        zero_when_equal=False,
    ),
    "noise_contrastive": Case(
        lambda s, t: F.noise_contrastive(s, t, num_samples=50),
        lambda s, t: R.noise_contrastive(s, t, 50),
        (4,),
        (4, 6),
        zero_when_equal=False,
        positive=True,
    ),
    "maximum_mean_discrepancy": Case(
        F.maximum_mean_discrepancy, R.maximum_mean_discrepancy, (4, 3), (5, 3), zero_when_equal=False
    ),
    "correlation_alignment": Case(
        F.correlation_alignment, R.correlation_alignment, (4, 3), (5, 3), zero_when_equal=False
    ),
}


def inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (case.student, case.teacher or case.student)
    ]
    student, teacher = (x.abs() + 0.1 for x in pair) if case.positive else pair
    return student, teacher


def test_every_formula_has_its_case() -> None:
    tested = {name for name in F.__all__ if any(case.startswith(name) for case in CASES)}
    assert set(F.__all__) - tested == {"margin_of", "margin_relu"}  # below


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_is_the_papers(name: str, seed: int) -> None:
    case = CASES[name]
    student, teacher = inputs(case, seed)
    value = case.formula(student, teacher)
    assert value.dtype == torch.float64
    assert value.shape == ()
    expected = case.reference(student, teacher)
    assert abs(expected) > 1e-4
    assert float(value) == pytest.approx(expected, rel=1e-6 if "standardized" in name else 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_gradient(name: str) -> None:
    case = CASES[name]
    student, teacher = inputs(case)
    assert torch.autograd.gradcheck(lambda s: case.formula(s, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    student, teacher = (x.to(dtype) for x in inputs(case))
    value = case.formula(student.requires_grad_(), teacher)
    assert value.dtype == torch.float32
    expected = case.reference(student.detach().double(), teacher.double())
    assert float(value) == pytest.approx(expected, rel=2e-4, abs=1e-6)
    value.backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.zero_when_equal and not case.teacher])
def test_nothing_is_to_learn_from_oneself(name: str) -> None:
    case = CASES[name]
    student, _ = inputs(case)
    assert float(case.formula(student, student)) == pytest.approx(0.0, abs=1e-9)
    assert float(case.formula(student, student + torch.linspace(0, 1, student.numel()).view_as(student))) > 0


@pytest.mark.parametrize(
    "formula",
    [F.soft_target, F.standardized_soft_target, F.logit_mse, F.soft_labels, F.multi_label, F.bounded_regression],
    ids=lambda formula: formula.__name__,
)
def test_sample_weights(formula: Any) -> None:
    torch.manual_seed(0)
    student, teacher, weights = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.rand(4).double()
    alone = [formula(student[i : i + 1], teacher[i : i + 1]) for i in range(4)]
    expected = sum(w * value for w, value in zip(weights, alone)) / 4
    assert torch.allclose(formula(student, teacher, sample_weights=weights), torch.as_tensor(expected))


def test_decoupled_with_its_parts_put_together_is_soft_targets() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 6).double(), torch.randn(1, 6).double()
    rest = 1 - float(teacher.div(T).softmax(1)[0, 2])
    value = F.decoupled(student, teacher, torch.tensor([2]), alpha=1.0, beta=rest, temperature=T)
    assert torch.allclose(value, F.soft_target(student, teacher, temperature=T))


def test_decoupled_is_finite_for_a_teacher_that_is_sure() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    value = F.decoupled(student, torch.tensor([[300.0, 0.0, -300.0]]), torch.tensor([0]), temperature=1.0)
    value.backward()
    assert bool(value.isfinite())
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_temperature_keeps_the_size_of_gradients() -> None:
    """The reason for T²: Hinton et al. 2015, section 2.1."""
    student, teacher = torch.tensor([[0.1, 0.0, -0.1]]).double(), torch.tensor([[0.2, -0.1, -0.1]]).double()
    sizes = []
    for temperature in (20.0, 40.0):
        leaf = student.clone().requires_grad_()
        F.soft_target(leaf, teacher, temperature=temperature).backward()
        assert leaf.grad is not None
        sizes.append(float(leaf.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@given(st.floats(-3, 3), st.floats(0.1, 3))
@settings(max_examples=10, deadline=None)
def test_margin_is_the_mean_of_what_is_negative(mean: float, std: float) -> None:
    value = float(F.margin_of(torch.tensor([mean]).double(), torch.tensor([std]).double()))
    if mean < 3 * std:  # beyond, the sum has no steps left where there is any mass
        assert value == pytest.approx(R.margin_of(mean, std), rel=1e-3)
    assert value <= 0


def test_margin_far_out_is_finite() -> None:
    margins = F.margin_of(torch.tensor([50.0, -50.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert bool(margins.isfinite().all())
    assert bool((margins <= 0).all())
    assert float(margins[1]) == pytest.approx(-50.0)


def test_the_taylor_series_becomes_the_gaussian_kernel() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.nn.functional.normalize(torch.randn(5, 4).double(), dim=1) for _ in range(2))
    kernels = [torch.exp(-0.4 * torch.cdist(rows, rows).square()) for rows in (student, teacher)]
    value = F.correlation_congruence(student, teacher, gamma=0.4, order=12)
    assert torch.allclose(value, (kernels[0] - kernels[1]).square().mean())


def test_padding_is_nowhere() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    wrong = torch.where(MASK[:, :, None], student, torch.tensor(math.inf))
    for formula in (F.hidden_states, F.cosine_embedding):
        assert torch.equal(formula(wrong, teacher, MASK), formula(student, teacher, MASK))
    garbage = torch.where(MASK[:, :, None], student, torch.tensor(1e4)).requires_grad_()
    for masked in (
        F.token_soft_target(garbage, teacher, MASK),
        F.self_attention_relation(garbage, teacher, num_heads=2, mask=MASK),
    ):
        (gradient,) = torch.autograd.grad(masked, garbage)
        assert bool(gradient.isfinite().all())
        assert float(gradient[~MASK].abs().max()) == 0.0
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert float(F.hidden_states(student, teacher, nothing)) == 0.0
    assert float(F.self_attention_relation(student, teacher, num_heads=2, mask=nothing)) == 0.0


@pytest.mark.parametrize(
    ("formula", "shape"),
    [
        (F.token_soft_target, (3, 4, 6)),
        (F.cosine_embedding, (3, 4, 6)),
        (F.hidden_states, (3, 4, 6)),
        (F.attention_maps, (3, 2, 4, 4)),
        (partial(F.self_attention_relation, num_heads=2), (3, 4, 6)),
    ],
)
def test_a_mask_of_the_wrong_shape(formula: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with pytest.raises(RecipeError, match=r"mask: expected shape \(3, 4\), one entry a token, got \(3, 5\)"):
        formula(x, x, mask=torch.ones(3, 5, dtype=torch.bool))


@pytest.mark.parametrize("name", ["soft_target", "decoupled", "dist", "logit_mse", "multi_label", "soft_labels"])
def test_different_classes(name: str) -> None:
    extra = (TARGETS,) if name == "decoupled" else ()
    with pytest.raises(RecipeError, match=r"got \(3, 5\) and \(3, 7\).*the last size, 5 and 7: for logits"):
        getattr(F, name)(torch.zeros(3, 5), torch.zeros(3, 7), *extra)


def test_what_else_is_refused() -> None:
    with pytest.raises(RecipeError, match="kernel: expected one of linear, polynomial, gaussian, got 'cubic'"):
        F.neuron_selectivity(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), kernel="cubic")
    with pytest.raises(RecipeError, match="num_heads: expected a divisor of the teacher's width 6, got 4"):
        F.self_attention_relation(torch.zeros(1, 2, 8), torch.zeros(1, 2, 6), num_heads=4)
    with pytest.raises(RecipeError, match=r"hint: expected student and teacher of one shape"):
        F.hint(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2))

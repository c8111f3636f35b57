from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.measure.agreement import agreement


@given(seed=st.integers(0, 999), factor=st.floats(0, 0.5), num=st.integers(1, 20))
def test_a_uniform_error_is_measured_as_it_was_made(seed: int, factor: float, num: int) -> None:
    reference = np.random.default_rng(seed).normal(size=(num, 5)).astype(np.float32)
    found = agreement(reference, reference.astype(np.float64) * (1 + factor))
    assert found.relative_error == pytest.approx(factor, abs=1e-6)
    assert found.max_abs_error == pytest.approx(factor * np.abs(reference).max(), abs=1e-6)
    assert (found.top1_agreement, found.num_samples) == (1.0, num)


def test_top1_counts_samples() -> None:
    reference = np.eye(4)
    outputs = reference[[0, 1, 2, 0]]
    assert agreement(reference, outputs).top1_agreement == 0.75


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_agrees_with_nothing(bad: float) -> None:
    outputs = np.ones((2, 3))
    outputs[1, 1] = bad
    found = agreement(np.ones((2, 3)), outputs)
    assert math.isinf(found.relative_error)
    assert math.isinf(found.max_abs_error)


def test_the_same_infinity_in_both_is_no_error() -> None:
    reference = np.array([[3.0, -np.inf, 4.0], [np.inf, 0.0, 0.0]])
    found = agreement(reference, np.array([[3.0, -np.inf, 4.5], [np.inf, 0.0, 0.0]]))
    assert (found.max_abs_error, found.relative_error, found.top1_agreement) == (0.5, 0.1, 1.0)
    assert np.isinf(reference).sum() == 2  # the caller's array is as it was


@pytest.mark.parametrize("other", [np.inf, np.nan, -3.4e38, 0.0])
def test_an_infinity_against_anything_else_is_one(other: float) -> None:
    found = agreement(np.array([[1.0, -np.inf]]), np.array([[1.0, other]]))
    assert math.isinf(found.relative_error)
    assert math.isinf(found.max_abs_error)


def test_not_a_number_in_both_is_an_error() -> None:
    values = np.array([[1.0, np.nan]])
    assert math.isinf(agreement(values, values).relative_error)


@pytest.mark.parametrize("kind", [np.complex64, np.complex128])
def test_imaginary_parts_count(kind: type) -> None:
    reference: np.ndarray = np.array([[3 + 4j, 0], [0, 12j]], kind)
    found = agreement(reference, reference.conj())
    assert (found.max_abs_error, found.top1_agreement) == (24, 1.0)
    assert found.relative_error == pytest.approx(np.hypot(8, 24) / 13)
    assert agreement(reference, reference).relative_error == 0


def test_shapes_must_be_alike() -> None:
    with pytest.raises(ValueError, match=r"expected outputs of shape \(2, 3\), got \(1, 3\)"):
        agreement(np.ones((2, 3)), np.ones((1, 3)))

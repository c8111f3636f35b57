from __future__ import annotations

import numpy as np

from compress.export.gates import FLOAT_TOLERANCE, Gates, failures
from compress.export.parity import Parity
from compress.export.targets import Census
from compress.measure.agreement import Agreement, agreement

GOOD = Agreement(0.01, 0.01, 1.0, 100)
EXACT = Agreement(0.0, FLOAT_TOLERANCE / 2, 1.0, 100)


def reasons(
    batches: Agreement = GOOD, singles: Agreement = GOOD, census: Census | None = None, *, quantized: bool = True
) -> str:
    return "\n".join(failures("aoti", Gates(0.1, 0.98, 0.5), census, Parity(batches, singles), quantized=quantized))


def test_good_targets_pass() -> None:
    assert reasons(census=Census(5, 5)) == ""
    assert reasons(EXACT, EXACT, Census(0, 9), quantized=False) == ""


def test_each_gate_names_target_figure_and_setting() -> None:
    message = reasons(batches=Agreement(1.0, 0.2, 0.9, 100), census=Census(4, 5))
    assert "aoti: expected a relative error of at most 0.1 (export.max_relative_error), got 0.2 on 100" in message
    assert "(export.min_top1_agreement), got 0.9" in message
    assert "(export.min_int8_fraction), got 0.444 in 4 of 9 kernels" in message


def test_a_batch_of_one_is_judged_by_itself() -> None:
    assert "one by one" in reasons(singles=Agreement(1.0, 0.2, 1.0, 16))


def test_floats_must_agree_tightly() -> None:
    message = reasons(GOOD, EXACT, quantized=False)
    assert "at most 0.0001 (in float32 whatever export.max_relative_error allows), got 0.01" in message


def test_the_limit_that_is_named_is_the_one_that_applies() -> None:
    (message,) = failures("eager", Gates(1e-6), None, Parity(EXACT, Agreement(0, 0, 1, 9)), quantized=False)
    assert "at most 1e-06 (export.max_relative_error), got" in message
    assert not list(failures("eager", Gates(), None, Parity(GOOD, GOOD), quantized=False, exact=False))


def test_not_a_number_fails() -> None:
    wanted = np.ones((4, 3))
    assert "relative error" in reasons(batches=agreement(wanted, np.full((4, 3), np.nan)))


def test_no_kernels_at_all_is_no_int8() -> None:
    assert "min_int8_fraction" in reasons(census=Census(0, 0))

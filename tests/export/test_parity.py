from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import ExportError, ExportSkippedError
from compress.export.parity import check_parity, other_sizes, reference_outputs
from compress.surgery.lengths import Length

INPUTS = torch.arange(200.0).reshape(100, 2)
WANTED = INPUTS.numpy() * 3


class Engine:
    takes = "numpy"
    threads = 1

    def __init__(self, run: Callable[[np.ndarray], np.ndarray]) -> None:
        self._run = run

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        return [self._run(inputs[0])]


def fixed_batch(x: np.ndarray) -> np.ndarray:
    if len(x) != 63:
        raise RuntimeError("expected 63 rows\nand a long trace")
    return x * 3


def test_agreement_in_batches_and_one_by_one() -> None:
    parity = check_parity(Engine(lambda x: x * 3), WANTED, [INPUTS])
    assert (parity.batches.max_abs_error, parity.batches.num_samples) == (0, 100)
    assert (parity.singles.max_abs_error, parity.singles.num_samples) == (0, 16)


def test_an_engine_that_is_wrong_for_single_samples_is_caught() -> None:
    parity = check_parity(Engine(lambda x: x * 3 if len(x) > 1 else -x), WANTED, [INPUTS])
    assert parity.batches.relative_error == 0
    assert parity.singles.relative_error > 1


def test_a_fixed_batch_size_is_caught() -> None:
    with pytest.raises(
        ExportSkippedError, match=r"Engine: expected a run at batch size 63, got: expected 63 rows\. Leave"
    ):
        check_parity(Engine(fixed_batch), WANTED, [INPUTS])


def test_outputs_of_another_shape_are_caught() -> None:
    with pytest.raises(ExportError, match=r"expected outputs of shape \(100, 2\).*got \(100, 1\)"):
        check_parity(Engine(lambda x: x[:, :1]), WANTED, [INPUTS])


def test_reference_outputs_are_those_of_the_module_in_order() -> None:
    found = reference_outputs(lambda x: x * 3, [INPUTS])
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, WANTED)


def test_no_inputs_are_refused() -> None:
    with pytest.raises(ExportError, match="at least one input"):
        reference_outputs(lambda x: x, [INPUTS[:0]])


def test_a_size_that_the_network_refuses_is_named() -> None:
    def short(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 3:
            raise RuntimeError("no more than three\nand a long trace")
        return x.sum(1, keepdim=True)

    with pytest.raises(ExportError, match=r"^lengths: expected .* sizes of 4 in dimension 1, got no more than three\."):
        other_sizes(short, [INPUTS], [Length()])

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.export.targets import ExportSkippedError, litert
from compress.runtime.engines import make_engine
from compress.surgery.capture import export_program
from tests.export.networks import KINDS
from tests.export.programs import floating, quantized
from tests.export.targets.checks import Determinant, check_outputs, check_serving, check_threads

pytest.importorskip("litert_torch", reason="the extra `litert` is not installed")


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_module(kind: str, tmp_path: Path) -> None:
    floats = check_outputs(litert, "litert", kind, tmp_path)["floats"]
    assert (floats.int8_kernels, floats.conversions) == (0, 0)


def test_convolutions_of_a_residual_net_become_integer_kernels(tmp_path: Path) -> None:
    census = litert.build(quantized().program, tmp_path / litert.FILE)
    # What comes out of the last layer is not quantised.
    assert census.details == {"CONV_2D int8": 5, "DEPTHWISE_CONV_2D int8": 1, "FULLY_CONNECTED float32": 1}
    engine = make_engine("litert", tmp_path / litert.FILE, num_threads=1)
    assert engine.threads == 1
    check_threads(engine, quantized().inputs)


def test_an_artefact_serves(tmp_path: Path) -> None:
    assert check_serving("litert", floating(), tmp_path).engine == "litert"


def test_what_litert_does_not_take_is_left_out_with_a_reason(tmp_path: Path) -> None:
    program = export_program(Determinant(), [torch.randn(2, 3, 3)])
    with pytest.raises(ExportSkippedError, match=r"litert: expected a program that it converts, got: "):
        litert.build(program, tmp_path / litert.FILE)
    assert not (tmp_path / litert.FILE).exists()

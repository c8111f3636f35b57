from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.export.targets import ExportSkippedError, tvm
from compress.runtime.engines import make_engine
from compress.runtime.requirements import why_not
from compress.surgery.capture import export_program
from tests.export.networks import KINDS
from tests.export.programs import floating
from tests.export.targets.checks import Determinant, check_outputs, check_serving, check_threads

pytest.importorskip("tvm", reason="the extra `tvm` is not installed")


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_module(kind: str, tmp_path: Path) -> None:
    for census in check_outputs(tvm, "tvm", kind, tmp_path).values():
        assert census.int8_kernels == 0
        assert census.float_kernels > 0


def test_threads_have_machines_of_their_own(tmp_path: Path) -> None:
    tvm.build(floating().program, tmp_path / tvm.FILE)
    engine = make_engine("tvm", tmp_path / tvm.FILE, num_threads=1)
    assert engine.threads == 1
    check_threads(engine, floating().inputs)


def test_an_artefact_serves_and_says_what_it_needs(tmp_path: Path) -> None:
    target = check_serving("tvm", floating(), tmp_path).manifest.targets["tvm"]
    assert "torch" not in target.requires
    assert why_not(target.requires) is None
    assert "built with apache-tvm 0.1" in str(why_not({**target.requires, "versions": {"apache-tvm": "0.1"}}))


def test_what_tvm_does_not_take_is_left_out_with_a_reason(tmp_path: Path) -> None:
    program = export_program(Determinant(), [torch.randn(2, 3, 3)])
    with pytest.raises(ExportSkippedError, match=r"tvm: expected a program that TVM compiles, got: "):
        tvm.build(program, tmp_path / tvm.FILE)
    assert not (tmp_path / tvm.FILE).exists()

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compress.export.targets import ExportSkippedError, tvm
from compress.runtime.engines import make_engine
from compress.runtime.engines.tvm import TVMEngine
from compress.runtime.requirements import why_not
from compress.surgery.capture import export_program
from compress.surgery.lengths import Length
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


@pytest.mark.slow
def test_a_tuned_function_serves_batches_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    inputs = torch.randn(3, 3, 8, 8)
    tvm.build(export_program(net, [inputs]), tmp_path / tvm.FILE, trials=6)
    engine = make_engine("tvm", tmp_path / tvm.FILE, num_threads=1)
    for batch in (inputs, inputs[:1]):
        (found,) = engine([batch.numpy()])
        torch.testing.assert_close(torch.from_numpy(found), net(batch).detach(), rtol=1e-4, atol=1e-5)
    assert isinstance(engine, TVMEngine)
    functions = engine._machines.functions
    assert functions[True] is not functions[False]


def test_lengths_are_not_tuned(tmp_path: Path) -> None:
    program = export_program(nn.Linear(4, 2).eval(), [torch.randn(2, 6, 4)], lengths=[Length(largest=9)])
    with pytest.raises(ExportSkippedError, match="tvm: expected nothing but the batch to vary, to tune, got lengths"):
        tvm.build(program, tmp_path / tvm.FILE, trials=4)


def test_what_tvm_does_not_take_is_left_out_with_a_reason(tmp_path: Path) -> None:
    program = export_program(Determinant(), [torch.randn(2, 3, 3)])
    with pytest.raises(ExportSkippedError, match=r"tvm: expected a program that TVM compiles, got: "):
        tvm.build(program, tmp_path / tvm.FILE)
    assert not (tmp_path / tvm.FILE).exists()

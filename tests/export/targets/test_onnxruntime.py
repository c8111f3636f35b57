from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.export.onnx import translate
from compress.export.products import products
from compress.export.targets import ExportSkippedError, onnxruntime
from compress.surgery.capture import export_program
from tests.export.programs import floating, quantized


def test_every_layer_of_a_residual_net_becomes_an_integer_kernel(tmp_path: Path) -> None:
    census = onnxruntime.build(quantized().program, tmp_path / onnxruntime.FILE)
    assert (census.int8_kernels, census.float_kernels) == (7, 0)
    assert census.details["QLinearConv"] == 6
    # One for the input; were there more, values would go to floats and back in between.
    assert census.details["QuantizeLinear"] == 1


def test_a_float_program_has_float_kernels(tmp_path: Path) -> None:
    census = onnxruntime.build(floating().program, tmp_path / onnxruntime.FILE)
    assert (census.int8_kernels, census.float_kernels) == (0, 7)


def test_the_file_is_alone_and_holds_no_paths(tmp_path: Path) -> None:
    path = tmp_path / onnxruntime.FILE
    onnxruntime.build(quantized().program, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [onnxruntime.FILE]
    assert b"site-packages" not in path.read_bytes()


def test_what_does_not_fit_into_one_file_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translate, "_LARGEST", 100)
    with pytest.raises(ExportSkippedError, match="at most 100 bytes"):
        onnxruntime.build(quantized().program, tmp_path / onnxruntime.FILE)


class Products(nn.Module):
    """One product of matrices, and one element by element, both by ``einsum``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nij,nkj->nik", x, torch.einsum("nij,nj->nij", x, x[:, 0]))


def test_a_product_element_by_element_is_no_kernel(tmp_path: Path) -> None:
    program = export_program(Products(), [torch.randn(2, 3, 5)])
    census = onnxruntime.build(program, tmp_path / onnxruntime.FILE)
    assert (len(products(program)), census.float_kernels) == (1, 1)


class Quantile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.erfinv(x.clamp(-0.9, 0.9))


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    program = export_program(Quantile(), [torch.randn(2, 3)])
    with pytest.raises(ExportSkippedError, match=r"^onnxruntime: expected operators that ONNX has, .*erf_?inv"):
        onnxruntime.build(program, tmp_path / onnxruntime.FILE)
    assert not list(tmp_path.iterdir())

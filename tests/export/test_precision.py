from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ExportError
from compress.export import ExportSkippedError, Gates, export_artifact
from compress.export.gates import FLOAT_TOLERANCE
from compress.export.passes import clean_up
from compress.export.precision import in_precision
from compress.surgery.capture import export_program
from tests.export.programs import floating, quantized

BOTH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


class Sentences(nn.Module):
    """Tokens and a mask, through attention, an LSTM, a norm and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.projection = nn.Embedding(11, 32), nn.Linear(32, 96)
        self.norm, self.lstm, self.head = nn.LayerNorm(32), nn.LSTM(32, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(tokens)
        lowest = torch.finfo(torch.float32).min
        bias = torch.zeros(mask.shape, dtype=torch.float32).masked_fill(mask == 0, lowest)[:, None, None]
        parts = self.projection(x).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=bias)
        x = self.norm(x + seen.transpose(1, 2).flatten(2))
        return self.head(self.lstm(x)[0][:, -1]).softmax(-1, dtype=torch.float32)


def sentences() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    mask = torch.ones(6, 7, dtype=torch.int64)
    mask[2:, 4:] = 0
    return Sentences().eval(), [torch.randint(0, 11, (6, 7)), mask]


@BOTH
def test_a_convolutional_program_stays_close(dtype: torch.dtype) -> None:
    program, reference, inputs = floating()
    half = in_precision(program, dtype).module(check_guards=False)
    found, wanted = half(inputs), reference(inputs)
    assert found.dtype == torch.float32
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_masked_attention_and_recurrence_stay_close(dtype: torch.dtype) -> None:
    network, inputs = sentences()
    program, _ = clean_up(export_program(network, inputs))
    found, wanted = in_precision(program, dtype).module(check_guards=False)(*inputs), network(*inputs)
    assert found.isfinite().all()
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 10 * torch.finfo(dtype).eps


@BOTH
def test_nothing_is_computed_in_float32(dtype: torch.dtype) -> None:
    network, inputs = sentences()
    half = in_precision(export_program(network, inputs), dtype)
    assert {value.dtype for value in half.state_dict.values()} == {dtype}
    values = [(node, node.meta["val"]) for node in half.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert [node.target for node, value in values if value.dtype == torch.float32] == [torch.ops.aten.to.dtype]


def test_the_program_given_is_left_as_it_is() -> None:
    program, reference, inputs = floating()
    before = {name: value.clone() for name, value in program.state_dict.items()}
    in_precision(program, torch.float16)
    assert all(value.dtype == torch.float32 for value in program.state_dict.values())
    assert all(torch.equal(before[name], value) for name, value in program.state_dict.items())
    assert torch.allclose(program.module(check_guards=False)(inputs), reference(inputs), atol=1e-6)


@BOTH
def test_the_batch_stays_dynamic(dtype: torch.dtype) -> None:
    half = in_precision(floating().program, dtype).module(check_guards=False)
    assert [len(half(floating().inputs[:num])) for num in (1, 2, 63)] == [1, 2, 63]


def test_too_large_a_constant_becomes_the_largest() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("many", torch.tensor([1e6, -1e6, torch.inf]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.minimum(x, self.get_buffer("many"))

    x = torch.full((2, 3), torch.inf)
    found = in_precision(export_program(Scaled(), [x]), torch.float16).module(check_guards=False)(x)
    assert found[0].tolist() == [65504, -65504, torch.inf]


class Made(nn.Module):
    """Floats that no input and no weight gives: zeros, and the quotient of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = mask / mask.sum(1, keepdim=True)
        return self.fc(torch.zeros(x.shape[0], 4) + x) + self.fc(weights)


@BOTH
def test_floats_that_operators_begin_are_halved(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network, inputs = Made().eval(), [torch.randn(5, 4), torch.randint(1, 3, (5, 4))]
    found = in_precision(export_program(network, inputs), dtype).module(check_guards=False)(*inputs)
    wanted = network(*inputs)
    assert found.dtype == torch.float32
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 10 * torch.finfo(dtype).eps


def test_a_quantized_program_is_skipped() -> None:
    with pytest.raises(ExportSkippedError, match="bfloat16: expected a network in floats, got a quantised one"):
        in_precision(quantized().program, torch.bfloat16)


class Halved(nn.Module):
    """A network whose weights are in half precision, with ends in any."""

    def __init__(self, inside: torch.dtype, outside: torch.dtype) -> None:
        super().__init__()
        self.fc, self.outside = nn.Linear(64, 4, dtype=inside), outside

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.to(self.fc.weight.dtype)).to(self.outside)


def test_networks_of_half_precision_pass_by_the_limit_of_gates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = Halved(torch.bfloat16, torch.float32).eval(), torch.randn(70, 64)
    program = export_program(network, [x[:2]])
    given: dict[str, Any] = {"targets": ["openvino"], "reference": network, "held_out": [x]}
    error = export_artifact(program, tmp_path / "a", **given).targets["openvino"].agreement["relative_error"]
    assert FLOAT_TOLERANCE < error < 0.01  # sums in float32, where the network rounds each
    with pytest.raises(ExportError, match=r"at most 0\.0002 \(export\.max_relative_error\), got"):
        export_artifact(program, tmp_path / "b", gates=Gates(max_relative_error=2e-4), **given)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_ends_that_numpy_does_not_have_are_refused_by_name(tmp_path: Path, dtypes: tuple[torch.dtype, ...]) -> None:
    network, x = Halved(torch.float32, dtypes[1]).eval(), torch.randn(4, 64).to(dtypes[0])
    name = "x" if dtypes[0] == torch.bfloat16 else "output"
    program = export_program(network, [x])
    with pytest.raises(ExportError, match=rf"{name}: expected a dtype that numpy has, got bfloat16\. Cast at the ends"):
        export_artifact(program, tmp_path / "a", targets=["eager"], reference=network, held_out=[x])

"""Sequences of any length within a range, from capture to what every engine gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ArtifactError, ExportError, ExportSkippedError
from compress.export import convert, export_artifact
from compress.export.targets import TARGETS, WITH_LENGTHS
from compress.models import LSTMClassifier
from compress.quantize import calibrate, prepare
from compress.quantize import convert as to_integers
from compress.runtime import load, read_manifest
from compress.runtime.engines import ENGINES, missing_package
from compress.runtime.manifest import Range
from compress.surgery.capture import export_program
from compress.surgery.lengths import Length
from tests.export.networks import Transformer

HERE = [name for name in ENGINES if name in WITH_LENGTHS and missing_package(name) is None]
LENGTH = Length(1, 2, 24)


class Masked(nn.Module):
    """A block of attention over tokens, of which some are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(11, 16), nn.Linear(16, 48)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, mask[:, None, None].bool())
        x = self.norm(x + mixed.transpose(1, 2).flatten(2)) * mask[..., None]
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))


class Made(NamedTuple):
    network: nn.Module
    inputs: Callable[[int, int], list[Tensor]]


def _tokens(num: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    ends = torch.randint(1, length + 1, (num, 1), generator=generator)
    return [
        torch.randint(11, (num, length), generator=generator),
        (torch.arange(length) < ends).to(torch.int64),
    ]


@cache
def made(kind: str) -> Made:
    torch.manual_seed(0)
    if kind == "lstm":
        return Made(LSTMClassifier(3, 5, 8, 2).eval(), lambda num, length: [torch.randn(num, length, 3)])
    return Made(Masked().eval(), _tokens)


@pytest.fixture(scope="module", params=["lstm", "transformer"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    network, inputs = made(request.param)
    path = tmp_path_factory.mktemp(request.param) / "artifact"
    held_out = inputs(20, 9)
    program = export_program(network, [value[:2] for value in held_out], lengths=[LENGTH])
    export_artifact(program, path, targets=HERE, reference=network, held_out=held_out)
    return request.param, path


def test_the_manifest_says_the_range_and_where_parity_was_checked(served: tuple[str, Path]) -> None:
    manifest = read_manifest(served[1])
    for spec in manifest.inputs:
        assert spec.shape[:2] == (None, None)
        assert spec.ranges == {1: Range("size1", 2, 24, 9)}
    assert list(manifest.targets) == HERE
    for target in manifest.targets.values():
        errors = target.agreement["relative_error_at"]
        assert list(errors) == ["2 in dimension 1", "24 in dimension 1"]
        assert max(errors.values()) < 1e-4


@pytest.mark.parametrize("engine", HERE)
def test_every_engine_serves_every_length(served: tuple[str, Path], engine: str) -> None:
    network, inputs = made(served[0])
    model = load(served[1], engine=engine)
    for num, length in ((1, 2), (3, 17), (5, 24)):
        given = inputs(num, length)
        with torch.no_grad():
            torch.testing.assert_close(model(*given), network(*given), atol=1e-5, rtol=1e-4)
    assert model.benchmark((2,), seconds=0.01)[0]["p50_ms"] > 0


@pytest.mark.parametrize("length", [1, 25])
def test_other_lengths_are_an_error_that_names_them(served: tuple[str, Path], length: int) -> None:
    kind, path = served
    name = read_manifest(path).inputs[0].name
    with pytest.raises(ArtifactError, match=f"{name}: expected a size from 2 to 24 in dimension 1, got {length}"):
        load(path, engine="onnxruntime")(*made(kind).inputs(2, length))


def test_a_target_is_added_with_the_same_lengths(served: tuple[str, Path]) -> None:
    kind, path = served
    manifest = convert(path, ["onnxruntime"], replace=True)
    assert manifest.inputs == read_manifest(path).inputs
    assert len(manifest.targets["onnxruntime"].agreement["relative_error_at"]) == 2
    given = made(kind).inputs(3, 13)
    with torch.no_grad():
        wanted = made(kind).network(*given)
    torch.testing.assert_close(load(path, engine="onnxruntime")(*given), wanted, atol=1e-5, rtol=1e-4)


def test_inputs_of_different_lengths_are_refused(tmp_path: Path) -> None:
    network, inputs = made("transformer")
    held_out = inputs(4, 9)
    program = export_program(network, [value[:2] for value in held_out], lengths=[LENGTH])
    export_artifact(program, tmp_path / "a", targets=["onnxruntime"], reference=network, held_out=held_out)
    model = load(tmp_path / "a")
    tokens, mask = inputs(2, 9)
    with pytest.raises(ArtifactError, match="mask: expected a size of 9 in dimension 1, as tokens has, got 8"):
        model(tokens, mask[:, :8])
    with pytest.raises(ArtifactError, match=r"tokens: expected shape \(N, from 2 to 24\), got \(2, 9, 1\)"):
        model(tokens[..., None], mask)


def test_int8_at_every_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = Transformer().eval(), torch.randn(64, 9, 16)
    prepared = prepare(network, [x[:2]], "int8", lengths=[LENGTH])
    calibrate(prepared, [(x,)])
    prepared.eval()
    program = export_program(to_integers(prepared), [x[:2]], lengths=[LENGTH])
    manifest = export_artifact(
        program,
        tmp_path / "a",
        targets=["eager", "onnxruntime"],
        reference=prepared,
        held_out=[x],
        scheme="int8",
    )
    assert manifest.targets["onnxruntime"].census["int8_kernels"] > 0
    for length in (2, 24):
        given = torch.randn(5, length, 16)
        with torch.no_grad():
            wanted = network(given)
        outputs = load(tmp_path / "a", engine="onnxruntime")(given)
        assert float((outputs - wanted).norm() / wanted.norm()) < 0.2


def test_a_length_that_an_engine_gets_wrong_fails_the_gate(tmp_path: Path) -> None:
    network, inputs = made("lstm")
    (x,) = inputs(8, 9)
    program = export_program(network, [x[:2]], lengths=[LENGTH])

    def reference(x: Tensor) -> Tensor:
        return network(x) if x.shape[1] < 24 else network(x) + 1.0

    with pytest.raises(ExportError, match=r"eager: expected a relative error .* inputs, 24 in dimension 1"):
        export_artifact(program, tmp_path / "a", targets=["eager"], reference=reference, held_out=[x])


def test_targets_without_lengths_say_so() -> None:
    from compress.export.building import Job, build_target
    from compress.export.gates import Gates

    network, inputs = made("lstm")
    (x,) = inputs(4, 9)
    program = export_program(network, [x[:2]], lengths=[LENGTH])
    job = Job(program, [], [x], np.zeros((4, 5)), False, Gates())
    others = sorted(set(TARGETS) - WITH_LENGTHS)
    assert others
    for name in others:
        with pytest.raises(ExportSkippedError, match=f"{name}: expected fixed sizes .* dimension 1 from 2 to 24"):
            build_target(name, job, Path("nowhere"))

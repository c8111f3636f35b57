"""Sequences of any length within a range, from capture to what every engine gives."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ArtifactError, DataError, ExportError, ExportSkippedError
from compress.export import convert, export_artifact
from compress.export.targets import TARGETS, WITH_LENGTHS
from compress.measure.cost import macs
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
ENGINES_OF = {
    "lstm": [name for name in HERE if name != "aoti"],
    "transformer": HERE,
    "compiled lstm": HERE,
}
KINDS = ["lstm", "transformer", pytest.param("compiled lstm", marks=pytest.mark.slow)]


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
    if kind != "transformer":
        return Made(LSTMClassifier(3, 5, 8, 2).eval(), lambda num, length: [torch.randn(num, length, 3)])
    return Made(Masked().eval(), _tokens)


@cache
def artifact(kind: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lengths-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    network, inputs = made(kind)
    held_out = inputs(20, 9)
    program = export_program(network, [value[:2] for value in held_out], lengths=[LENGTH])
    export_artifact(program, folder / "artifact", targets=ENGINES_OF[kind], reference=network, held_out=held_out)
    return folder / "artifact"


@pytest.fixture(params=KINDS)
def served(request: pytest.FixtureRequest) -> tuple[str, Path]:
    return request.param, artifact(request.param)


@pytest.fixture
def masked() -> Path:
    return artifact("transformer")


def test_the_manifest_says_the_range_and_where_parity_was_checked(served: tuple[str, Path]) -> None:
    network, inputs = made(served[0])
    manifest = read_manifest(served[1])
    for spec in manifest.inputs:
        assert spec.shape[:2] == (None, None)
        assert spec.ranges == {1: Range("size1", 2, 24, 9)}
    assert sum(product["macs"] for product in manifest.products) == manifest.cleanup["after"]["macs"]
    assert manifest.cleanup["before"]["macs"] == macs(network, [value[:1] for value in inputs(2, 9)])
    assert list(manifest.targets) == ENGINES_OF[served[0]]
    for target in manifest.targets.values():
        errors = target.agreement["relative_error_at"]
        assert list(errors) == ["2 in dimension 1", "24 in dimension 1"]
        assert max(errors.values()) < 1e-4


@pytest.mark.parametrize(
    ("served", "engine"),
    [
        pytest.param(kind, engine, marks=[pytest.mark.slow] if kind == "compiled lstm" else [])
        for kind, engines in ENGINES_OF.items()
        for engine in engines
    ],
    indirect=["served"],
)
def test_every_engine_serves_every_length(served: tuple[str, Path], engine: str) -> None:
    network, inputs = made(served[0])
    model = load(served[1], engine=engine)
    for num, length in ((1, 2), (3, 17), (5, 24)):
        given = inputs(num, length)
        with torch.no_grad():
            torch.testing.assert_close(model(*given), network(*given), atol=1e-5, rtol=1e-4)
    assert model.benchmark((2,), seconds=0.01)[0]["p50_ms"] > 0


@pytest.mark.parametrize("engine", HERE)
def test_a_masked_batch_gives_what_each_sequence_gives_alone(masked: Path, engine: str) -> None:
    model = load(masked, engine=engine)
    tokens, mask = _tokens(6, 24)
    mask[0], mask[1] = 1, torch.arange(24) < 2
    together = model(tokens, mask)
    torch.testing.assert_close(model(tokens.where(mask > 0, 10), mask), together, atol=1e-6, rtol=1e-5)
    for row, end in enumerate(mask.sum(1).clamp(min=2).tolist()):
        alone = model(tokens[row : row + 1, :end], mask[row : row + 1, :end])
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 25])
def test_other_lengths_are_an_error_that_names_them(served: tuple[str, Path], length: int) -> None:
    kind, path = served
    name = read_manifest(path).inputs[0].name
    with pytest.raises(ArtifactError, match=f"{name}: expected a size from 2 to 24 in dimension 1, got {length}"):
        load(path, engine="onnxruntime")(*made(kind).inputs(2, length))


@pytest.mark.parametrize(
    ("served", "length"),
    [
        ("lstm", None),
        ("transformer", 13),
        pytest.param("lstm", 13, marks=pytest.mark.slow),
        pytest.param("transformer", None, marks=pytest.mark.slow),
    ],
    indirect=["served"],
)
def test_a_target_is_added_with_the_same_lengths(served: tuple[str, Path], length: int | None) -> None:
    kind, path = served
    before = read_manifest(path)
    inputs = made(kind).inputs(20, length) if length else None
    manifest = convert(path, ["onnxruntime"], inputs=inputs, replace=True)
    assert (manifest.inputs, manifest.products) == (before.inputs, before.products)
    assert len(manifest.targets["onnxruntime"].agreement["relative_error_at"]) == 2
    given = made(kind).inputs(3, 13)
    with torch.no_grad():
        wanted = made(kind).network(*given)
    torch.testing.assert_close(load(path, engine="onnxruntime")(*given), wanted, atol=1e-5, rtol=1e-4)


def test_inputs_of_different_lengths_are_refused(masked: Path) -> None:
    model = load(masked, engine="onnxruntime")
    tokens, mask = _tokens(2, 9)
    with pytest.raises(ArtifactError, match="mask: expected a size of 9 in dimension 1, as tokens has, got 8"):
        model(tokens, mask[:, :8])
    with pytest.raises(ArtifactError, match="mask: expected a size from 2 to 24 in dimension 1, got 1"):
        model(tokens, mask[:, :1])
    with pytest.raises(ArtifactError, match=r"tokens: expected shape \(N, from 2 to 24\), got \(2, 9, 1\)"):
        model(tokens[..., None], mask)


def test_inputs_to_compare_on_have_lengths_of_the_range(masked: Path, tmp_path: Path) -> None:
    network, inputs = made("transformer")
    program = export_program(network, inputs(2, 9), lengths=[LENGTH])
    tokens, mask = inputs(4, 9)
    for held_out, reason in (
        (inputs(4, 25), "tokens: expected a size from 2 to 24 in dimension 1, got 25"),
        ([tokens, mask[:, :5]], "mask: expected a size of 9 in dimension 1, as tokens has, got 5"),
    ):
        with pytest.raises(ExportError, match=reason):
            export_artifact(program, tmp_path / "a", targets=["eager"], reference=network, held_out=held_out)
        with pytest.raises(ExportError, match=reason):
            convert(masked, ["onnxruntime"], inputs=held_out, replace=True)


def test_a_length_without_a_limit(tmp_path: Path) -> None:
    network, inputs = made("lstm")
    (x,) = inputs(4, 9)
    program = export_program(network, [x[:2]], lengths=[Length(1, 2)])
    targets = ["eager", "onnxruntime"]
    manifest = export_artifact(program, tmp_path / "a", targets=targets, reference=network, held_out=[x])
    assert manifest.inputs[0].ranges == {1: Range("size1", 2, None, 9)}
    assert list(manifest.targets["eager"].agreement["relative_error_at"]) == ["2 in dimension 1", "18 in dimension 1"]
    (long,) = inputs(2, 100)
    for engine in targets:
        model = load(tmp_path / "a", engine=engine)
        with torch.no_grad():
            torch.testing.assert_close(model(long), network(long), atol=1e-5, rtol=1e-4)
        with pytest.raises(ArtifactError, match="expected a size of at least 2 in dimension 1, got 1"):
            model(long[:, :1])


def test_int8_at_every_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = Transformer().eval(), torch.randn(64, 9, 16)
    prepared = prepare(network, [x[:2]], "int8", lengths=[LENGTH])
    calibrate(prepared, [(x,), (torch.randn(8, 5, 16),)])  # of whatever length
    with pytest.raises(DataError, match=r"\(N, any, 16\) float32, got \(N, 9, 15\) float32"):
        calibrate(prepared, [(x[..., 1:],)])
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

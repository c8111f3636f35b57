from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.export import Gates, export_artifact
from compress.export.parity import check_parity, reference_outputs
from compress.export.targets import ExportSkippedError, executorch
from compress.quantize import calibrate, convert, prepare
from compress.runtime.engines import make_engine
from compress.surgery.capture import export_program
from compress.surgery.lengths import user_inputs
from tests.export.networks import Transformer, network
from tests.export.programs import quantized
from tests.export.targets.checks import check_outputs

pytest.importorskip("executorch", reason="the extra `executorch` is not installed")


@pytest.mark.parametrize(("kind", "products", "attention"), [("cnn", 4, 0), ("transformer", 5, 2)])
def test_outputs_are_those_of_the_module(kind: str, products: int, attention: int, tmp_path: Path) -> None:
    counted = check_outputs(executorch, "executorch", kind, tmp_path)
    kernels = {name: (census.int8_kernels, census.float_kernels) for name, census in counted.items()}
    assert kernels == {"floats": (0, products + attention), "integers": (products, attention)}


def test_memory_is_taken_for_the_planned_batch_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, 512, 16)
    # For as many samples as a program takes, its largest activation would need half a terabyte.
    encoder = prepare(Transformer(hidden=4096).eval(), (inputs[:2],), "int8_portable")
    calibrate(encoder, [(inputs,)])
    program = export_program(convert(encoder.eval()), (inputs[:2],))
    assert executorch.planned_batch(program) == 4
    executorch.build(program, tmp_path / executorch.FILE)
    engine = make_engine("executorch", tmp_path / executorch.FILE)
    parity = check_parity(engine, reference_outputs(encoder, [inputs]), [inputs])
    assert parity.batches.relative_error < 0.02


@pytest.mark.parametrize("batch", [1, 2])
def test_a_program_whose_activations_are_large_takes_few_samples_at_once(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = network("cnn")
    monkeypatch.setattr(executorch, "planned_batch", lambda program: batch)
    executorch.build(made.integers, tmp_path / executorch.FILE)
    wanted = reference_outputs(made.prepared, [made.inputs])
    parity = check_parity(make_engine("executorch", tmp_path / executorch.FILE), wanted, [made.inputs])
    assert parity.batches.relative_error < 0.02


def test_the_program_keeps_its_range_for_other_targets(tmp_path: Path) -> None:
    program = network("cnn").program
    ((_, value),) = user_inputs(program)
    size: Any = value.shape[0]
    before = dict(size.node.shape_env.var_to_range)
    executorch.build(program, tmp_path / executorch.FILE)
    assert size.node.shape_env.var_to_range == before


def test_every_layer_of_a_residual_net_becomes_an_integer_kernel(tmp_path: Path) -> None:
    found = executorch.build(quantized().program, tmp_path / executorch.FILE)
    assert (found.int8_kernels, found.float_kernels) == (7, 0)
    # The images; what goes from the pool to the last layer, twice, since that gives floats.
    assert found.conversions == 3
    content = (tmp_path / executorch.FILE).read_bytes()
    assert b"site-packages" not in content
    assert b"test_" not in content


def test_few_bits_run_as_int8(tmp_path: Path) -> None:
    made = network("cnn", "w4a4")
    found = executorch.build(made.integers, tmp_path / executorch.FILE)
    assert (found.int8_kernels, found.float_kernels) == (4, 0)
    wanted = reference_outputs(made.prepared, [made.inputs])
    parity = check_parity(make_engine("executorch", tmp_path / executorch.FILE), wanted, [made.inputs])
    assert parity.batches.relative_error < 0.01


def test_recurrent_layers_are_skipped_with_a_reason_and_the_others_built(tmp_path: Path) -> None:
    made = network("lstm")
    with pytest.warns(UserWarning, match="executorch: expected no recurrent layers, got lstm"):
        manifest = export_artifact(
            made.integers,
            tmp_path / "artifact",
            targets=["executorch", "eager"],
            reference=made.prepared,
            held_out=[made.inputs],
            scheme="int8_portable",
            gates=Gates(min_top1_agreement=0.9, min_int8_fraction=0),
        )
    assert list(manifest.targets) == ["eager"]
    assert "Leave the target out" in manifest.skipped["executorch"]


def test_what_cannot_be_lowered_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Unsigned activations, as they come: no kernel takes them.
    monkeypatch.setattr(executorch, "rewrite", lambda graph_module: 0)
    with pytest.raises(ExportSkippedError, match=r"executorch: expected .*eave the target out"):
        executorch.build(network("cnn").integers, tmp_path / executorch.FILE)
    assert not list(tmp_path.iterdir())


def test_batches_are_as_large_as_memory_allows() -> None:
    program = network("cnn").program
    assert executorch.planned_batch(program) == 64
    # The largest activation has 8 channels of 8 by 8.
    sample = 8 * 8 * 8 * 4
    assert executorch.planned_batch(program, memory=5 * sample) == 4
    assert executorch.planned_batch(program, memory=1) == 1


def test_what_has_no_kernel_of_integers_counts_as_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, 5, 5)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Tanh()).eval()
    prepared = prepare(network, (inputs[:2],), "int8_portable")
    calibrate(prepared, [(inputs,)])
    program = export_program(convert(prepared.eval()), (inputs[:2],))
    found = executorch.build(program, tmp_path / executorch.FILE)
    assert (found.int8_kernels, found.float_kernels) == (1, 1)
    parity = check_parity(
        make_engine("executorch", tmp_path / executorch.FILE), reference_outputs(prepared, [inputs]), [inputs]
    )
    assert parity.batches.relative_error < 0.01

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

from compress.errors import ArtifactError, ExportError
from compress.export import Gates, census, export_artifact
from compress.surgery.capture import export_program
from tests.export.networks import network
from tests.export.programs import edit


def export(program: ExportedProgram, folder: Path, **gates: Any) -> None:
    made = network("cnn")
    export_artifact(
        program,
        folder,
        targets=["eager", "onnxruntime"],
        reference=made.prepared,
        held_out=[made.inputs],
        scheme="int8_portable",
        gates=Gates(**gates),
    )


def test_the_census_is_that_of_the_compiled_graph(tmp_path: Path) -> None:
    export(network("cnn").integers, tmp_path / "a", min_int8_fraction=1.0)
    found = census(tmp_path / "a")
    assert list(found) == ["onnxruntime"]
    counted = found["onnxruntime"]
    assert (counted.int8_kernels, counted.float_kernels, counted.conversions) == (4, 0, 1)
    assert counted.int8_fraction == 1.0
    assert counted.macs == counted.int8_macs == 8 * 64 * 27 + 8 * 64 * 9 + 12 * 16 * 8 + 12 * 4
    edit(tmp_path / "a", lambda manifest: manifest["targets"]["onnxruntime"]["census"].update(more=1))
    with pytest.raises(ArtifactError, match=r"manifest\.json: expected a manifest, got .* a census with more"):
        census(tmp_path / "a")
    edit(tmp_path / "a", lambda manifest: manifest["targets"]["onnxruntime"]["census"].pop("more"))
    edit(tmp_path / "a", lambda manifest: manifest["products"][0].pop("macs"))
    with pytest.raises(ArtifactError, match=r"manifest\.json: expected a manifest, got KeyError: 'macs'"):
        census(tmp_path / "a")


def test_a_network_with_its_largest_layer_in_floats_fails_the_gate(tmp_path: Path) -> None:
    module = network("cnn").integers.module(check_guards=False)
    first = next(node for node in module.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    dequantized = first.args[0]
    first.replace_input_with(dequantized, dequantized.args[0].args[0])
    module.graph.eliminate_dead_code()
    module.recompile()
    program = export_program(module, [network("cnn").inputs[:2]])
    # Three of four kernels are left, but a third of the work: what counts is the work.
    with pytest.raises(
        ExportError, match=r"onnxruntime: expected at least 0.5 of the multiply.*got 0\.\d+ in 3 of 4 k"
    ):
        export(program, tmp_path / "b", max_relative_error=1.0)
    assert not (tmp_path / "b").exists()

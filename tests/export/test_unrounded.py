from __future__ import annotations

import torch

from compress.export.unrounded import UnroundedEngine, drop_rounding
from compress.quantize.calibrate import float_mode
from compress.runtime import load, read_manifest
from tests.export.programs import artifact, floating, quantized


def test_the_program_of_integers_becomes_the_network_in_floats() -> None:
    path = artifact() / read_manifest(artifact()).targets["eager"].file
    engine, trained = UnroundedEngine(path), quantized()
    targets = {node.target for node in engine._program.graph.nodes}
    assert not targets & {torch.ops.aten.round.default, torch.ops.aten.clamp.default}
    with torch.no_grad(), float_mode(trained.reference):
        wanted = trained.reference(trained.inputs)
    found, rounded = engine([trained.inputs])[0], load(artifact(), engine="eager")(trained.inputs)
    assert (found - wanted).norm() < 0.02 * wanted.norm()  # its weights are rounded
    assert not torch.equal(found, rounded)
    assert engine.is_float


def test_a_program_of_floats_has_nothing_to_drop() -> None:
    assert drop_rounding(floating().program.module(check_guards=False)) == 0

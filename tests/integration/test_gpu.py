"""The whole job on a GPU: pytest -m gpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import compress
import compress.cli
from compress.distill import Classification, Distiller, EarlierSelf, SoftTarget
from compress.export import Gates, export_artifact
from compress.prune import StructuredPruning
from compress.quantize import QuantizationAwareTraining
from compress.surgery import Captured, history_of
from compress.surgery.capture import export_program
from tests.integration.test_resume import KeepEach, build, fit, weights
from tests.networks import Residual, images, loader, trainer

pytestmark = pytest.mark.gpu
DEVICE = "gpu"


def fitted(
    precision: Any, settings: dict[str, Any], teacher: Any = None
) -> tuple[Distiller, QuantizationAwareTraining]:
    pl.seed_everything(0, verbose=False)
    module = Distiller(
        Residual(),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        teacher=teacher or Residual(8),
        losses=[SoftTarget(weight=0.5)],
    )
    pruning = StructuredPruning(0.5, schedule="linear", start=0.1, end=0.4, num_edits=2, round_to=4)
    qat = QuantizationAwareTraining(**{"start": 0.6, "freeze_batchnorm": 0.8, **settings})
    run = trainer(max_epochs=8, accelerator=DEVICE, devices=1, precision=precision, callbacks=[pruning, qat])
    run.fit(module, loader(), loader(seed=1, shuffle=False))
    assert torch.isfinite(run.callback_metrics["train/loss"])
    return module, qat


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"scheme": "int8_portable", "learn_steps": True}, {"scheme": "int4_weights"}, {"scheme": "fp8"}],
    ids=["int8", "learned", "int4", "fp8"],
)
def test_distils_prunes_and_quantises(precision: str, settings: dict[str, Any]) -> None:
    module, qat = fitted(precision, settings)
    assert [edit.kind for edit in history_of(module)] == ["prune", "prune", "quantize"]
    assert isinstance(module.student, Captured)
    x, _ = images(48, seed=1)
    with torch.no_grad():
        wanted = module.cpu().eval()(x)
        found = qat.converted.cpu()(x)
    assert float((wanted - found).norm() / wanted.norm()) < 0.02


def test_the_float_self_teaches() -> None:
    module, _ = fitted("bf16-mixed", {}, EarlierSelf())
    assert [edit.kind for edit in history_of(module)] == ["prune", "prune", "quantize"]


def test_what_was_trained_there_is_served_from_the_cpu(tmp_path: Path) -> None:
    module, qat = fitted("bf16-mixed", {})
    x, _ = images(48, seed=1)
    program = export_program(qat.converted, [x[:2].to(next(iter(qat.converted.state_dict().values())).device)])
    gates = Gates(max_relative_error=0.02)
    targets = ["eager", "onnxruntime"]
    export_artifact(
        program, tmp_path / "a", targets=targets, reference=qat.converted, held_out=[x], scheme="int8", gates=gates
    )
    model = compress.load(tmp_path / "a", "cpu")
    with torch.no_grad():
        wanted = module.cpu().eval()(x)
    assert float((model(x) - wanted).norm() / wanted.norm()) < 0.02


def test_resumes_in_the_middle_of_it_all(tmp_path: Path) -> None:
    whole, again = build(), build(seed=99)
    fit(whole, tmp_path / "last.ckpt", extra=(KeepEach(tmp_path / "last.ckpt"),), accelerator=DEVICE)
    fit(again, tmp_path / "again.ckpt", resume=tmp_path / "before_epoch_3.ckpt", accelerator=DEVICE)
    assert history_of(again) == history_of(whole)
    expected, got = weights(whole), weights(again)
    for name in expected:  # kernels on a GPU add in any order
        assert torch.allclose(expected[name], got[name].to(expected[name].device), rtol=1e-2, atol=1e-3), name


def test_a_recipe_runs_to_its_report(tmp_path: Path) -> None:
    words = ["run", "digits", "--run_dir", str(tmp_path / "run"), "--teacher.max_epochs", "4"]
    words += ["--teacher.model.init_args.width", "48", "--teacher.model.init_args.blocks", "[1, 1, 1]"]
    words += ["--trainer.max_epochs", "12", "--trainer.accelerator", DEVICE, "--trainer.precision", "bf16-mixed"]
    words += ["--trainer.enable_progress_bar", "false", "--export.min_top1_agreement", "0.9"]
    words += ["--export.targets", "[eager, onnxruntime]"]
    assert compress.cli.main(words) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]][-1] == "int8 artefact"
    assert compress.cli.main(["run", "--resume", str(tmp_path / "run")]) == 0

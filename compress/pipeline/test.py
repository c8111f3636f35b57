"""Judge every stage once on the test split."""

from __future__ import annotations

import pytorch_lightning as pl
from rich.text import Text
from torch import nn

from compress.distill import Distiller
from compress.pipeline.rundir import RunDirectory

__all__ = ["test", "test_network"]


def test(run: RunDirectory) -> None:
    """Measure the task's metrics of every stage on the test split; the last one as the integer network.

    Leaves ``test.json``: ``{stage: {metric: value}}``.
    """
    run.console.rule(Text("test", "bold"))
    metrics = {}
    for stage in run.stages():
        metrics[stage] = test_network(run, run.deployed if stage == "final" else run.network(stage)[0])
    run.write_json("test", metrics)


def test_network(run: RunDirectory, network: nn.Module) -> dict[str, float]:
    """Return the metrics of a network on the test split, in float32 on the CPU."""
    module = Distiller(network, task=run.recipe.task, optimizer=run.recipe.optimizer)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    (result,) = trainer.test(module, datamodule=run.recipe.data, verbose=False)
    return {name.removeprefix("test/"): value for name, value in result.items()}

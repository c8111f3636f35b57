"""Run by test_ranks.py: fits on two processes; each rank writes what it ended with.

Gradients are accumulated over two batches, and an average of the weights follows. What the words after the folder name:
``edits`` prunes, then quantises; for ``learn_steps`` nothing is pruned, and steps are learned under bfloat16; for
``after`` nothing is pruned, and the network is quantised after training; for ``fallback`` one that cannot be captured
is pruned and rounded layer by layer. Last, ranges are learned from batches of which one rank has one of NaN.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging

from compress.distill import Classification, Distiller, SoftTarget, WarmupCosine
from compress.prune import StructuredPruning
from compress.quantize import QuantizationAwareTraining, prepare
from compress.quantize.training.ranks import follow_first_rank
from compress.surgery import history_of
from tests.networks import Residual, loader, trainer
from tests.quantize.ranks import SPOILT


class Locked(Residual):
    """Its code holds a lock, which torch cannot read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with threading.Lock():
            return super().forward(x)


class Compare(Callback):
    """Counts the numbers that are not equal on both ranks after each batch: parameters, statistics and ranges."""

    def __init__(self) -> None:
        self.apart: list[int] = []
        self.statistics: list[int] = []
        self.kinds: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.apart.append(num_apart(pl_module, pl_module.parameters()))
        self.kinds.append(len(history_of(pl_module)))
        if "quantize" in [edit.kind for edit in history_of(pl_module)]:
            self.statistics.append(num_apart(pl_module, pl_module.student.buffers()))


def num_apart(pl_module: pl.LightningModule, tensors: Iterable[torch.Tensor]) -> int:
    both = pl_module.all_gather(torch.cat([tensor.detach().double().flatten() for tensor in tensors]))
    assert isinstance(both, torch.Tensor)
    return int((both[0] != both[1]).sum())


def main(folder: Path, kind: str) -> None:
    pl.seed_everything(0, verbose=False)
    folder.mkdir(exist_ok=True)
    learn_steps, fallback, after = (kind == name for name in ("learn_steps", "fallback", "after"))
    quantize: dict[str, Any] = {"start": 0.6, "freeze_batchnorm": 0.9, "learn_steps": learn_steps}
    if after:
        quantize = {"start": 1, "improve": ["equalize", "adaround", "bias"], "num_batches": 2}
    module = Distiller(
        Locked() if fallback else Residual(),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        scheduler=WarmupCosine(),
        teacher=Residual(8),
        losses=[SoftTarget(weight=0.5)],
    )
    compare, average = Compare(), EMAWeightAveraging(decay=0.5)
    pruning = StructuredPruning(0.5, schedule="linear", start=0.2, end=0.4, num_edits=3, round_to=2)
    run = trainer(
        max_epochs=4 if quantize["start"] < 1 and not learn_steps else 3,
        precision="bf16-mixed" if learn_steps else "32-true",
        devices=2,
        strategy="ddp",
        accumulate_grad_batches=2,
        default_root_dir=folder,
        callbacks=[
            *([] if learn_steps or after else [pruning]),
            QuantizationAwareTraining(**quantize, fallback="parametrize" if fallback else None),
            average,
            compare,
        ],
    )
    run.fit(module, loader(num=96), loader(seed=1, shuffle=False))
    assert average._average_model is not None
    twin: Any = average._average_model.module
    torch.save(
        {
            "apart": compare.apart,
            "statistics": compare.statistics,
            "edits": compare.kinds,
            "history": history_of(module).to_list(),
            "buffers": {name: tensor.clone() for name, tensor in module.student.named_buffers()},
            "state": {name: tensor.clone() for name, tensor in module.student.named_parameters()},
            "average": {name: p.detach().clone() for name, p in twin.student.named_parameters()},
            "moments": len(run.optimizers[0].state),
        },
        folder / f"rank{run.global_rank}.pt",
    )


def seen(rank: int, spoilt: int, at: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    network = prepare(layers, [torch.randn(2, 8)], "int8").train()
    torch.manual_seed(rank)
    for number in range(4):
        x = torch.randn(12, 8)
        if (rank, number) == (spoilt, at):
            x[3, 3] = math.nan
        network(x)
        follow_first_rank(network)
    return network.state_dict()


if __name__ == "__main__":
    for word in sys.argv[2:]:
        main(Path(sys.argv[1], word), word)
    number = torch.distributed.get_rank()
    for case, (spoilt, at) in enumerate(SPOILT):
        torch.save(seen(number, spoilt, at), Path(sys.argv[1], f"spoilt{case}_rank{number}.pt"))

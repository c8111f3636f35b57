"""Where averages of weights by Lightning's SWA meet quantization.

For BatchNorm it adds an epoch without steps, in which ``nn.BatchNorm`` begins anew and takes the mean over all
batches. A graph has momenta written into it, and both its statistics and its ranges are those of the weights before the
average, which may be far from it.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.errors import EditError
from compress.quantize.parametrize import begin_rounding
from compress.quantize.training.ranks import follow_first_rank
from compress.surgery import Captured

__all__ = ["StatisticsAnew", "check_resume", "is_swa_epoch", "show_norms_to_swa"]

_BATCH_NORM = torch.ops.aten.batch_norm.default


def is_swa_epoch(trainer: pl.Trainer) -> bool:
    """Say whether this is the epoch without steps that SWA adds."""
    return trainer.fit_loop._skip_backward


def show_norms_to_swa(trainer: pl.Trainer) -> None:
    """Let SWA add its epoch for BatchNorms in graphs, too: a fit that resumes after the capture begins with one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            callback.pl_module_contains_batch_norm = _contains_norms  # type: ignore[method-assign]


def check_resume(trainer: pl.Trainer) -> None:
    """Refuse to go on within the epoch that SWA adds: Lightning would train on in it, and fail at its end.

    Raises:
        EditError: when the checkpoint is of such a place.
    """
    swas = [c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging)]  # type: ignore[attr-defined]
    if trainer.fit_loop.restarted_mid_epoch and any(trainer.current_epoch > swa.swa_end for swa in swas):
        raise EditError(
            "quantize: expected a checkpoint from before the epoch that StochasticWeightAveraging adds, got one from "
            "within it, where Lightning cannot go on. Resume from the one before."
        )


def _contains_norms(pl_module: pl.LightningModule) -> bool:
    return StochasticWeightAveraging.pl_module_contains_batch_norm(pl_module) or any(
        _statistics(module) for module in pl_module.modules()
    )


class StatisticsAnew:
    """Learns a graph's BatchNorm statistics and ranges from the beginning, in a pass over data in training mode.

    Statistics become the mean of those of batches. The first batch passes without rounding, and does not count: with
    other statistics weights are scaled otherwise before they are rounded, and ranges fit none of them yet. Where it is
    alone it passes twice.
    """

    def __init__(self) -> None:
        self._num = 0
        self._before: dict[str, Tensor] = {}
        self._inputs: tuple[Any, Any] | None = None
        self._hook: RemovableHandle | None = None

    def before(self, network: nn.Module, *, alone: bool = False) -> None:
        """Make ready for a batch.

        Args:
            network: Prepared, not frozen; of one that is no graph, statistics are left to Lightning.
            alone: Whether this batch is the only one.
        """
        if alone and isinstance(network, Captured):
            self._hook = network.register_forward_pre_hook(self._keep, with_kwargs=True)
        network.zero_grad()  # gradients of the last step are still there, and Lightning takes another by them
        self._before = {name: buffer.clone() for name, (buffer, _) in _statistics(network).items()}
        fakes: list[Any] = [module for module in network.modules() if hasattr(module, "fake_quant_enabled")]
        for fake in fakes if isinstance(network, Captured) else ():
            if fake.observer_enabled[0] and (self._num == 0 or fake.is_per_channel):
                _forget_range(fake)
            if self._num == 0:
                fake.fake_quant_enabled[0] = 0

    @torch.no_grad()
    def after(self, network: nn.Module, *, several: bool) -> None:
        """Give the batch that has passed its share.

        Args:
            network: The same.
            several: Whether there are other ranks, which get what the first has learned.
        """
        for name, (running, kept) in _statistics(network).items():
            old = self._before[name]
            if torch.equal(running, old):
                continue  # it stands still: its layer is in evaluation
            of_batch = (running - kept * old) / (1 - kept)
            running.copy_(old + (of_batch - old) / max(1, self._num))
        if self._num == 0 and isinstance(network, Captured):
            begin_rounding(network)
        self._num += 1
        if several:
            follow_first_rank(network)
        if self._hook is not None:
            self._hook.remove()
            (args, kwargs), self._inputs, self._hook = self._inputs or ((), {}), None, None
            self.before(network)
            network(*args, **kwargs)
            self.after(network, several=several)

    def _keep(self, network: nn.Module, *inputs: Any) -> None:
        self._inputs = inputs[0], inputs[1]


def _forget_range(fake: Any) -> None:
    observer = fake.activation_post_process
    if fake.is_per_channel:  # of weights, which the next pass sees whole
        observer.min_val.resize_(0)
        observer.max_val.resize_(0)
    else:
        observer.min_val.fill_(torch.inf)
        observer.max_val.fill_(-torch.inf)


def _statistics(network: nn.Module) -> dict[str, tuple[Tensor, float]]:
    """Return a graph's statistics by name, and how much of each is left when a batch has passed."""
    if not isinstance(network, Captured):
        return {}
    kept: dict[str, float] = {}
    for node in network.graph_module.graph.nodes:
        sources: Any = node.args[3:5] if node.target is _BATCH_NORM else ()
        for source in filter(None, sources):
            # Once for each time that the layer is called.
            kept[source.target] = kept.get(source.target, 1.0) * (1 - node.args[6])
    return {name: (network.graph_module.get_buffer(name), share) for name, share in kept.items() if share < 1}

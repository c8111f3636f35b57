"""Quantization-aware training as a Lightning callback."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from compress.errors import CaptureError, DataError, EditError
from compress.quantize.calibrate import calibrate
from compress.quantize.improve import improve_network, improve_prepared, in_order, rehearse_improvements
from compress.quantize.layers import make_assignment, write_assignment
from compress.quantize.parametrize import begin_rounding, freeze, set_rounding
from compress.quantize.pt2e import WAY_OUT, deployed_form, describe_inputs, example_tensors, prepare, replay_quantize
from compress.quantize.training.averaging import StatisticsAnew, check_resume, is_swa_epoch, show_norms_to_swa
from compress.quantize.training.batches import InputReader, training_batches
from compress.quantize.training.checks import check_precision, check_settings, check_training, check_unchanged
from compress.quantize.training.progressive import Stages, quantizers, set_stages
from compress.quantize.training.ranks import follow_first_rank, share, share_ranges
from compress.surgery import Captured, Edit, ModelEditor, history_of
from compress.surgery.averages import after_averages, find_averages
from compress.surgery.editor import example_inputs, progress, whole_inputs
from compress.surgery.lengths import Length, read_lengths, write_lengths
from compress.surgery.modes import modules_at_rest
from compress.surgery.samples import blaming_samples
from compress.surgery.slicing import shapes_of

__all__ = ["QuantizationAwareTraining"]


class QuantizationAwareTraining(ModelEditor):
    """Train with fake quantization from a given progress on, or quantise what has been trained.

    The network is captured as a graph, prepared for the scheme, and trained on with the same optimiser; BatchNorm
    statistics and activation ranges stand still for the last part (Jacob et al. 2018, arXiv:1712.05877, section 3;
    Krishnamoorthi 2018, arXiv:1806.08342, section 4). After the fit, ``converted`` holds the integer network.

    With ``start=1`` nothing is trained in integers (post-training quantization): when the fit ends, after averages of
    weights (Lightning's EMA and SWA) have become the weights, ranges are learned from training batches that pass
    through the float network in evaluation (``calibrate``), as the loader gives them: what a ``training_step`` does to
    inputs before the network does not happen to these.

    Args:
        scheme: What is quantised and how, one of ``SCHEMES``, or ``w4a8`` and the like.
        start: Progress in [0, 1] from which on fake quantization works.
        observe: For how much of the progress after that ranges are learned and nothing is rounded yet.
        freeze_batchnorm: Progress from which on BatchNorm statistics and activation ranges stand still.
        layers: Schemes of layers by patterns of their names, as ``{"stages.0.*": "w4a8", "fc": "float"}``; of several
            that match the last one counts.
        keep: Patterns of layers that stay in floating point: ``float`` in ``layers``, after all others.
        first_last: Scheme of the first and the last layer; by default what the scheme says, ``int8`` for low bits.
        ranges: How a range follows from calibration data, with ``start=1``: one of ``RANGES``.
        percentile: How many of the values lie inside a range, in per cent, for ``ranges: percentile``.
        num_batches: Training batches to calibrate with, at most.
        learn_steps: Whether steps are parameters, trained with the weights to the end
            (``compress.quantize.fakes.lsq``); they start at the ranges of the first batch, and each joins the group of
            the optimiser in which ``configure_optimizers`` would put it.
        progressive: More bits first, for what has fewer than 8 in the end (``compress.quantize.training.progressive``).
        fallback: What to do with a network that PT2E cannot capture or prepare: ``parametrize`` rounds layer by layer
            (``compress.quantize.parametrize``); by default it is refused with the reason.
        improve: What makes post-training quantization better, with ``start=1``: some of ``IMPROVEMENTS``, in any order.
        inputs: Returns the network's inputs in a batch as ``training_step`` gets it, a tensor or a tuple; by default
            they are its first element. Asked for with ``start=1``, ``learn_steps`` and no ``example_input_array``.
        lengths: Sizes of inputs beyond the batch that vary, as that of a sequence; other sizes are those of
            ``example_input_array``, else of the first batch, and ones that differ are refused once it is quantised.
        attribute: Name of the LightningModule's attribute that holds the network.

    Raises:
        RecipeError: when a value is out of range.
    """

    kind = "quantize"

    def __init__(
        self,
        scheme: str = "int8",
        *,
        start: float = 0.7,
        observe: float = 0.0,
        freeze_batchnorm: float = 0.9,
        layers: Mapping[str, str] | None = None,
        keep: Sequence[str] = (),
        first_last: str | None = None,
        ranges: str = "mse",
        percentile: float = 99.99,
        num_batches: int = 32,
        learn_steps: bool = False,
        progressive: Stages | None = None,
        improve: Sequence[str] = (),
        fallback: str | None = None,
        inputs: Callable[[Any], Any] | None = None,
        lengths: Sequence[Length] = (),
        attribute: str = "student",
    ) -> None:
        super().__init__(attribute)
        self.assignment = make_assignment(scheme, layers=layers, keep=keep, first_last=first_last)
        check_settings(
            self.assignment,
            start=start,
            observe=observe,
            freeze=freeze_batchnorm,
            progressive=progressive,
            ranges=ranges,
            percentile=percentile,
            num_batches=num_batches,
            learn_steps=learn_steps,
            improve=improve,
            fallback=fallback,
            lengths=lengths,
        )
        self.fallback = fallback
        self.progressive = progressive
        self.start = start
        self.observe = observe
        self.freeze_batchnorm = freeze_batchnorm
        self.ranges = ranges
        self.percentile = percentile
        self.num_batches = num_batches
        self.learn_steps = learn_steps
        self._reader = InputReader(
            inputs, start=start, learn_steps=learn_steps, sizes_vary=fallback is not None or bool(lengths)
        )
        self.lengths = tuple(lengths)
        self._first: tuple[pl.Trainer, tuple[Tensor, ...]] | None = None
        self._tried: tuple[nn.Module, Captured] | None = None
        self.improve = in_order(improve)
        self._trained: tuple[nn.Module, Edit] | None = None
        self._grouped: tuple[nn.Module, list[list[Any]]] | None = None
        self._frozen = False

    @cached_property
    def converted(self) -> nn.Module:
        """The integer network, after the fit; the LightningModule keeps the trained form, which checkpoints can hold.

        It is a graph (``Captured``), except after a fallback where not even running the network's code gives one.

        Raises:
            EditError: when there has been no fit that reached ``start``.
        """
        if self._trained is None:
            raise EditError(
                f"quantize: expected a finished fit that reached start={self.start:g}, got none, or one with no step "
                "left to take. Call trainer.fit first, with more steps than its checkpoint or a fast_dev_run has seen."
            )
        network, edit = self._trained
        return deployed_form(network, example_tensors(edit), lengths=read_lengths(edit.data.get("lengths", ())))

    def rehearse(self, network: nn.Module, inputs: Sequence[Tensor]) -> nn.Module:
        """Do to a network what the fit will do to it, and return it.

        Args:
            network: It changes: give a copy.
            inputs: Example inputs, two samples each.

        Raises:
            CaptureError: when it cannot be quantised.
            RecipeError: when a pattern matches no layer, or an improvement finds nothing to work on.
        """
        rehearse_improvements(copy.deepcopy(network), inputs, self.improve, lengths=self.lengths)
        prepared = replay_quantize(network, self._plan(network, inputs), prepared=self._take_tried(network))
        if self.progressive is not None:
            quantizers(prepared, self.progressive.order)
        return prepared

    def apply(self, network: nn.Module, edit: Edit) -> nn.Module:
        """Capture and prepare the network; learned steps start from the batch at hand, on every rank from rank 0's."""
        if self._first is None:
            return replay_quantize(network, edit, prepared=self._take_tried(network))
        trainer, inputs = self._first
        prepared = replay_quantize(network, edit, batches=[inputs])
        share_ranges(trainer, prepared)
        return prepared

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare for checkpoints; what is quantised after training comes after the averages that end it.

        Raises:
            EditError: when the fit would not keep the network in float32.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_precision(self.network(pl_module), self.attribute, str(trainer.precision))
            show_norms_to_swa(trainer)
        if stage == "fit" and self.start == 1:
            trainer.callbacks = after_averages(self, trainer.callbacks)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a network in evaluation, where ranges would never be learned.

        Raises:
            EditError: when it is, or the checkpoint is one SWA cannot go on from, or of other schemes.
        """
        check_resume(trainer)
        if _is_quantized(pl_module):
            check_unchanged(list(history_of(pl_module))[-1].data, self.assignment)
        self._reader.begin()
        self._statistics = StatisticsAnew()
        if self.start < 1:
            check_training(self.network(pl_module), self.attribute)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Quantise when it is due, and freeze late.

        Raises:
            EditError: at the first batch, when the network's inputs are needed and not found.
            DataError: then, when they are not what it takes.
            CaptureError, RecipeError: then, when what is due after the fit would be refused.
        """
        if not _is_quantized(pl_module):
            first = self._reader.try_first(pl_module, self.network(pl_module), batch)
            if self.start == 1:  # only the end counts, which a fit may have without a length
                if first and self.fallback is None:
                    gpus = [pl_module.device] if pl_module.device.type == "cuda" else []
                    with torch.random.fork_rng(gpus), blaming_samples(whole_inputs(pl_module, [first])):
                        self.rehearse(copy.deepcopy(self.network(pl_module)), example_inputs(pl_module, [first]))
                return
        now = progress(trainer)
        due = self.start <= now and self.start < 1 and not is_swa_epoch(trainer)
        if due and not _is_quantized(pl_module) and batch_idx % trainer.accumulate_grad_batches == 0:
            self._quantize(trainer, pl_module, self._reader.readable(pl_module, batch))
        if _is_quantized(pl_module):
            network = self.network(pl_module)
            self._frozen = now >= self.freeze_batchnorm and not is_swa_epoch(trainer)
            freeze(network, self._frozen)
            if self.observe:
                set_rounding(network, now >= self.start + self.observe)
            self._set_bits(network, now)
            if is_swa_epoch(trainer):
                self._statistics.before(network, alone=trainer.num_training_batches == 2)  # SWA counts one more

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Learn the statistics of weights that SWA has averaged."""
        if is_swa_epoch(trainer) and _is_quantized(pl_module):
            self._statistics.after(self.network(pl_module), several=trainer.world_size > 1)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make ranges and BatchNorm statistics those of rank 0 on every rank, after each batch."""
        if trainer.world_size > 1 and _is_quantized(pl_module) and not self._frozen:
            follow_first_rank(self.network(pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what was trained, to be converted when asked for: PT2E takes some seconds for that."""
        if self.start == 1 and not _is_quantized(pl_module):
            self._calibrate(trainer, pl_module)
            for average in find_averages(trainer, pl_module, self.attribute):
                average.take(self.network(pl_module))
        elif not _is_quantized(pl_module):
            rank_zero_warn(
                f"quantize.start: expected training to go beyond {self.start} of its steps, and it ended before: "
                f"{self.attribute} is as it was, in floats. Start earlier, or train longer."
            )
        self._keep(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what a checkpoint of the last epoch holds, from which Lightning trains nothing and ends no training."""
        if self._trained is None or self._trained[0] is not self.network(pl_module):
            self._keep(pl_module)

    def _keep(self, pl_module: pl.LightningModule) -> None:
        self.__dict__.pop("converted", None)
        self._trained = None
        if _is_quantized(pl_module):
            network = self.network(pl_module)
            if begin_rounding(network):
                rank_zero_warn(
                    f"quantize.observe: expected training to go beyond {self.start + self.observe:g} of its steps, and "
                    f"it ended before: {self.attribute} is rounded now, but has not been trained so. Observe for "
                    "less, or train longer."
                )
            self._set_bits(network, 1.0)
            self._trained = network, list(history_of(pl_module))[-1]

    def _set_bits(self, network: nn.Module, now: float) -> None:
        if self.progressive is None:
            return
        if self._grouped is None or self._grouped[0] is not network:
            self._grouped = network, quantizers(network, self.progressive.order)
        set_stages(self.progressive, self._grouped[1], now)

    def _quantize(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        if self.learn_steps:
            self._first = trainer, batch[0]
        try:
            inputs = example_inputs(pl_module, batch)
            with blaming_samples(whole_inputs(pl_module, batch)):
                self.edit(trainer, pl_module, lambda: self._plan(self.network(pl_module), inputs))
        finally:
            self._first = self._tried = None

    def _plan(self, network: nn.Module, inputs: Sequence[Tensor]) -> Edit:
        data = {
            **write_assignment(self.assignment),
            "inputs": describe_inputs(inputs),
            "shapes": shapes_of(network, {}),
            "learn_steps": self.learn_steps,
            "lengths": write_lengths(self.lengths),
            "frozen": modules_at_rest(network),  # at replay, hooks that freeze have not run yet
        }
        if self.fallback is not None:
            try:
                self._tried = network, prepare(network, inputs, self.assignment, lengths=self.lengths)
            except CaptureError as error:
                reason = str(error).removesuffix(WAY_OUT)
                rank_zero_warn(f"quantize.fallback: layers are rounded one by one, without a graph. {reason}")
                data["fallback"] = self.fallback
        return Edit(self.kind, data)

    def _take_tried(self, network: nn.Module) -> Captured | None:
        """Return what the trial for a fallback has made of a network, where it went well."""
        if self._tried is None or self._tried[0] is not network:
            return None
        (_, prepared), self._tried = self._tried, None
        return prepared

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Quantise with ranges from training data; every rank has those of rank 0."""
        batches = map(self._reader.read, itertools.islice(training_batches(trainer, pl_module), self.num_batches))
        first = next(batches, None)
        if first is None:
            raise DataError("quantize: expected training batches to calibrate with, got none. Give the Trainer data.")
        data: Iterable[tuple[Tensor, ...]] = itertools.chain([first], batches)
        improved: dict[str, int] = {}
        if self.improve:
            data = list(data)  # it passes several times
            improved = improve_network(self.network(pl_module), data, self.improve, lengths=self.lengths)
        self._quantize(trainer, pl_module, [first])
        network = self.network(pl_module)
        shown = trainer.is_global_zero and bool(trainer.progress_bar_callback)
        calibrate(network, data, ranges=self.ranges, percentile=self.percentile, progress=shown)
        if isinstance(data, list):
            assert isinstance(network, Captured)
            improved |= improve_prepared(network, data, self.improve, progress=shown)
            rank_zero_info("quantize.improve: " + ", ".join(f"{name} {num}" for name, num in improved.items()))
            share(trainer, dict(network.named_parameters()))
        share_ranges(trainer, network)


def _is_quantized(pl_module: pl.LightningModule) -> bool:
    return history_of(pl_module).count(QuantizationAwareTraining.kind) > 0

"""A teacher's outputs, written once and read in every epoch."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import move_data_to_device
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from compress.data import KeyedDataModule, keyed_loader
from compress.distill import Distiller, LiveTeacher, OutputCache, read_batch
from compress.distill.cache import CacheWriter, Field, fingerprint_module, fingerprint_tensors
from compress.distill.sources import TeacherSource
from compress.distill.stored import to_stored
from compress.errors import DataError
from compress.pipeline.rundir import RunDirectory

__all__ = ["stored_outputs"]

_NUM_PROBES = 32  # samples of each view whose content stands for the whole data set in a cache's key


def stored_outputs(run: RunDirectory, live: LiveTeacher, folder: Path) -> tuple[OutputCache, LightningDataModule]:
    """Return a teacher's stored outputs, written first where they are missing, and data whose batches carry keys.

    Args:
        run: The run directory.
        live: The teacher.
        folder: Where outputs are kept when the recipe names no folder.

    Raises:
        DataError: when the folder that the recipe names holds other outputs or is damaged.
    """
    spec = run.recipe.teacher
    assert spec is not None
    data = KeyedDataModule(run.recipe.data, seed=run.recipe.seed, num_views=spec.cache_views)
    data.prepare_data()
    data.setup("fit")
    loader = keyed_loader(run.recipe.data.train_dataloader(), seed=run.recipe.seed, view=0)
    num_samples = len(loader.sampler)  # type: ignore[arg-type]
    source, layers = _source(run, live, loader)
    example = to_stored(*source.teach(read_batch(_fetch(loader, [0, 1]))))
    fields = {name: _field(name, tensor, spec.cache_dtype, spec.cache_top_k) for name, tensor in example.items()}
    key = {
        "teacher": f"{fingerprint_module(live.network)} in {live.precision or 'fp32'}",
        "layers": ", ".join(layers) or "outputs only",
        **_fingerprint(loader, num_samples, spec.cache_views),
        "stored": ", ".join(f"{name} {field.describe()}" for name, field in fields.items()),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(spec.cache_dir) if spec.cache_dir is not None else folder / name
    if run.is_main_process:
        if not (path / "manifest.json").exists():
            writer = CacheWriter(path, key=key, fields=fields, num_samples=num_samples, num_views=spec.cache_views)
            _write(run, writer, source, loader, num_samples)
            writer.finish()
        run.console.print(f"teacher: outputs taken from {path}", soft_wrap=True)
    while not (path / "manifest.json").exists():
        time.sleep(1.0)  # another process of this run writes it
    return OutputCache.open(path, key=key, progress=run.is_main_process), data


def _source(run: RunDirectory, live: LiveTeacher, loader: DataLoader) -> tuple[TeacherSource, list[str]]:
    """Return what runs the teacher, and the layers whose activations the losses of the recipe need."""
    module = Distiller(
        copy.deepcopy(run.recipe.student),
        task=run.recipe.task,
        optimizer=run.recipe.optimizer,
        teacher=live,
        losses=copy.deepcopy(run.recipe.distill.losses),
        task_weight=run.recipe.distill.task_weight,
    )
    with torch.random.fork_rng(devices=[]):
        module.prepare(lambda: _fetch(loader, [0, 1]))
    assert module.source is not None
    return module.source, sorted({name for loss in module.losses for name in loss.layers()[1]})  # type: ignore[operator]


def _fingerprint(loader: DataLoader, num_samples: int, num_views: int) -> dict[str, str]:
    """Describe data and augmentation by what some samples look like in each view."""
    indices = torch.linspace(0, num_samples - 1, min(_NUM_PROBES, num_samples)).long()
    probes = [read_batch(_fetch(loader, (view * num_samples + indices).tolist())) for view in range(num_views)]
    targets = [probe.targets for probe in probes[:1] if probe.targets is not None]
    inputs = [[*probe.inputs, *probe.named.values()] for probe in probes]
    again = read_batch(_fetch(loader, indices.tolist()))
    if fingerprint_tensors([*again.inputs, *again.named.values()]) != fingerprint_tensors(inputs[0]):
        raise DataError(
            "data: expected the same inputs when a sample is asked for again, got others. Its augmentation must draw "
            "from the global generators of torch, numpy or Python, which are seeded for each sample and view; or turn "
            "the cache off."
        )
    return {
        "data": f"{num_samples} samples, targets {fingerprint_tensors(*targets)}",
        "augmentation": f"{num_views} views, inputs {fingerprint_tensors(*inputs)}",
    }


def _field(name: str, example: Tensor, dtype: str, top_k: int | None) -> Field:
    shape = tuple(example.shape[1:])
    is_logits = "outputs" in name and len(shape) == 1 and top_k is not None and top_k < shape[0]
    return Field(shape, "float32" if name == "weights" else dtype, top_k if is_logits else None)


def _write(run: RunDirectory, writer: CacheWriter, source: TeacherSource, loader: DataLoader, num_samples: int) -> None:
    """Run the teacher on every sample and view that is not yet stored."""
    missing = writer.missing()
    cpu = str(run.recipe.trainer.get("accelerator", "auto")) == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if cpu else "cuda")
    source.to(device)
    columns = (TextColumn("teacher's outputs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=run.console, transient=True) as progress:
        total = writer.num_views * num_samples
        task = progress.add_task("", total=total, completed=total - sum(stop - start for _, start, stop in missing))
        batches = iter(_loader_of(loader, missing, num_samples))
        for view, start, stop in missing:
            rows: dict[str, list[Tensor]] = {}
            done = start
            while done < stop:
                given = read_batch(move_data_to_device(next(batches), device))
                for name, tensor in to_stored(*source.teach(given)).items():
                    rows.setdefault(name, []).append(tensor.float().cpu())
                done += given.size
                progress.advance(task, given.size)
            writer.write(view, start, {name: torch.cat(parts) for name, parts in rows.items()})
    source.to(torch.device("cpu"))


def _loader_of(loader: DataLoader, chunks: Sequence[tuple[int, int, int]], num_samples: int) -> DataLoader:
    """Return a loader that goes through chunks ``(view, start, stop)`` in order; no batch spans two of them."""
    size = loader.batch_size or 256
    batches = [
        [view * num_samples + row for row in range(first, min(first + size, stop))]
        for view, start, stop in chunks
        for first in range(start, stop, size)
    ]
    return DataLoader(
        loader.dataset, batch_sampler=batches, num_workers=loader.num_workers, collate_fn=loader.collate_fn
    )


def _fetch(loader: DataLoader, keys: list[int]) -> Any:
    dataset: Any = loader.dataset
    if hasattr(dataset, "__getitems__"):
        return loader.collate_fn(dataset.__getitems__(keys))
    return loader.collate_fn([dataset[key] for key in keys])

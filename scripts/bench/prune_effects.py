"""What an edit costs and what it brings: time to plan and apply it, training step, artefact, optimiser state.

A network is compared with itself at half the multiply-accumulates, in one interleaved run.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from common import Row, ratios
from halving import halved
from rich.progress import track
from torch import Tensor, nn
from zoo_models import build

from compress.export import Gates, export_artifact
from compress.measure import macs, num_params
from compress.prune import apply_removal, study
from compress.prune.criteria import score_groups
from compress.prune.planner import describe_removal, least
from compress.runtime import load
from compress.surgery.capture import export_program
from compress.surgery.relink import relink_optimizer

__all__ = ["edit_rows", "effect_rows"]

Inputs = tuple[Tensor, ...]

NETWORKS = [
    "torchvision/resnet18",
    "torchvision/resnet50",
    "torchvision/resnet152",
    "torchvision/mobilenet_v2",
    "torchvision/vit_b_16",
    "transformers/bert_12_layers",
]


def edit_rows(quick: bool) -> list[Row]:
    """Time one edit of each network."""
    rows: list[Row] = []
    for name in track(NETWORKS[:1] if quick else NETWORKS, "one edit"):
        rows += _edit(name, *build(name), rounds=1 if quick else 3)
    return rows


def effect_rows(quick: bool) -> list[Row]:
    """Compare ResNet-18 with itself at half the MACs: training step, artefact on each engine, optimiser state."""
    image, batch, seconds = (64, 8, 2.0) if quick else (224, 16, 20.0)
    network = build("torchvision/resnet18")[0]
    return _effects(f"resnet18, {image}x{image}", network, image, batch=batch, seconds=seconds)


def _edit(name: str, network: nn.Module, inputs: Inputs, rounds: int) -> list[Row]:
    """Time one edit that removes a third of the units, step by step."""
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        edited = copy.deepcopy(network)
        optimizer = torch.optim.AdamW(edited.parameters())
        for parameter in edited.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        started = time.perf_counter()
        anatomy = study(edited, inputs)
        studied = time.perf_counter()
        keep = {group: max(1, round(width * 2 / 3)) for group, width in anatomy.widths.items()}
        data = describe_removal(anatomy, least(score_groups(anatomy, "l2"), keep))
        planned = time.perf_counter()
        assert data is not None
        before = dict(edited.named_parameters())
        edited = apply_removal(edited, data)
        relink_optimizer(optimizer, before, dict(edited.named_parameters()), data["slices"])
        applied = time.perf_counter()
        for key, seconds in [
            ("study (export and couplings)", studied - started),
            ("choose (scores, check on a copy)", planned - studied),
            ("apply and re-link", applied - planned),
            ("one edit", applied - started),
        ]:
            times.setdefault(key, []).append(seconds)
    rows = [Row(name, key, median(values), "s") for key, values in times.items()]
    return [Row(name, "parameters", num_params(network) / 1e6, "M"), *rows]


def _effects(name: str, network: nn.Module, image: int, *, batch: int, seconds: float) -> list[Row]:
    torch.manual_seed(0)
    one = (torch.randn(2, 3, image, image),)
    half = halved(network, one)
    share = macs(half, (one[0][:1],)) / macs(network, (one[0][:1],))
    rows = [Row(name, "MACs after / before", share, "ratio")]
    networks = {"whole": network, "half": half}
    x, y = torch.randn(batch, 3, image, image), torch.randint(10, (batch,))
    optimizers = {key: torch.optim.AdamW(each.parameters(), lr=1e-4) for key, each in networks.items()}
    steps = {key: _step(each, optimizers[key], x, y) for key, each in networks.items()}
    rows += ratios(f"{name}, training step, batch {batch}, fp32", steps, seconds=seconds, min_runs=4)
    sizes = {key: _state_bytes(each) for key, each in optimizers.items()}
    rows.append(Row(f"{name}, AdamW state", "bytes after / before", sizes["half"] / sizes["whole"], "ratio"))
    with tempfile.TemporaryDirectory() as folder:
        for engine in ("onnxruntime", "aoti"):
            calls = {
                key: _served(each, one[0], Path(folder) / f"{key}_{engine}", engine) for key, each in networks.items()
            }
            rows += ratios(f"{name}, artefact, {engine}, batch 1, fp32", calls, seconds=seconds)
    return rows


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], object]:
    network.train()

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()

    return step


def _served(network: nn.Module, image: Tensor, folder: Path, engine: str) -> Callable[[], object]:
    network.eval()
    pair = image.repeat(2, 1, 1, 1)
    export_artifact(
        export_program(network, (pair,)),
        folder,
        targets=[engine],
        reference=network,
        held_out=(torch.randn(8, *image.shape[1:]),),
        gates=Gates(min_top1_agreement=0.0),
    )
    model, given = load(folder, engine=engine), image.numpy()
    return lambda: model(given)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

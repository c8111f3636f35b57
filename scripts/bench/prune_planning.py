"""How long planning takes: couplings from the exported graph, beside Torch-Pruning's tracer, and how it grows.

Seconds are those of the processor, in one thread: medians over rounds that take the planners in turn; export is shown
by itself.
"""

from __future__ import annotations

import copy
import gc
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch_pruning as tp
from common import Row
from limit import OutOfTimeError, processor_time
from prune_effects import NETWORKS as EDITED
from rich.progress import track
from torch import Tensor, nn
from zoo_models import build

from compress.measure.threads import torch_threads
from compress.prune.coupling import read_coupling, static_graph

__all__ = ["planning_rows", "plot_planning"]

NETWORKS = [*EDITED, "torchvision/vit_l_16", "torchvision/swin_b"]
DECODER_LAYERS = (4, 8, 16)
LIMIT_S = 60.0
"""For one call of Torch-Pruning."""


def planning_rows(quick: bool) -> list[Row]:
    """Time both planners on each network, and ours on a decoder of up to a billion parameters."""
    logging.disable(logging.WARNING)
    try:
        with torch_threads(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = _planning(NETWORKS[:2] if quick else NETWORKS, rounds=1 if quick else 3)
            return rows if quick else rows + _decoder()
    finally:
        logging.disable(logging.NOTSET)


def _planning(names: list[str], rounds: int) -> list[Row]:
    rows: list[Row] = []
    for name in track(names, "planning"):
        network, inputs = build(name)
        graph: Any = static_graph(network, inputs)
        calls: dict[str, Callable[[], object]] = {
            "export": lambda network=network, inputs=inputs: static_graph(network, inputs),
            "plan": lambda graph=graph: read_coupling(graph),
            "torch_pruning": lambda network=network, inputs=inputs: _torch_pruning(network, inputs),
        }
        times: dict[str, list[float]] = {call: [] for call in calls}
        for _ in range(rounds):
            for call, run in calls.items():
                times[call].append(_seconds(run) if times[call] != [float("inf")] else float("inf"))
        rows.append(Row(name, "nodes", len(graph.graph.nodes), ""))
        rows += [Row(name, call, median(values), "s") for call, values in times.items()]
        gc.collect()  # tracers leave circles that hold the weights
    return rows


def _seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes; infinity beyond the limit, NaN when it fails."""
    started = time.process_time()
    try:
        with processor_time(LIMIT_S):
            run()
    except OutOfTimeError:
        return float("inf")
    except Exception:  # a network that Torch-Pruning's tracer cannot take
        return float("nan")
    return time.process_time() - started


def _torch_pruning(network: nn.Module, inputs: Any) -> object:
    twin = copy.deepcopy(network)
    graph = tp.DependencyGraph().build_dependency(twin, example_inputs=tuple(inputs), verbose=False)
    return list(graph.get_all_groups(root_module_types=(nn.modules.conv._ConvNd, nn.Linear)))


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def _decoder() -> list[Row]:
    """A decoder of a billion parameters, without memory for them; fewer of its layers too, to see how time grows."""
    import transformers

    rows = []
    for layers in track(DECODER_LAYERS, "decoder"):
        config = transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=8192,
            use_cache=False,
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            network = _Logits(transformers.LlamaForCausalLM(config)).eval()
            tokens = torch.zeros(2, 8, dtype=torch.int64)
        started = time.process_time()
        graph: Any = static_graph(network, (tokens,))
        exported = time.process_time() - started
        plans = [_seconds(lambda graph=graph: read_coupling(graph)) for _ in range(3)]
        name = f"decoder, {layers} layers, {sum(p.numel() for p in network.parameters()) / 1e9:.2f} G parameters"
        rows += [
            Row(name, "nodes", len(graph.graph.nodes), ""),
            Row(name, "export", exported, "s"),
            Row(name, "plan", median(plans), "s"),
            Row(name, "groups", len(read_coupling(graph).groups), ""),
        ]
    return rows


def plot_planning(rows: list[Row], file: Path) -> None:
    """Draw planning over nodes; the decoder's sizes as a line of their own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row.name, {})[row.metric] = row.value
    decoder = [each for name, each in found.items() if name.startswith("decoder")]
    others = {name: each for name, each in found.items() if not name.startswith("decoder")}
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.plot([e["nodes"] for e in decoder], [e["plan"] for e in decoder], "o-", label="decoder, 4, 8, 16 layers")
    nodes = [e["nodes"] for e in others.values()]
    axes.plot(nodes, [e["plan"] for e in others.values()], "s", label="other networks")
    axes.plot(nodes, [e["torch_pruning"] for e in others.values()], "x", label="the same, Torch-Pruning")
    for name, each in others.items():
        axes.annotate(
            name.rpartition("/")[2], (each["nodes"], each["plan"]), (4, -9), textcoords="offset points", size=7
        )
    axes.set(
        xlabel="nodes of the graph", ylabel="planning, s (one thread)", xlim=(0, 1.12 * max(nodes)), ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)

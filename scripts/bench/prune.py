"""How long planning takes: couplings from the exported graph, beside Torch-Pruning's tracer, and how it grows.

Needs the extra ``zoo``. Times are medians over rounds that take the planners in turn; export is shown by itself.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch_pruning as tp
from common import Row, finish, options
from rich.progress import track
from torch import nn
from zoo_models import build

from compress.prune.coupling import read_coupling, static_program

NETWORKS = [
    "torchvision/resnet18",
    "torchvision/resnet50",
    "torchvision/resnet152",
    "torchvision/mobilenet_v2",
    "torchvision/vit_b_16",
    "torchvision/vit_l_16",
    "torchvision/swin_b",
    "transformers/bert",
]


def main() -> None:
    arguments = options(__doc__ or "")
    logging.disable(logging.WARNING)
    names = NETWORKS[:2] if arguments.quick else NETWORKS
    rows: list[Row] = []
    for name in track(names, "planning"):
        network, inputs = build(name)
        graph: Any = static_program(network, inputs).module(check_guards=False)
        calls: dict[str, Callable[[], object]] = {
            "export": lambda network=network, inputs=inputs: static_program(network, inputs),
            "plan": lambda graph=graph: read_coupling(graph),
            "torch_pruning": lambda network=network, inputs=inputs: _torch_pruning(network, inputs),
        }
        times: dict[str, list[float]] = {call: [] for call in calls}
        for _ in range(1 if arguments.quick else 3):
            for call, run in calls.items():
                started = time.perf_counter()
                try:
                    run()
                except Exception:  # a network that its tracer cannot take
                    times[call].append(float("nan"))
                    continue
                times[call].append(time.perf_counter() - started)
        rows.append(Row(name, "nodes", len(graph.graph.nodes), ""))
        rows += [Row(name, call, median(values), "s") for call, values in times.items()]
    if not arguments.quick:
        rows += _decoder()
    finish(arguments, rows)


def _torch_pruning(network: nn.Module, inputs: Any) -> object:
    twin = copy.deepcopy(network)
    graph = tp.DependencyGraph().build_dependency(twin, example_inputs=tuple(inputs), verbose=False)
    return list(graph.get_all_groups(root_module_types=(nn.modules.conv._ConvNd, nn.Linear)))


def _decoder() -> list[Row]:
    """A decoder of a billion parameters, without memory for them; 4, 8 and 16 layers, to see how time grows."""
    import transformers

    rows = []
    for layers in (4, 8, 16):
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
        started = time.perf_counter()
        graph: Any = static_program(network, (tokens,)).module(check_guards=False)
        exported = time.perf_counter()
        groups = read_coupling(graph).groups
        name = f"decoder, {layers} layers, {sum(p.numel() for p in network.parameters()) / 1e9:.2f} G parameters"
        rows += [
            Row(name, "nodes", len(graph.graph.nodes), ""),
            Row(name, "export", exported - started, "s"),
            Row(name, "plan", time.perf_counter() - exported, "s"),
            Row(name, "groups", len(groups), ""),
        ]
    return rows


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens).logits


if __name__ == "__main__":
    main()

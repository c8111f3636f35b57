"""The zoo's main check: prune one architecture by 30 % and do with it what a fit would."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import torch
from torch import nn
from zoo_models import build, first_output, size

from compress.prune import apply_removal, describe_removal, score_groups, study
from compress.prune.coupling import read_coupling, static_graph
from compress.prune.planner import least
from compress.surgery import Captured

__all__ = ["RATIO", "kept_units", "prune", "train_a_step"]

RATIO = 0.3


def prune(name: str, row: dict[str, Any]) -> None:
    """Plan, remove, forward, backward, a step of the optimiser, replay from JSON on a fresh copy, export again.

    Args:
        name: Of the architecture.
        row: Gets the figures; seconds are those of the processor.

    Raises:
        Exception: whatever fails.
    """
    network, inputs = build(name)
    started = time.process_time()
    graph: Any = static_graph(network, inputs)
    exported = time.process_time()
    read_coupling(graph)
    row |= {"export_s": exported - started, "plan_s": time.process_time() - exported}
    anatomy = study(network, inputs)
    row |= {"nodes": len(graph.graph.nodes), "share": anatomy.coupling.prunable_share()}
    row |= {"groups": len(anatomy.groups), "unknown": list(anatomy.coupling.unknown)}
    scores = score_groups(anatomy, "l2")
    data = describe_removal(anatomy, least(scores, {name: kept_units(width) for name, width in anatomy.widths.items()}))
    assert data is not None, "nothing can be removed"
    row["form"] = data["form"]
    original = copy.deepcopy(network)
    network = apply_removal(network.train(), data)
    row["left"] = size(network) / size(original)
    train_a_step(network, inputs)
    replayed = apply_removal(original, json.loads(json.dumps(data)))
    replayed.load_state_dict(network.state_dict())
    with torch.no_grad():
        got, expected = first_output(replayed.eval()(*inputs)), first_output(network.eval()(*inputs))
    assert torch.allclose(got, expected, atol=1e-4, rtol=1e-3), "the replayed network differs"
    static_graph(network.graph_module if isinstance(network, Captured) else network, inputs)


def kept_units(width: int) -> int:
    """Return how many of a group's units stay: one goes at least, and one stays."""
    return max(1, width - max(1, int(RATIO * width)))


def train_a_step(network: nn.Module, inputs: Any) -> None:
    """Forward, backward and a step of an optimiser, in training mode."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    loss = first_output(network(*inputs)).float().square().mean()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss), "the loss is not finite"

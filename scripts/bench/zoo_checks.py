"""The checks of the zoo by name; importing this imports all they need, and warms up what exports networks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo_criteria import criteria
from zoo_masked import masked_is_shrunk
from zoo_prune import prune
from zoo_quantize import quantize
from zoo_torch_pruning import prune_by_torch_pruning
from zoo_units import compare_units

from compress.prune.coupling import static_graph

__all__ = ["CHECKS", "checked"]

CHECKS: dict[str, Callable[[str, dict[str, Any]], None]] = {
    "prune": prune,
    "torch_pruning": prune_by_torch_pruning,
    "masked": masked_is_shrunk,
    "units": compare_units,
    "criteria": criteria,
    "quantize": quantize,
}


def checked(name: str, check: str) -> dict[str, Any]:
    """Do one thing with one architecture; whatever fails is a row of the table."""
    row: dict[str, Any] = {"name": name, "pass": 0}
    try:
        CHECKS[check](name, row)
        row["pass"] = 1
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row


warnings.simplefilter("ignore")
torch.set_num_threads(1)
static_graph(nn.Linear(2, 2), (torch.randn(2, 2),))

"""Structured pruning: which channels belong together, which of them matter least, and when they are removed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compress.prune.allocation import ALLOCATIONS, Target
from compress.prune.anatomy import Anatomy, study
from compress.prune.blocks import Block, find_blocks
from compress.prune.coupling import Group
from compress.prune.criteria import CRITERIA, score_groups
from compress.prune.influence import block_influence
from compress.prune.masks import global_masks, magnitude_mask, nm_mask
from compress.prune.planner import apply_removal, describe_removal, find_groups, plan_removal, replay_prune
from compress.prune.removal import Removal
from compress.prune.schedules import SCHEDULES
from compress.prune.sensitivity import divergence, measure_sensitivity

if TYPE_CHECKING:
    from compress.prune.callback import StructuredPruning
    from compress.prune.sparsity import WeightSparsity

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "SCHEDULES",
    "Anatomy",
    "Block",
    "Group",
    "Removal",
    "StructuredPruning",
    "Target",
    "WeightSparsity",
    "apply_removal",
    "block_influence",
    "describe_removal",
    "divergence",
    "find_blocks",
    "find_groups",
    "global_masks",
    "magnitude_mask",
    "measure_sensitivity",
    "nm_mask",
    "plan_removal",
    "replay_prune",
    "score_groups",
    "study",
]

_LAZY = {"StructuredPruning": "compress.prune.callback", "WeightSparsity": "compress.prune.sparsity"}


def __getattr__(name: str) -> Any:
    # Lazily: a pruned network is rebuilt without Lightning.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

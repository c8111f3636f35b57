"""Structured pruning: which channels belong together, which of them matter least, and when they are removed."""

from compress.prune.callback import StructuredPruning, replay_prune
from compress.prune.planner import Group, apply_removal, find_groups, plan_removal
from compress.prune.schedules import SCHEDULES, num_kept

__all__ = [
    "SCHEDULES",
    "Group",
    "StructuredPruning",
    "apply_removal",
    "find_groups",
    "num_kept",
    "plan_removal",
    "replay_prune",
]

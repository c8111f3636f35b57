"""How much each unit matters: pure functions of what a group's units hold, have been told and say."""

from compress.prune.criteria.activations import Activation, measure_activations
from compress.prune.criteria.gradients import Gradients
from compress.prune.criteria.members import Member, members
from compress.prune.criteria.scores import CRITERIA, Criterion, Evidence, normalise, score_groups

__all__ = [
    "CRITERIA",
    "Activation",
    "Criterion",
    "Evidence",
    "Gradients",
    "Member",
    "measure_activations",
    "members",
    "normalise",
    "score_groups",
]

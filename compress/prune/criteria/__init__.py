"""How much each unit matters: pure functions of what a group's units hold."""

from compress.prune.criteria.scores import CRITERIA, Criterion, score_groups

__all__ = ["CRITERIA", "Criterion", "score_groups"]

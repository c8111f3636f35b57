"""A network at half its multiply-accumulates, for benchmarks that compare it with the whole one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from compress.prune import Target, apply_removal, study
from compress.prune.allocation import Candidate, fit_to_target
from compress.prune.criteria import score_groups
from compress.prune.planner import describe_removal, least

__all__ = ["halved"]


def halved(network: nn.Module, inputs: Sequence[Tensor]) -> nn.Module:
    """Return a copy with half the MACs: by ``l2``, uniform, widths in multiples of 8."""
    anatomy = study(network.eval(), inputs)
    scores = score_groups(anatomy, "l2")
    candidates = [Candidate(name, width, width, scores[name]) for name, width in anatomy.widths.items()]
    widths = fit_to_target(anatomy, candidates, "uniform", Target(macs=0.5), round_to=8).widths
    data = describe_removal(anatomy, least(scores, widths))
    assert data is not None
    return apply_removal(copy.deepcopy(network), data)

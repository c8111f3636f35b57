from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from compress.pipeline.report import _zeros


def test_the_note_counts_zeros_and_promises_no_speed() -> None:
    second = nn.Linear(5, 4)
    network = nn.Sequential(nn.Linear(4, 5), second)
    with torch.no_grad():
        second.weight[:2] = 0
    run: Any = SimpleNamespace(final=(network, None))
    note = _zeros(run)
    assert "25.0% of all matrices and kernels are zero (1 50%)" in note
    assert "dense" in note

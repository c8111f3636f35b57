"""A fit on two gloo processes, and what each of them ended with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SPOILT = [(0, 0), (1, 2)]  # which rank has a batch of NaN, and when
ROOT = Path(__file__).parent.parent.parent


def fit(folder: Path, *kinds: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return what each rank ended with, by the kind of fit; nothing may be apart while weights are trained.

    Args:
        folder: Where the ranks write.
        kinds: For ``fit_ddp.py``, one fit after the other.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.quantize.fit_ddp", str(folder), *kinds],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {kind: _ended(folder / kind) for kind in kinds}


def _ended(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert max(first["apart"]) == 0
    assert first["history"] == second["history"]
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
    return first, second

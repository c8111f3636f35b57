from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.measure.memory import peak_memory, peak_memory_of

MEGA = 2**20


def test_memory_is_what_was_touched_at_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loader_of_bytes.py").write_text(
        "def load(number):\n"
        "    kept = bytearray(b'x' * int(number))\n"
        "    return lambda: bytearray(b'y' * int(number)) and kept\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))  # a fresh process finds what this one finds
    # Bigger than what is measured: a process must not inherit its parent's peak.
    ballast = np.ones(150 * MEGA // 8)
    found = peak_memory("loader_of_bytes:load", str(40 * MEGA))
    assert 2 * 40 * MEGA <= found < 4 * 40 * MEGA
    assert ballast.size


def test_a_larger_network_takes_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "network_beside_bytes.py").write_text(
        f"from torch import nn\n\nKEPT = bytearray(b'x' * {100 * MEGA})\n\n\nclass Small(nn.Linear):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    # What its module takes that is imported for it does not count.
    small = peak_memory_of(importlib.import_module("network_beside_bytes").Small(8, 8), [torch.randn(1, 8)])
    large = peak_memory_of(nn.Linear(4096, 4096), [torch.randn(1, 4096)])
    assert small is not None
    assert large is not None
    assert small < 40 * MEGA
    assert 4096 * 4096 * 4 <= large < 4 * 4096 * 4096 * 4


def test_a_failure_tells_what_the_process_said() -> None:
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        peak_memory("no_such_module:load")


def test_a_class_out_of_reach_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(nn.Linear):
        pass

    with pytest.warns(UserWarning, match="Local"):
        assert peak_memory_of(Local(2, 2), [torch.ones(1, 2)]) is None
    script = type("Script", (nn.Linear,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Script", script, raising=False)
    with pytest.warns(UserWarning, match="Script defined in the script that runs"):
        assert peak_memory_of(nn.Sequential(script(2, 2)), [torch.ones(1, 2)]) is None

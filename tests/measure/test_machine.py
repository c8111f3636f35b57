from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.measure.machine import cpu_flags, describe_machine, versions


def test_machine_is_described_in_json() -> None:
    machine = describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    assert machine["processor"]
    assert 1 <= int(machine["cores"]) <= (os.cpu_count() or 1)
    assert machine["torch"] == torch.__version__


def test_versions_leave_out_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.measure.machine._PACKAGES", ["numpy", "no-such-package"])
    assert versions() == {"numpy": np.__version__}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="flags are read on Linux")
def test_flags_are_the_kernels() -> None:
    text = Path("/proc/cpuinfo").read_text()
    assert all(flag in text for flag in cpu_flags())
    assert ("avx2" in cpu_flags()) == (" avx2 " in text)

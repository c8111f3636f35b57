from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.measure import machine
from compress.measure.machine import cpu_flags, describe_machine, has_bf16, has_cuda, user_cache, versions


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


@pytest.mark.parametrize(
    ("flags", "has"), [({"avx512_bf16", "fma"}, True), ({"asimd", "bf16"}, True), ({"avx2"}, False)]
)
def test_bfloat16_is_read_from_the_flags(flags: set[str], has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: flags)
    assert has_bf16() == has


def test_a_user_without_a_home_has_no_folder_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("COMPRESS_CACHE", raising=False)
    assert user_cache() is None
    monkeypatch.setenv("COMPRESS_CACHE", "here")
    assert user_cache() == Path("here")


def test_hidden_gpus_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: name)
    for hidden in ("", "-1"):
        has_cuda.cache_clear()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not has_cuda()
    has_cuda.cache_clear()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert has_cuda()
    has_cuda.cache_clear()

from __future__ import annotations

import platform
from importlib.metadata import version

import pytest
import torch

from compress.export.targets import inductor_cuda
from compress.runtime import requirements
from compress.runtime.requirements import cuda_requirements, native_requirements, why_not


def test_this_machine_meets_its_own_requirements() -> None:
    assert why_not(native_requirements()) is None
    assert why_not({}) is None


def test_what_inductor_compiled_needs_the_very_same_torch() -> None:
    build = {"build": inductor_cuda.requires()["build"]}
    assert why_not(build) is None
    assert f"built with torch 2.0.1, this is {version('torch')}" == why_not({"build": "2.0.1"})


@pytest.mark.parametrize(
    ("requires", "reason"),
    [
        ({"arch": "pdp11"}, f"built for pdp11, this is {platform.machine()}"),
        ({"system": "Plan9"}, "built for Plan9"),
        ({"flags": ["avx2048", "amx_magic"]}, "lacks amx_magic, avx2048"),
        ({"versions": {"numpy": "0.1"}}, "built with numpy 0.1, this is "),
        ({"versions": {"no-such-package": "1.0"}}, "no-such-package is not installed"),
        ({"cuda": "9.0"}, "there is no GPU that CUDA sees"),
        ({"torch": "1.0"}, f"built with torch 1.0, this is {torch.__version__[:4]}"),
    ],
)
def test_what_is_missing_is_named(requires: dict[str, object], reason: str) -> None:
    assert reason in str(why_not(requires))


def test_an_older_processor_cannot_run_what_was_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = native_requirements()
    monkeypatch.setattr(requirements, "cpu_flags", lambda: {"sse2", "sse4_1", "avx"})
    assert "this processor lacks" in str(why_not(needed))


def test_another_kind_of_gpu_cannot_run_what_was_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    needed = cuda_requirements()
    assert needed["cuda"] == "8.6"
    assert why_not(needed) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert why_not(needed) == "built for compute capability 8.6, this is 9.0"

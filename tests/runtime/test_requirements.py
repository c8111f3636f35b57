from __future__ import annotations

import platform

import pytest
import torch

from compress.runtime import requirements
from compress.runtime.requirements import native_requirements, why_not


def test_this_machine_meets_its_own_requirements() -> None:
    assert why_not(native_requirements()) is None
    assert why_not({}) is None


@pytest.mark.parametrize(
    ("requires", "reason"),
    [
        ({"arch": "pdp11"}, f"built for pdp11, this is {platform.machine()}"),
        ({"system": "Plan9"}, "built for Plan9"),
        ({"flags": ["avx2048", "amx_magic"]}, "lacks amx_magic, avx2048"),
        ({"versions": {"numpy": "0.1"}}, "built with numpy 0.1, this is "),
        ({"versions": {"no-such-package": "1.0"}}, "no-such-package is not installed"),
        ({"torch": "1.0"}, f"built with torch 1.0, this is {torch.__version__[:4]}"),
    ],
)
def test_what_is_missing_is_named(requires: dict[str, object], reason: str) -> None:
    assert reason in str(why_not(requires))


def test_an_older_processor_cannot_run_what_was_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = native_requirements()
    monkeypatch.setattr(requirements, "cpu_flags", lambda: {"sse2", "sse4_1", "avx"})
    assert "this processor lacks" in str(why_not(needed))

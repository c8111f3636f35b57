from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from compress.export import TARGETS
from compress.runtime import engines
from compress.runtime.engines import ENGINES, READS, engines_for, missing_package


def test_every_target_has_an_engine_and_every_engine_a_target() -> None:
    assert list(TARGETS) == [name for name in ENGINES if name not in READS]
    assert set(READS.values()) < set(TARGETS)
    for module in (*TARGETS.values(), *ENGINES.values()):
        assert find_spec(module)


def test_engines_are_found_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ["onnxruntime", "aoti_cuda_fp16", "eager", "quantum"]
    assert engines_for(there, "auto") == engines_for(there, "cpu") == ["eager", "onnxruntime", "quantum"]
    assert engines_for(there, "cuda") == ["quantum"]
    monkeypatch.setattr(engines, "has_cuda", lambda: True)
    on_gpu = ["aoti_cuda_fp16", "eager_cuda", "onnxruntime_cuda"]
    assert engines_for(there, "cuda") == [*on_gpu, "quantum"]
    assert engines_for(there, "auto") == ["eager", "aoti_cuda_fp16", "onnxruntime", *on_gpu[1:], "quantum"]


@pytest.mark.parametrize("name", list(ENGINES))
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(package: str) -> Any:
        return None

    monkeypatch.setattr(engines, "find_spec", hidden)
    assert missing_package(name) == import_module(ENGINES[name]).PACKAGES[0]
    assert missing_package(name) in {"torch", "onnxruntime", "openvino", "executorch", "tvm", "ai_edge_litert"}


def test_each_package_of_several_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda package: None if package == "torch" else package)
    assert missing_package("executorch") == "torch"

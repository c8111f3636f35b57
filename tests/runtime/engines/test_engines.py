from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from compress.export import TARGETS
from compress.runtime import engines
from compress.runtime.engines import ENGINES, missing_package


def test_every_target_has_an_engine() -> None:
    assert list(TARGETS) == list(ENGINES)
    for module in (*TARGETS.values(), *ENGINES.values()):
        assert find_spec(module)


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

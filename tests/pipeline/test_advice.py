from __future__ import annotations

from importlib import import_module

import pytest

from compress.quantize.layers import make_assignment

export = import_module("compress.pipeline.export")  # the package has a function of that name


@pytest.mark.parametrize(
    ("scheme", "vnni", "advised"),
    [
        ("int8", False, True),
        ("int8_portable", False, True),
        ("int8", True, False),
        ("int8_reduced", False, False),
        ("int8_weights", False, False),
        ("fp8", False, False),
    ],
)
def test_eight_bit_weights_without_vnni_are_advised_against(
    scheme: str, vnni: bool, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "has_vnni", lambda: vnni)
    assert export.wide_without_vnni(make_assignment(scheme)) == advised

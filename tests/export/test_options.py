from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import ExportError
from compress.export import convert, export_artifact
from compress.export.options import option_mistakes
from compress.export.targets import TARGETS, aoti
from compress.runtime import load, read_manifest
from tests.export.programs import floating


def test_each_mistake_is_named() -> None:
    assert list(option_mistakes({"aoti": {"max_autotune": True}}, ["eager", "aoti"])) == []
    for options, text in (
        ({"tvm": {}}, r"options.tvm: expected a target among eager, aoti, got another"),
        ({"aoti": {"autotune": True}}, r"options.aoti: expected options among max_autotune, got autotune"),
        ({"eager": {"fast": True}}, r"options.eager: expected no options, got fast"),
        ({"aoti": {"max_autotune": 1}}, r"options.aoti.max_autotune: expected a value of type bool, got 1"),
    ):
        (mistake,) = option_mistakes(options, ["eager", "aoti"])
        assert text in mistake


def test_every_target_that_has_options_says_their_types() -> None:
    for target in TARGETS:
        assert "expected " in next(option_mistakes({target: {"none of them": 1}}, [target]))


def test_a_target_is_told_and_the_manifest_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = floating()
    told: list[Mapping[str, Any]] = []
    compile_package = aoti.compile_package

    def spy(program: Any, path: Path, settings: Mapping[str, Any]) -> Any:
        told.append(settings)
        return compile_package(program, path, settings)

    monkeypatch.setattr(aoti, "compile_package", spy)
    path = tmp_path / "artifact"
    options = {"aoti": {"max_autotune": True}}
    with pytest.raises(ExportError, match=r"options.aoti: expected options among max_autotune, got tune"):
        export_artifact(
            trained.program,
            path,
            targets=["eager", "aoti"],
            reference=trained.reference,
            held_out=[trained.inputs],
            options={"aoti": {"tune": 1}},
        )
    export_artifact(trained.program, path, targets=["eager"], reference=trained.reference, held_out=[trained.inputs])
    with pytest.raises(ExportError, match=r"options.eager: expected a target among aoti, got another"):
        convert(path, ["aoti"], options={"eager": {}})
    convert(path, ["aoti"], options=options)
    assert [settings["max_autotune"] for settings in told] == [True]
    targets = read_manifest(path).targets
    assert (targets["aoti"].options, targets["eager"].options) == ({"max_autotune": True}, {})
    with torch.no_grad():
        wanted = trained.reference(trained.inputs[:5])
    torch.testing.assert_close(load(path, engine="aoti")(trained.inputs[:5]), wanted, rtol=1e-3, atol=1e-4)

"""``compress convert`` on a manifest that nobody has checked yet."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from compress.errors import ArtifactError, ExportError
from compress.pipeline import convert
from compress.quantize.layers import make_assignment, write_assignment
from compress.runtime.manifest import Manifest, Target, TensorSpec


def write(directory: Path, history: list[Any]) -> Path:
    specs = (TensorSpec("x", "float32", (None, 3)),)
    targets = {"eager": Target("program.pt2", 4, "0" * 64)}
    manifest = Manifest("small", "", "classification", specs, specs, targets, history=history)
    (directory / "manifest.json").write_text(json.dumps(asdict(manifest)))
    return directory


def quantize(**changes: Any) -> dict[str, Any]:
    data = write_assignment(make_assignment("int8"))
    return {"kind": "quantize", "data": {**data, "definition": {**data["definition"], **changes}}}


@pytest.mark.parametrize(
    "edit",
    [
        3,
        {"data": {}},
        {"kind": "quantize", "data": "int8"},
        {"kind": "quantize", "data": {"more": 1}},
        {"kind": "quantize", "data": {"scheme": "none"}},
        {"kind": "quantize", "data": {"scheme": []}},
        {"kind": "quantize", "data": {"definition": {}}},
        {"kind": "quantize", "data": {"definition": 5}},
        quantize(weight_bits="8"),
        quantize(weight_bits=99),
        quantize(engines=5),
        quantize(engines=[1]),
        quantize(description=[]),
    ],
)
def test_an_odd_history_is_one_error_that_names_the_manifest(tmp_path: Path, edit: Any) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json: expected a (history|manifest)"):
        convert(write(tmp_path, [edit]), ["onnxruntime"])


def test_an_engine_that_cannot_run_the_scheme_is_still_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="expected engines that run the scheme 'int8'"):
        convert(write(tmp_path, [quantize(engines=["eager"])]), ["onnxruntime"])


def test_the_signature_is_looked_at_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"signature\.json: expected the manifest's checksum"):
        convert(write(tmp_path, [quantize()]), ["onnxruntime"])

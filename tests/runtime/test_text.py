"""An artefact that holds a tokenizer predicts texts, and one of several inputs arrays by their names."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compress.cli
from compress.errors import ArtifactError, DataError, ExportError, MissingPackageError
from compress.export import convert, export_artifact
from compress.runtime import CompactModel, load, read_manifest, read_samples
from compress.runtime.inputs import raw_inputs
from compress.runtime.manifest import Manifest, TensorSpec
from tests.export.programs import edit, reviews
from tests.runtime.test_manifest import JSON, paths

TEXTS = ["a fine film", "dull", "Not a fine film, a dull film", "fine " * 20, "unheard of"]


@pytest.fixture(scope="module")
def model() -> CompactModel:
    return load(reviews().artifact, engine="onnxruntime")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(reviews().artifact, tmp_path / "copy"))


def wanted(texts: list[str]) -> np.ndarray:
    with torch.no_grad():
        return reviews().network(*reviews().tokenizer(texts)).softmax(1).numpy()


def test_labels_of_texts_are_those_of_the_network(model: CompactModel) -> None:
    labels, probabilities = model.predict(TEXTS)
    np.testing.assert_allclose(probabilities, wanted(TEXTS), atol=1e-5)
    assert labels == [("bad", "good")[index] for index in wanted(TEXTS).argmax(1)]
    assert set(labels) == {"bad", "good"}
    assert np.array_equal(model.predict(tuple(TEXTS))[1], probabilities)


def test_the_manifest_says_how(model: CompactModel) -> None:
    assert model.manifest.preprocessing == {
        "tokenizer": "tokenizer.json",
        "length": 7,
        "padding": {"token": "[PAD]", "id": 0, "type_id": 0, "side": "right"},
        "truncation": {"side": "right"},
        "inputs": ["ids", "mask"],
    }
    content = (reviews().artifact / "tokenizer.json").read_bytes()
    assert model.manifest.files == {"tokenizer.json": hashlib.sha256(content).hexdigest()}


def test_tokens_are_taken_by_name(model: CompactModel, tmp_path: Path) -> None:
    tokens, mask = (tensor.numpy() for tensor in reviews().tokenizer(TEXTS * 9))
    named: dict[str, Any] = {"mask": mask, "tokens": tokens.astype(np.float64)}
    assert np.array_equal(model.predict(named)[1], model.predict(TEXTS * 9)[1])
    np.savez(tmp_path / "a.npz", **named)
    batches = list(read_samples(tmp_path / "a.npz", model.manifest))
    assert [name for batch in batches for name in batch.names] == [str(index) for index in range(45)]
    assert [len(batch.names) for batch in batches] == [32, 13]
    found = [model.predict(batch.values)[1] for batch in batches]
    np.testing.assert_allclose(np.concatenate(found), wanted(TEXTS * 9), atol=1e-5)
    for wrong, message in [
        ({"tokens": tokens}, "inputs: expected tokens, mask, got tokens"),
        ({"tokens": tokens, "mask": mask / 2}, "mask: expected whole numbers of int64, got others"),
        ({"tokens": tokens, "mask": np.full(mask.shape, "x")}, "mask: expected numbers, got"),
        ({"tokens": tokens, "mask": mask[:2]}, "inputs: expected the same batch size for all"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            model.predict(wrong)


def test_an_array_by_name_is_preprocessed_as_one_alone() -> None:
    spec = TensorSpec("x", "float32", (None, 2, 1, 1))
    steps = {"scale": 0.5, "mean": [1.0, 0.0], "std": [0.1, 2.0]}
    manifest = Manifest("net", "", "", (spec,), (), {}, preprocessing=steps)
    raw = np.array([4, 8]).reshape(1, 2, 1, 1)
    for values in (raw, {"x": raw}):
        (array,) = raw_inputs(values, manifest, None)
        np.testing.assert_allclose(array.ravel(), [10.0, 2.0])
    with pytest.raises(ArtifactError, match="net: expected one input for its preprocessing, got 2"):
        raw_inputs({"x": raw, "y": raw}, replace(manifest, inputs=(spec, replace(spec, name="y"))), None)


@pytest.fixture
def plain(copy: Path) -> Path:
    """Return an artefact without a tokenizer."""
    edit(copy, lambda content: content.update(preprocessing=None, files={}, name="plain"))
    return copy


def test_an_artefact_without_a_tokenizer_refuses_texts_and_takes_tokens(plain: Path) -> None:
    model = load(plain, engine="onnxruntime")
    tokens, mask = (tensor.numpy() for tensor in reviews().tokenizer(TEXTS))
    np.testing.assert_allclose(model.predict({"tokens": tokens, "mask": mask})[1], wanted(TEXTS), atol=1e-5)
    for texts, message in [
        (["a film"], "plain: expected an artefact that holds a tokenizer, got none"),
        ("a film", "raw: expected a list of texts, got one alone"),
        (["a film", 3], "tokens: expected numbers, got"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            model.predict(texts)


def test_a_file_has_a_text_in_each_line(model: CompactModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa fine film\r\n\n  dull \ndéjà\u2028vu".encode())
    (batch,) = read_samples(tmp_path / "a.txt", model.manifest)
    assert batch.names == batch.values == ["a fine film", "dull", "déjà\u2028vu"]
    (tmp_path / "a.txt").write_text("fine\n" * 60)
    assert [len(batch.values) for batch in read_samples(tmp_path / "a.txt", model.manifest)] == [32, 28]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt: expected a text in each line, got none"),
        (b"\n \n", "a.txt: expected a text in each line, got none"),
        (b"fine\nfilm \xff\n", "a.txt, line 2: expected text, got 'utf-8' codec"),
    ],
)
def test_files_without_text_are_named(model: CompactModel, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_samples(tmp_path / "a.txt", model.manifest))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": np.ones((2, 7))}, "a.npz: expected arrays named tokens, mask, got tokens"),
        ({"tokens": np.ones((2, 7)), "mask": np.ones((3, 7))}, r"of all arrays, got tokens \(2, 7\), mask \(3, 7\)"),
        ({"tokens": np.ones((0, 7)), "mask": np.ones((0, 7))}, "a.npz: expected a sample in each row"),
        ({"tokens": np.ones((2, 7)), "mask": np.array([None])}, "a.npz: expected arrays saved by numpy.savez, got"),
        (np.ones((2, 7)), "a.npz: expected arrays saved by numpy.savez, got one array"),
        (b"no archive", "a.npz: expected arrays saved by numpy.savez, got"),
    ],
)
def test_archives_that_do_not_fit_are_named(model: CompactModel, arrays: Any, message: str, tmp_path: Path) -> None:
    content = io.BytesIO(arrays if isinstance(arrays, bytes) else b"")
    if isinstance(arrays, dict):
        np.savez(content, **arrays)
    elif isinstance(arrays, np.ndarray):
        np.save(content, arrays)
    (tmp_path / "a.npz").write_bytes(content.getvalue())
    with pytest.raises(DataError, match=message):
        list(read_samples(tmp_path / "a.npz", model.manifest))


def test_lines_are_predicted_on_the_command_line(
    capsys: pytest.CaptureFixture[str], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    words = [str(reviews().artifact), "--engine", "onnxruntime", "--json", str(tmp_path / "rows.json")]
    assert compress.cli.main(["predict", words[0], str(tmp_path / "lines.txt"), *words[1:]]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["input"] for row in rows] == [text.strip() for text in TEXTS]
    assert [row["label"] for row in rows] == [("bad", "good")[index] for index in wanted(TEXTS).argmax(1)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "lines.txt").read_bytes())))
    assert compress.cli.main(["predict", words[0], "-", *words[1:]]) == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    for arguments, message in [
        ([words[0], "-"], "standard input: expected a text in each line, got none"),
        ([str(plain), "-"], "plain: expected an artefact that holds a tokenizer, got none"),
        ([words[0], "-", "--resize"], "--resize: expected an image or a folder of images, got -"),
    ]:
        assert compress.cli.main(["predict", *arguments, "--engine", "onnxruntime"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_damaged_tokenizer_is_refused(copy: Path) -> None:
    file = copy / "tokenizer.json"
    content = bytearray(file.read_bytes())
    model = load(copy, engine="onnxruntime")
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="expected the tokenizer that was loaded, got another"):
        model.predict(TEXTS)
    for refuse in (load, lambda path: convert(path, ["openvino"])):
        with pytest.raises(ArtifactError, match=r"tokenizer\.json: expected SHA-256"):
            refuse(copy)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: expected a file of the artefact, got none"):
        load(copy)


def test_a_tokenizer_outside_is_refused(copy: Path) -> None:
    shutil.move(copy / "tokenizer.json", copy.parent / "outside.json")
    (copy / "link.json").symlink_to(copy.parent / "outside.json")
    checksum = read_manifest(copy).files["tokenizer.json"]

    for name in ("../outside.json", str(copy.parent / "outside.json"), "link.json"):

        def point(content: dict[str, Any], name: str = name) -> None:
            content["files"] = {name: checksum}
            content["preprocessing"]["tokenizer"] = name

        edit(copy, point)
        with pytest.raises(ArtifactError, match="expected files inside the artefact"):
            load(copy)


def test_a_file_that_is_no_tokenizer_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    checksum = hashlib.sha256(b"{}").hexdigest()
    edit(copy, lambda content: content["files"].update({"tokenizer.json": checksum}))
    model = load(copy, engine="onnxruntime")
    with pytest.raises(ArtifactError, match=r"tokenizer: expected one of Hugging Face's tokenizers, of 7 tokens, got"):
        model.predict(TEXTS)
    tokens, mask = (tensor.numpy() for tensor in reviews().tokenizer(TEXTS))
    np.testing.assert_allclose(model.predict({"tokens": tokens, "mask": mask})[1], wanted(TEXTS), atol=1e-5)


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingPackageError, match=r"tokenizers: expected an installed package.*'\.\[text\]'"):
        load(reviews().artifact, engine="onnxruntime").predict(TEXTS)


CHANGES: list[dict[str, Any]] = [
    {"length": 8},
    {"length": 0},
    {"length": "7"},
    {"inputs": ["ids"]},
    {"inputs": ["mask", "mask"]},
    {"inputs": ["ids", "words"]},
    {"padding": None},
    {"padding": {"token": "[PAD]", "id": "0", "type_id": 0, "side": "right"}},
    {"truncation": {"side": "middle"}},
    {"tokenizer": "other.json"},
]


@pytest.mark.parametrize("change", CHANGES)
def test_preprocessing_that_cannot_be_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy(reviews().artifact / "manifest.json", tmp_path)
    edit(tmp_path, lambda content: content["preprocessing"].update(change))
    with pytest.raises(ArtifactError, match="expected a manifest"):
        read_manifest(tmp_path)
    steps = {**reviews().tokenizer.preprocessing, **change}
    with pytest.raises(ExportError, match="preprocessing: expected what turns texts into the network's inputs, got"):
        again(tmp_path / "new", preprocessing=steps)
    assert not (tmp_path / "new").exists()


def test_files_stay_within_the_artefact(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"files: expected names within the artefact, got '\.\./tokenizer\.json"):
        again(tmp_path / "new", files={"../tokenizer.json": "{}"})
    assert not list(tmp_path.iterdir())


def again(path: Path, *, files: dict[str, str] | None = None, preprocessing: dict[str, Any] | None = None) -> None:
    export_artifact(
        reviews().program,
        path,
        targets=["eager"],
        reference=reviews().network,
        held_out=reviews().tokenizer(TEXTS),
        metadata={"preprocessing": preprocessing or reviews().tokenizer.preprocessing},
        files=files or reviews().tokenizer.files,
    )


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_damaged_preprocessing_is_an_artifact_error_or_harmless(
    tmp_path: Path, data: st.DataObject, value: Any
) -> None:
    content = json.loads((reviews().artifact / "manifest.json").read_text())
    where = data.draw(st.sampled_from(paths({key: content[key] for key in ("preprocessing", "files")})))
    holder = content
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    try:
        manifest = read_manifest(tmp_path)
    except ArtifactError:
        return
    steps = manifest.preprocessing or {}
    assert isinstance(manifest.files, dict)
    assert "tokenizer" not in steps or steps["tokenizer"] in manifest.files
    assert "tokenizer" not in steps or (steps["length"] == 7 and len(steps["inputs"]) == 2)

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import ArtifactError
from compress.export import export_artifact
from compress.runtime import CompactModel, load, read_manifest
from compress.runtime.buffers import _shared
from compress.runtime.classes import check_classes
from compress.runtime.manifest import Manifest, TensorSpec, manifest_text, parse_manifest
from compress.surgery.capture import export_program
from tests.export.heads import HERE_SEVERAL, Several, encoder, two_heads
from tests.export.programs import edit

ROOT = Path(__file__).parent.parent.parent
BOTH = [two_heads, encoder]
SERVED = [pytest.param(made, name) for made in BOTH for name in HERE_SEVERAL if made is two_heads or name != "aoti"]

Made = Callable[[], Several]


class Twice:
    """An engine of two outputs that refuses large batches."""

    takes, threads = "numpy", 1

    def __init__(self, limit: int = 4) -> None:
        self.limit = limit
        self.sizes: list[int] = []

    def __call__(self, inputs: Any) -> list[Any]:
        self.sizes.append(len(inputs[0]))
        assert len(inputs[0]) <= self.limit
        return [inputs[0] * 2, inputs[0].sum(1)]


def twice(structure: str | None = "dict", limit: int = 4, **serves: Twice) -> CompactModel:
    runs = serves or {"one": Twice(limit)}
    outputs = (TensorSpec("logits", "float32", (None, 3)), TensorSpec("sums", "float32", (None,)))
    manifest = Manifest("twice", "", "", (TensorSpec("x", "float32", (None, 3)),), outputs, {}, structure)
    manifest = replace(manifest, max_batch=limit)
    sizes = dict(zip((1, 4), runs))
    return CompactModel(manifest, runs, runs.__getitem__, engines=list(runs), serves=sizes)


def rows(num: int) -> np.ndarray:
    return np.arange(3.0 * num, dtype=np.float32).reshape(num, 3)


def values(outputs: Any) -> list[Any]:
    return list(outputs.values()) if isinstance(outputs, Mapping) else list(outputs)


@pytest.mark.parametrize(("made", "engine"), SERVED)
def test_any_batch_as_torch_or_numpy_in_the_structure_of_the_network(made: Made, engine: str) -> None:
    network, inputs, path = made()
    model = load(path, engine=engine)
    for num in (1, 2, 7, 130):
        few = [value[:num] for value in inputs]
        with torch.no_grad():
            wanted = network(*few)
        as_torch, as_numpy = model(*few), model([value.numpy() for value in few])
        assert type(as_torch) is type(as_numpy) is type(wanted)
        if isinstance(wanted, dict):
            assert list(as_torch) == list(as_numpy) == list(wanted)
        torch.testing.assert_close(as_torch, wanted, rtol=1e-4, atol=1e-5)
        for one, other in zip(values(as_torch), values(as_numpy), strict=True):
            assert isinstance(other, np.ndarray)
            assert not one.requires_grad
            np.testing.assert_array_equal(one.numpy(), other)


@pytest.mark.parametrize(("made", "engine"), SERVED)
def test_each_output_goes_where_the_caller_wants_it(made: Made, engine: str) -> None:
    _, inputs, path = made()
    model = load(path, engine=engine)
    few = [value[:5] for value in inputs]
    wanted = values(model(*few))
    buffers = [torch.full_like(value, torch.nan) for value in wanted]
    names = [spec.name for spec in model.manifest.outputs]
    for out in (buffers, tuple(buffers), dict(zip(names, buffers))):
        for buffer in buffers:
            buffer.fill_(torch.nan)
        assert model(*few, out=out) is out
        torch.testing.assert_close(buffers, wanted)
    arrays = [np.full(value.shape, np.nan, dtype=np.float32) for value in wanted]
    model(*[value.numpy() for value in few], out=arrays)
    for array, value in zip(arrays, wanted):
        np.testing.assert_allclose(array, value.numpy(), rtol=1e-5, atol=1e-6)


def test_batches_beyond_the_limit_are_split_and_joined() -> None:
    for x in (rows(11), torch.from_numpy(rows(11))):
        model = twice()
        found = model(x)
        assert model._runs["one"].sizes == [4, 4, 3]  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(found["logits"]), rows(11) * 2)
        assert np.array_equal(np.asarray(found["sums"]), rows(11).sum(1))
        assert {type(value) for value in found.values()} == {type(x)}
        buffers = (x * 0, x[:, 0] * 0)
        assert twice()(x, out=buffers) is buffers
        assert np.array_equal(np.asarray(buffers[1]), rows(11).sum(1))


def test_a_real_artefact_of_small_batches_is_split(tmp_path: Path) -> None:
    network, (x,), _ = two_heads()
    program = export_program(network, [x[:2]], largest_batch=8)
    export_artifact(program, tmp_path / "a", targets=["onnxruntime"], reference=network, held_out=[x[:8]])
    model = load(tmp_path / "a")
    assert model.manifest.max_batch == 8
    with torch.no_grad():
        torch.testing.assert_close(model(x[:21]), network(x[:21]), rtol=1e-4, atol=1e-5)


def test_each_batch_size_has_its_engine() -> None:
    one, many = Twice(64), Twice(64)
    model = twice("tuple", 64, one=one, many=many)
    for num in (1, 2, 3, 64, 65):
        found = model(rows(num))
        assert isinstance(found, tuple)
        assert np.array_equal(found[1], rows(num).sum(1))
    assert (one.sizes, many.sizes) == ([1, 2, 1], [3, 64, 64])


@pytest.mark.parametrize(
    ("structure", "out", "message"),
    [
        ("dict", {"logits": rows(2)}, r"out: expected logits, sums, got logits\. Give one for each output"),
        ("dict", {}, "out: expected logits, sums, got none"),
        ("dict", rows(2), r"out: expected 2 buffers \(logits, sums\) in a tuple, list or mapping, got ndarray"),
        ("tuple", (rows(2),), r"out: expected 2 buffers \(logits, sums\) .* got 1\."),
        ("tuple", (rows(2), rows(2)), r"out\[1\]: expected shape \(N\) with N = 2, got \(2, 3\)"),
        ("dict", (rows(2), np.zeros(2)), r"out\['sums'\]: expected dtype float32, got float64"),
        ("dict", (torch.zeros(2, 3), np.zeros(2)), r"out\['logits'\]: expected what the inputs are, got torch"),
        ("tuple", (rows(2), np.frombuffer(bytes(8), dtype=np.float32)), r"out\[1\]: expected memory that can be wr"),
        (None, (rows(2),), "out: expected what the inputs are, got tuple"),
    ],
)
def test_buffers_that_do_not_fit_are_named(structure: str | None, out: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        twice(structure)(rows(2), out=out)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_buffers_lie_apart(kind: Callable[[np.ndarray], Any]) -> None:
    model, x, wide = twice(), kind(rows(2)), kind(np.zeros((2, 4), np.float32))
    model(x, out=(wide[:, :3], wide[:, 3]))  # columns of one array: no value in common
    assert wide[:, 3].tolist() == rows(2).sum(1).tolist()
    assert wide[:, :3].tolist() == (rows(2) * 2).tolist()
    message = r"out\['sums'\]: expected memory of its own, got some of out\['logits'\]"
    for out in ((wide[:, :3], wide[:, 2]), {"sums": wide[0, :2], "logits": wide[:, 1:]}):
        with pytest.raises(ArtifactError, match=message):
            model(x, out=out)


def test_tensors_elsewhere_lie_apart_where_one_ends_before_the_other_begins() -> None:
    flat = torch.empty(10, device="meta")
    assert _shared(flat[:6], flat[5:])
    assert not _shared(flat[:6:5], flat[6:])


def test_a_buffer_may_be_one_that_requires_a_gradient() -> None:
    out = (torch.zeros(9, 3, requires_grad=True), torch.zeros(9, requires_grad=True))
    assert twice()(torch.from_numpy(rows(9)), out=out) is out
    np.testing.assert_array_equal(out[1].detach(), rows(9).sum(1))


@pytest.mark.parametrize("made", BOTH)
def test_labels_are_predicted_by_the_logits_else_by_the_first(made: Made) -> None:
    network, inputs, path = made()
    model = load(path, engine="onnxruntime")
    names = model.manifest.labels
    assert names is not None
    raw = {spec.name: value.numpy() for spec, value in zip(model.manifest.inputs, inputs)}
    labels, probabilities = model.predict(raw)
    with torch.no_grad():
        outputs = network(*inputs)
    scores = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    np.testing.assert_allclose(probabilities, scores.softmax(-1).numpy(), atol=1e-5)
    assert labels == [names[i] for i in scores.argmax(-1)]


def test_without_classes_predict_names_the_output() -> None:
    model = twice()
    check_classes(model.manifest)
    model.manifest = replace(model.manifest, outputs=model.manifest.outputs[::-1])
    check_classes(model.manifest)
    model.manifest = replace(model.manifest, outputs=(TensorSpec("boxes", "float32", (None, 7, 4)),) * 2)
    with pytest.raises(ArtifactError, match=r"twice: expected an output .* got \(N, 7, 4\) of 'boxes' for the task"):
        model.predict(rows(2))


def test_a_manifest_is_read_as_written() -> None:
    for structure in ("dict", "tuple"):
        manifest = twice(structure).manifest
        assert parse_manifest(manifest_text(manifest).encode(), "a") == manifest
    one = replace(twice(None).manifest, outputs=twice().manifest.outputs[:1])
    assert "structure" not in manifest_text(one)
    assert parse_manifest(manifest_text(one).encode(), "a") == one


def one_name(content: dict[str, Any]) -> None:
    content["outputs"][1]["name"] = content["outputs"][0]["name"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("structure"), r"2 outputs \(features, logits\) for one by itself"),
        (lambda content: content.update(structure=None), r"2 outputs \(features, logits\) for one by itself"),
        (lambda content: content.update(structure="set"), "structure 'set', neither tuple nor dict"),
        (lambda content: content.update(structure=["dict"]), "structure is of type list"),
        (lambda content: content.update(outputs=[]), "1?2? inputs and 0 outputs"),
        (one_name, r"one name for several outputs \(features, features\)"),
        (lambda content: content["outputs"][1].update(name=3), "name is of type int"),
        (lambda content: content["outputs"][1].update(shape=[3, 2]), "shape"),
        (lambda content: content["labels"].pop(), "1 labels for 2 classes"),
        (lambda content: content["outputs"].pop(), r"several: expected 1 outputs of onnxruntime \(features\), got 2\."),
        (
            lambda content: content["outputs"].append({"name": "more", "dtype": "float32", "shape": [None]}),
            r"several: expected 3 outputs of onnxruntime \(features, logits, more\), got 2\. Export again",
        ),
    ],
)
def test_a_damaged_manifest_is_one_clear_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    shutil.copytree(encoder().artifact, tmp_path / "a")
    edit(tmp_path / "a", change)
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path / "a", engine="onnxruntime")


def test_an_artefact_of_one_output_is_held_to_it(tmp_path: Path) -> None:
    shutil.copytree(two_heads().artifact, tmp_path / "a")

    def one(content: dict[str, Any]) -> None:
        del content["structure"]
        del content["outputs"][1]

    edit(tmp_path / "a", one)
    assert read_manifest(tmp_path / "a").structure is None
    with pytest.raises(ArtifactError, match=r"several: expected 1 outputs of eager \(output_0\), got 2"):
        load(tmp_path / "a", engine="eager")


def test_several_outputs_are_served_without_torch(tmp_path: Path) -> None:
    _, inputs, path = encoder()
    names = [spec.name for spec in read_manifest(path).inputs]
    arrays: dict[str, Any] = {name: value[:9].numpy() for name, value in zip(names, inputs)}
    np.savez(tmp_path / "inputs.npz", **arrays)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, compress.runtime\n"
        "x = dict(np.load(sys.argv[2]))\n"
        "for engine in sys.argv[4:]:\n"
        "    model = compress.runtime.load(sys.argv[1], engine=engine)\n"
        "    found = model(x)\n"
        "    out = {name: np.empty_like(value) for name, value in found.items()}\n"
        "    model(x, out=out)\n"
        "    assert all(np.allclose(out[name], found[name], atol=1e-6) for name in out)\n"
        "    assert len(model.predict(x)[0]) == 9\n"
        "np.savez(sys.argv[3], **found)\n"
    )
    engines = [name for name in ("onnxruntime", "openvino") if name in HERE_SEVERAL]
    files = [str(path), str(tmp_path / "inputs.npz"), str(tmp_path / "found.npz")]
    command = [sys.executable, "-c", program, *files, *engines]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    wanted = load(path, engine="eager")(arrays)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)

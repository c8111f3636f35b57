from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.errors import ArtifactError
from compress.runtime.manifest import FORMAT_VERSION, Manifest, Range, Target, check_file, read_manifest, sha256

CONTENT: dict[str, Any] = {
    "name": "small",
    "created": "2026-01-01T00:00:00+00:00",
    "task": "classification",
    "inputs": [
        {"name": "x", "dtype": "float32", "shape": [None, 1, 8, 8]},
        {
            "name": "tokens",
            "dtype": "int64",
            "shape": [None, None],
            "ranges": {"1": {"name": "size1", "smallest": 2, "largest": 64, "typical": 9}},
            "num_rows": 10,
        },
    ],
    "outputs": [{"name": "output", "dtype": "float32", "shape": [None, 3]}],
    "targets": {
        "eager": {
            "file": "program.pt2",
            "bytes": 4,
            "sha256": "0" * 64,
            "census": {"int8_kernels": 4, "float_kernels": 0, "details": {"Conv": 4}, "conversions": None, "macs": 9},
            "agreement": {},
            "requires": {},
        }
    },
    "labels": ["a", "b", "c"],
    "preprocessing": {"scale": 0.1, "mean": [0.0], "std": [1.0], "layout": "NCHW"},
    "scheme": "int8",
    "metrics": {"accuracy": 0.9},
    "history": [{"kind": "prune", "data": {"slices": {}}}, {"kind": "quantize"}],
    "versions": {},
    "skipped": {},
    "max_batch": None,
    "products": [{"name": "conv2d", "macs": 9, "quantized": True}],
    "gates": {"max_relative_error": 0.1},
    "format_version": FORMAT_VERSION,
}

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.sampled_from([10**400, "(1 2)f4,f4", "1e300"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def write(directory: Path, content: Any) -> Path:
    (directory / "manifest.json").write_text(json.dumps(content))
    return directory


def paths(content: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path for key, value in items for path in [(*prefix, key), *paths(value, (*prefix, key))]]


def test_a_manifest_is_read_as_written(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, CONTENT))
    assert manifest.inputs[0].shape == (None, 1, 8, 8)
    assert manifest.inputs[0].ranges == {}
    assert manifest.inputs[1].ranges == {1: Range("size1", 2, 64, 9)}
    assert [spec.num_rows for spec in (*manifest.inputs, *manifest.outputs)] == [None, 10, None]
    assert manifest.targets["eager"].file == "program.pt2"
    assert manifest.labels == ["a", "b", "c"]


@pytest.mark.parametrize(
    "change",
    [
        {"smallest": 0},
        {"smallest": 10},
        {"typical": 65},
        {"typical": 2.5},
        {"largest": "64"},
        {"name": None},
        {"more": 1},
    ],
)
def test_a_range_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    content = json.loads(json.dumps(CONTENT))
    content["inputs"][1]["ranges"]["1"] |= change
    with pytest.raises(ArtifactError, match="expected a manifest"):
        read_manifest(write(tmp_path, content))


@pytest.mark.parametrize("change", [{"num_rows": 0}, {"num_rows": 2.5}, {"num_rows": "9"}, {"dtype": "float32"}])
def test_a_table_that_cannot_be_looked_up_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    content = json.loads(json.dumps(CONTENT))
    content["inputs"][1] |= change
    with pytest.raises(ArtifactError, match="expected a manifest"):
        read_manifest(write(tmp_path, content))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("inputs", []),
        ("outputs", []),
        ("labels", ["a", "b"]),
        ("preprocessing", {"scale": 1.0, "mean": [0.0, 1.0], "std": [1.0]}),
        ("preprocessing", {"scale": 1.0, "mean": [], "std": [1.0]}),
        ("preprocessing", {"scale": 1.0, "mean": [0.0], "std": [0.0]}),
        ("preprocessing", {"scale": 1.0, "mean": ["zero"], "std": [1.0]}),
        ("preprocessing", {"scale": 1.0, "mean": [[0.0]], "std": [1.0]}),
        ("preprocessing", {"scale": 10**400, "mean": [0.0], "std": [1.0]}),
        ("preprocessing", {"scale": 1.0, "mean": [10**400], "std": [1.0]}),
        ("preprocessing", {"scale": 1e300, "mean": [0.0], "std": [1.0]}),
        ("preprocessing", {"scale": 1.0, "mean": [0.0], "std": [1e-300]}),
        ("preprocessing", {"scale": 1.0, "mean": [0.0], "std": ["0"]}),
        ("history", [3]),
        ("history", [{"data": {}}]),
        ("history", [{"kind": "quantize", "data": [1]}]),
        ("products", None),
        ("products", ["conv2d"]),
        ("products", [{"name": "conv2d", "macs": 9}]),
        ("products", [{"name": "conv2d", "macs": "many", "quantized": True}]),
        ("products", [{"name": "conv2d", "macs": 9, "quantized": True, "more": 1}]),
        ("gates", None),
        ("gates", {"max_relative_error": "0.1"}),
    ],
)
def test_what_would_fail_later_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ArtifactError, match="expected a manifest"):
        read_manifest(write(tmp_path, {**CONTENT, key: value}))


@pytest.mark.parametrize(
    "requires",
    [
        {"flags": 5},
        {"flags": ["avx2", 1]},
        {"versions": "x"},
        {"versions": {"": "1"}},
        {"versions": {"torch": 2}},
        {"torch": 2.13},
        {"arch": None},
        {"cuda": 9},
    ],
)
def test_requirements_that_cannot_be_are_refused(tmp_path: Path, requires: dict[str, Any]) -> None:
    content = json.loads(json.dumps(CONTENT))
    content["targets"]["eager"]["requires"] = requires
    with pytest.raises(ArtifactError, match="expected a manifest"):
        read_manifest(write(tmp_path, content))


@pytest.mark.parametrize(
    "census",
    [
        {"int8_kernels": 4},
        {"int8_kernels": 4, "float_kernels": None},
        {"int8_kernels": 4, "float_kernels": 0, "details": 3},
        {"int8_kernels": 4, "float_kernels": 0, "more": 1},
    ],
)
def test_kernel_counts_that_cannot_be_are_refused(tmp_path: Path, census: dict[str, Any]) -> None:
    content = json.loads(json.dumps(CONTENT))
    content["targets"]["eager"]["census"] = census
    with pytest.raises(ArtifactError, match=r"manifest\.json: expected a manifest"):
        read_manifest(write(tmp_path, content))


@pytest.mark.parametrize("dtype", ["(1 2)f4,f4", "f4,f4", "object", "float33", "", "(" * 5000])
@pytest.mark.parametrize("key", ["inputs", "outputs"])
def test_what_is_no_dtype_is_refused(tmp_path: Path, key: str, dtype: str) -> None:
    content = json.loads(json.dumps(CONTENT))
    content[key][0]["dtype"] = dtype
    with pytest.raises(ArtifactError, match="expected a manifest"):
        read_manifest(write(tmp_path, content))


@pytest.mark.parametrize("dimension", ["0", "2", "-1", "x"])
def test_a_range_of_no_dynamic_dimension_is_refused(tmp_path: Path, dimension: str) -> None:
    content = json.loads(json.dumps(CONTENT))
    content["inputs"][1]["ranges"] = {dimension: content["inputs"][1]["ranges"]["1"]}
    with pytest.raises(ArtifactError, match="expected a manifest"):
        read_manifest(write(tmp_path, content))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(paths(CONTENT)), value=JSON, remove=st.booleans())
def test_a_damaged_manifest_is_an_artifact_error_or_harmless(
    tmp_path: Path, where: tuple[Any, ...], value: Any, remove: bool
) -> None:
    content = json.loads(json.dumps(CONTENT))
    holder = content
    for key in where[:-1]:
        holder = holder[key]
    if remove:
        del holder[where[-1]]
    else:
        holder[where[-1]] = value
    try:
        manifest = read_manifest(write(tmp_path, content))
    except ArtifactError:
        return
    assert isinstance(manifest, Manifest)
    assert all(isinstance(target.file, str) for target in manifest.targets.values())
    assert all(spec.shape[0] is None for spec in manifest.inputs)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '"x"', "\x00"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="expected a manifest"):
        read_manifest(tmp_path)


def test_a_later_format_is_refused_by_its_number(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected format_version 1, got 2\. Update compress"):
        read_manifest(write(tmp_path, {**CONTENT, "format_version": 2, "news": 1}))


def test_no_artefact_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected an artefact with a manifest\.json, got none"):
        read_manifest(tmp_path)


def test_a_manifest_that_may_not_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError("permission denied")

    write(tmp_path, CONTENT)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ArtifactError, match=r"manifest\.json: expected to read it, got permission denied"):
        read_manifest(tmp_path)


def test_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / "f").write_bytes(b"data")
    shutil.copy(path / "f", tmp_path / "outside")
    good = Target(file="f", bytes=4, sha256=sha256(path / "f"))
    assert check_file(path, good) == path / "f"
    for name, message in (("../outside", "inside"), ("absent", "got none"), (str(tmp_path / "outside"), "inside")):
        with pytest.raises(ArtifactError, match=message):
            check_file(path, Target(file=name, bytes=4, sha256=good.sha256))
        with pytest.raises(ArtifactError, match=message):
            check_file(path, Target(file="f", bytes=4, sha256=good.sha256, parts={name: good.sha256}))
    for name in ("a\0b", "a" * 5000, "\ud800"):
        with pytest.raises(ArtifactError, match="expected to read"):
            check_file(path, Target(file=name, bytes=4, sha256=good.sha256))
    (path / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match=r"link: expected files inside the artefact, got a link .* local_dir="):
        check_file(path, Target(file="link", bytes=4, sha256=good.sha256))
    (path / "loop").symlink_to(path / "loop")
    with pytest.raises(ArtifactError, match="expected to read 'loop'"):
        check_file(path, Target(file="loop", bytes=4, sha256=good.sha256))
    (path / "g").write_bytes(b"dbta")
    with pytest.raises(ArtifactError, match=r"g: expected SHA-256"):
        check_file(path, Target(file="f", bytes=4, sha256=good.sha256, parts={"g": good.sha256}))
    (path / "f").write_bytes(b"dbta")
    with pytest.raises(ArtifactError, match="expected SHA-256"):
        check_file(path, good)

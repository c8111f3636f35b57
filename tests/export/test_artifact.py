from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import ExportError, MissingPackageError
from compress.export import Gates, building, export_artifact
from compress.export.targets import Census, ExportSkippedError, aoti, eager, onnxruntime
from compress.runtime.engines import Engine, make_engine
from compress.runtime.manifest import check_file, read_manifest
from compress.runtime.trust import SIGNATURE
from tests.export.programs import HERE, LABELS, PREPROCESSING, artifact, floating, tiny


def export(directory: Path, *, targets: tuple[str, ...] = ("eager",), **changes: Any) -> Any:
    trained = tiny()
    arguments: dict[str, Any] = {
        "reference": trained.reference,
        "held_out": [trained.inputs],
        "scheme": "int8",
        "gates": Gates(min_top1_agreement=0.95, min_int8_fraction=0),
        "targets": targets,
        **changes,
    }
    return export_artifact(arguments.pop("program", trained.program), directory, **arguments)


def scaled(x: torch.Tensor) -> torch.Tensor:
    """Give what differs a little: the integer network is the trained one nearly to the last bit."""
    return 1.001 * tiny().reference(x)


def test_the_manifest_says_what_there_is() -> None:
    manifest = read_manifest(artifact())
    assert (manifest.name, manifest.task, manifest.scheme) == ("small", "classification", "int8")
    assert (manifest.labels, manifest.preprocessing) == (LABELS, PREPROCESSING)
    assert manifest.inputs[0].shape == (None, 1, 8, 8)
    assert (manifest.outputs[0].dtype, manifest.outputs[0].shape) == ("float32", (None, 3))
    assert (manifest.history, manifest.metrics) == ([{"kind": "quantize"}], {"accuracy": 0.9})
    assert list(manifest.targets) == HERE
    assert manifest.versions["torch"] == torch.__version__.partition("+")[0] or manifest.versions["torch"]
    for target in manifest.targets.values():
        file = check_file(artifact(), target)
        assert target.bytes == sum((file.parent / name).stat().st_size for name in (file.name, *target.parts))
        assert target.agreement["num_samples"] == 150
        assert target.agreement["relative_error"] < 0.1


def test_the_directory_holds_the_manifest_and_the_targets_only() -> None:
    names = {entry.name for entry in artifact().iterdir()}
    files = {file for target in read_manifest(artifact()).targets.values() for file in (target.file, *target.parts)}
    assert names == {"manifest.json", SIGNATURE} | files
    assert files >= {eager.FILE, onnxruntime.FILE}
    assert [entry.name for entry in artifact().parent.iterdir()] == ["small"]


def test_an_int8_artefact_is_smaller_than_its_float_twin(tmp_path: Path) -> None:
    trained = floating()
    targets = ("eager", "onnxruntime")
    export(tmp_path / "f", program=trained.program, reference=trained.reference, scheme=None, targets=targets)
    twin, small = read_manifest(tmp_path / "f"), read_manifest(artifact())
    assert twin.scheme is None
    for name in targets:
        assert small.targets[name].bytes < twin.targets[name].bytes
        assert twin.targets[name].agreement["relative_error"] < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gates": Gates(max_relative_error=1e-9), "reference": lambda x: scaled(x)},
            r"eager: expected a relative error of at most 1e-09",
        ),
        ({"gates": Gates(min_top1_agreement=1.01)}, r"eager: expected a top-1 agreement"),
        ({"reference": lambda x: -tiny().reference(x)}, r"relative error"),
        (
            {
                "program": floating().program,
                "reference": lambda x: 1.001 * floating().reference(x),
                "scheme": None,
            },
            r"relative error of at most 0.0001",
        ),
        ({"targets": ("eager", "abacus")}, r"got abacus"),
        ({"targets": ()}, r"at least one target, got none: no targets"),
        ({"targets": "eager"}, r"^targets: expected a list of str, got one alone"),
        ({"held_out": torch.ones(4, 1, 8, 8)}, r"^held_out: expected a list of Tensor, got one alone"),
        (
            {"program": torch.nn.ReLU()},
            r"^program: expected what compress\.export\.export_program makes .*, got ReLU\.",
        ),
        ({"reference": torch.nn.ReLU().train()}, r"^reference: expected a module in eval mode"),
        ({"scheme": None}, r"^scheme: expected the name of one for a program in integers, got none"),
        (
            {
                "program": floating().program,
                "reference": floating().reference,
                "targets": ("onnxruntime",),
                "gates": Gates(9, 0),
            },
            r"got 0 in 0 of 7 kernels",
        ),
    ],
)
def test_a_failed_gate_leaves_nothing_behind(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "sub" / "a", **changes)
    assert not list(tmp_path.glob("*/*"))


def test_all_failures_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        export(tmp_path / "a", targets=("eager", "onnxruntime"), gates=Gates(1e-9, 1.01), reference=scaled)
    assert [str(caught.value).count(name) for name in ("eager:", "onnxruntime:")] == [3, 3]
    assert "Nothing was written. Train longer, loosen the gate that is named, or" in str(caught.value)
    with pytest.raises(
        ExportError, match=r"Nothing was written\. Loosen the gate that is named, or leave the target out"
    ):
        export(tmp_path / "a", gates=Gates(min_int8_fraction=1.01))


def test_an_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(program: object, path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(eager, "build", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("1")
    with pytest.raises(ExportError, match="expected no artefact yet"):
        export(tmp_path / "a")
    assert (tmp_path / "a" / "mine").read_text() == "1"


def test_a_link_that_leads_nowhere_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="expected no artefact yet"):
        export(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


def test_a_target_that_cannot_be_built_is_skipped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(program: object, path: Path) -> None:
        raise ExportSkippedError("aoti: expected a C++ compiler, got none.")

    monkeypatch.setattr(aoti, "build", build)
    with pytest.warns(UserWarning, match=r"C\+\+ compiler, got none\. Going on"):
        manifest = export(tmp_path / "a", targets=("aoti", "eager"))
    assert list(manifest.targets) == ["eager"]
    assert "compiler" in manifest.skipped["aoti"]
    with pytest.raises(ExportError, match="at least one target"):
        export(tmp_path / "b", targets=("aoti",))


def test_a_target_that_its_engine_does_not_load_is_skipped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, path: Path) -> Engine:
        if name == "onnxruntime":
            raise RuntimeError("an operator of tomorrow\nand more")
        return make_engine(name, path)

    monkeypatch.setattr(building, "make_engine", broken)
    program, reference, inputs = floating()
    with pytest.warns(
        UserWarning, match="a file that onnxruntime loads, got RuntimeError: an operator of tomorrow. Leave"
    ):
        manifest = export_artifact(
            program, tmp_path / "a", targets=["eager", "onnxruntime"], reference=reference, held_out=[inputs]
        )
    assert list(manifest.targets) == ["eager"]
    assert list(manifest.skipped) == ["onnxruntime"]
    assert not (tmp_path / "a" / "model.onnx").exists()


def test_a_target_that_would_compute_in_floats_is_skipped_where_another_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = building.with_macs
    monkeypatch.setattr(building, "with_macs", lambda *given: Census(0, 7) if given[2] == "openvino" else count(*given))
    trained = tiny()
    given: dict[str, Any] = {"reference": trained.reference, "held_out": [trained.inputs], "scheme": "int8"}
    given["gates"] = Gates(min_top1_agreement=0.95)
    with pytest.warns(UserWarning, match=r"openvino: expected at least 0\.5 .* floating point\. Going on"):
        manifest = export_artifact(trained.program, tmp_path / "a", targets=["openvino", "onnxruntime"], **given)
    assert (list(manifest.targets), list(manifest.skipped)) == (["onnxruntime"], ["openvino"])
    assert not {path.name for path in (tmp_path / "a").iterdir()} & {"model.xml", "model.bin"}
    with pytest.raises(ExportError, match=r"openvino: expected at least 0\.5 of the multiply-accumulates in int8"):
        export_artifact(trained.program, tmp_path / "b", targets=["openvino"], **given)
    with pytest.raises(ExportError, match=r"got targets that compute in floats: eager\. Add another"):
        export_artifact(trained.program, tmp_path / "b", targets=["eager"], **given)
    given["gates"] = Gates(min_top1_agreement=0.95, min_int8_fraction=0)
    assert list(export_artifact(trained.program, tmp_path / "b", targets=["eager"], **given).targets) == ["eager"]


def test_a_target_whose_library_is_missing_is_skipped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    program, reference, inputs = floating()
    with pytest.warns(UserWarning, match=r"openvino: .*pip install .*Going on with the other targets"):
        manifest = export_artifact(
            program, tmp_path / "a", targets=["openvino", "eager"], reference=reference, held_out=[inputs]
        )
    assert (list(manifest.targets), list(manifest.skipped)) == (["eager"], ["openvino"])


def test_what_a_missing_library_left_goes_with_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(program: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise MissingPackageError("onnxruntime")

    monkeypatch.setattr(onnxruntime, "build", build)
    with pytest.warns(UserWarning, match="onnxruntime"):
        manifest = export(tmp_path / "a", targets=("onnxruntime", "eager"))
    assert list(manifest.targets) == ["eager"]
    assert not (tmp_path / "a" / onnxruntime.FILE).exists()
    with pytest.raises(ExportError, match=r"floats: eager\. .*pip install"), pytest.warns(match="install"):
        export(tmp_path / "b", targets=("onnxruntime", "eager"), gates=Gates(min_top1_agreement=0.95))


@pytest.mark.parametrize("broken", ["build", "run"])
def test_a_target_whose_library_refuses_the_network_is_skipped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    class Broken:
        takes, threads = "numpy", 1

        def __call__(self, inputs: object) -> list[object]:
            raise RuntimeError("no kernel\nand more")

    def refuse(program: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise RuntimeError("no kernel\nand more")

    if broken == "build":
        monkeypatch.setattr(onnxruntime, "build", refuse)
    else:
        make = building.make_engine
        monkeypatch.setattr(
            building, "make_engine", lambda name, path: Broken() if name != "eager" else make(name, path)
        )
    program, reference, inputs = floating()
    with pytest.warns(UserWarning, match=r"got.*: no kernel\. Leave the target out\. Going on"):
        manifest = export_artifact(
            program, tmp_path / "a", targets=["onnxruntime", "eager"], reference=reference, held_out=[inputs]
        )
    assert (list(manifest.targets), list(manifest.skipped)) == (["eager"], ["onnxruntime"])
    assert not (tmp_path / "a" / "model.onnx").exists()


def test_labels_for_some_classes_alone_are_refused(tmp_path: Path) -> None:
    program, reference, inputs = floating()
    with pytest.raises(ExportError, match="labels: expected a name for each class, got 2 labels for 3 classes"):
        export_artifact(
            program,
            tmp_path / "a",
            targets=["eager"],
            reference=reference,
            held_out=[inputs],
            metadata={"labels": ["left", "right"]},
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"labels": [0, 1, 2]}}, r"metadata: expected .*, got labels are not all of type str\. Change it"),
        ({"metadata": {"task": None}}, "got task is of type NoneType"),
        ({"metadata": {"history": [{"step": 1}]}}, "got 'kind'"),
        ({"metadata": {"metrics": {"accuracy": torch.ones(2)}}}, "got Tensor is not one of JSON's kinds"),
        ({"metadata": {"created": "today"}}, "metadata: expected keys among name, task, .*, got created"),
        ({"files": {"": "text"}}, "files: expected names within the artefact, got ''"),
        ({"files": {"..": "text"}}, r"names within the artefact, got '\.\.'"),
        ({"files": {"a\\b": "text"}}, "names within the artefact"),
        (
            {"files": {"manifest.json": "{}", "words.json": "{}"}},
            r"that the artefact does not use, got manifest\.json\.",
        ),
        ({"files": {"Signature.json": "{}"}}, r"got Signature\.json"),
        ({"files": {"model.bin": "{}"}}, r"got model\.bin"),
    ],
)
def test_what_no_manifest_holds_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(eager, "build", lambda *given: pytest.fail("something was built"))
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "a", **changes)
    assert not list(tmp_path.iterdir())


def test_numbers_of_metadata_may_be_those_of_a_library(tmp_path: Path) -> None:
    metrics = {"accuracy": np.float32(0.5), "loss": torch.tensor(2.0), "num": np.int64(3)}
    manifest = export(tmp_path / "a", metadata={"metrics": metrics, "labels": ("a", "b", "c")})
    assert manifest.metrics == {"accuracy": 0.5, "loss": 2.0, "num": 3}
    assert manifest == read_manifest(tmp_path / "a")


def test_the_manifest_is_plain_json_without_paths_of_this_machine() -> None:
    text = (artifact() / "manifest.json").read_text()
    assert json.loads(text)["format_version"] == 1
    assert str(artifact().parent) not in text

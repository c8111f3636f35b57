from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from compress.errors import ArtifactError, CompressError, ExportError
from compress.export import Gates, conversion, convert, export_artifact
from compress.export.targets import ExportSkippedError, onnxruntime, openvino
from compress.runtime import load, read_manifest
from compress.runtime.trust import SIGNATURE, is_ours
from compress.surgery.capture import export_program
from tests.export.networks import floats
from tests.export.programs import HERE, Trained, edit, floating, quantized, tiny

COMPILED = [name for name in HERE if name in ("aoti", "onnxruntime", "openvino")]


def export(made: Trained, path: Path) -> None:
    """Write an artefact of an int8 network with the portable program alone."""
    export_artifact(
        made.program,
        path,
        targets=["eager"],
        reference=made.reference,
        held_out=[made.inputs],
        scheme="int8",
        gates=Gates(min_top1_agreement=0.9, min_int8_fraction=0),
    )


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact that is copied; do not change the files."""
    path = tmp_path_factory.mktemp("portable") / "tiny"
    export(tiny(), path)
    return path


@pytest.fixture
def copy(portable: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(portable, tmp_path / "copy"))


@pytest.fixture
def built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the ONNX file of ``portable`` once for all tests that are about what happens to files."""
    monkeypatch.setattr(onnxruntime, "build", _build)


_FILES: dict[str, tuple[Any, bytes]] = {}
_build_anew = onnxruntime.build


def _build(program: ExportedProgram, path: Path) -> Any:
    key = str(program.graph) + str([value.double().sum() for value in program.state_dict.values()])
    if key not in _FILES:
        _FILES[key] = _build_anew(program, path), path.read_bytes()
    census, file = _FILES[key]
    path.write_bytes(file)
    return census


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*")}


def test_what_is_added_is_what_the_export_would_have_built(tmp_path: Path) -> None:
    copy = tmp_path / "small"
    export(quantized(), copy)
    before = content(copy)
    manifest = convert(copy, [*COMPILED, *COMPILED])
    assert manifest == read_manifest(copy)
    assert list(manifest.targets) == ["eager", *COMPILED]
    assert is_ours(copy)
    after = content(copy)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json", SIGNATURE}
    assert set(after) - set(before) == {
        name for engine in COMPILED for name in (manifest.targets[engine].file, *manifest.targets[engine].parts)
    }
    x = quantized().inputs
    wanted = load(copy, engine="eager")(x)
    for name in COMPILED:
        target = manifest.targets[name]
        assert target.census["int8_macs"] > 0.9 * target.census["macs"] > 0
        assert target.agreement["reference"] == "eager"
        assert target.agreement["inputs"] == "random, seed 0"
        outputs = load(copy, engine=name)(x)
        assert float((outputs - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_networks_of_floats(kind: str, tmp_path: Path) -> None:
    made = floats(kind)
    export_artifact(made.program, tmp_path / "a", targets=["eager"], reference=made.reference, held_out=[made.inputs])
    manifest = convert(tmp_path / "a", ["onnxruntime"], seed=3)
    assert manifest.targets["onnxruntime"].agreement["inputs"] == "random, seed 3"
    assert manifest.targets["onnxruntime"].agreement["relative_error"] < 1e-4
    np.testing.assert_allclose(
        load(tmp_path / "a", engine="onnxruntime")(made.inputs.numpy()),
        load(tmp_path / "a", engine="eager")(made.inputs.numpy()),
        atol=1e-4,
    )


class Tokens(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * mask[..., None]
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))


def test_random_tokens_are_rows_of_the_embedding_and_masks_are_never_empty(tmp_path: Path) -> None:
    reference = Tokens().eval()
    inputs = [torch.randint(11, (20, 5)), torch.ones(20, 5, dtype=torch.int64)]
    program = export_program(reference, [value[:2] for value in inputs])
    export_artifact(program, tmp_path / "a", targets=["eager"], reference=reference, held_out=inputs)
    found = convert(tmp_path / "a", ["onnxruntime"]).targets["onnxruntime"].agreement
    assert found["num_samples"] == 64
    assert found["relative_error"] < 1e-5  # not-a-number, from an empty mask, would be infinite
    given = convert(tmp_path / "a", ["onnxruntime"], inputs=inputs, replace=True)
    found = given.targets["onnxruntime"].agreement
    assert (found["inputs"], found["num_samples"]) == ("given", 20)


class Averaged(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(6, 3)

    def forward(self, sums: torch.Tensor, days: torch.Tensor) -> torch.Tensor:
        return self.head(sums / days[:, None] * days[:, None])


def test_where_random_inputs_fail_real_ones_are_asked_for(tmp_path: Path) -> None:
    reference = Averaged().eval()
    inputs = [torch.randn(20, 6), torch.randint(1, 9, (20,))]
    program = export_program(reference, [value[:2] for value in inputs])
    export_artifact(program, tmp_path / "a", targets=["eager"], reference=reference, held_out=inputs)
    with pytest.raises(ExportError, match=r"got inf on 64 held-out inputs(.|\n)*give real inputs \(--inputs\)"):
        convert(tmp_path / "a", ["onnxruntime"])
    with pytest.raises(ExportError, match=r"leave the target out\.$"):
        convert(tmp_path / "a", ["onnxruntime"], inputs=inputs, gates=Gates(min_top1_agreement=1.01))
    assert "onnxruntime" in convert(tmp_path / "a", ["onnxruntime"], inputs=inputs).targets


class Months(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = torch.nn.Embedding(12, 4), torch.nn.Linear(4, 3)

    def forward(self, month: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(month - 1))


def test_inputs_that_the_network_does_not_take_are_one_error(tmp_path: Path) -> None:
    reference, month = Months().eval(), torch.arange(1, 13)
    program = export_program(reference, [month])
    export_artifact(program, tmp_path / "a", targets=["eager"], reference=reference, held_out=[month])
    with pytest.raises(ExportError, match=r"inputs: .*got random, seed 0, which it does not: .*\(--inputs\)"):
        convert(tmp_path / "a", ["onnxruntime"])
    with pytest.raises(ExportError, match="got given, which it does not"):
        convert(tmp_path / "a", ["onnxruntime"], inputs=[month + 1])
    assert "onnxruntime" in convert(tmp_path / "a", ["onnxruntime"], inputs=[month]).targets


@pytest.mark.usefixtures("built_once")
@pytest.mark.parametrize(
    ("targets", "arguments", "message"),
    [
        (["abacus"], {}, r"target: expected names among .*, got abacus"),
        ([], {}, "got none"),
        (["eager"], {}, "expected another one than eager"),
        (["onnxruntime"], {"gates": Gates(min_top1_agreement=1.01)}, "onnxruntime: expected a top-1 agreement"),
        (["onnxruntime"], {"gates": Gates(min_int8_fraction=1.01)}, "multiply-accumulates in int8"),
        (["onnxruntime"], {"inputs": []}, "inputs: expected 1, got 0"),
        (
            ["onnxruntime"],
            {"inputs": [torch.ones(4, 1, 8, 9)]},
            r"x: expected at least 2 samples of shape \(N, 1, 8, 8\)",
        ),
        (["onnxruntime"], {"inputs": [torch.ones(4, 1, 8, 8, dtype=torch.float64)]}, "float64"),
    ],
)
def test_a_mistake_is_one_error_and_changes_nothing(
    copy: Path, targets: list[str], arguments: dict[str, Any], message: str
) -> None:
    before = content(copy)
    with pytest.raises(ExportError, match=message):
        convert(copy, targets, **arguments)
    assert content(copy) == before


@pytest.mark.usefixtures("built_once")
def test_what_is_there_is_replaced_only_when_asked(copy: Path) -> None:
    convert(copy, ["onnxruntime"])
    before = content(copy)
    with pytest.raises(ExportError, match=r"does not have, got onnxruntime\. Say replace=True \(--replace\)"):
        convert(copy, ["onnxruntime"])
    assert content(copy) == before
    manifest = convert(copy, ["onnxruntime"], seed=1, replace=True)
    assert list(manifest.targets) == ["eager", "onnxruntime"]
    assert manifest.targets["onnxruntime"].agreement["inputs"] == "random, seed 1"


def test_a_missing_package_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "missing_package", lambda name: "onnxruntime")
    with pytest.raises(ExportError, match="onnxruntime: expected onnxruntime to be installed, got none"):
        convert(copy, ["onnxruntime"])


@pytest.mark.usefixtures("built_once")
def test_an_artefact_without_the_portable_program_says_so(copy: Path) -> None:
    convert(copy, ["onnxruntime"])
    edit(copy, lambda manifest: manifest["targets"].pop("eager"))
    with pytest.raises(ExportError, match="expected an artefact with the target eager"):
        convert(copy, ["aoti"])


def test_a_damaged_artefact_is_one_error(copy: Path) -> None:
    file = copy / "program.pt2"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="expected SHA-256"):
        convert(copy, ["onnxruntime"])
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match="expected a manifest"):
        convert(copy, ["onnxruntime"])


def test_another_network_of_the_same_name_is_refused(copy: Path, tmp_path: Path) -> None:
    """A manifest that describes another program than the file holds, all checksums right."""
    edit(copy, lambda manifest: manifest["inputs"][0].update(shape=[None, 1, None, 8]))
    with pytest.raises(CompressError, match="expected inputs"):
        convert(copy, ["onnxruntime"])


@pytest.mark.usefixtures("built_once")
def test_from_elsewhere_only_with_trust(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_KEY", str(tmp_path / "another-key"))
    before = content(copy)
    with pytest.raises(ArtifactError, match="got another's, whose portable program may run code"):
        convert(copy, ["onnxruntime"])
    assert content(copy) == before
    convert(copy, ["onnxruntime"], trust=True)
    assert is_ours(copy)


@pytest.mark.parametrize("error", [ExportSkippedError("onnxruntime: expected less."), KeyboardInterrupt()])
def test_a_build_that_fails_half_way_leaves_the_artefact(
    copy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def build(program: object, path: Path) -> None:
        path.write_text("half")
        raise error

    before = content(copy)
    monkeypatch.setattr(onnxruntime, "build", build)
    with pytest.raises(type(error)):
        convert(copy, ["onnxruntime"])
    assert content(copy) == before


@pytest.mark.usefixtures("built_once")
def test_the_artefact_loads_wherever_the_process_ends(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look before each move: of a target that is added, one that is replaced, and one that is put back."""
    x = tiny().inputs[:4]
    wanted = load(copy, engine="eager")(x)
    found: list[Path] = []
    move = conversion.os.replace

    def replace(source: Path, place: Path) -> None:
        found.append(shutil.copytree(copy, tmp_path / str(len(found)), ignore=shutil.ignore_patterns(".new.*")))
        if len(found) == 4 + 7 + 7:
            raise OSError("full")
        move(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(conversion.os, "replace", replace)
        convert(copy, ["onnxruntime"])
        convert(copy, ["onnxruntime"], seed=1, replace=True)
        with pytest.raises(OSError, match="full"):
            convert(copy, ["onnxruntime"], seed=2, replace=True)
    assert len(found) == 4 + 7 + 2 * 7
    for path in [*found, copy]:
        assert is_ours(path)
        for name in read_manifest(path).targets:
            outputs = load(path, engine=name)(x)
            assert float((outputs - wanted).norm() / wanted.norm()) < 0.05


def test_what_an_ended_process_left_is_removed_and_what_another_builds_is_not(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, building = copy / ".new.left", copy / ".new.building"
    for folder in (left, building):
        folder.mkdir()
        (folder / "half").write_text("half")
    monkeypatch.setattr(conversion, "_build_all", lambda *_, **__: (_ for _ in ()).throw(ExportError("as it was")))
    glob = Path.glob
    gone = copy / ".new.gone"  # another process has ended meanwhile
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [gone, *glob(path, pattern)])
    with lock_of(building), pytest.raises(ExportError, match="as it was"):
        convert(copy, ["onnxruntime"])
    monkeypatch.undo()
    assert not left.exists()
    assert [path.name for path in building.iterdir()] == ["half"]
    assert [path for path in copy.glob(".new.*") if path != building] == []


@contextmanager
def lock_of(directory: Path) -> Iterator[None]:
    fcntl = pytest.importorskip("fcntl", reason="this system has no such lock")
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@pytest.mark.usefixtures("built_once")
@pytest.mark.skipif("openvino" not in HERE, reason="needs a second engine")
def test_what_another_adds_meanwhile_stays(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = openvino.build

    def meanwhile(program: ExportedProgram, path: Path) -> Any:
        convert(copy, ["onnxruntime"])
        return build(program, path)

    monkeypatch.setattr(openvino, "build", meanwhile)
    manifest = convert(copy, ["openvino"])
    assert manifest == read_manifest(copy)
    assert list(manifest.targets) == ["eager", "onnxruntime", "openvino"]
    assert is_ours(copy)
    for name in manifest.targets:
        assert load(copy, engine=name).engine == name


@pytest.mark.usefixtures("built_once")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda copy: convert(copy, ["onnxruntime"]), ExportError, "does not have, got onnxruntime"),
        (
            lambda copy: edit(copy, lambda manifest: manifest.update(created="later")),
            ArtifactError,
            "expected the artefact that is converted, got another",
        ),
    ],
)
def test_what_has_changed_meanwhile_is_not_overwritten(
    copy: Path, monkeypatch: pytest.MonkeyPatch, change: Any, error: type[Exception], message: str
) -> None:
    found: list[dict[str, bytes]] = []

    def meanwhile(program: ExportedProgram, path: Path) -> Any:
        if not found:
            found.append({})
            change(copy)
            found[0] = {file.name: file.read_bytes() for file in copy.iterdir() if file.is_file()}
        return _build(program, path)

    monkeypatch.setattr(onnxruntime, "build", meanwhile)
    with pytest.raises(error, match=message):
        convert(copy, ["onnxruntime"])
    assert content(copy) == found[0]


@pytest.mark.usefixtures("built_once")
def test_nobody_else_converts_while_files_are_moved(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Path] = []
    move = conversion.os.replace

    def replace(source: Path, place: Path) -> None:
        moved.append(place)
        with pytest.raises(BlockingIOError), lock_of(copy):
            pass
        move(source, place)

    monkeypatch.setattr(conversion.os, "replace", replace)
    convert(copy, ["onnxruntime"])
    assert len(moved) == 4
    with lock_of(copy):
        pass


@pytest.mark.usefixtures("built_once")
def test_a_second_one_waits_before_it_reads(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = threading.Event()
    read = conversion.read_signed

    def noted(path: Path) -> Any:
        reads.set()
        return read(path)

    monkeypatch.setattr(conversion, "read_signed", noted)
    with ThreadPoolExecutor(1) as pool:
        with lock_of(copy):
            second = pool.submit(convert, copy, ["onnxruntime"])
            assert not reads.wait(0.5)
        assert "onnxruntime" in second.result().targets


def test_no_artefact_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere: expected an artefact"):
        convert(tmp_path / "nowhere", ["onnxruntime"])
    with pytest.raises(ArtifactError, match="expected an artefact with a manifest"):
        convert(tmp_path, ["onnxruntime"])


@pytest.mark.usefixtures("built_once")
def test_files_that_cannot_be_moved_leave_the_artefact(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(copy, ["onnxruntime"])
    before = content(copy)
    moved: list[Path] = []
    move = conversion.os.replace

    for failing in range(7):

        def replace(source: Path, place: Path, failing: int = failing) -> None:
            moved.append(place)
            if len(moved) == failing + 1:
                raise OSError("full")
            move(source, place)

        moved.clear()
        monkeypatch.setattr(conversion.os, "replace", replace)
        with pytest.raises(OSError, match="full"):
            convert(copy, ["onnxruntime"], seed=1, replace=True)
        assert content(copy) == before, failing


def test_the_reason_of_a_skipped_target_goes_once_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(program: object, path: Path) -> None:
        raise ExportSkippedError("onnxruntime: expected less, got more.")

    made, targets = floating(), ["eager", "onnxruntime"]
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "build", build)
        export_artifact(made.program, tmp_path / "a", targets=targets, reference=made.reference, held_out=[made.inputs])
    assert "onnxruntime" in read_manifest(tmp_path / "a").skipped
    assert not convert(tmp_path / "a", ["onnxruntime"]).skipped

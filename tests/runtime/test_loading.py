from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import ArtifactError, MissingPackageError
from compress.runtime import load, loading, memory, requirements
from compress.runtime.engines import Engine, onnxruntime
from compress.runtime.examples import example_call
from compress.runtime.loading import load_and_call
from compress.runtime.manifest import Manifest, Target, sha256
from compress.runtime.requirements import native_requirements
from tests.export.programs import HERE, artifact, edit, quantized

Measured = tuple[dict[int, dict[str, float]], dict[str, str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact(), tmp_path / "copy"))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Record what is measured, and let ONNX Runtime win."""
    seen: list[set[str]] = []

    def measure(engines: dict[str, Engine], manifest: Manifest) -> Measured:
        seen.append(set(engines))
        for engine in engines.values():
            example_call(engine, manifest, 2)()
        return {size: {name: 1.0 + (name != "onnxruntime") for name in engines} for size in (1, 16)}, {}

    monkeypatch.setattr(loading, "measure", measure)
    return seen


def keep(content: dict[str, Any], *engines: str) -> None:
    content["targets"] = {name: content["targets"][name] for name in engines}


def test_the_fastest_engine_serves_and_is_remembered(timed: list[set[str]]) -> None:
    artifact()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(artifact())
        again = load(artifact())
    assert model.engine == again.engine == "onnxruntime"
    assert model.engines == again.engines == tuple(HERE)
    assert timed == [set(HERE)]
    assert again.times == model.times == {size: {n: 1.0 + (n != "onnxruntime") for n in HERE} for size in (1, 16)}
    assert again.engines_by_batch == {1: "onnxruntime", 16: "onnxruntime"}
    assert list(model._runs) == list(again._runs) == ["onnxruntime"]  # what wins nowhere is not kept


def test_engines_share_the_batch_sizes_where_they_win(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(engines: dict[str, Engine], manifest: Manifest) -> Measured:
        return {size: {name: 1.0 + (name != best) for name in engines} for size, best in wins.items()}, {}

    wins = {1: "onnxruntime", 4: "eager", 16: "eager"}
    monkeypatch.setattr(loading, "measure", measure)
    for _ in range(2):  # measured, then remembered
        model = load(artifact())
        assert model.engines_by_batch == wins
        assert set(model._runs) == {"onnxruntime", "eager"}
        x = quantized().inputs
        for num, name in ((1, "onnxruntime"), (16, "eager")):
            assert torch.equal(model(x[:num]), load(artifact(), engine=name)(x[:num]))
        monkeypatch.setattr(loading, "measure", None)


def test_a_remembered_winner_that_cannot_be_loaded_any_more_is_replaced(
    timed: list[set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, num_threads: int | None) -> Engine:
        raise RuntimeError("gone")

    load(artifact())
    monkeypatch.setattr(onnxruntime, "make", broken)
    with pytest.warns(UserWarning, match="left out on this machine: onnxruntime: RuntimeError: gone"):
        model = load(artifact())
    rest = [name for name in HERE if name != "onnxruntime"]
    assert timed == [set(HERE), set(rest)]
    assert model.engines == tuple(rest)


def test_an_engine_that_could_not_be_loaded_is_measured_once_it_can(
    timed: list[set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(path: Path, num_threads: int | None) -> Engine:
        raise MissingPackageError("onnxruntime")  # it is there, and one of its libraries is not

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "make", absent)
        for _ in range(2):  # measured, then remembered
            with pytest.warns(UserWarning, match="left out on this machine: onnxruntime: .* got none"):
                assert load(artifact()).engine != "onnxruntime"
    rest = set(HERE) - {"onnxruntime"}
    assert timed == ([rest] if len(rest) > 1 else [])
    assert load(artifact()).engine == "onnxruntime"
    assert timed[-1] == set(HERE)


def test_an_engine_that_does_not_run_is_left_out(timed: list[set[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        takes, threads = "numpy", 1

        def __call__(self, inputs: Any) -> list[Any]:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(onnxruntime, "make", lambda path, num_threads: Broken())
    with pytest.warns(UserWarning, match="left out on this machine: onnxruntime: RuntimeError: out of memory"):
        model = load(artifact())
    assert model.engines == tuple(name for name in HERE if name != "onnxruntime")
    with pytest.raises(ArtifactError, match="onnxruntime: RuntimeError: out of memory"):
        load(artifact(), engine="onnxruntime")


def test_an_engine_that_fails_while_it_is_measured_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(engines: dict[str, Engine], manifest: Manifest) -> Measured:
        return {1: {name: 1.0 for name in engines if name != "eager"}}, {"eager": "a batch of 32: no memory"}

    rest = tuple(name for name in HERE if name != "eager")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "measure", measure)
        with pytest.warns(UserWarning, match="left out on this machine: eager: a batch of 32: no memory; served by"):
            assert load(artifact()).engines == rest
    monkeypatch.setattr(loading, "measure", None)  # what failed is remembered, too
    with pytest.warns(UserWarning, match="eager: it did not run when it was measured here; served by"):
        assert load(artifact()).engines == rest


def test_what_is_measured_later_is_the_file_that_was_loaded(copy: Path) -> None:
    model = load(copy, engine="onnxruntime")
    (copy / "model.onnx").write_bytes(b"another")
    with pytest.raises(ArtifactError, match="expected SHA-256"):
        model.benchmark([1], threads=[1], seconds=0.01)


def test_auto_measures_and_serves(tmp_path: Path) -> None:
    model = load(artifact())
    assert set(model.engines_by_batch) == set(model.times) == {1, 4, 16, 32}
    assert all(set(row) == set(HERE) for row in model.times.values())
    for size, row in model.times.items():
        assert row[model.engines_by_batch[size]] <= 1.03 * min(row.values())
    x = quantized().inputs
    for num in (1, 20, 150):
        assert model(x[:num]).shape == (num, 3)


def test_another_number_of_threads_is_measured_anew(timed: list[set[str]]) -> None:
    load(artifact())
    load(artifact(), num_threads=2)
    assert len(timed) == 2


def test_another_number_of_torchs_threads_is_measured_anew(timed: list[set[str]]) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 1, 3, 1, 3):
            torch.set_num_threads(threads)
            load(artifact())
    finally:
        torch.set_num_threads(before)
    assert len(timed) == 2


def test_a_measurement_can_be_asked_for_again(timed: list[set[str]]) -> None:
    for again in (False, True, False):
        load(artifact(), measure_again=again)
    assert len(timed) == 2


def test_a_user_without_a_home_or_a_temporary_folder_is_served(
    timed: list[set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    artifact()
    monkeypatch.delenv("COMPRESS_CACHE")
    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", none)
        assert load(artifact(), engine="onnxruntime").engine == "onnxruntime"
    assert not timed
    with warnings.catch_warnings(action="ignore"):  # OpenVINO asks for a home of its own
        for _ in range(2):
            assert load(artifact()).engine == "onnxruntime"
    assert [names | {"openvino"} for names in timed] == [{*HERE, "openvino"}] * 2
    assert not list(tmp_path.iterdir())


def test_an_engine_alone_asks_for_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "Memory", None)
    assert load(artifact(), engine="onnxruntime").engine == "onnxruntime"


def test_two_at_once_measure_in_turn(timed: list[set[str]]) -> None:
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(load, [artifact()] * 2))
    assert len(timed) == 1  # the second has waited, and read what the first found
    assert models[0].times == models[1].times


def test_without_locks_or_beside_one_that_hangs_it_still_loads(
    timed: list[set[str]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", none)
        load(artifact())
    (lock,) = (cache / "engines").glob("*.lock")
    monkeypatch.setattr(memory, "_PATIENCE", 2)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert load(artifact(), measure_again=True).engine == "onnxruntime"
    assert len(timed) == 2


@pytest.mark.parametrize("wrong", [{"shape": [None, 1]}, {"shape": [None, 3, 1]}, {"dtype": "int32"}])
def test_outputs_that_are_not_the_networks_are_refused(copy: Path, wrong: dict[str, Any]) -> None:
    edit(copy, lambda content: content["outputs"][0].update(wrong))
    with pytest.raises(ArtifactError, match=r"expected output of onnxruntime as .* got float32 of shape \(1, 3\)"):
        load(copy, engine="onnxruntime")


def test_labels_are_names(copy: Path) -> None:
    edit(copy, lambda content: content.update(labels=["a", 1, "c"]))
    with pytest.raises(ArtifactError, match="labels"):
        load(copy)


@pytest.mark.parametrize("threads", [0, 1.5, "2", True, 4 * max(4, os.cpu_count() or 1) + 1])
def test_threads_are_a_whole_number(threads: Any) -> None:
    with pytest.raises(ArtifactError, match=r"num_threads: expected a whole number from 1 to .*, got"):
        load(artifact(), num_threads=threads)


@pytest.mark.parametrize(
    "content",
    [
        b"unknown",
        pytest.param(b"\xff\xfe", marks=pytest.mark.slow),
        b"",
        b"[]",
        pytest.param(b"{}", marks=pytest.mark.slow),
        pytest.param(b'{"1": []}', marks=pytest.mark.slow),
        b'{"1": {}}',
        pytest.param(b'{"one": {"eager": 1}}', marks=pytest.mark.slow),
        b'{"1": {"quantum": 1.0}}',
        b'{"1": {"eager": NaN}}',
        b'{"4": {"eager": 1.0}}',
        pytest.param(b'{"1": {"eager": 1.0}, "4": {"aoti": 1.0}}', marks=pytest.mark.slow),
    ],
)
def test_a_damaged_memory_is_measured_anew(timed: list[set[str]], cache: Path, content: bytes) -> None:
    load(artifact())
    for file in (cache / "engines").iterdir():
        file.write_bytes(content)
    assert load(artifact()).engine == "onnxruntime"
    assert len(timed) == 2


def test_without_a_writable_cache_it_still_loads(
    timed: list[set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "file" / "below"))
    assert load(artifact()).engine == "onnxruntime"


@pytest.mark.parametrize("engine", HERE)
def test_an_engine_can_be_named(engine: str, timed: list[set[str]]) -> None:
    model = load(artifact(), engine=engine)
    assert (model.engine, model.engines) == (engine, (engine,))
    assert not timed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "quantum"}, f"expected one of {', '.join(HERE)}, got 'quantum'"),
        ({"device": "tpu"}, "got 'tpu'"),
        ({"num_threads": 0}, "expected a whole number from 1 to .*, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(artifact(), **arguments)


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize("auto", [True, False])
def test_a_changed_file_is_refused(copy: Path, engine: str, auto: bool, timed: list[set[str]]) -> None:
    file = copy / json.loads((copy / "manifest.json").read_text())["targets"][engine]["file"]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="expected SHA-256"):
        load(copy, engine="auto" if auto else engine)


def test_a_processor_without_the_instructions_gets_the_portable_engine_and_is_told(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copy, lambda content: keep(content, "eager", "onnxruntime"))
    edit(copy, lambda content: content["targets"]["onnxruntime"].update(requires=native_requirements()))
    monkeypatch.setattr(requirements, "cpu_flags", lambda: {"sse2"})
    with pytest.warns(UserWarning, match=r"onnxruntime: this processor lacks .*; served by: eager"):
        model = load(copy)
    assert model.engine == "eager"
    assert model(quantized().inputs).shape == (150, 3)
    with pytest.raises(ArtifactError, match="this processor lacks"):
        load(copy, engine="onnxruntime")


def test_an_engine_whose_library_rejects_its_file_is_left_out(copy: Path, timed: list[set[str]]) -> None:
    from compress.runtime.manifest import sha256

    broken = copy / "model.onnx"
    broken.write_bytes(b"not a network")
    edit(copy, lambda content: content["targets"]["onnxruntime"].update(sha256=sha256(broken)))
    with pytest.warns(UserWarning, match="left out on this machine: onnxruntime"):
        model = load(copy)
    assert model.engines == tuple(name for name in HERE if name != "onnxruntime")


def test_an_unknown_engine_of_a_later_version_is_left_out(copy: Path, timed: list[set[str]]) -> None:
    edit(copy, lambda content: content["targets"].update(quantum=content["targets"]["eager"]))
    with pytest.warns(UserWarning, match="quantum: this version does not know it"):
        assert "quantum" not in load(copy).engines


def test_no_engine_at_all_is_an_error_with_every_reason(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(copy, lambda content: keep(content, "eager"))
    edit(copy, lambda content: content["targets"]["eager"].update(requires=native_requirements()))
    monkeypatch.setattr(requirements, "cpu_flags", lambda: {"sse2"})
    with pytest.raises(ArtifactError, match=r"small: expected an engine that runs here, got none \(eager: this proc"):
        load(copy)


def test_without_a_gpu_the_cpu_serves_and_says_so(timed: list[set[str]]) -> None:
    with pytest.warns(UserWarning, match=r"expected an engine on a GPU, got none \(no GPU\); the CPU serves"):
        model = load(artifact(), "cuda")
    assert model.engines == tuple(HERE)
    for device in ("cuda", "auto"):
        with pytest.raises(ArtifactError, match="eager_cuda: there is no GPU that CUDA sees"):
            load(artifact(), device, engine="eager_cuda")


def test_an_engine_on_another_device_is_refused() -> None:
    with pytest.raises(ArtifactError, match="expected one that runs on cpu, got eager_cuda"):
        load(artifact(), "cpu", engine="eager_cuda")
    with pytest.raises(ArtifactError, match="expected one that runs on cuda, got eager"):
        load(artifact(), "cuda", engine="eager")


def test_load_and_call_runs_one_sample() -> None:
    outputs = load_and_call(str(artifact()), "onnxruntime")()
    assert [output.shape for output in outputs] == [(1, 3)]  # type: ignore[attr-defined]


def test_what_is_built_anew_while_it_is_loaded_is_read_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process puts a file and its manifest in their places between the reading of both."""
    check, waiting = loading.check_file, [True]

    def replaced(directory: Path, target: Target) -> Path:
        if waiting:
            waiting.clear()
            with (directory / target.file).open("ab") as file:
                file.write(b" ")
            changed = {"bytes": (directory / target.file).stat().st_size, "sha256": sha256(directory / target.file)}
            edit(directory, lambda content: content["targets"]["eager"].update(changed))
        return check(directory, target)

    monkeypatch.setattr(loading, "check_file", replaced)
    eager = load(copy, engine="onnxruntime").manifest.targets["eager"]
    assert eager.sha256 == sha256(copy / eager.file)
    assert not waiting
    waiting.append(True)
    (copy / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        load(copy, engine="onnxruntime")

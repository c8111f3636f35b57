from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from compress.export.apart import why_not_loaded
from compress.export.targets import aoti, onnxruntime
from tests.export.programs import HERE, artifact, floating


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "aoti" in HERE:
        return artifact() / aoti.FILE
    path = tmp_path_factory.mktemp("package") / aoti.FILE
    aoti.build(floating().program, path)
    return path


def test_what_loads_is_fine() -> None:
    assert why_not_loaded("onnxruntime", artifact() / onnxruntime.FILE) is None


def test_what_does_not_run_is_told(package: Path) -> None:
    x = torch.ones(4, 1, 8, 8)
    assert why_not_loaded("aoti", package, [x]) is None
    assert why_not_loaded("aoti", package, [x, x]) is not None


def test_what_takes_too_long_is_given_up(package: Path) -> None:
    assert why_not_loaded("aoti", package, seconds=0.01) == "it takes more than 0.01 s"


def test_an_error_is_told(tmp_path: Path) -> None:
    (tmp_path / "damaged.pt2").write_bytes(b"nothing")
    assert why_not_loaded("eager", tmp_path / "damaged.pt2") == "zipfile.BadZipFile: File is not a zip file"


def test_a_crash_is_told_and_survived(package: Path, tmp_path: Path) -> None:
    source, library = tmp_path / "crash.c", tmp_path / "crash.so"
    source.write_text("#include <stdlib.h>\n__attribute__((constructor)) static void crash(void) { abort(); }\n")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    crashing = tmp_path / aoti.FILE
    with zipfile.ZipFile(package) as given, zipfile.ZipFile(crashing, "w") as changed:
        for name in given.namelist():
            changed.writestr(name, library.read_bytes() if name.endswith(".so") else given.read(name))
    assert why_not_loaded("aoti", crashing) == "the process ends with SIGABRT"

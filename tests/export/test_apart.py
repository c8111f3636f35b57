from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.export.apart import why_not_loaded
from compress.export.targets import aoti
from compress.surgery.capture import export_program


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / aoti.FILE
    aoti.build(export_program(nn.Linear(3, 2).eval(), [torch.ones(2, 3)]), path)
    return path


def test_what_loads_is_fine(package: Path) -> None:
    assert why_not_loaded("aoti", package) is None


def test_what_does_not_run_is_told(package: Path) -> None:
    assert why_not_loaded("aoti", package, [torch.ones(4, 3)]) is None
    assert why_not_loaded("aoti", package, [torch.ones(4, 3, dtype=torch.int64)]) is not None


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

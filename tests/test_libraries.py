from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import compress.cli

ROOT = Path(__file__).parent.parent
BROKEN = """
import torch
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold): return dets.new_empty(0)
@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold): return dets.new_empty(0)
"""


def run(folder: Path, torchvision: str | None, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program where torchvision is what is given, or absent."""
    if torchvision is not None:
        (folder / "torchvision").mkdir()
        (folder / "torchvision" / "__init__.py").write_text(torchvision)
    else:
        program = f"import sys; sys.modules['torchvision'] = None\n{program}"
    program = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n{program}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.parametrize("name", ["torchvision", "transformers"])
def test_missing_operators_are_declared(tmp_path: Path, name: str) -> None:
    (tmp_path / "transformers.py").write_text("import torchvision")
    assert "operator torchvision::nms does not exist" in run(tmp_path, BROKEN, "import torchvision").stderr
    (tmp_path / "again").mkdir()
    program = f"from compress.libraries import import_library; print(import_library({name!r}).__name__)"
    done = run(tmp_path / "again", BROKEN, f"sys.path.append({str(tmp_path)!r})\n{program}")
    assert done.stdout.strip() == name, done.stderr


def test_the_command_mends_what_lightning_will_look_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mended: list[str] = []
    monkeypatch.setattr(compress.cli, "mend_torchvision", lambda: mended.append("torchvision"))
    assert compress.cli.main(["recipes"]) == 0
    assert mended == ["torchvision"]
    assert compress.cli.main(["predict", str(tmp_path), "none.npy"]) == 2
    assert mended == ["torchvision"]  # what serves does not import Lightning


@pytest.mark.parametrize(
    ("torchvision", "message"),
    [
        ("raise RuntimeError('another reason')", "RuntimeError: another reason"),
        ("raise OSError('libcudart')", "OSError: libcudart"),
    ],
)
def test_other_failures_are_told(tmp_path: Path, torchvision: str, message: str) -> None:
    done = run(tmp_path, torchvision, "from compress.libraries import mend_torchvision; mend_torchvision()")
    assert message in done.stderr


def test_nothing_happens_without_torchvision(tmp_path: Path) -> None:
    program = "from compress.libraries import mend_torchvision; mend_torchvision(); print('torch' in sys.modules)"
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
         "import compress.libraries; compress.libraries.find_spec = lambda name: None\n" + program],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "False", done.stderr

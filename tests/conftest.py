"""What every test needs: a key of its own to sign artefacts with, not the user's; no GPU but where it is asked for."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

_FOLDER = tempfile.mkdtemp(prefix="key")
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
os.environ["COMPRESS_KEY"] = str(Path(_FOLDER) / "key")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, so that all machines run the same tests: ``-m gpu`` asks for those that need one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

"""What every test needs: a key of its own to sign artefacts with, not the user's; no GPU but where it is asked for."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# The processes of one run share a folder, with the key and with what takes long to build.
if "PYTEST_XDIST_WORKER" not in os.environ or not Path(os.environ.get("COMPRESS_TESTS", "")).is_dir():
    os.environ["COMPRESS_TESTS"] = tempfile.mkdtemp(prefix="tests")
    atexit.register(shutil.rmtree, os.environ["COMPRESS_TESTS"], ignore_errors=True)
os.environ["COMPRESS_KEY"] = str(Path(os.environ["COMPRESS_TESTS"]) / "key")

# A tenth of the tests' time would go into looking for garbage among the modules and the graphs that are kept.
gc.set_threshold(20_000, 10, 10)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, so that all machines run the same tests: ``-m gpu`` asks for those that need one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Keep the collector away from what was imported."""
    gc.collect()
    gc.freeze()

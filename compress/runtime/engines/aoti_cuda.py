"""A package compiled ahead of time by Inductor for one kind of GPU."""

from __future__ import annotations

from pathlib import Path

from compress.errors import MissingPackageError
from compress.runtime.engines.on_cuda import OnCUDA

__all__ = ["PACKAGES", "make"]

PACKAGES = ("torch",)
RUNS_CODE = True
DEVICE = "cuda"


def make(path: Path, num_threads: int | None) -> OnCUDA:
    """Load the package onto the current GPU; it is native code: only from a trusted source."""
    try:
        import torch
        import torch._inductor
    except ImportError as error:
        raise MissingPackageError("torch") from error
    torch.cuda.init()  # says what is wrong with the GPU, where something is
    # Without the locks of a call that may be one of several at once: they cannot be captured in a graph.
    return OnCUDA(torch._inductor.aoti_load_package(str(path), run_single_threaded=True).loader.boxed_run)

"""What Inductor has compiled for one kind of GPU, its kernels called from Python."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import EngineError, MissingPackageError
from compress.runtime.engines.aliases import owned, storages
from compress.runtime.engines.on_cuda import OnCUDA

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PACKAGES", "load_artifact", "make"]

PACKAGES = ("torch",)
RUNS_CODE = True
DEVICE = "cuda"


def make(path: Path, num_threads: int | None) -> OnCUDA:
    """Load the file onto the first GPU that is visible. Loading runs code: only from a trusted source.

    Raises:
        EngineError: where torch's current device is another GPU.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError("torch") from error
    torch.cuda.init()
    if torch.cuda.current_device() != 0:
        raise EngineError(
            f"{path.name}: expected the first GPU, for which it was compiled, got number "
            f"{torch.cuda.current_device()}. Choose one by CUDA_VISIBLE_DEVICES."
        )
    return OnCUDA(load_artifact(path, "cuda"))


def load_artifact(path: Path, device: str) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Return what runs a file on the device it was compiled for.

    Args:
        path: Of a target ``inductor_...``.
        device: ``"cuda"``, or the device that it was compiled for.
    """
    import torch
    import torch._inductor

    content = torch.load(path, weights_only=True)
    values = [value.to(device) for value in content["values"]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "compiled")
        file.write_bytes(content["compiled"].numpy().tobytes())
        compiled: Any = torch._inductor.CompiledArtifact.load(path=str(file), format="binary")

    constants = storages(values)
    most = content["largest_batch"]  # its kernels would count further than they can

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        num = len(inputs[0])
        if num <= most:
            return owned(compiled(*values, *inputs), inputs, constants)
        parts = [run([value[start : start + most] for value in inputs]) for start in range(0, num, most)]
        return [torch.cat(outputs) for outputs in zip(*parts)]

    return run

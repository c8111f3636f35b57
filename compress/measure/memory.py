"""Peak memory of a network, measured where nothing else is: in a fresh process."""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["peak_memory", "peak_memory_of", "unpickle"]

_NUM_CALLS = 3


def peak_memory(load: str, *arguments: str) -> int:
    """Return by how many bytes a process grows when it loads a network and runs it a few times.

    Args:
        load: ``"module:function"``; the function takes ``arguments`` and returns a call without arguments. What
            importing the module costs is not counted.
        arguments: Strings for that function.

    Raises:
        RuntimeError: when the process fails.
    """
    command = [sys.executable, "-m", "compress.measure.memory", load, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak_memory: expected {load} to run in a fresh process, got:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["bytes"]


def peak_memory_of(network: Any, inputs: Sequence[Any]) -> int:
    """Return the peak memory of a module in eager mode.

    Args:
        network: A module that can be pickled.
        inputs: Its inputs.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt"
        torch.save((network, tuple(inputs)), path)
        return peak_memory("compress.measure.memory:unpickle", str(path))


def unpickle(path: str) -> Callable[[], object]:
    """Load what ``peak_memory_of`` wrote for this process alone."""
    import torch

    network, inputs = torch.load(path, weights_only=False)

    def call() -> object:
        with torch.no_grad():
            return network(*inputs)

    return call


def _resident_peak() -> int:
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _main(load: str, *arguments: str) -> None:
    module_name, _, function = load.partition(":")
    importlib.import_module("torch")
    loader = getattr(importlib.import_module(module_name), function)
    before = _resident_peak()
    call = loader(*arguments)
    for _ in range(_NUM_CALLS):
        call()
    print(json.dumps({"bytes": _resident_peak() - before}))


if __name__ == "__main__":
    _main(*sys.argv[1:])

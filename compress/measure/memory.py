"""Peak memory of a network, measured where nothing else is: in a fresh process."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress.libraries import import_library

__all__ = ["peak_memory", "peak_memory_of", "unpickle"]

_NUM_CALLS = 3


def peak_memory(load: str, *arguments: str, imports: Sequence[str] = ()) -> int:
    """Return by how many bytes a process grows when it loads a network and runs it a few times.

    Args:
        load: ``"module:function"``; the function takes ``arguments`` and returns a call without arguments. What
            importing the module costs is not counted.
        arguments: Strings for that function.
        imports: Further modules whose import is not counted.

    Raises:
        RuntimeError: when the process fails.
    """
    command = [sys.executable, "-m", "compress.measure.memory", load, json.dumps(list(imports)), *arguments]
    # The same import path as here, whatever started this process.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"peak_memory: expected {load} to run in a fresh process, got:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["bytes"]


def peak_memory_of(network: Any, inputs: Sequence[Any]) -> int | None:
    """Return the peak memory of a module in eager mode: its weights, activations and the kernels' workspaces.

    Args:
        network: A module; classes of the script that runs, or of a function, are out of a fresh process's reach.
        inputs: Its inputs.

    Returns:
        Bytes, or ``None``, with a warning, where a fresh process cannot have the module.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt"
        homes = {type(part).__module__ for part in network.modules()}
        homeless = sorted({type(part).__name__ for part in network.modules() if type(part).__module__ == "__main__"})
        reason = f"{', '.join(homeless)} defined in the script that runs" if homeless else ""
        try:
            torch.save((network, tuple(inputs)), path)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            reason = str(error)
        if reason:
            warnings.warn(
                f"peak memory: expected a network that a fresh process can import, got {reason}. "
                "Move its class to the top of a module of its own; left out of the report.",
                stacklevel=2,
            )
            return None
        return peak_memory("compress.measure.memory:unpickle", str(path), imports=sorted(homes))


def unpickle(path: str) -> Callable[[], object]:
    """Load what ``peak_memory_of`` wrote for this process alone."""
    import torch

    network, inputs = torch.load(path, weights_only=False)

    def call() -> object:
        with torch.no_grad():
            return network(*inputs)

    return call


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux it starts at what the parent had when it started this process.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # macOS counts in bytes, other systems in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _main(load: str, imports: str, *arguments: str) -> None:
    module_name, _, function = load.partition(":")
    for name in ["torch", *json.loads(imports)]:
        import_library(name)
    loader = getattr(importlib.import_module(module_name), function)
    before = _resident_peak()
    call = loader(*arguments)
    for _ in range(_NUM_CALLS):
        call()
    print(json.dumps({"bytes": _resident_peak() - before}))


if __name__ == "__main__":
    _main(*sys.argv[1:])

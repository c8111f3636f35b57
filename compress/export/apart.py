"""Loading an engine's file in a process of its own: native code that crashes there takes nothing else with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

__all__ = ["why_not_loaded"]

_PROGRAM = """
import json
import sys
from pathlib import Path
from compress.runtime.engines import make_engine
engine = make_engine(sys.argv[1], Path(sys.argv[2]))
inputs = json.loads(sys.argv[3])
if inputs:
    import torch
    engine([torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in inputs])
"""


def why_not_loaded(engine: str, path: Path, inputs: Sequence[Tensor] = (), *, seconds: float = 300.0) -> str | None:
    """Load a file, run it, and say how that failed, or ``None`` when it did not.

    Args:
        engine: A key of ``ENGINES``.
        path: Its file.
        inputs: What it is run on is zeros like these; without any it is not run.
        seconds: How long it may take.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _PROGRAM, engine, str(path)]
    command.append(json.dumps([[list(value.shape), str(value.dtype).removeprefix("torch.")] for value in inputs]))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"it takes more than {seconds:g} s"
    if done.returncode < 0:
        return f"the process ends with {signal.Signals(-done.returncode).name}"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    return None

"""Loading an engine's file in a process of its own: native code that crashes there takes nothing else with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

__all__ = ["why_not_loaded"]

_PROGRAM = """
import sys
from pathlib import Path
from compress.runtime.engines import make_engine
make_engine(sys.argv[1], Path(sys.argv[2]))
"""


def why_not_loaded(engine: str, path: Path, *, seconds: float = 300.0) -> str | None:
    """Load a file and say how that failed, or ``None`` when it did not.

    Args:
        engine: A key of ``ENGINES``.
        path: Its file.
        seconds: How long it may take.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _PROGRAM, engine, str(path)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"it takes more than {seconds:g} s"
    if done.returncode < 0:
        return f"the process ends with {signal.Signals(-done.returncode).name}"
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:200]
    return None

"""The main job: recipe -> fit -> test -> export -> bench -> report, each step on a run directory."""

from compress.pipeline.bench import bench
from compress.pipeline.export import convert, export
from compress.pipeline.fit import fit
from compress.pipeline.mixed import Deadline
from compress.pipeline.report import report
from compress.pipeline.rundir import RunDirectory, create_run, open_run
from compress.pipeline.sensitivity import sensitivity
from compress.pipeline.teaching import cache_teacher
from compress.pipeline.test import test

__all__ = [
    "STEPS",
    "Deadline",
    "RunDirectory",
    "bench",
    "cache_teacher",
    "convert",
    "create_run",
    "export",
    "fit",
    "open_run",
    "report",
    "run",
    "sensitivity",
    "test",
]

# What each step leaves; "report" is cheap and always written anew, "fit" knows its own phases.
_LEAVES = {"test": "test.json", "export": "artifact", "bench": "bench.json"}

STEPS = {"fit": fit, "test": test, "export": export, "bench": bench, "report": report}


def run(directory: RunDirectory) -> None:
    """Do all steps that a run directory does not have yet; a run that died goes on where it stood.

    Args:
        directory: From ``create_run`` or ``open_run``.
    """
    for name, step in STEPS.items():
        done = name in _LEAVES and (directory.path / _LEAVES[name]).exists()
        if not done and (directory.is_main_process or name == "fit"):
            step(directory)

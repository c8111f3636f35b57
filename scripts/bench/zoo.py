"""Prune every architecture of the zoo by 30 %, channels, and whole heads where there are heads; or quantise it.

Each one runs in its own process with a time limit. What is done stays done (``--results``); ``--only NAME`` runs some.
``--check`` names what to do: ``prune`` (plan, remove, forward, backward, a step of the optimiser, replay, export
again), ``torch_pruning`` (the same by Torch-Pruning), ``masked`` (what is left computes what the masked network does,
for every group), ``units`` (ours beside Torch-Pruning's), ``criteria`` (every criterion, allocation and target once,
by itself on ``FAMILIES``) or ``quantize`` (int8 after training, before and after pruning). The table has what has been
done of each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from zoo_models import ARCHITECTURES, FAMILIES
from zoo_table import table

from compress.files import write_json, write_text

CHECKS = ("prune", "torch_pruning", "masked", "units", "criteria", "quantize")
_IMPORTED_ONCE = ["zoo_models", "torchvision", "timm", "transformers", "zoo_checks"]
_PATIENCE = 20
"""How much longer than its processor time a process may take, on a machine that has other work."""
_PROCESSES = multiprocessing.get_context("forkserver")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some architectures")
    parser.add_argument("--check", nargs="+", choices=CHECKS, default=["prune"], help="what to do with each")
    parser.add_argument("--results", type=Path, default=Path("runs/zoo"), help="folder of what is done")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of processor time for each")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write the table there, as Markdown")
    options = parser.parse_args()
    names = options.only or list(FAMILIES if options.check == ["criteria"] else ARCHITECTURES)
    missing = [(check, name) for check in options.check for name in names if not _file(options, check, name).exists()]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    _PROCESSES.set_forkserver_preload(_IMPORTED_ONCE)
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(_run, options, check, name) for check, name in missing]
        for job in track(jobs, "pruning"):
            job.result()
    rows = {check: {name: _read(options, check, name) for name in names} for check in CHECKS}
    text = table(names, rows)
    Console(width=200).print(text)
    if options.table:
        write_text(options.table, text)
    if options.json:
        entries = [
            {"name": name, "metric": f"{check}_pass", "value": rows[check][name]["pass"], "unit": ""}
            for check in options.check
            for name in names
        ]
        write_json(options.json, entries)


def _run(options: argparse.Namespace, check: str, name: str) -> None:
    file = _file(options, check, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    process = _PROCESSES.Process(target=_check, args=(name, check, file, int(options.limit)))
    process.start()
    process.join(_PATIENCE * options.limit)
    out_of_time = process.is_alive() or process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
    process.kill()
    process.join()
    if not file.exists():
        reason = f"longer than {options.limit:.0f} s" if out_of_time else f"ended with code {process.exitcode}"
        _write({"name": name, "pass": 0, "reason": reason}, file)


def _check(name: str, check: str, file: Path, limit: int) -> None:
    from zoo_checks import checked

    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    _write(checked(name, check), file)


def _write(row: dict[str, Any], file: Path) -> None:
    write_json(file, row)


def _file(options: argparse.Namespace, check: str, name: str) -> Path:
    return options.results / check / f"{name.replace('/', '_')}.json"


def _read(options: argparse.Namespace, check: str, name: str) -> dict[str, Any]:
    file = _file(options, check, name)
    return json.loads(file.read_text()) if file.exists() else {}


if __name__ == "__main__":
    main()

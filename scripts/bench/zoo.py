"""Prune every architecture of the zoo by 30 %: channels, and whole heads where there are heads.

Each one runs in its own process with a time limit: plan, remove, forward, backward, a step of the optimiser, replay
from JSON on a fresh copy, export again. What is done stays done (``--results``); ``--only NAME`` runs some.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from zoo_models import ARCHITECTURES, build

RATIO = 0.3


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some architectures")
    parser.add_argument("--results", type=Path, default=Path("runs/zoo"), help="folder of what is done")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write the table there, as Markdown")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_prune(options.one)))
        return
    options.results.mkdir(parents=True, exist_ok=True)
    names = options.only or list(ARCHITECTURES)
    missing = [name for name in names if not _file(options.results, name).exists()]
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(_run, name, options.results, options.limit) for name in missing]
        for job in track(jobs, "pruning"):
            job.result()
    rows = [json.loads(_file(options.results, name).read_text()) for name in names]
    table = _table(rows)
    Console(width=160).print(table)
    if options.table:
        options.table.write_text(table)
    if options.json:
        entries = [{"name": row["name"], "metric": "prune_pass", "value": row["pass"], "unit": ""} for row in rows]
        options.json.write_text(json.dumps(entries, indent=1))


def _run(name: str, folder: Path, limit: float) -> None:
    command = [sys.executable, str(Path(__file__)), "--one", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    row: dict[str, Any] = {"name": name, "pass": 0}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=environment)
        lines = done.stdout.strip().splitlines()
        row = json.loads(lines[-1]) if lines and done.returncode == 0 else {**row, "reason": done.stderr[-300:]}
    except subprocess.TimeoutExpired:
        row["reason"] = f"longer than {limit:.0f} s"
    temporary = _file(folder, name).with_suffix(".tmp")
    temporary.write_text(json.dumps(row))
    os.replace(temporary, _file(folder, name))


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '_')}.json"


def _prune(name: str) -> dict[str, Any]:
    """Prune one architecture and do with it what a fit would."""
    from compress.prune import apply_removal, find_groups, plan_removal
    from compress.prune.coupling import read_coupling, static_program
    from compress.surgery import Captured

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name, "pass": 0}
    try:
        network, inputs = build(name)
        started = time.perf_counter()
        graph: Any = static_program(network, inputs).module(check_guards=False)
        exported = time.perf_counter()
        coupling = read_coupling(graph)
        row |= {"export_s": exported - started, "plan_s": time.perf_counter() - exported}
        row |= {"nodes": len(graph.graph.nodes), "share": coupling.prunable_share(), "unknown": list(coupling.unknown)}
        widths = {group.name: group.width for group in find_groups(network, inputs)}
        data = plan_removal(
            network, inputs, {group: max(1, width - max(1, int(RATIO * width))) for group, width in widths.items()}
        )
        assert data is not None, "nothing can be removed"
        row |= {"groups": len(widths), "form": data["form"]}
        original = copy.deepcopy(network)
        network = apply_removal(network.train(), data)
        row["left"] = _size(network) / _size(original)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
        _first(network(*inputs)).float().square().mean().backward()
        optimizer.step()
        replayed = apply_removal(original, json.loads(json.dumps(data)))
        replayed.load_state_dict(network.state_dict())
        with torch.no_grad():
            got, expected = _first(replayed.eval()(*inputs)), _first(network.eval()(*inputs))
        assert torch.allclose(got, expected, atol=1e-4, rtol=1e-3), "the replayed network differs"
        static_program(network.graph_module if isinstance(network, Captured) else network, inputs)
        row["pass"] = 1
    except Exception as error:  # whatever fails is a row of the table
        row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return row


def _size(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _first(outputs: Any) -> torch.Tensor:
    if isinstance(outputs, torch.Tensor):
        return outputs
    return _first(next(iter(outputs.values() if isinstance(outputs, dict) else outputs)))


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{sum(row['pass'] for row in rows)} of {len(rows)} pass.",
        "",
        "| Architecture | Passes | Prunable share | Parameters left | Groups | Nodes | Export, s | Plan, s | Edit on |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        cells = [row["name"], "yes" if row["pass"] else f"no: {row.get('reason', '')}".replace("|", "/")]
        cells += [f"{100 * row[key]:.1f} %" if key in row else "" for key in ("share", "left")]
        cells += [str(row.get(key, "")) for key in ("groups", "nodes")]
        cells += [f"{row[key]:.1f}" if key in row else "" for key in ("export_s", "plan_s")]
        lines.append(f"| {' | '.join([*cells, row.get('form', '')])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""What pruning costs and what it brings: planning, one edit, and a network at half its multiply-accumulates.

``planning`` takes the couplings from the exported graph, beside Torch-Pruning's tracer. ``edits`` times one edit of a
network under training, step by step. ``effects`` compares ResNet-18 with itself at half the multiply-accumulates:
training step, artefact on each engine, optimiser state. Needs the extra ``zoo``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import finish, options
from prune_effects import edit_rows, effect_rows
from prune_planning import planning_rows, plot_planning

PARTS = {"planning": planning_rows, "edits": edit_rows, "effects": effect_rows}


def main() -> None:
    """Print the table of the parts asked for."""
    arguments = options(__doc__ or "", _more)
    rows = {part: PARTS[part](arguments.quick) for part in arguments.part}
    finish(arguments, [row for each in rows.values() for row in each])
    if arguments.plot and "planning" in rows:
        plot_planning(rows["planning"], arguments.plot)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="also draw planning over the graph's nodes there")


if __name__ == "__main__":
    main()

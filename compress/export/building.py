"""One target of an artefact: built, loaded as it will be served, compared with what must come out, and judged."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor
from torch.export import ExportedProgram

from compress.errors import CaptureError, CompressError, ExportSkippedError, MissingPackageError, first_line
from compress.export.counting import with_macs
from compress.export.gates import Gates, failures
from compress.export.options import Options
from compress.export.outputs import Outputs
from compress.export.parity import Parity, Sample, check_parity
from compress.export.precision import has_halves
from compress.export.products import Product
from compress.export.targets import TARGETS, WITH_LENGTHS
from compress.runtime.engines import make_engine
from compress.runtime.manifest import Target, sha256
from compress.surgery.lengths import lengths_of

__all__ = ["Job", "announced", "build_target"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What every target of an artefact is built from and held against.

    Args:
        program: What is lowered.
        work: Its products.
        inputs: What engines are compared on, shape (N, ...) each.
        wanted: The outputs that must come out, shape (N, ...) each.
        quantized: Whether int8 kernels are expected.
        gates: What each target must pass.
        others: Inputs of other sizes, and what must come out.
        notes: What else the manifest shall say of the comparison.
        options: What targets are told.
    """

    program: ExportedProgram
    work: Sequence[Product]
    inputs: Sequence[Tensor]
    wanted: Outputs
    quantized: bool
    gates: Gates
    others: Mapping[str, Sample] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    options: Options = field(default_factory=dict)


def announced(targets: Sequence[str], *, progress: bool) -> Iterator[str]:
    """Yield targets one by one, with a bar that says which is being built.

    Args:
        targets: Keys of ``TARGETS``.
        progress: Whether to show the bar.
    """
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("", total=len(targets))
        for engine in targets:
            bar.update(task, description=f"building and checking {engine}")
            yield engine
            bar.advance(task)


def build_target(engine: str, job: Job, folder: Path) -> tuple[Target, list[str]]:
    """Build a target's files and say what it fails, in words.

    Args:
        engine: A key of ``TARGETS``.
        job: What it is built from.
        folder: Where its files go.

    Raises:
        ExportError: when it gives outputs of another number or shape.
        ExportSkippedError: when the engine does not take the network, or this machine cannot build it; nothing is left.
        MissingPackageError: when a library is not installed.
    """
    lengths = lengths_of(job.program)
    if lengths and engine not in WITH_LENGTHS:
        raise ExportSkippedError(
            f"{engine}: expected fixed sizes beyond the batch, got {', '.join(map(str, lengths))}. "
            "Leave the target out."
        )
    target = import_module(TARGETS[engine])
    path, options = folder / target.FILE, job.options.get(engine, {})
    parts = [folder / name for name in getattr(target, "PARTS", ())]
    served_by = getattr(target, "CHECKED_BY", engine)
    try:
        with _or_skipped(f"{engine}: expected a network that it takes"):
            census = with_macs(target.build(job.program, path, **options), job.work, engine)
        with _or_skipped(f"{engine}: expected a file that {served_by} loads"):
            judge = make_engine(served_by, path)
        parity = check_parity(judge, job.wanted, job.inputs, job.others)
    except (ExportSkippedError, MissingPackageError):
        for file in (path, *parts):
            file.unlink(missing_ok=True)
        raise
    entry = Target(
        file=target.FILE,
        bytes=sum(file.stat().st_size for file in (path, *parts)),
        sha256=sha256(path),
        census=asdict(census) if census else {},
        agreement={**asdict(parity.batches), **_details(parity), **job.notes},
        requires=target.requires(),
        parts={part.name: sha256(part) for part in parts},
        options=dict(options),
    )
    exact = getattr(target, "EXACT", True) and not has_halves(job.program)
    return entry, list(failures(engine, job.gates, census, parity, quantized=job.quantized, exact=exact))


@contextmanager
def _or_skipped(expected: str) -> Iterator[None]:
    """Make a reason to leave the target out of whatever an engine's library raises."""
    try:
        yield
    except CaptureError as error:  # what a target makes of a program is captured anew
        raise ExportSkippedError(f"{expected}, got: {first_line(error)} Leave the target out.") from error
    except CompressError:
        raise
    except Exception as error:
        log.info("%s", expected, exc_info=error)
        reason = f"{type(error).__name__}: {first_line(error)[:300]}"
        raise ExportSkippedError(f"{expected}, got {reason}. Leave the target out.") from error


def _details(parity: Parity) -> dict[str, dict[str, float]]:
    """Return relative errors by size and by output, where there are several."""
    found = {
        "relative_error_at": {text: found.relative_error for text, found in parity.others.items()},
        "relative_error_of": {name: each.batches.relative_error for name, each in parity.outputs.items()},
    }
    return {key: errors for key, errors in found.items() if errors}

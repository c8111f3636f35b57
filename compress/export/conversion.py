"""Add a target to an artefact from the portable program that is in it, through the checks of every export."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from compress.errors import ArtifactError, ExportError, first_line
from compress.export.arithmetic import recognise
from compress.export.building import Job, announced, build_target
from compress.export.gates import Gates
from compress.export.graph import input_specs
from compress.export.options import Options, option_mistakes
from compress.export.parity import check_inputs, other_sizes, reference_outputs
from compress.export.passes import clean_up
from compress.export.products import Product, products
from compress.export.samples import note_drawn, random_inputs
from compress.export.targets import TARGETS
from compress.runtime.engines import make_engine, missing_package
from compress.runtime.manifest import (
    Manifest,
    Target,
    TensorSpec,
    check_file,
    check_files,
    manifest_text,
    read_manifest,
)
from compress.runtime.outputs import arranger, check_outputs
from compress.runtime.trust import SIGNATURE, Signed, read_signed, signature_of
from compress.surgery.capture import export_program
from compress.surgery.lengths import LARGEST_BATCH, lengths_of

__all__ = ["convert"]

_SOURCE = "eager"
_UNFINISHED = ".new."


def convert(
    path: str | Path,
    targets: Sequence[str],
    *,
    inputs: Sequence[Tensor] | None = None,
    seed: int = 0,
    gates: Gates | None = None,
    options: Options | None = None,
    replace: bool = False,
    trust: bool = False,
    progress: bool = False,
) -> Manifest:
    """Add targets to an artefact, built from its portable program (``eager``).

    Each is held against the portable program's outputs by the gates of the artefact's export, and its manifest says on
    which inputs. All targets are added, or none: the artefact is left as it was when one fails. It loads at every
    moment in between, also where the process ends there, if without what is being replaced. Of two that convert at once
    one waits while the other reads, or puts its files in their places: both have their targets in the end.

    Args:
        path: The artefact's directory.
        targets: Names among ``TARGETS``.
        inputs: What to compare on, shape (N, ...) each, as the network takes them; random values without.
        seed: Of the random inputs.
        gates: What each target must pass; by default those of the export.
        options: What targets are told, by name.
        replace: Whether targets that are there may be built anew.
        trust: Load the portable program, which may run code, though the artefact was built elsewhere; it is signed as
            this machine's afterwards.
        progress: Whether to show a progress bar.

    Returns:
        The manifest as written.

    Raises:
        ArtifactError: when the artefact is damaged, or its program may not be loaded.
        ExportError: when a target or an option is unknown, a target is there already, or fails a gate.
        ExportSkippedError: when it cannot be built on this machine, or from this network.
        MissingPackageError: when a target's library is not installed.
    """
    directory = Path(path)
    targets = list(dict.fromkeys(targets))
    with ExitStack() as stack:
        with _alone(directory):
            manifest = _convertible(directory, targets, replace=replace, trust=trust).manifest
            if mistakes := list(option_mistakes(options or {}, targets)):
                raise ExportError("\n".join(mistakes))
            files = {name: check_file(directory, target) for name, target in manifest.targets.items()}
            check_files(directory, manifest.files)
            temporary = stack.enter_context(_folder_in(directory))
        job = dataclasses.replace(_job(manifest, files[_SOURCE], inputs, seed, gates), options=options or {})
        built = _build_all(targets, job, temporary, progress=progress)
        with _alone(directory):
            latest = _convertible(directory, targets, replace=replace, trust=trust)  # others may have come
            _put(_steps(latest, _with(latest.manifest, built, manifest), built, temporary), directory, temporary)
            return read_manifest(directory)


@contextmanager
def _alone(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Wait until nobody else holds a folder, and keep them waiting; with the process goes its lock.

    Args:
        folder: Of an artefact, or in one.
        wait: Otherwise nothing is waited for.

    Returns:
        Whether it is held; false with ``wait=False`` where another has it, or where folders cannot be held.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock; there, do not convert one artefact twice at once
        yield False
        return
    try:
        handle = os.open(folder, os.O_RDONLY)  # of the folder itself: no file is left
    except OSError as error:
        raise ArtifactError(f"{folder}: expected an artefact's directory, got {error}. Give another.") from error
    held = False
    try:
        with suppress(OSError):  # another has it, or a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held
    finally:
        os.close(handle)


def _convertible(directory: Path, targets: Sequence[str], *, replace: bool, trust: bool) -> Signed:
    """Read an artefact that may be given targets."""
    signed = read_signed(directory)
    _check_targets(signed.manifest, targets, replace=replace)
    if not (signed.ours or trust):
        raise ArtifactError(
            f"{directory}: expected an artefact of this machine, got another's, whose portable program may run code. "
            "Say trust=True (--trust) if you know who made it."
        )
    return signed


def _check_targets(manifest: Manifest, targets: Sequence[str], *, replace: bool) -> None:
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or not targets:
        given = ", ".join(unknown) or "none"
        raise ExportError(f"target: expected names among {', '.join(TARGETS)}, got {given}. Choose one of them.")
    if _SOURCE not in manifest.targets:
        raise ExportError(
            f"{manifest.name}: expected an artefact with the target {_SOURCE}, which others are built from, got "
            f"{', '.join(manifest.targets)}. Export again, with {_SOURCE} in export.targets."
        )
    if _SOURCE in targets:
        raise ExportError(
            f"target: expected another one than {_SOURCE}, which the others are built from. Leave it out."
        )
    there = [name for name in targets if name in manifest.targets]
    if there and not replace:
        raise ExportError(
            f"target: expected one that the artefact does not have, got {', '.join(there)}. "
            "Say replace=True (--replace) to build it anew."
        )
    for name in targets:
        package = missing_package(name)
        if package:
            raise ExportError(f"{name}: expected {package} to be installed, got none. Install it, e.g. by pip.")


def _job(manifest: Manifest, source: Path, inputs: Sequence[Tensor] | None, seed: int, gates: Gates | None) -> Job:
    try:
        portable = torch.export.load(source)
        module = portable.module(check_guards=False)
    except Exception as error:  # torch raises anything here
        raise ArtifactError(
            f"{source}: expected a program of torch.export, got {type(error).__name__}: {str(error).strip()[:200]}. "
            "Export again."
        ) from error
    assert isinstance(module, torch.fx.GraphModule)
    notes = {"reference": _SOURCE, "inputs": "given"}
    if inputs is None:
        inputs = random_inputs(module, manifest.inputs, seed=seed)
        notes["inputs"] = f"random, seed {seed}"
    check_inputs(manifest.inputs, inputs)
    engine = make_engine(_SOURCE, source)
    lengths = lengths_of(portable)
    arrange = arranger(manifest.structure, [spec.name for spec in manifest.outputs])

    def reference(*batch: Tensor) -> Any:
        found = engine(batch)
        check_outputs(found, manifest, _SOURCE)
        return arrange(found)

    try:
        wanted, others = reference_outputs(reference, inputs), other_sizes(reference, inputs, lengths)
    except (IndexError, RuntimeError) as error:  # of an operator
        found = f"{notes['inputs']}, which it does not: {first_line(error)}"
        raise ExportError(
            f"inputs: expected some that the network takes, got {found}. Give others (--inputs)."
        ) from error
    if manifest.scheme is not None:
        recognise(module)
    most = manifest.max_batch or LARGEST_BATCH
    examples = [tensor[:2] for tensor in inputs]
    program, _ = clean_up(export_program(module, examples, lengths=lengths, largest_batch=most))
    _check_program(manifest, program, source)
    if notes["inputs"] != "given":
        note_drawn(program)
    work = [Product(**product) for product in manifest.products] or products(program)
    limits = gates or Gates(**{key: value for key, value in manifest.gates.items() if key in _GATES})
    return Job(program, work, inputs, wanted, manifest.scheme is not None, limits, others, notes)


_GATES = {field.name for field in fields(Gates)}


def _check_program(manifest: Manifest, program: ExportedProgram, source: Path) -> None:
    """Make sure that the program is the one that the manifest describes, whatever sizes it was captured with."""
    specs = input_specs(program)
    if [_as_captured(spec) for spec in specs] != [_as_captured(spec) for spec in manifest.inputs]:
        raise ArtifactError(f"{source}: expected inputs {manifest.inputs}, got {specs}. Export again.")


def _build_all(targets: Sequence[str], job: Job, folder: Path, *, progress: bool) -> dict[str, Target]:
    built: dict[str, Target] = {}
    failed: list[str] = []
    for engine in announced(targets, progress=progress):
        built[engine], reasons = build_target(engine, job, folder)
        failed += reasons
    if failed:
        failed.append("The artefact is as it was. Loosen the gate that is named, or leave the target out.")
        if job.notes["inputs"] != "given":  # zeros and ones for integers, by which it may divide
            failed.append(
                "Its inputs were random, and the network may be made for others: give real inputs (--inputs)."
            )
        raise ExportError("\n".join(failed))
    return built


def _as_captured(spec: TensorSpec) -> TensorSpec:
    ranges = {
        dimension: dataclasses.replace(allowed, typical=allowed.smallest) for dimension, allowed in spec.ranges.items()
    }
    return dataclasses.replace(spec, ranges=ranges, num_rows=None)


@contextmanager
def _folder_in(directory: Path) -> Iterator[Path]:
    """Give a folder from which files can be moved into the artefact at once, whatever it is mounted on.

    Those that processes have left that ended half way are removed: nobody holds them. Call it where you are alone.
    """
    for left in directory.glob(f"{_UNFINISHED}*"):
        with suppress(ArtifactError), _alone(left, wait=False) as abandoned:  # it may go, or be another user's
            if abandoned:
                shutil.rmtree(left, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=directory))
    except OSError as error:
        raise ArtifactError(
            f"{directory}: expected a folder that can be written, got {error}. Copy it first."
        ) from error
    try:
        with _alone(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _steps(signed: Signed, new: Manifest, built: Mapping[str, Target], folder: Path) -> list[tuple[Path, str]]:
    """Return which file goes where, in an order in which the artefact loads after each.

    Args:
        signed: The artefact as it is.
        new: Its manifest to be.
        built: The targets that are added.
        folder: Of their files; what else is written goes there, too.
    """
    steps: list[tuple[Path, str]] = []
    signature = signed.signature

    def write(name: str, content: bytes) -> None:
        path = folder / f"{len(steps)}.{name}"
        path.write_bytes(content)
        steps.append((path, name))

    def become(manifest: Manifest) -> None:
        nonlocal signature
        content = manifest_text(manifest).encode()
        following = signature_of(content)
        # In between, the signature is that of either manifest.
        write(SIGNATURE, json.dumps({**signature, "next": following}, indent=1).encode())
        write("manifest.json", content)
        write(SIGNATURE, json.dumps(following, indent=1).encode())
        signature = following

    kept = {name: target for name, target in signed.manifest.targets.items() if name not in built}
    if len(kept) < len(signed.manifest.targets):  # no manifest names a file that is being replaced
        become(dataclasses.replace(signed.manifest, targets=kept))
    steps += [(folder / name, name) for target in built.values() for name in (*target.parts, target.file)]
    become(new)
    return steps


def _with(latest: Manifest, built: Mapping[str, Target], converted: Manifest) -> Manifest:
    """Return the manifest with the targets that were built.

    Args:
        latest: The artefact's, as it is.
        built: The targets.
        converted: That of the artefact that they were built from.

    Raises:
        ArtifactError: when these two are not of one export.
    """
    one, other = ((each.created, each.targets[_SOURCE].sha256) for each in (latest, converted))
    if one != other:
        raise ArtifactError(f"{latest.name}: expected the artefact that is converted, got another. Convert again.")
    skipped = {name: reason for name, reason in latest.skipped.items() if name not in built}
    return dataclasses.replace(latest, targets={**latest.targets, **built}, skipped=skipped)


def _put(steps: Sequence[tuple[Path, str]], directory: Path, folder: Path) -> None:
    """Put files in their places, one by one; when one fails, all are as they were, undone in reverse order."""
    before = folder / "before"
    before.mkdir()
    done: list[tuple[Path, Path]] = []
    try:
        for number, (file, name) in enumerate(steps):
            copy, place = before / str(number), directory / name
            if place.exists():
                shutil.copy2(place, copy)
            done.append((copy, place))
            os.replace(file, place)
    except BaseException:
        for copy, place in reversed(done):
            if copy.exists():
                os.replace(copy, place)
            else:
                place.unlink(missing_ok=True)
        raise

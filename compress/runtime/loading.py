"""From an artefact on disk to a ``CompactModel``: which engines can run here, and which of them is the fastest."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from math import inf
from pathlib import Path

from compress.errors import ArtifactError
from compress.measure.machine import has_cuda, most_threads
from compress.runtime.dispatch import choose, load_each, measure
from compress.runtime.engines import (
    ENGINES,
    READS,
    Engine,
    device_of,
    engines_for,
    make_engine,
    missing_package,
    runs_code,
)
from compress.runtime.examples import example_call
from compress.runtime.manifest import Manifest, check_file, check_files, preprocesses_text
from compress.runtime.memory import Memory
from compress.runtime.model import CompactModel
from compress.runtime.outputs import check_outputs
from compress.runtime.requirements import why_not
from compress.runtime.text import Encode, make_encoder
from compress.runtime.trust import Signed, read_signed

__all__ = ["load", "load_and_call", "why_left_out"]


def load(
    path: str | Path,
    device: str = "auto",
    *,
    engine: str = "auto",
    num_threads: int | None = None,
    trust: bool = False,
    measure_again: bool = False,
) -> CompactModel:
    """Load an artefact whose every file is the one that was exported, by SHA-256.

    Engines whose files may run code when they are loaded (pickles, native code, engines that are built already) serve
    only an artefact that was built on this machine, unless it is trusted.

    Args:
        path: The artefact's directory.
        device: ``"cpu"``, ``"cuda"`` (the current GPU) or ``"auto"``, where engines on both compete; without a GPU, the
            CPU serves.
        engine: A name, or ``"auto"``: the engines that can run here are measured once, interleaved, at a few batch
            sizes, and each batch is served by the fastest at the nearest of them; one engine serves all where it is
            within 3 % of the others. What was measured is remembered for this machine and artefact.
        num_threads: Threads of one call, at most four for each processor, or 16; for torch's engines this sets the
            number for the whole process.
        trust: Let files run code though the artefact was built elsewhere: you know who made it.
        measure_again: Measure the engines though that has been done here: the machine was busy then, say.

    Raises:
        ArtifactError: when the artefact is damaged, has no engine that can run here, or an argument cannot be.
    """
    directory = Path(path)
    if device not in ("auto", "cpu", "cuda"):
        raise ArtifactError(f"device: expected 'auto', 'cpu' or 'cuda', got {device!r}. Use 'auto'.")
    if num_threads is not None and (type(num_threads) is not int or not 1 <= num_threads <= most_threads()):
        raise ArtifactError(
            f"num_threads: expected a whole number from 1 to {most_threads()}, got {num_threads!r}. Leave it out for "
            "the default."
        )
    signed, checked = _read_checked(directory)
    manifest, trusted = signed.manifest, signed.ours or trust
    if engine == "auto":
        wanted = engines_for(manifest.targets, device)
    else:
        _check_engine(engine, manifest, device)
        wanted = [engine]

    def make(name: str, threads: int | None = num_threads) -> Engine:
        target = READS.get(name, name)
        # Asked for later, it has to be the file that was loaded still.
        file = checked.pop(target, None) or check_file(directory, manifest.targets[target])
        engine = make_engine(name, file, num_threads=threads)
        # An engine may take a file and not run it, and the first call is slow.
        check_outputs(example_call(engine, manifest, 1)(), manifest, name)
        return engine

    reasons = {name: reason for name in wanted if (reason := why_left_out(name, manifest, trusted=trusted))}
    able = [name for name in wanted if name not in reasons]
    # One alone is not measured, and needs no folder.
    memory = Memory([signed.signature["sha256"], able], able, num_threads) if len(able) > 1 else None
    times, failed = memory.read() if memory and not measure_again else ({}, [])
    with memory.alone() if memory and not times else nullcontext():
        if memory and not times and not measure_again:
            times, failed = memory.read()  # another process may have measured meanwhile
        reasons |= dict.fromkeys(failed, "it did not run when it was measured here")
        able = [name for name in able if name not in failed]
        winners = sorted(set(choose(times).values()), key=able.index) if times else able
        loaded = load_each(winners, make, reasons)
        unmeasured = [name for name in able if times and name not in times[1]]
        again = load_each(unmeasured, make, reasons)
        if again or len(loaded) < len(winners):  # what could not be loaded before can now, or the other way round
            others = [name for name in able if name not in (*winners, *unmeasured)]
            times, loaded = {}, loaded | again | load_each(others, make, reasons)
        if memory and not times and len(loaded) > 1:
            times, fails = measure(loaded, manifest)
            reasons |= fails
            loaded = {name: run for name, run in loaded.items() if name not in fails}
            memory.write({size: {**row, **dict.fromkeys(fails, inf)} for size, row in times.items()})
    if loaded and engine == "auto":  # nobody has asked for what has no target of its own
        reasons = {name: reason for name, reason in reasons.items() if name not in READS}
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if not loaded and device == "cuda" and engine == "auto":
        warnings.warn(
            f"device: expected an engine on a GPU, got none ({why or 'no GPU'}); the CPU serves", stacklevel=2
        )
        return load(path, "cpu", num_threads=num_threads, trust=trust, measure_again=measure_again)
    if not loaded:
        raise ArtifactError(
            f"{manifest.name}: expected an engine that runs here, got none ({why}). "
            "Export on this machine, install an engine, or say trust=True if you know who made the artefact."
        )
    if reasons:
        warnings.warn(f"left out on this machine: {why}; served by: {', '.join(loaded)}", stacklevel=2)
    serves = choose(times) if times else {1: next(iter(loaded))}
    return CompactModel(
        manifest,
        {name: loaded[name] for name in serves.values()},
        make,
        engines=[name for name in able if name in (times[1] if times else loaded)],
        serves=serves,
        times=times,
        encode=_encoder(directory, manifest),
    )


def _read_checked(directory: Path) -> tuple[Signed, dict[str, Path]]:
    """Return what an artefact says of itself, and the file of each target, every one that it names looked at."""
    signed = read_signed(directory)
    try:
        files = {name: check_file(directory, target) for name, target in signed.manifest.targets.items()}
        check_files(directory, signed.manifest.files)
    except ArtifactError:
        if read_signed(directory).signature["sha256"] == signed.signature["sha256"]:
            raise
        return _read_checked(directory)  # a target was built anew since the manifest was read
    return signed, files


def _check_engine(engine: str, manifest: Manifest, device: str) -> None:
    if READS.get(engine, engine) not in manifest.targets:
        raise ArtifactError(
            f"engine: expected one of {', '.join(engines_for(manifest.targets, device))}, got {engine!r}. "
            "Use 'auto', or export that target."
        )
    if engine in ENGINES and device not in ("auto", device_of(engine)):
        raise ArtifactError(
            f"engine: expected one that runs on {device}, got {engine}, which does not. Leave out one of the two."
        )


def _encoder(directory: Path, manifest: Manifest) -> Encode | None:
    """Return what turns texts into inputs; the tokenizer is read when the first comes."""
    steps = manifest.preprocessing or {}
    if not preprocesses_text(steps):
        return None

    @cache
    def encoder() -> Encode:
        content = (directory / steps["tokenizer"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest.files[steps["tokenizer"]]:
            raise ArtifactError(f"{directory}: expected the tokenizer that was loaded, got another. Load it again.")
        return make_encoder(content.decode(), steps)

    return lambda texts: encoder()(texts)


def load_and_call(path: str, engine: str) -> Callable[[], object]:
    """Load one engine of an artefact and return a call that runs a batch of one."""
    directory = Path(path)
    signed = read_signed(directory)
    manifest = signed.manifest
    reason = why_left_out(engine, manifest, trusted=signed.ours)
    if reason:
        raise ArtifactError(f"{engine}: expected an engine that runs here, got none ({reason}). Name another.")
    file = check_file(directory, manifest.targets[READS.get(engine, engine)])
    return example_call(make_engine(engine, file), manifest, 1)


def why_left_out(name: str, manifest: Manifest, *, trusted: bool) -> str | None:
    """Say why an engine cannot serve an artefact here, or ``None``.

    Args:
        name: Of the engine.
        manifest: Of the artefact, with its target.
        trusted: Whether files may run code.
    """
    if name not in ENGINES:
        return "this version does not know it"
    if runs_code(name) and not trusted:
        return "its file may run code, and the artefact was not built on this machine: say trust=True if you trust it"
    package = missing_package(name)
    if package:
        return f"{package} is not installed"
    if device_of(name) == "cuda" and not has_cuda():
        return "there is no GPU that CUDA sees"
    return why_not(manifest.targets[READS.get(name, name)].requires)

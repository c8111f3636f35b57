"""From an artefact on disk to a ``CompactModel``: which engines can run here, and which of them is the fastest."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from compress.errors import ArtifactError, MissingPackageError
from compress.measure.latency import measure_latency
from compress.measure.machine import describe_machine
from compress.runtime.engines import ENGINES, Engine, make_engine
from compress.runtime.manifest import Manifest, check_file, read_manifest
from compress.runtime.model import CompactModel, example_call
from compress.runtime.requirements import why_not

__all__ = ["load", "load_and_call"]


def load(
    path: str | Path, device: str = "auto", *, engine: str = "auto", num_threads: int | None = None
) -> CompactModel:
    """Load an artefact.

    Files are native code or pickles: load artefacts from trusted sources only. Each file's SHA-256 is checked.

    Args:
        path: The artefact's directory.
        device: ``"auto"`` or ``"cpu"``; every engine of this version runs on the CPU.
        engine: A name, or ``"auto"``: the engines that can run here are measured once, interleaved, and the fastest
            at batch 1 serves; the choice is remembered for this machine and artefact.
        num_threads: Threads of one call; for torch's engines this sets the number for the whole process.

    Raises:
        ArtifactError: when the artefact is damaged, or has no engine that can run here.
    """
    directory = Path(path)
    if device not in ("auto", "cpu"):
        raise ArtifactError(f"device: expected 'auto' or 'cpu', got {device!r}. Use 'auto'.")
    if num_threads is not None and num_threads < 1:
        raise ArtifactError(f"num_threads: expected at least 1, got {num_threads}. Leave it out for the default.")
    manifest = read_manifest(directory)
    if engine != "auto" and engine not in manifest.targets:
        raise ArtifactError(
            f"engine: expected one of {', '.join(manifest.targets)}, got {engine!r}. Use 'auto', or export that target."
        )

    @cache
    def make(name: str) -> Engine:
        return make_engine(name, check_file(directory, manifest.targets[name]), num_threads=num_threads)

    wanted = list(manifest.targets) if engine == "auto" else [engine]
    usable = _usable(manifest, wanted, make, strict=engine != "auto")
    chosen = usable[0] if len(usable) == 1 else _fastest(manifest, usable, make, directory, num_threads)
    return CompactModel(manifest, chosen, make, engines=usable)


def load_and_call(path: str, engine: str) -> Callable[[], object]:
    """Load one engine of an artefact and return a call that runs a batch of one."""
    directory = Path(path)
    manifest = read_manifest(directory)
    return example_call(make_engine(engine, check_file(directory, manifest.targets[engine])), manifest, 1)


def _usable(manifest: Manifest, wanted: Sequence[str], make: Callable[[str], Engine], *, strict: bool) -> list[str]:
    usable, reasons = [], []
    for name in wanted:
        reason = None if name in ENGINES else "this version does not know it"
        reason = reason or why_not(manifest.targets[name].requires)
        if reason is None:
            try:
                make(name)
            except ArtifactError:
                raise  # a damaged file is not a matter of this machine
            except MissingPackageError as error:
                reason = str(error)
            except Exception as error:  # a library that does not load its file; any kind of exception
                reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
        if reason is None:
            usable.append(name)
        else:
            reasons.append(f"{name}: {reason}")
    if not usable or (strict and reasons):
        raise ArtifactError(
            f"{manifest.name}: expected an engine that runs here, got none ({'; '.join(reasons)}). "
            "Export on this machine, or install an engine."
        )
    if reasons:
        warnings.warn(f"left out on this machine: {'; '.join(reasons)}; served by: {', '.join(usable)}", stacklevel=3)
    return usable


def _fastest(
    manifest: Manifest, usable: Sequence[str], make: Callable[[str], Engine], directory: Path, num_threads: int | None
) -> str:
    memory = _Memory(directory, usable, num_threads)
    remembered = memory.read()
    if remembered in usable:
        return str(remembered)
    calls = {name: example_call(make(name), manifest, 1) for name in usable}
    measured = measure_latency(calls, seconds=2.0 / len(calls))
    chosen = min(usable, key=lambda name: measured[name].p50_ms)
    memory.write(chosen)
    return chosen


class _Memory:
    """Remembers the fastest engine of an artefact on this machine, in the user's cache folder."""

    def __init__(self, directory: Path, usable: Sequence[str], num_threads: int | None) -> None:
        what = [(directory / "manifest.json").read_text(), list(usable), num_threads, describe_machine()]
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
        cache = Path(os.environ.get("COMPRESS_CACHE", Path.home() / ".cache" / "compress"))
        self._file = cache / "engines" / key

    def read(self) -> str | None:
        try:
            return self._file.read_text()
        except (OSError, UnicodeDecodeError):
            return None

    def write(self, engine: str) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_suffix(f".{os.getpid()}")
            temporary.write_text(engine)
            os.replace(temporary, self._file)
        except OSError:
            pass  # a read-only home: measured again next time

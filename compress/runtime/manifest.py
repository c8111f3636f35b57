"""What an artefact says of itself: ``manifest.json``, read and checked before anything in it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import ArtifactError
from compress.runtime.kinds import check_content, check_kinds, check_target
from compress.runtime.values import check_labels, check_scaling, check_structure, class_output

__all__ = [
    "FORMAT_VERSION",
    "Manifest",
    "Range",
    "Target",
    "TensorSpec",
    "check_file",
    "check_files",
    "check_text",
    "manifest_bytes",
    "manifest_text",
    "parse_manifest",
    "preprocesses_text",
    "read_manifest",
    "sha256",
]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Range:
    """Sizes that a dimension may have.

    Args:
        name: Dimensions of one name have one size, in all inputs.
        smallest: Least size.
        largest: Greatest size; ``None`` for any.
        typical: That of the inputs on which the artefact was checked and is measured, and of the sample whose
            multiply-accumulates are counted.
    """

    name: str
    smallest: int
    largest: int | None
    typical: int


@dataclass(frozen=True)
class TensorSpec:
    """An input or output.

    Args:
        name: Of an input, as in the engine files; of an output, as the network calls it, else ``output_0`` and so on.
        dtype: As numpy names it.
        shape: Sizes; ``None`` where any size goes, as in the batch dimension.
        ranges: Which sizes go, by dimension, where not any does.
        num_rows: Of integers that a table is looked up by, as tokens: they go from 0 to the last of its rows. Engines
            look up others, too, and some give whatever lies there.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    ranges: Mapping[int, Range] = field(default_factory=dict)
    num_rows: int | None = None


@dataclass(frozen=True)
class Target:
    """One engine's file, or files.

    Args:
        file: Name within the artefact of the one to load.
        bytes: Size of all its files.
        sha256: Its checksum.
        census: Kernel counts of the compiled graph.
        agreement: Distance from the trained module on held-out inputs.
        requires: What a machine needs for it: architecture, processor flags, package versions.
        parts: Checksums of the files that it reads beside it, by name within the artefact.
        options: What its target was told when it was built.
    """

    file: str
    bytes: int
    sha256: str
    census: Mapping[str, Any] = field(default_factory=dict)
    agreement: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """An artefact's description.

    Args:
        name: What the artefact is called.
        created: When, in ISO 8601, UTC.
        task: What it is for, e.g. ``"classification"``.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
        targets: Files by engine.
        structure: How a call gives the outputs: in a ``"tuple"``, in a ``"dict"`` by their names, or ``None`` for the
            only one by itself.
        labels: Names of the classes.
        preprocessing: How raw values become inputs: ``scale, mean, std`` for ``(raw * scale - mean) / std``; or, for
            texts, ``tokenizer`` (one of ``files``), ``length`` in tokens, ``padding`` (``token, id, type_id, side``),
            ``truncation`` (``side``), and ``inputs``: for each of the network's, in order, which of ``ids``, ``mask``
            and ``type_ids`` it takes.
        scheme: The quantization scheme, or ``None`` for floats.
        metrics: Of the trained network on the test split.
        history: The edits that made the network.
        versions: Of the packages that made the artefact.
        skipped: Why a wanted target is not there, by engine.
        cleanup: Operators, bytes and multiply-accumulates of the program before and after cleaning, and what changed.
        max_batch: Largest batch that the files take at once, or ``None`` without a limit.
        products: Each convolution and matrix product of the program: ``name, macs, quantized``. Here as in ``cleanup``
            and every census, multiply-accumulates are those of one sample, of typical sizes where these vary.
        agreement: Distance of the program, before an engine compiles it, from the trained module.
        gates: What each target had to pass.
        files: Checksums of what preprocessing reads, by name within the artefact.
        format_version: Of this file.
    """

    name: str
    created: str
    task: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    targets: Mapping[str, Target]
    structure: str | None = None
    labels: list[str] | None = None
    preprocessing: Mapping[str, Any] | None = None
    scheme: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: list[Any] = field(default_factory=list)
    versions: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    cleanup: Mapping[str, Any] = field(default_factory=dict)
    max_batch: int | None = None
    products: list[Mapping[str, Any]] = field(default_factory=list)
    agreement: Mapping[str, Any] = field(default_factory=dict)
    gates: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def read_manifest(path: str | Path) -> Manifest:
    """Read an artefact's manifest.

    Args:
        path: The artefact's directory.

    Raises:
        ArtifactError: when there is none, or it is damaged or of a later format.
    """
    return parse_manifest(manifest_bytes(path), path)


def manifest_text(manifest: Manifest) -> str:
    """Return a manifest as it is written; what one without a structure or tables says is what it has always been."""
    content = asdict(manifest)
    for spec in (*content["inputs"], *content["outputs"]):
        if spec["num_rows"] is None:
            del spec["num_rows"]
    if manifest.structure is None:
        del content["structure"]
    return json.dumps(content, indent=1)


def manifest_bytes(path: str | Path) -> bytes:
    """Return the content of an artefact's manifest, unread.

    Args:
        path: The artefact's directory.

    Raises:
        ArtifactError: when there is none, or it may not be read.
    """
    file = Path(path) / "manifest.json"
    try:
        if file.is_file():
            return file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{file}: expected to read it, got {error}. Give an artefact that may be read.") from error
    raise ArtifactError(f"{path}: expected an artefact with a manifest.json, got none. Give its directory.")


def parse_manifest(text: bytes, path: str | Path) -> Manifest:
    """Return what the content of a manifest says.

    Args:
        text: From ``manifest_bytes``.
        path: The artefact's directory, for messages.

    Raises:
        ArtifactError: when it is damaged or of a later format.
    """
    file = Path(path) / "manifest.json"
    try:
        content = json.loads(text.decode())
        version = content["format_version"]
        if version == FORMAT_VERSION:
            return _parse(content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{file}: expected a manifest, got {type(error).__name__}: {error}. Export again."
        ) from error
    raise ArtifactError(f"{file}: expected format_version {FORMAT_VERSION}, got {version!r}. Update compress.")


def sha256(path: Path) -> str:
    """Return a file's checksum in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(directory: Path, target: Target) -> Path:
    """Return the path of a target's file once its checksum is right, and those of its parts.

    Raises:
        ArtifactError: when a file is missing, outside the artefact, or not the one that was exported.
    """
    check_files(directory, {**target.parts, target.file: target.sha256})
    return directory / target.file


def check_files(directory: Path, checksums: Mapping[str, str]) -> None:
    """Make sure that an artefact's files are those that were exported.

    Args:
        directory: The artefact.
        checksums: SHA-256 by name within it.

    Raises:
        ArtifactError: as ``check_file`` does.
    """
    for name, wanted in checksums.items():
        path = directory / name
        try:
            if path.resolve().parent != directory.resolve():
                if path.is_symlink() and Path(name).name == name:
                    raise ArtifactError(
                        f"{path}: expected files inside the artefact, got a link elsewhere. Copy it with what its "
                        "links lead to; from the Hugging Face hub, download it with local_dir=."
                    )
                raise ArtifactError(f"{directory}: expected files inside the artefact, got {name!r}. Do not use it.")
            if not path.is_file():
                raise ArtifactError(f"{path}: expected a file of the artefact, got none. Export again.")
            if sha256(path) != wanted:
                raise ArtifactError(f"{path}: expected SHA-256 {wanted[:12]}…, got another. Export again.")
        except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, not to be read, a loop
            raise ArtifactError(f"{directory}: expected to read {name[:80]!r}, got {error}. Export again.") from error


def preprocesses_text(steps: Mapping[str, Any]) -> bool:
    """Say whether a manifest's preprocessing is that of text."""
    return "tokenizer" in steps


def check_text(steps: Mapping[str, Any], inputs: Sequence[TensorSpec], files: Container[str]) -> None:
    """Make sure that texts can become a network's inputs.

    Args:
        steps: The manifest's preprocessing.
        inputs: Of the network.
        files: Names of the artefact's files.

    Raises:
        ValueError: when they cannot, or a value is not what it must be; ``KeyError`` and ``TypeError`` likewise.
    """
    check_kinds(steps, {"tokenizer": str, "length": int, "padding": dict, "truncation": dict, "inputs": list})
    check_kinds(steps["padding"], {"token": str, "id": int, "type_id": int})
    length, parts = steps["length"], steps["inputs"]
    if steps["tokenizer"] not in files:
        raise ValueError(f"tokenizer {steps['tokenizer']!r} is none of the files")
    if not {steps["padding"]["side"], steps["truncation"]["side"]} <= {"left", "right"}:
        raise ValueError("a side of padding or truncation is neither left nor right")
    if len(parts) != len(inputs) or "ids" not in parts or not set(parts) <= {"ids", "mask", "type_ids"}:
        raise ValueError(f"{parts} of a text for the inputs {', '.join(spec.name for spec in inputs)}")
    for spec in inputs:
        if length < 1 or len(spec.shape) != 2 or spec.shape[1] not in (None, length):
            raise ValueError(f"texts of {length} tokens for {spec.name}, of shape {list(spec.shape)}")


def _parse(content: dict[str, Any]) -> Manifest:
    check_content(content)
    for target in content["targets"].values():
        check_target(target)
    inputs = tuple(_spec(entry) for entry in content["inputs"])
    outputs = tuple(_spec(entry) for entry in content["outputs"])
    if not inputs or not outputs:
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    names = [spec.name for spec in outputs]
    check_structure(content.get("structure"), names)
    check_labels(content.get("labels"), outputs[class_output(names)].shape)
    steps = content.get("preprocessing") or {}
    if preprocesses_text(steps):
        check_text(steps, inputs, content.get("files", {}))
    elif steps:
        check_scaling(steps, inputs[0].shape)
    return Manifest(
        **{
            **content,
            "inputs": inputs,
            "outputs": outputs,
            "targets": {name: Target(**target) for name, target in content["targets"].items()},
        }
    )


def _spec(entry: dict[str, Any]) -> TensorSpec:
    check_kinds(entry, {"name": str, "dtype": str, "shape": list})
    sizes = entry["shape"]
    if not sizes or sizes[0] is not None or not all(size is None or isinstance(size, int) for size in sizes):
        raise ValueError(f"shape {sizes} of {entry['name']}")
    known = np.sctypeDict.get(entry["dtype"])  # np.dtype reads expressions, and raises whatever they make it raise
    if known is None or np.dtype(known).kind not in "biufc":
        raise ValueError(f"dtype {entry['dtype']!r} of {entry['name']}")
    ranges = {int(key): _range(value) for key, value in entry.get("ranges", {}).items()}
    if any(not 0 < dimension < len(sizes) or sizes[dimension] is not None for dimension in ranges):
        raise ValueError(f"ranges {sorted(ranges)} of {entry['name']}")
    num_rows = entry.get("num_rows")
    check_kinds({"num_rows": num_rows}, {"num_rows": int | None})
    if num_rows is not None and (num_rows < 1 or np.dtype(known).kind not in "iu"):
        raise ValueError(f"num_rows {num_rows} of {entry['name']}, of {entry['dtype']}")
    return TensorSpec(entry["name"], entry["dtype"], tuple(sizes), ranges, num_rows)


def _range(entry: dict[str, Any]) -> Range:
    check_kinds(entry, {"name": str, "smallest": int, "typical": int})
    largest = entry["largest"]
    if largest is not None and not isinstance(largest, int):
        raise TypeError(f"largest is of type {type(largest).__name__}")
    if not 0 < entry["smallest"] <= entry["typical"] <= (entry["typical"] if largest is None else largest):
        raise ValueError(f"sizes of {entry['name']}")
    return Range(**entry)

"""A thousand damaged artefacts: each a clean error or the right answer."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import ArtifactError
from compress.runtime import load
from compress.runtime.manifest import parse_manifest
from compress.runtime.trust import SIGNATURE
from tests.export.programs import HERE, artifact, quantized

_VALUES: list[Any] = [None, "", "x", -1, 0, 1, 10**30, 1.5, float("nan"), [], {}, [None], True, "../../etc/passwd"]
_VALUES += ["a\0b", "a" * 5000, "\ud800", {"": "1"}, 10**400, [10**400], "(1 2)f4,f4"]


def flip(folder: Path, draw: random.Random) -> None:
    file = _any(folder, draw)
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def truncate(folder: Path, draw: random.Random) -> None:
    file = _any(folder, draw)
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])


def append(folder: Path, draw: random.Random) -> None:
    file = _any(folder, draw)
    file.write_bytes(file.read_bytes() + draw.randbytes(1 + draw.randrange(20)))


def swap(folder: Path, draw: random.Random) -> None:
    one, other = draw.sample(sorted(folder.iterdir()), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def remove(folder: Path, draw: random.Random) -> None:
    _any(folder, draw).unlink()


def change(folder: Path, draw: random.Random) -> None:
    """Change a value of the manifest; half of the time by somebody who mends its checksum, too."""
    content = json.loads((folder / "manifest.json").read_text())
    holder, key = draw.choice(list(_places(content)))
    value = draw.choice([*_VALUES, _DELETE])
    if value is _DELETE:
        del holder[key]
    else:
        holder[key] = value
    text = json.dumps(content)
    (folder / "manifest.json").write_text(text)
    if draw.random() < 0.5:
        signature = json.loads((folder / SIGNATURE).read_text())
        signature["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        (folder / SIGNATURE).write_text(json.dumps(signature))


def escape(folder: Path, draw: random.Random) -> None:
    """Let a target's file lie outside, with all checksums right."""
    content = json.loads((folder / "manifest.json").read_text())
    target = content["targets"][draw.choice(list(content["targets"]))]
    outside = folder.parent / "outside"
    shutil.copy(folder / target["file"], outside)
    link = folder / "link"
    link.symlink_to(outside)
    target["file"] = draw.choice(["../outside", str(outside), "./../outside", "link"])
    text = json.dumps(content)
    (folder / "manifest.json").write_text(text)
    signature = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "hmac_sha256": None}
    (folder / SIGNATURE).write_text(json.dumps(signature))


_DELETE = object()
_MUTATIONS: list[Callable[[Path, random.Random], None]] = [flip, truncate, append, swap, remove, change, change, escape]


def _any(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))


def _places(content: Any) -> Any:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from _places(value)


def test_each_value_in_each_place_of_the_manifest_is_refused_or_read() -> None:
    content = json.loads((artifact() / "manifest.json").read_text())
    read = 0
    for holder, key in list(_places(content)):
        before = holder[key]
        for value in _VALUES:
            holder[key] = value
            with suppress(ArtifactError):
                read += bool(parse_manifest(json.dumps(content).encode(), artifact()))
        holder[key] = before
    assert read


def test_a_thousand_mutations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    inputs = quantized().inputs.numpy()[:5]
    right = {engine: load(artifact(), engine=engine)(inputs) for engine in HERE}
    refused: dict[str, int] = {}
    folder = tmp_path / "copy"
    for number in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(artifact(), folder)
        draw = random.Random(number)
        mutation = _MUTATIONS[number % len(_MUTATIONS)]
        mutation(folder, draw)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = load(folder, engine="onnxruntime" if number % 3 else "auto")
                outputs = model(inputs)
                labels, probabilities = model.predict(inputs)
        except ArtifactError:
            refused[mutation.__name__] = refused.get(mutation.__name__, 0) + 1
            continue
        serving = set(model.engines_by_batch.values())
        assert any(np.array_equal(outputs, right[engine]) for engine in serving), (number, mutation.__name__)
        assert len(labels) == len(probabilities) == len(inputs)
    # What a checksum covers is refused without exception; what somebody has signed off may be harmless.
    for name in ("truncate", "remove", "escape"):
        assert refused[name] == 125, (name, refused)
    assert refused["flip"] >= 100, refused  # some hit a blank of the signature, or its case
    assert refused["change"] >= 125, refused

"""Sizes that a manifest claims cost nothing until its files bear them out."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from compress.errors import ArtifactError
from compress.runtime import load
from compress.runtime.examples import example_call
from compress.runtime.manifest import Manifest, Range, TensorSpec
from tests.export.programs import artifact, edit


class Keeper:
    """Gives what it is given."""

    takes, threads = "numpy", 1

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        return list(inputs)


def refusal(call: Callable[[], object]) -> str:
    """Return what is said against a call, which may not ask for memory before it."""
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError) as error:
            call()
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    return str(error.value)


def test_sizes_that_the_file_does_not_have_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    copy = Path(shutil.copytree(artifact(), tmp_path / "copy"))
    edit(copy, lambda content: content["inputs"][0].update(shape=[None, 1, 8, 10**6]))
    message = refusal(lambda: load(copy, engine="onnxruntime"))
    assert "expected shape (N, 1, 8, 8), as the engine's file has, got (N, 1, 8, 1000000) in the manifest" in message
    edit(copy, lambda content: content["inputs"][0].update(shape=[None, 1, 8]))
    assert "got (N, 1, 8) in the manifest" in refusal(lambda: load(copy, engine="onnxruntime"))


@pytest.mark.parametrize(
    "specs",
    [
        [TensorSpec("x", "float32", (None, 2 * 10**9))],
        [TensorSpec("x", "float32", (None, 10**30, 10**30))],
        [TensorSpec("x", "float32", (None, None), {1: Range("time", 1, None, 10**10)})],
        [TensorSpec(f"x{place}", "int64", (None, 4 * 10**8)) for place in range(3)],
        [TensorSpec("x", "float32", (None, 10**9)), TensorSpec("y", "float32", (None, -(10**9)))],
    ],
)
def test_sizes_beyond_any_network_are_refused(specs: list[TensorSpec]) -> None:
    manifest = Manifest("m", "", "", tuple(specs), (), {})
    message = refusal(lambda: example_call(Keeper(), manifest, 1))
    assert "m: expected inputs of at most 1,073,741,824 values a sample, got " in message


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "bool"])
def test_inputs_are_of_the_dtype_and_the_typical_sizes(dtype: str) -> None:
    spec = TensorSpec("x", dtype, (None, 3, None, None), {3: Range("time", 1, 9, 5)})
    (given,) = example_call(Keeper(), Manifest("m", "", "", (spec,), (), {}), 4)()
    assert (given.dtype, given.shape) == (dtype, (4, 3, 8, 5))

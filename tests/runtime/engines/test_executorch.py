from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.export.targets import executorch
from compress.runtime.engines import make_engine
from compress.runtime.engines.executorch import ExecuTorchEngine
from tests.export.networks import network

pytest.importorskip("executorch", reason="the extra `executorch` is not installed")


@cache
def content() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        executorch.build(network("cnn").integers, Path(folder) / executorch.FILE)
        return (Path(folder) / executorch.FILE).read_bytes()


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    (tmp_path / executorch.FILE).write_bytes(content())
    return make_engine("executorch", tmp_path / executorch.FILE)


def test_batches_grow_and_shrink_and_are_split_beyond_what_is_planned(engine: ExecuTorchEngine) -> None:
    inputs = torch.randn(200, 3, 8, 8)
    singles = torch.cat([engine([inputs[i : i + 1]])[0] for i in range(200)])
    for num in (1, 3, 64, 2, 65, 200, 128, 63):
        assert torch.equal(engine([inputs[:num]])[0], singles[:num])


def test_inputs_may_lie_as_they_like_and_results_stay(engine: ExecuTorchEngine) -> None:
    inputs = torch.randn(6, 3, 8, 8)
    first = engine([inputs])[0]
    kept = first.clone()
    engine([inputs * 2])
    assert torch.equal(first, kept)
    for other in (
        inputs.to(memory_format=torch.channels_last),
        inputs.transpose(2, 3).contiguous().transpose(2, 3),
        inputs.clone().requires_grad_(),
    ):
        assert torch.equal(engine([other])[0], kept)
    single = inputs[:1, :, :, :].as_strided((1, 3, 8, 8), (7, 64, 8, 1))
    assert torch.equal(engine([single])[0], kept[:1])


def test_threads_are_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / executorch.FILE).write_bytes(content())
    inputs = torch.randn(5, 3, 8, 8)
    before = make_engine("executorch", tmp_path / executorch.FILE)
    usual, wanted = before.threads, before([inputs])[0]
    try:
        assert make_engine("executorch", tmp_path / executorch.FILE, num_threads=1).threads == 1
        assert torch.equal(before([inputs])[0], wanted)  # which was loaded with other threads
    finally:
        make_engine("executorch", tmp_path / executorch.FILE, num_threads=usual)


def test_what_was_loaded_before_goes_on_when_threads_change(tmp_path: Path) -> None:
    (tmp_path / executorch.FILE).write_bytes(content())
    inputs = torch.randn(5, 3, 8, 8)
    engines = [make_engine("executorch", tmp_path / executorch.FILE)]
    usual, wanted = engines[0].threads, engines[0]([inputs])[0]
    try:
        for num in range(10):
            engines.append(make_engine("executorch", tmp_path / executorch.FILE, num_threads=1 + num % 2))
            assert all(torch.equal(engine([inputs])[0], wanted) for engine in (engines[0], *engines[-2:]))
    finally:
        make_engine("executorch", tmp_path / executorch.FILE, num_threads=usual)


def test_several_threads_may_call(engine: ExecuTorchEngine) -> None:
    inputs = torch.randn(40, 3, 8, 8)
    wanted = engine([inputs])[0]
    wrong: list[int] = []

    def call(start: int) -> None:
        for size in range(1, 11):
            if not torch.equal(engine([inputs[start : start + size]])[0], wanted[start : start + size]):
                wrong.append(start)

    threads = [threading.Thread(target=call, args=(start,)) for start in (0, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / executorch.FILE
    for damaged in (b"", b"nothing", content()[:100], b"\0" * 4096):
        path.write_bytes(damaged)
        with pytest.raises(RuntimeError):
            make_engine("executorch", path)

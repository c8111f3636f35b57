"""Written, read, and refused: everything that can be wrong with stored outputs is noticed and said."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.distill.cache import CacheWriter, Field, OutputCache, fingerprint_module, fingerprint_tensors
from compress.errors import DataError, RecipeError

KEY = {"teacher": "a", "data": "b", "augmentation": "c"}
FIELDS = {"outputs": Field((5,)), "features/stages.1": Field((2, 3), "float32")}
NUM, VIEWS, CHUNK = 23, 2, 8


def values(view: int, start: int, stop: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(view)
    outputs = torch.randn(NUM, 5, generator=generator)[start:stop]
    features = torch.randn(NUM, 2, 3, generator=generator)[start:stop]
    return {"outputs": outputs, "features/stages.1": features}


def writer(path: Path, **changes: Any) -> CacheWriter:
    arguments: dict[str, Any] = {"key": KEY, "fields": FIELDS, "num_samples": NUM, "num_views": VIEWS, "chunk": CHUNK}
    return CacheWriter(path, **{**arguments, **changes})


def write(path: Path, *, stop_after: int | None = None) -> None:
    made = writer(path)
    for number, (view, start, stop) in enumerate(made.missing()):
        if number == stop_after:
            made.close()
            return
        made.write(view, start, values(view, start, stop))
    made.finish()


def read_all(cache: OutputCache, view: int) -> dict[str, Tensor]:
    return cache.read(torch.arange(NUM), torch.full((NUM,), view))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    cache = OutputCache.open(tmp_path, key=KEY)
    assert {path.name for path in tmp_path.iterdir()} == {"records.bin", "manifest.json", "lock"}
    for view in range(VIEWS):
        got, expected = read_all(cache, view), values(view, 0, NUM)
        assert torch.equal(got["features/stages.1"], expected["features/stages.1"])
        assert torch.equal(got["outputs"], expected["outputs"].half().float())
    index, views = torch.tensor([7, 0, 7, 22]), torch.tensor([1, 0, 0, 1])
    mixed = cache.read(index, views)["outputs"]
    for row, (i, v) in enumerate(zip(index.tolist(), views.tolist())):
        assert torch.equal(mixed[row], values(v, i, i + 1)["outputs"][0].half().float())
    twin = pickle.loads(pickle.dumps(cache))
    assert torch.equal(twin.read(index, views)["outputs"], mixed)


@pytest.mark.parametrize("stop_after", [0, 1, 3, 5])
def test_an_interrupted_write_goes_on(tmp_path: Path, stop_after: int) -> None:
    write(tmp_path / "whole")
    write(tmp_path / "part", stop_after=stop_after)
    with pytest.raises(DataError, match=r"got an unfinished write. Go on with it: compress cache-teacher RECIPE"):
        OutputCache.open(tmp_path / "part", key=KEY)
    made = writer(tmp_path / "part")
    assert len(made.missing()) == 6 - stop_after
    made.close()
    write(tmp_path / "part")
    assert (tmp_path / "part/records.bin").read_bytes() == (tmp_path / "whole/records.bin").read_bytes()
    assert (tmp_path / "part/manifest.json").read_text() == (tmp_path / "whole/manifest.json").read_text()


def test_a_chunk_that_never_reached_the_disk_is_written_again(tmp_path: Path) -> None:
    write(tmp_path, stop_after=3)
    content = bytearray((tmp_path / "records.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "records.bin").write_bytes(bytes(content[: len(content) // 2]))
    with (tmp_path / "journal.jsonl").open("a") as journal:
        journal.write('[1, 0, 8, "half a li')
    made = writer(tmp_path)
    assert (0, 0, 8) in made.missing()
    made.close()
    write(tmp_path)
    OutputCache.open(tmp_path, key=KEY)


def test_nothing_is_written_twice_and_nothing_half(tmp_path: Path) -> None:
    write(tmp_path)
    again = writer(tmp_path)
    assert again.missing() == []
    again.finish()
    half = writer(tmp_path / "other")
    with pytest.raises(DataError, match="expected all chunks, got 6 missing"):
        half.finish()
    with pytest.raises(DataError, match="expected a chunk that is missing, got view 0 from 3"):
        half.write(0, 3, values(0, 3, 8))
    with pytest.raises(DataError, match=r"expected outputs of shape \(8, 5\), got \(7, 5\)"):
        half.write(0, 0, values(0, 0, 7))


@pytest.mark.parametrize("part", list(KEY))
def test_a_stale_cache_is_refused_with_the_reason(tmp_path: Path, part: str) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=f"got others: {part}: expected 'new', got '{KEY[part]}'. Write them anew"):
        OutputCache.open(tmp_path, key={**KEY, part: "new"})
    with pytest.raises(DataError, match=f"{part}: expected 'new'"):
        writer(tmp_path, key={**KEY, part: "new"})


def test_an_unfinished_cache_of_another_teacher_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path, stop_after=2)
    before = (tmp_path / "records.bin").read_bytes()
    with pytest.raises(DataError, match="teacher: expected 'new', got 'a'"):
        writer(tmp_path, key={**KEY, "teacher": "new"})
    with pytest.raises(DataError, match="num_views: expected 3, got 2"):
        writer(tmp_path, num_views=3)
    assert (tmp_path / "records.bin").read_bytes() == before


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=25, deadline=None)
def test_any_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("flip")
    write(folder)
    content = bytearray((folder / "records.bin").read_bytes())
    content[position % len(content)] ^= 1 << bit
    (folder / "records.bin").write_bytes(bytes(content))
    with pytest.raises(DataError, match="expected the bytes that were written, got others for samples"):
        OutputCache.open(folder, key=KEY)


def test_truncated_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a teacher's stored outputs, got none. Write them"):
        OutputCache.open(tmp_path / "absent", key=KEY)
    write(tmp_path)
    records, manifest = tmp_path / "records.bin", tmp_path / "manifest.json"
    content, text = records.read_bytes(), manifest.read_text()
    records.write_bytes(content[:-1])
    with pytest.raises(
        DataError, match=f"expected {len(content)} bytes, got {len(content) - 1}: the file was truncated"
    ):
        OutputCache.open(tmp_path, key=KEY)
    records.unlink()
    with pytest.raises(DataError, match="got 0: the file was truncated"):
        OutputCache.open(tmp_path, key=KEY)
    records.write_bytes(content)
    manifest.write_text(json.dumps({**json.loads(text), "version": 99}))
    with pytest.raises(DataError, match="expected a cache of version 1, got 99"):
        OutputCache.open(tmp_path, key=KEY)
    manifest.write_text("{")
    with pytest.raises(DataError, match="expected a manifest, got JSONDecodeError"):
        OutputCache.open(tmp_path, key=KEY)


def test_samples_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path)
    cache = OutputCache.open(tmp_path, key=KEY)
    for index, view, what in ((NUM, 0, "a sample below 23, got 23"), (0, VIEWS, "a view below 2, got 2")):
        with pytest.raises(DataError, match=what):
            cache.read(torch.tensor([index]), torch.tensor([view]))


def test_the_largest_probabilities_and_the_rest() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 1000) * 4
    field = Field((1000,), "float32", top_k=20)
    rows = np.zeros(64, dtype=field.dtype_of_row)
    field.pack(logits, rows)
    exact, got = logits.softmax(1), field.unpack(rows).softmax(1)
    top = exact.topk(20, dim=1)
    assert torch.allclose(got.gather(1, top.indices), top.values, rtol=1e-4)
    assert torch.allclose(got.sum(1), torch.ones(64))
    rest = 1 - top.values.sum(1)
    others = got.scatter(1, top.indices, 0.0)
    assert torch.allclose(others.sum(1), rest, atol=1e-5)
    assert torch.allclose(others.max(1).values, rest / 980, atol=1e-6)
    assert field.dtype_of_row.itemsize * 20 < 1000 * 4


def test_what_a_field_cannot_hold() -> None:
    rows = np.zeros(1, dtype=Field((2,)).dtype_of_row)
    with pytest.raises(DataError, match="expected values that float16 can hold, got some beyond ±65504"):
        Field((2,)).pack(torch.tensor([[1e6, 0.0]]), rows)
    with pytest.raises(RecipeError, match=r"cache_top_k: expected a number in \[1, C\)"):
        Field((4,), top_k=4)
    with pytest.raises(RecipeError, match="cache_dtype: expected float16 or float32, got 'int8'"):
        Field((4,), dtype="int8")


def _write_slowly(path: str, count: Any) -> None:
    made = writer(Path(path))
    for view, start, stop in made.missing():
        with count.get_lock():
            count.value += 1
        made.write(view, start, values(view, start, stop))
    made.finish()


def test_two_processes_do_not_write_over_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)
    processes = [context.Process(target=_write_slowly, args=(str(tmp_path), count)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert count.value == 6
    OutputCache.open(tmp_path, key=KEY)


def test_fingerprints_change_with_what_they_stand_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    network = nn.Sequential(layer, nn.ReLU())
    first = fingerprint_module(network)
    assert first == fingerprint_module(network)
    with torch.no_grad():
        layer.weight[0, 0] += 1e-6
    second = fingerprint_module(network)
    network[1] = nn.Tanh()
    assert len({first, second, fingerprint_module(network)}) == 3

    class Filed(nn.Module):
        path = str(tmp_path / "file")

    Path(Filed.path).write_text("a")
    before = fingerprint_module(Filed())
    Path(Filed.path).write_text("b")
    assert fingerprint_module(Filed()) != before
    x = torch.zeros(2, 2)
    assert len({fingerprint_tensors(x), fingerprint_tensors(x.half()), fingerprint_tensors(x.flatten())}) == 3
    assert fingerprint_tensors([x, {"a": x}]) == fingerprint_tensors(x, x)

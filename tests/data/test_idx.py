from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from compress.data.idx import read_idx
from compress.errors import DataError
from tests.data.files import pack_idx


@pytest.mark.parametrize("shape", [(7,), (3, 4, 5), (0, 28, 28)])
def test_reads_what_was_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(pack_idx(array)))
    read = read_idx(path, num_dims=len(shape))
    assert read.dtype == np.uint8
    assert read.shape == shape
    assert (read == array).all()
    read[...] = 0  # writable: torch shares its memory


CONTENT = pack_idx(np.arange(6, dtype=np.uint8))


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"plain text", "expected a whole gzip file"),
        (packed(CONTENT)[:-9], "expected a whole gzip file"),
        (b"", "got nothing"),
        (packed(CONTENT[:5]), "expected an idx file that begins with 00000801, got 00000801"),
        (packed(b"\x00\x00\x0d\x01" + CONTENT[4:]), "begins with 00000801, got 00000d01"),
        (packed(pack_idx(np.zeros((2, 3, 4), dtype=np.uint8))), "got 00000803.*not exchanged"),
        (packed(CONTENT[:-1]), r"expected 6 values of shape \(6,\), got 5"),
        (packed(CONTENT + b"\x00"), r"expected 6 values of shape \(6,\), got 7"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, num_dims=1)
    assert str(path) in str(caught.value)

"""The idx format in which MNIST and its relatives are published."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from compress.errors import DataError

__all__ = ["read_idx"]

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, *, num_dims: int) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes.

    Source: http://yann.lecun.com/exdb/mnist: two zero bytes, the type, the number of dimensions, then each dimension
    as a big-endian 32-bit integer, then the values.

    Args:
        path: The ``.gz`` file.
        num_dims: Dimensions it must have: 3 for images, 1 for labels.

    Returns:
        uint8 array.

    Raises:
        DataError: when the file cannot be unpacked, or its header or its length is not what it should be.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a whole gzip file, got: {error}. Fetch it again.") from error
    start = 4 + 4 * num_dims
    magic = bytes([0, 0, _UNSIGNED_BYTE, num_dims])
    if len(content) < start or content[:4] != magic:
        raise DataError(
            f"{path}: expected an idx file that begins with {magic.hex()}, got {content[:4].hex() or 'nothing'}. "
            "Fetch it again, and check that images and labels are not exchanged."
        )
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=num_dims, offset=4))
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path}: expected {math.prod(shape)} values of shape {shape}, got {len(content) - start}. Fetch it again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()  # writable

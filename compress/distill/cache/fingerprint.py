"""Short descriptions of networks and tensors that change when their content does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint_module", "fingerprint_tensors"]


def fingerprint_module(network: nn.Module) -> str:
    """Return a checksum of a network's structure, weights, and the files that it stands for.

    Example:
        >>> first = nn.Linear(2, 2)
        >>> twin = nn.Linear(2, 2)
        >>> fingerprint_module(first) == fingerprint_module(twin)
        False
        >>> twin.load_state_dict(first.state_dict())
        <All keys matched successfully>
        >>> fingerprint_module(first) == fingerprint_module(twin)
        True
    """
    result = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        result.update(name.encode())
        _add(result, tensor)
    for module in network.modules():
        path = Path(getattr(module, "path", None) or "")
        for file in sorted(path.rglob("*")) if path.is_dir() and str(path) != "." else [path]:
            if file.is_file():
                result.update(file.read_bytes())
    return result.hexdigest()[:16]


def fingerprint_tensors(*tensors: Any) -> str:
    """Return a checksum of tensors, also of those in nested sequences and mappings.

    Example:
        >>> fingerprint_tensors(torch.zeros(2)) == fingerprint_tensors([torch.zeros(2)])
        True
        >>> fingerprint_tensors(torch.zeros(2)) == fingerprint_tensors(torch.zeros(1, 2))
        False
    """
    result = hashlib.sha256()
    for tensor in _flat(tensors):
        _add(result, tensor)
    return result.hexdigest()[:16]


def _add(result: Any, tensor: Tensor) -> None:
    result.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    result.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _flat(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
        return
    for value in values.values() if isinstance(values, Mapping) else values:
        yield from _flat(value)

"""Zeroing a group's units and removing them give the same output, for every group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.prune.coupling.masked import masked_and_shrunk
from tests.prune.coupling.networks import NETWORKS


def build(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(0)
    make, x = NETWORKS[name]
    network = make().to(dtype).eval()  # type: ignore[operator]
    for buffer_name, buffer in network.named_buffers():
        if "running_var" in buffer_name:
            buffer.uniform_(0.5, 1.5)
        elif "running_mean" in buffer_name:
            buffer.uniform_(-1.0, 0.1)
    return network, (x.to(dtype) if x.is_floating_point() else x)


def each_unit(groups: Any) -> list[Any]:
    return [(f"{group.name} unit {unit}", [(group, [unit])]) for group in groups for unit in (0, group.width // 2)]


def a_third_of_all(groups: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    picks = [
        (group, torch.randperm(group.width, generator=generator)[: max(1, group.width // 3)].tolist())
        for group in groups
    ]
    return [("a third of all", picks)]


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_is_shrunk_unit_by_unit(name: str) -> None:
    network, x = build(name, torch.float64)
    results = masked_and_shrunk(network, (x,), each_unit)
    assert results
    for unit, masked, shrunk in results:
        assert torch.allclose(masked, shrunk, rtol=1e-9, atol=1e-9), f"{name}: {unit}"
    with torch.no_grad():
        whole = network(x)
    assert any(not torch.allclose(masked, whole, rtol=1e-6) for _, masked, _ in results)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NETWORKS)
def test_masked_is_shrunk_for_a_third_of_all_groups(name: str, dtype: torch.dtype, tolerance: float) -> None:
    network, x = build(name, dtype)
    ((_, masked, shrunk),) = masked_and_shrunk(network, (x,), a_third_of_all)
    assert torch.allclose(masked, shrunk, rtol=tolerance, atol=tolerance)

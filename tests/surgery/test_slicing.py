from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.errors import EditError
from compress.surgery.slicing import apply_slices, slice_tensor


@given(st.data())
def test_slicing_is_indexing(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    kept = {
        str(dim): data.draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True).map(sorted))
        for dim, size in enumerate(shape)
    }
    expected = tensor.numpy()
    for dim, indices in kept.items():
        expected = expected.take(indices, axis=int(dim))
    assert (slice_tensor(tensor, kept).numpy() == expected).all()


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 1, 1), (6, 4, 2, 3, 3)])
def test_the_order_in_memory_stays(shape: tuple[int, ...]) -> None:
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    tensor = torch.randn(shape).to(memory_format=last)
    sliced = slice_tensor(tensor, {"0": [0, 2, 5], "1": [1, 2, 3]})
    assert sliced.equal(tensor[[0, 2, 5]][:, [1, 2, 3]])
    assert sliced.stride() == torch.empty(sliced.shape, memory_format=last).stride()
    assert slice_tensor(tensor.contiguous(), {"0": [1]}).is_contiguous()
    assert slice_tensor(torch.tensor(2.0), {}).item() == 2.0


def test_parameters_gradients_buffers_and_attributes_shrink_together() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    network(torch.randn(2, 1, 5, 5)).sum().backward()
    gradient = network[0].weight.grad.clone()  # type: ignore[union-attr, operator]
    apply_slices(
        network,
        {
            "0.weight": {"0": [1, 3]},
            "0.bias": {"0": [1, 3]},
            "1.weight": {"0": [1, 3]},
            "1.bias": {"0": [1, 3]},
            "1.running_mean": {"0": [1, 3]},
            "1.running_var": {"0": [1, 3]},
        },
        {"0": {"out_channels": 2}, "1": {"num_features": 2}},
    )
    assert network(torch.randn(2, 1, 5, 5)).shape == (2, 2, 3, 3)
    assert network[0].out_channels == 2
    assert torch.equal(network[0].weight.grad, gradient[[1, 3]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"1.weight": {"0": [0]}}, "expected a tensor named '1.weight'"),
        ({"0.weight": {"0": [7]}}, "have index 7 in dimension 0"),
        ({"0.weight": {"2": [0]}}, "dimension 2"),
    ],
)
def test_a_foreign_edit_leaves_the_network_whole(slices: dict[str, dict[str, list[int]]], message: str) -> None:
    network = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(EditError, match=message):
        apply_slices(network, {"0.bias": {"0": [0]}, **slices}, {})
    assert network[0].bias.shape == (2,)


def test_tied_tensors_stay_tied() -> None:
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False))
    network[1].weight = network[0].weight
    apply_slices(network, {"0.weight": {"0": [0, 2]}}, {})
    assert network[1].weight is network[0].weight
    assert network[0].weight.shape == (2, 3)

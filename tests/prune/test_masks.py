from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.errors import EditError, RecipeError
from compress.models import LSTMClassifier, ResNet
from compress.prune.masks import global_masks, magnitude_mask, nm_mask, parse_pattern, sparse_weights
from compress.surgery import capture
from tests.prune.coupling.networks import TorchAttention


@given(ratio=st.floats(0, 1), size=st.integers(1, 60), seed=st.integers(0, 99))
def test_exactly_a_ratio_goes_and_it_is_the_smallest(ratio: float, size: int, seed: int) -> None:
    weight = torch.randint(-5, 6, (size,), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    mask = magnitude_mask(weight, ratio)
    assert int((~mask).sum()) == round(ratio * size)
    if mask.any() and not mask.all():
        assert weight[~mask].abs().max() <= weight[mask].abs().min()


def test_masks_only_grow_when_weights_are_held() -> None:
    weight = torch.randn(20, 30)
    first = magnitude_mask(weight, 0.4)
    assert not (magnitude_mask(weight * first + 0.0, 0.7) & ~first).any()


def test_a_global_ratio_takes_from_where_weights_are_small() -> None:
    masks = global_masks({"small": torch.rand(4, 5) * 0.1, "large": torch.rand(4, 5) + 1}, 0.5)
    assert not masks["small"].any()
    assert masks["large"].all()


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (6, 8, 3, 3)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8)])
def test_n_of_m_inputs_stay_and_they_are_the_largest(shape: tuple[int, ...], n: int, m: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = nm_mask(weight, n, m)
    for output in range(shape[0]):
        for place in range(weight[0, 0].numel()):
            row = weight[output].reshape(shape[1], -1)[:, place]
            kept = mask[output].reshape(shape[1], -1)[:, place]
            for first in range(0, shape[1], m):
                expected = row[first : first + m].abs().topk(n).indices + first
                assert kept[first : first + m].nonzero()[:, 0].add(first).tolist() == sorted(expected.tolist())


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(EditError, match=r"sparsify\.pattern: .* groups of 4, got shape \(2, 6\)"):
        nm_mask(torch.ones(2, 6), 2, 4)
    for pattern in ("2:2", "0:4", "24", "half"):
        with pytest.raises(RecipeError, match=r"sparsify\.pattern: expected 'unstructured' or N:M"):
            parse_pattern(pattern)


def test_first_and_last_layers_stay_dense_unless_others_are_named() -> None:
    network = ResNet(in_channels=3, width=4, blocks=(1, 1))
    convolutions = [name for name, p in network.named_parameters() if p.dim() == 4 and not name.startswith("stem")]
    assert sparse_weights(network) == convolutions
    assert sparse_weights(network, ["stages.0"]) == [
        "stem.0.weight",
        *(name for name in convolutions if name.startswith("stages.1")),
        "fc.weight",
    ]
    captured = capture(network, [torch.randn(2, 3, 8, 8)])
    assert set(sparse_weights(captured)) == set(convolutions)
    with pytest.raises(EditError, match=r"sparsify\.ignore: expected names of layers with weights, got 'stage'"):
        sparse_weights(network, ["stage"])


def test_other_layers() -> None:
    assert sparse_weights(TorchAttention(), []) == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    ]  # no embedding
    assert sparse_weights(LSTMClassifier(3, 2, hidden=4), []) == ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "fc.weight"]
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 2))
    assert sparse_weights(depthwise, []) == ["1.weight"]

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data.augment import flip_images, shift_images


@settings(max_examples=60, deadline=None)
@given(down=st.integers(-4, 4), right=st.integers(-4, 4))
def test_shift_moves_every_pixel_and_fills_the_border(down: int, right: int) -> None:
    x = torch.arange(2 * 2 * 5 * 6, dtype=torch.float32).reshape(2, 2, 5, 6)
    fill = torch.tensor([-1.0, -2.0])
    moved = shift_images(x, torch.tensor([[down, right], [0, 0]]), fill=fill)
    assert torch.equal(moved[1], x[1])
    for i in range(5):
        for j in range(6):
            inside = 0 <= i - down < 5 and 0 <= j - right < 6
            expected = x[0, :, i - down, j - right] if inside else fill
            assert torch.equal(moved[0, :, i, j], expected)


def test_flip_mirrors_only_the_chosen_and_is_its_own_inverse() -> None:
    x = torch.randn(3, 1, 4, 5)
    flipped = torch.tensor([True, False, True])
    once = flip_images(x, flipped)
    assert torch.equal(once[1], x[1])
    assert torch.equal(once[0, 0, :, 0], x[0, 0, :, -1])
    assert not torch.equal(once[2], x[2])
    assert torch.equal(flip_images(once, flipped), x)

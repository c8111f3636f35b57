from __future__ import annotations

import pytest
import torch

from compress.distill.lesson import pick, read_batch
from compress.errors import DataError, RecipeError


def test_every_form_of_a_batch() -> None:
    x, y, keys = torch.randn(4, 3), torch.arange(4), torch.zeros(4, 2, dtype=torch.int64)
    assert read_batch(x).targets is None
    assert read_batch([x, y]).targets is y
    assert read_batch((x, y, keys)).keys is keys
    assert read_batch(((x, x), y)).inputs == (x, x)
    given = read_batch({"input_ids": x, "attention_mask": torch.tensor([[1, 0, 0]] * 4), "labels": y, "keys": keys})
    assert set(given.named) == {"input_ids", "attention_mask"}
    assert given.mask is not None
    assert given.mask.dtype == torch.bool
    assert given.size == 4


def test_two_domains_become_one_batch() -> None:
    x, y = torch.randn(4, 3), torch.arange(4)
    given = read_batch({"source": (x, y), "target": (x[:2],)})
    assert given.size == 6
    assert given.source is not None
    assert given.source.tolist() == [True] * 4 + [False] * 2
    assert given.targets.tolist() == [0, 1, 2, 3, -100, -100]


def test_what_is_no_batch() -> None:
    with pytest.raises(DataError, match="batch: expected a tensor, a mapping"):
        read_batch("text")
    with pytest.raises(RecipeError, match="output: expected one of a, b, got 'c'"):
        pick({"a": torch.ones(1), "b": torch.ones(1)}, "c")
    with pytest.raises(RecipeError, match="outputs: expected a tensor"):
        pick(3.0)

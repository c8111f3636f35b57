from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from compress.surgery.editor import example_inputs


@pytest.mark.parametrize("num", [1, 2, 5])
def test_examples_are_two_samples_each(num: int) -> None:
    module = pl.LightningModule()
    (x,) = example_inputs(module, (torch.arange(3.0 * num).view(num, 3), torch.zeros(num)))
    assert x.shape == (2, 3)
    assert x[0].tolist() == [0.0, 1.0, 2.0]

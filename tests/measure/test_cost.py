from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.measure.cost import macs, num_bytes, num_params, widths
from tests.networks import Residual


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_macs_agree_with_hand_counts() -> None:
    image, sequence = torch.randn(1, 4, 8, 8), torch.randn(1, 10, 8)
    assert macs(nn.Conv2d(4, 6, 3), [image]) == 6 * 6 * 6 * 4 * 9
    assert macs(nn.Conv2d(4, 4, 3, groups=4), [image]) == 6 * 6 * 4 * 9
    assert macs(nn.Linear(8, 3), [sequence]) == 10 * 8 * 3


def test_macs_see_what_pytorch_fuses() -> None:
    sequence = torch.randn(1, 10, 8)
    assert macs(nn.LSTM(8, 16, batch_first=True), [sequence]) == 10 * 4 * 16 * (8 + 16)
    assert macs(Attention(), [torch.randn(1, 2, 10, 4)]) == 2 * 2 * 10 * 10 * 4
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    projections, attention, feed_forward = 10 * 8 * 24 + 10 * 8 * 8, 2 * 10 * 10 * 8, 2 * 10 * 8 * 16
    assert macs(layer, [sequence]) == projections + attention + feed_forward


def test_macs_grow_with_the_batch() -> None:
    network = Residual()
    assert macs(network, [torch.randn(3, 1, 8, 8)]) == 3 * macs(network, [torch.randn(1, 1, 8, 8)]) > 0


def test_macs_leave_each_module_as_it_was() -> None:
    network = Residual().train()
    network.norm.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    macs(network, [torch.randn(1, 1, 8, 8)])
    assert [name for name, module in network.named_modules() if not module.training] == ["norm"]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == fast


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(5, 5)
    assert num_params(nn.Sequential(layer, nn.ReLU(), layer)) == 30


def test_bytes_are_those_on_disk(tmp_path: Path) -> None:
    network = Residual()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    on_disk = (tmp_path / "weights.pt").stat().st_size
    assert abs(num_bytes(network) - on_disk) < 1000  # the archive holds the file's own name
    assert num_bytes(network.half()) < on_disk


def test_widths_are_outputs() -> None:
    assert widths(Residual(8)) == {"stem": 8, "conv1": 16, "conv2": 8, "fc": 3}
    layers = nn.ModuleDict(
        {
            "up": nn.ConvTranspose2d(6, 4, 2, groups=2),
            "conv1d": nn.Conv1d(3, 7, 2),
            "words": nn.Embedding(100, 5),
            "norm": nn.LayerNorm(9),
        }
    )
    assert widths(layers) == {"up": 4, "conv1d": 7}

from __future__ import annotations

import torch

from compress.prune import apply_removal, describe_removal, score_groups, study
from compress.prune.planner import least
from compress.quantize import calibrate, convert, coverage, prepare
from tests.networks import Residual, images


def test_odd_widths_quantise() -> None:
    """Every group loses one unit, so that no width is a multiple of two any more."""
    torch.manual_seed(0)
    network, (x, _) = Residual().eval(), images(32)
    anatomy = study(network, (x[:2],))
    scores = score_groups(anatomy, "l2")
    data = describe_removal(anatomy, least(scores, {name: width - 1 for name, width in anatomy.widths.items()}))
    assert data is not None
    pruned = apply_removal(network, data).eval()
    widths = {module.out_channels for module in pruned.modules() if isinstance(module, torch.nn.Conv2d)}
    assert all(width % 2 for width in widths)
    prepared = prepare(pruned, [x[:2]], "int8")
    calibrate(prepared, [(x,)], ranges="minmax")
    assert coverage(prepared, [x]).share == 1.0
    with torch.no_grad():
        expected, fake, integer = pruned(x), prepared(x), convert(prepared)(x)
    assert float((fake - expected).norm() / expected.norm()) < 0.1
    assert float((integer - fake).norm() / fake.norm()) < 0.01

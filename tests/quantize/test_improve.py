from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from compress.distill import Classification, Distiller
from compress.errors import DataError, RecipeError
from compress.quantize import (
    QuantizationAwareTraining,
    calibrate,
    improve_network,
    improve_prepared,
    prepare,
    rehearse_improvements,
    replay_quantize,
)
from compress.quantize.improve import IMPROVEMENTS, in_order
from compress.surgery import history_of
from tests.networks import Residual, images, loader, trainer


def test_in_a_fit_and_back_from_its_weights() -> None:
    pl.seed_everything(0)
    module = Distiller(
        Residual(), task=Classification(3), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
    )
    callback = QuantizationAwareTraining(start=1, num_batches=3, improve=["bias", "adaround", "equalize"])
    assert callback.improve == ("equalize", "adaround", "bias")
    before: dict[str, torch.Tensor] = {}

    class Last(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            before.update(copy.deepcopy(pl_module.student.state_dict()))  # type: ignore[union-attr, operator]

    trainer(max_epochs=3, callbacks=[Last(), callback]).fit(module, loader())
    after = module.student.state_dict()
    moved = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert {"conv1.weight", "conv2.weight", "norm1.weight", "norm1.bias", "norm2.bias", "fc.bias"} <= moved
    (edit,) = history_of(module)
    x, _ = images(48, seed=1)
    trained = Residual().eval()
    trained.load_state_dict(before)
    again = replay_quantize(Residual(), edit)
    again.load_state_dict(after)
    with torch.no_grad():
        fake, integer, exact = module.eval()(x), callback.converted(x), trained(x)
        assert torch.equal(again.eval()(x), fake)
    assert float((fake - integer).norm() / fake.norm()) < 2e-3
    assert float((exact - integer).norm() / exact.norm()) < 0.03


def test_the_order_is_fixed_and_a_name_unknown_is_named() -> None:
    assert in_order(IMPROVEMENTS[::-1]) == IMPROVEMENTS
    assert in_order(["bias", "bias"]) == ("bias",)
    with pytest.raises(
        RecipeError, match=r"quantize\.improve: expected some of equalize, smooth, adaround, bias, got 'b"
    ):
        in_order(["bias", "bais"])


def test_each_works_where_it_belongs() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(32, 4)
    assert improve_network(network, [(x[:1],), (x,)], IMPROVEMENTS) == {"equalize": 1, "smooth": 1}
    prepared = prepare(network, [x[:2]], "int8")
    calibrate(prepared, [(x,)])
    improved = improve_prepared(prepared, [(x,)], ["equalize", "bias"])
    assert improved == {"bias": 2}
    assert improve_network(network, [], ["bias"]) == {}
    with pytest.raises(DataError, match="expected at least one batch, got none"):
        improve_network(network, [], ["smooth"])


def test_what_has_nothing_to_work_on_is_refused_beforehand() -> None:
    network, x = Residual(), images(2)[0]
    rehearse_improvements(network, [x[:1]], ["equalize", "bias", "adaround"])
    with pytest.raises(RecipeError, match="expected norms whose outputs linears alone read for 'smooth', got none"):
        rehearse_improvements(network, [x], ["smooth"])
    with pytest.raises(RecipeError, match="expected layers in a row with ReLU between for 'equalize', got none"):
        rehearse_improvements(nn.Linear(3, 3), [torch.randn(2, 3)], ["equalize"])


class Drawn:
    """Batches in another order each time."""

    def __init__(self, batches: list[tuple[torch.Tensor, ...]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        self.batches = self.batches[1:] + self.batches[:1]
        return iter(self.batches)


def test_batches_may_come_in_another_order_each_time() -> None:
    x, _ = images(48)
    batches = [(part,) for part in x.split(12)]
    torch.manual_seed(0)
    network = Residual().eval()

    def improved(data: Any, names: list[str]) -> torch.Tensor:
        twin = copy.deepcopy(network)
        improve_network(twin, data, names)
        prepared = prepare(twin, [x[:2]], "w3a8")
        calibrate(prepared, batches)
        improve_prepared(prepared, data, names)
        with torch.no_grad():
            return prepared.eval()(x)

    for names in (["bias"], ["equalize"]):
        wanted = improved(batches[1:] + batches[:1], names)
        assert torch.equal(improved(Drawn(list(batches)), names), wanted)


@pytest.mark.parametrize("settings", [{"keep": ["classifier"]}, {"improve": ["smooth"]}])
def test_in_a_fit_what_its_end_would_refuse_is_refused_at_the_first_batch(settings: dict[str, Any]) -> None:
    module = Distiller(Residual(), task=Classification(3), optimizer=torch.optim.SGD)
    fit = trainer(max_epochs=1, callbacks=[QuantizationAwareTraining(start=1, **settings)])
    with pytest.raises(RecipeError, match=f"quantize\\.{next(iter(settings))}: expected"):
        fit.fit(module, loader())
    assert fit.global_step == 0

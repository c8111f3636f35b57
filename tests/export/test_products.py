from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from compress.export.products import Product, int8_macs, products
from compress.measure.cost import macs
from compress.surgery.capture import export_program
from compress.surgery.lengths import Length
from tests.export.networks import KINDS, network


@pytest.mark.parametrize("kind", KINDS)
def test_products_cost_what_the_profiler_counts(kind: str) -> None:
    made = network(kind)
    found = products(made.program)
    assert sum(product.macs for product in found) == macs(made.reference, [made.inputs[:1]])
    assert not any(product.quantized for product in found)


@pytest.mark.parametrize(("kind", "length"), [("transformer", 6), ("lstm", 9)])
def test_where_lengths_vary_a_sample_is_as_long_as_the_example(kind: str, length: int) -> None:
    made = network(kind)
    fixed = products(made.program)
    for size in (length, 2 * length):
        x = made.inputs[:2].repeat(1, size // length, 1)
        found = products(export_program(made.reference, [x], lengths=[Length(1, 2, 24)]))
        assert [product.name for product in found] == [product.name for product in fixed]
        assert sum(product.macs for product in found) == macs(made.reference, [x[:1]])


def test_a_converted_network_says_which_of_them_are_quantised() -> None:
    found = products(network("cnn").integers)
    assert [product.quantized for product in found] == [True] * 4
    assert [product.macs for product in found] == [8 * 64 * 27, 8 * 64 * 9, 12 * 16 * 8, 12 * 4]


def test_weights_alone_are_not_enough() -> None:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.transpose(1, 2)

    (product,) = products(export_program(Mixed(), [torch.randn(2, 3, 5)]))
    assert (product.macs, product.quantized) == (45, False)


class Odd(nn.Module):
    """A product that is written in another way than layers are."""

    def __init__(self, run: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.run, self.weight, self.vector = run, nn.Parameter(torch.randn(4, 7)), nn.Parameter(torch.randn(16))
        self.bilinear = nn.Bilinear(4, 3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda own, x: torch.einsum("bcl,cd->bld", x, own.weight), 16 * 4 * 7),
        (lambda own, x: torch.einsum("bcl,cd,ed->bel", x, own.weight, own.weight), 2 * 16 * 4 * 7),
        (lambda own, x: torch.einsum("bcl,bcm->blm", x, x), 16 * 16 * 4),
        (lambda own, x: torch.tensordot(x, own.weight, dims=([1], [0])), 16 * 4 * 7),
        (lambda own, x: torch.inner(x[:, :, 0], own.weight.t()), 4 * 7),
        (lambda own, x: torch.baddbmm(x[:, :, :4], x, x.transpose(1, 2)), 4 * 4 * 16),
        (lambda own, x: own.bilinear(x[:, :, 0], x[:, :3, 1]), 5 * 4 * 3),
        (lambda own, x: x @ own.vector, 4 * 16),
        (lambda own, x: torch.addmv(x[0, :, 0], own.weight, x[0, 0, :7]), 4 * 7),
    ],
)
def test_products_count_however_they_are_written(run: Callable[..., torch.Tensor], expected: int) -> None:
    made, x = Odd(run).eval(), torch.randn(3, 4, 16)
    (product,) = products(export_program(made, [x]))
    assert product.macs == macs(made, [x[:1]]) == expected
    assert not product.quantized


@pytest.mark.parametrize(
    ("int8_kernels", "float_kernels", "expected"),
    [
        (3, 1, 111),  # as the program says
        (2, 1, 111),  # two merged into one
        (3, 4, 111),  # attention taken apart
        (2, 2, 11),  # one fell back: the largest may be the one
        (1, 3, 1),
        (0, 4, 0),
        (0, 0, 0),
    ],
)
def test_what_an_engine_is_certain_to_do_in_integers(int8_kernels: int, float_kernels: int, expected: int) -> None:
    found = [Product("a", 10, True), Product("b", 100, True), Product("c", 1, True), Product("d", 5, False)]
    assert int8_macs(found, int8_kernels=int8_kernels, float_kernels=float_kernels) == expected

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import CaptureError, DataError
from compress.models import LSTMClassifier
from compress.surgery.capture import capture, export_program
from compress.surgery.lengths import Length, dynamic_shapes, lengths_of, read_lengths, write_lengths


class Weighted(nn.Module):
    """Several inputs with the same length."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x * weight[..., None]).sum(1)


class Placed(nn.Module):
    """Learned positions end at eight."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.position[: x.shape[1]]).sum(1)


class Written(nn.Module):
    """The length is written into the code."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 5, 3).sum(1)


def test_a_captured_program_takes_other_lengths_and_says_which() -> None:
    network = LSTMClassifier(3, 5, 8, 1).eval()
    length = Length(1, 2, 40)
    program = export_program(network, [torch.randn(2, 9, 3)], lengths=[length])
    assert lengths_of(program) == (Length(1, 2, 40, (0,)),)
    for num, size in ((1, 2), (3, 40), (2, 9)):
        x = torch.randn(num, size, 3)
        torch.testing.assert_close(program.module()(x), network(x))
    captured = capture(network, [torch.randn(2, 9, 3)], lengths=[length])
    x = torch.randn(4, 17, 3)
    torch.testing.assert_close(captured(x), network(x))
    again = export_program(captured, [torch.randn(2, 9, 3)], lengths=[length])
    assert lengths_of(again) == lengths_of(program)


def test_without_lengths_there_are_none() -> None:
    assert lengths_of(export_program(Weighted(), [torch.randn(2, 5, 3), torch.randn(2, 5)])) == ()


def test_inputs_share_a_length() -> None:
    inputs = [torch.randn(2, 5, 3), torch.randn(2, 5)]
    program = export_program(Weighted(), inputs, lengths=[Length(1, 1, 9)])
    assert lengths_of(program) == (Length(1, 1, 9, (0, 1)),)
    x, weight = torch.randn(2, 9, 3), torch.randn(2, 9)
    torch.testing.assert_close(program.module()(x, weight), Weighted()(x, weight))
    first, second = dynamic_shapes(inputs, [Length(1)])
    assert first[1] is second[1]
    assert [set(sizes) for sizes in dynamic_shapes(inputs, [Length(2)])] == [{0, 2}, {0}]


@pytest.mark.parametrize(
    ("network", "length", "message"),
    [
        (Written(), Length(1, 2, 9), r"dimension 1 from 2 to 9, got Written: .*(constant|specialized)"),
        (Placed(), Length(1, 2, 9), r"dimension 1 from 2 to 9, got Placed: .*8"),
        (Placed(), Length(1, 6, 9), r"expected an example of a size between 6 and 9, got input 0 of shape \(2, 5, 3\)"),
        (Placed(), Length(1, 1, 4), "between 2 and 4, got input 0"),
        (Placed(), Length(3), r"expected inputs that have it, got \[\] of 1"),
        (Placed(), Length(1, inputs=[2]), r"got \[2\] of 1"),
    ],
)
def test_what_cannot_vary_is_an_error_with_its_reason(network: nn.Module, length: Length, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        export_program(network, [torch.randn(2, 5, 3)], lengths=[length])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension": 0}, "The batch is dynamic anyway"),
        ({"smallest": 0}, "got 0 to None"),
        ({"smallest": 4, "largest": 4}, "got 4 to 4"),
    ],
)
def test_wrong_ranges_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        Length(**arguments)


class Mean(nn.Module):
    """A size that is read becomes a number in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) / x.shape[1]


@pytest.mark.parametrize("shape", [(4, 12, 3), (4, 3, 3), (4, 6), (4, 6, 3, 1)])
def test_sizes_that_a_graph_was_not_captured_for_are_refused(shape: tuple[int, ...]) -> None:
    captured = capture(Mean(), [torch.randn(2, 6, 3)])
    for graph in (captured, copy.deepcopy(captured), capture(captured, [torch.randn(2, 6, 3)])):
        x = torch.randn(5, 6, 3)
        torch.testing.assert_close(graph(x), Mean()(x))
        message = r"expected inputs of shapes \(any, 6, 3\), got " + re.escape(str(shape)) + r"\. .* lengths"
        with pytest.raises(DataError, match=message):
            graph(torch.randn(shape))
        with pytest.raises(DataError, match=message):
            graph.forward_with_features([], torch.randn(shape))


def test_lengths_survive_a_checkpoint() -> None:
    given = (Length(1, 2, 9), Length(2, inputs=(0, 1)))
    read = read_lengths(json.loads(json.dumps(write_lengths(given))))
    assert [dynamic_shapes([torch.ones(2, 3, 4)] * 2, read)[1].keys()] == [{0, 1, 2}]
    assert read == given == (given[0], Length(2, inputs=[0, 1]))


@pytest.mark.parametrize(
    ("other", "held"),
    [
        (Length(1, 2, 9), True),
        (Length(1, 3, 8), True),
        (Length(1, 1, 9), False),
        (Length(1, 2, 10), False),
        (Length(1, 2), False),
        (Length(2, 2, 9), False),
        (Length(1, 2, 9, [0]), False),
    ],
)
def test_a_length_holds_the_sizes_within_it(other: Length, held: bool) -> None:
    assert Length(1, 2, 9).holds(other) == held
    assert Length(other.dimension, inputs=other.inputs).holds(other)

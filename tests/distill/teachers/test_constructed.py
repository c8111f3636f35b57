from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.distill import Constructed, FeatureTaps, find_layers
from compress.errors import MissingPackageError, RecipeError

HERE = "tests.distill.teachers.test_constructed"


class Answer:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Library(nn.Module):
    """As a network of another library: a root with its own parameter and buffer, and an answer that is an object."""

    scale: Tensor

    def __init__(self, width: int = 4, *, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.Dropout(0.5))
        self.head = nn.Linear(width, classes)
        self.bias = nn.Parameter(torch.randn(classes))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.head(self.body(x)) * self.scale + self.bias)


def build(width: int, **arguments: int) -> Library:
    return Library(width, **arguments)


def test_it_is_the_network_in_all_but_name() -> None:
    made = Constructed(f"{HERE}.build", {"*": [6], "classes": 5}, output="logits")
    plain = Library(6, classes=5)
    assert list(made.state_dict()) == list(plain.state_dict())
    made.load_state_dict(plain.state_dict())
    x = torch.randn(3, 2)
    assert torch.equal(made.eval()(x), plain.eval()(x).logits)
    assert find_layers(made, "body.0") == ["body.0"]
    assert FeatureTaps(["body.0"])(made, x).features["body.0"].shape == (3, 6)


def test_modes_copies_and_moves_reach_the_network() -> None:
    made = Constructed(f"{HERE}.Library", output="logits")
    x = torch.randn(64, 2)
    assert not torch.equal(made.train()(x), made(x))
    assert torch.equal(made.eval()(x), made(x))
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), made(x))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        for buffer in twin.buffers():
            buffer.zero_()
    assert float(twin(x).abs().max()) == 0.0
    assert float(made(x).abs().max()) > 0.0
    assert made.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("constructor", "arguments", "error"),
    [
        ("torch.nn.Linea", {}, "expected a dotted name such as timm.create_model, got 'torch.nn.Linea'"),
        ("nothing_here.make", {}, "expected a function of an installed package, got 'nothing_here.make'"),
        ("torch.nn.Linear", {"width": 3}, "expected arguments of torch.nn.Linear, got TypeError"),
        ("torch.zeros", {"size": [2]}, "expected a function that returns a network, got Tensor"),
    ],
)
def test_mistakes_are_named(constructor: str, arguments: dict, error: str) -> None:
    with pytest.raises(RecipeError, match=error):
        Constructed(constructor, arguments)


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'compress\[zoo\]'"):
        Constructed("timm.create_model", {"model_name": "resnet18"})

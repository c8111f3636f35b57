from __future__ import annotations

import copy
import pickle
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import compress.distill
from compress.distill import Classification, Distiller, FeatureTaps, SoftTarget, find_layers
from compress.errors import MissingPackageError, RecipeError
from compress.measure.cost import macs, num_params, widths
from compress.measure.memory import peak_memory_of
from compress.models import Constructed
from compress.pipeline.rundir import HANDLERS
from compress.prune import StructuredPruning
from compress.quantize import QuantizationAwareTraining
from compress.surgery import Captured, capture, history_of, load_snapshot, save_snapshot
from tests.models.library import Library
from tests.networks import Residual, images, loader, trainer

HERE = "tests.models.test_constructed"
LIBRARY = "tests.models.library"


def test_it_is_the_network_in_all_but_name() -> None:
    made = Constructed(f"{LIBRARY}.build", {"*": [6], "classes": 5}, output="logits")
    plain = Library(6, classes=5)
    assert list(made.state_dict()) == list(plain.state_dict())
    made.load_state_dict(plain.state_dict())
    x = torch.randn(3, 2)
    assert torch.equal(made.eval()(x), plain.eval()(x).logits)
    assert find_layers(made, "body.0") == ["body.0"]
    assert FeatureTaps(["body.0"])(made, x).features["body.0"].shape == (3, 6)


def test_modes_copies_and_moves_reach_the_network() -> None:
    made = Constructed(f"{LIBRARY}.Library", output="logits")
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


def test_a_mode_that_is_assigned_reaches_the_root_of_the_network() -> None:
    made = Constructed(f"{HERE}.Moody")
    for module in made.modules():
        module.training = False  # what Lightning does after validation, the other way round
    assert torch.equal(made(torch.ones(2, 3)), torch.ones(2, 3))


class Moody(nn.Module):
    """A root whose own code asks for the mode, and whose attributes and layer are named as anyone's could be."""

    def __init__(self) -> None:
        super().__init__()
        self.constructor, self.arguments = "mine", 3
        self.output = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(x + 1 if self.training else x)


def test_names_and_attributes_of_the_network_are_its_own() -> None:
    made: Any = Constructed(f"{HERE}.Moody")
    assert isinstance(made, Moody)
    assert isinstance(made, Constructed)
    assert (made.constructor, made.arguments, type(made.output)) == ("mine", 3, nn.Identity)


def test_the_name_that_older_recipes_use_still_means_it() -> None:
    assert compress.distill.Constructed is Constructed


def test_copies_and_other_processes_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Constructed(f"{LIBRARY}.Library", output="logits").eval()
    x = torch.randn(3, 2)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(twin) is type(made)
        assert torch.equal(twin(x), made(x))
        assert [id(p) for p in twin.parameters()] != [id(p) for p in made.parameters()]
        twin.get_submodule("head").weight = nn.Parameter(torch.zeros(3, 4))  # what an edit does
        assert not torch.equal(twin(x), made(x))
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent))
    memory = peak_memory_of(made, [x])
    assert memory is not None
    assert memory >= 0


def test_a_class_made_in_a_function_can_be_copied() -> None:
    made = Constructed(f"{HERE}.local")
    assert torch.equal(copy.deepcopy(made)(torch.ones(2, 2)), made(torch.ones(2, 2)))


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Linear(2, 2))


def scripted() -> nn.Module:
    return torch.jit.script(nn.Linear(2, 2))


def local() -> nn.Module:
    class Local(nn.Linear):
        pass

    return Local(2, 2)


def test_it_is_captured_and_measured_as_the_network() -> None:
    torch.manual_seed(0)
    plain = Residual()
    torch.manual_seed(0)
    made = Constructed("tests.networks.Residual")
    x, _ = images(5)
    captured = capture(made, [x[:2]]).eval()
    assert set(dict(captured.named_parameters())) == set(dict(plain.named_parameters()))
    assert torch.equal(captured(x), plain.eval()(x))
    measured = [(macs(net, [x]), num_params(net), widths(net)) for net in (made, plain)]
    assert measured[0] == measured[1]
    assert FeatureTaps(["conv1"])(captured, x).features["conv1"].shape == (5, 32, 8, 8)


def fit(student: nn.Module, **initial: Tensor) -> Distiller:
    pl.seed_everything(1, verbose=False)
    student.load_state_dict(initial)
    module = Distiller(
        student,
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        teacher=Constructed("tests.networks.Residual", {"width": 8}),
        losses=[SoftTarget(weight=0.5)],
    )
    editors = [StructuredPruning(0.5, start=0.2, end=0.4, num_edits=2, round_to=2), QuantizationAwareTraining()]
    trainer(max_epochs=6, callbacks=editors).fit(module, loader(shuffle=False))
    return module


@pytest.mark.parametrize(
    ("network", "form"), [("tests.networks.Residual", "module"), ("tests.prune.test_graph_form.Written", "graph")]
)
def test_a_student_is_taught_pruned_and_quantised_as_the_network_itself(
    network: str, form: str, tmp_path: Path
) -> None:
    made = Constructed(network)
    plain = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    module = fit(made, **plain)
    itself = fit(locate(network)(), **plain)  # type: ignore[operator]
    assert list(history_of(module)) == list(history_of(itself))
    assert form in [edit.data.get("form") for edit in history_of(module)]
    for name, tensor in itself.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    save_snapshot(tmp_path / "final.pt", module.student, history_of(module))  # type: ignore[arg-type]
    again, _ = load_snapshot(tmp_path / "final.pt", Constructed(network), HANDLERS)
    assert isinstance(again, Captured)
    x, _ = images(7)
    assert torch.equal(again.eval()(x), module.student.eval()(x))  # type: ignore[operator, union-attr]


def in_evaluation() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3)).eval()


def test_a_network_that_is_made_in_evaluation_can_be_trained() -> None:
    network = Constructed(f"{__name__}.in_evaluation")
    assert all(module.training for module in network.modules())


def test_arguments_that_describe_calls_are_made_first() -> None:
    made: Any = Constructed(
        f"{LIBRARY}.build", {"width": {"constructor": "builtins.max", "arguments": {"*": [[3, 6]]}}, "classes": 2}
    )
    assert made.body[0].weight.shape == (6, 2)
    with pytest.raises(RecipeError, match=r"expected arguments of torch.device, got RuntimeError"):
        Constructed(f"{LIBRARY}.build", {"width": {"constructor": "torch.device", "arguments": {"*": ["nowhere"]}}})


def test_layers_are_replaced_by_name() -> None:
    made: Any = Constructed(
        f"{LIBRARY}.Library",
        output="logits",
        replace={
            "body.0": {"constructor": "torch.nn.Linear", "arguments": {"in_features": 5, "out_features": 4}},
            "body.1": {"constructor": "torch.nn.Identity"},
        },
    )
    assert made(torch.ones(2, 5)).shape == (2, 3)
    assert torch.equal(made(torch.ones(2, 5)), made(torch.ones(2, 5)))  # no dropout
    with pytest.raises(RecipeError, match=r"names of layers of Library, got 'stem'. They are: body, body.0, body.1"):
        Constructed(f"{LIBRARY}.Library", replace={"stem": {"constructor": "torch.nn.Identity"}})
    with pytest.raises(RecipeError, match=r"expected a layer as .* for head, got 'torch.nn.Identity'"):
        Constructed(f"{LIBRARY}.Library", replace={"head": "torch.nn.Identity"})


@pytest.mark.parametrize(
    ("constructor", "arguments", "error"),
    [
        ("torch.nn.Linea", {}, "expected a dotted name such as timm.create_model, got 'torch.nn.Linea'"),
        ("nothing_here.make", {}, "expected a function of an installed package, got 'nothing_here.make'"),
        ("torch.nn.Linear", {"width": 3}, "expected arguments of torch.nn.Linear, got TypeError"),
        ("torch.zeros", {"size": [2]}, "expected a function that returns a network, got Tensor"),
        (f"{HERE}.traced", {}, "expected a function that returns a network of Python code, got a traced or"),
        (f"{HERE}.scripted", {}, "network of Python code, got a traced or scripted one .* use ProgramTeacher"),
    ],
)
def test_mistakes_are_named(constructor: str, arguments: dict, error: str) -> None:
    with pytest.raises(RecipeError, match=error):
        Constructed(constructor, arguments)


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackageError, match=r"pip install -e '\.\[zoo\]'"):
        Constructed("timm.create_model", {"model_name": "resnet18"})

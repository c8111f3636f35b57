"""Embeddings: rows by hand, training, conversion, sizes, engines."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import RecipeError
from compress.export import Gates, export_artifact
from compress.export.graph import has_narrow_weights
from compress.export.onnx.graph import mark_narrow
from compress.export.onnx.translate import translate
from compress.quantize import calibrate, convert, prepare
from compress.quantize.calibrate import float_mode
from compress.quantize.corrections.lockstep import float_twin
from compress.quantize.graph.embeddings import round_vectors
from compress.quantize.layers import Assignment, make_assignment, read_assignment, write_assignment
from compress.runtime.manifest import read_manifest
from compress.surgery import Captured
from compress.surgery.capture import export_program
from tests.export.programs import HERE

VOCABULARY = 300
ENGINES = [name for name in ("eager", "aoti", "onnxruntime", "openvino", "executorch") if name in HERE]


class Reader(nn.Module):
    """Looks words and their places up, and a second time words alone, from the table of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, 16, padding_idx=0), nn.Embedding(8, 16)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        mixed = torch.relu(self.mix(self.words(x) + places)) + self.words(x.flip(1))
        return self.head(mixed.mean(1))


def network() -> Reader:
    torch.manual_seed(0)
    return Reader().eval()


def words(num: int = 64) -> Tensor:
    return torch.randint(0, VOCABULARY, (num, 8), generator=torch.Generator().manual_seed(1))


def prepared(net: nn.Module, scheme: str | Assignment) -> Captured:
    made = prepare(net, (words()[:2],), scheme)
    calibrate(made, [(words(),)])
    return made.eval()


def kinds(module: nn.Module) -> dict[str, torch.dtype]:
    """Types of the tables that a converted network holds."""
    return {name: value.dtype for name, value in module.state_dict().items() if "words" in name and "steps" not in name}


def test_rows_by_hand() -> None:
    x = torch.tensor([[1.0, -0.3, 0.12], [0.0, 0.0, 0.0], [50.0, 50.0, 0.25]], requires_grad=True)
    rounded = round_vectors(x, 3)  # steps of a third, anything, and 16 2/3
    assert torch.allclose(rounded, torch.tensor([[1.0, -1 / 3, 0.0], [0.0, 0.0, 0.0], [50.0, 50.0, 0.0]]))
    rounded.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("scheme", ["int8", "int8_portable", "int8_weights", "int8_dynamic", "w4a8", "int4_weights"])
def test_tables_are_stored_in_8_bits(scheme: str) -> None:
    fake = prepared(network(), scheme)
    converted = convert(fake)
    assert kinds(converted) == {"words_weight_integers_127": torch.int8}  # once, although looked up twice
    with torch.no_grad():
        assert torch.equal(converted(words()), fake(words()))


def test_integers_are_those_of_the_table_row_by_row() -> None:
    net = network()
    table = net.words.weight.detach()
    converted = convert(prepared(net, "int8"))
    step = table.abs().amax(1, keepdim=True) / 127
    step[0] = torch.finfo(torch.float32).tiny  # the padding's row is zero
    stored = dict(converted.graph_module.named_buffers())
    assert torch.equal(stored["words_weight_integers_127"], (table / step).round().to(torch.int8))
    assert torch.equal(stored["words_weight_steps_127"], step)


def test_training_sees_rounded_rows_and_moves_the_table() -> None:
    net = network()
    before = copy.deepcopy(net.words.weight.detach())
    fake = prepare(net, (words()[:2],), make_assignment("int8", layers={"words": "w2a8"})).train()
    twin = network()
    with torch.no_grad(), float_mode(fake):
        for table, largest in ((twin.words.weight, 1), (twin.places.weight, 127)):
            table.copy_(round_vectors(table, largest))
        torch.testing.assert_close(fake(words()), twin(words()))
    optimizer = torch.optim.SGD(fake.parameters(), lr=1.0)
    fake(words()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net.words.weight, before)
    assert torch.equal(net.words.weight[0], before[0])  # the padding's


def test_layers_are_named_and_kept_like_others() -> None:
    assert kinds(convert(prepared(network(), make_assignment("int8", keep=["words"])))) == {"words.weight": torch.float}
    few = convert(prepared(network(), make_assignment("int8", layers={"words": "w3a8"})))
    assert kinds(few) == {"words_weight_integers_3": torch.int8}
    assert kinds(convert(prepared(network(), make_assignment("fp8")))) == {"words.weight": torch.float}
    with pytest.raises(RecipeError, match=r"a product or a table, got 'word'.*: mix, head, places, words"):
        prepared(network(), make_assignment("int8", keep=["word"]))


def test_patterns_for_few_bits_reach_tables_alone_when_they_name_them() -> None:
    schemes = make_assignment("int8", layers={"*": "w2a8", "place*": "w3a8"}).resolve(["mix"], ["words", "places"])
    assert {name: scheme.weight_bits for name, scheme in schemes.items()} == {"mix": 2, "words": 8, "places": 3}
    wide = make_assignment("w4a8", layers={"*": "int8"}).resolve(["mix"], ["words"])
    assert {scheme.name for scheme in wide.values()} == {"int8"}


def test_runs_of_before_go_on_without() -> None:
    data = write_assignment(make_assignment("int8"))
    assert read_assignment(data).embeddings
    for old in ({key: value for key, value in data.items() if key != "embeddings"}, {"scheme": "int8"}):
        assert kinds(convert(prepared(network(), read_assignment(old)))) == {"words.weight": torch.float}


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"_weight": torch.arange(900).reshape(300, 3), "_freeze": True}]
)
def test_what_changes_as_it_is_looked_up_and_integers_stay(options: dict[str, Any]) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, 3, **options)
            self.head = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words(x).float().mean(1))

    made = prepared(Other().eval(), "int8")
    assert round_vectors not in {node.target for node in made.graph_module.graph.nodes}


def test_halves_and_tables_of_one_name() -> None:
    rows = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    step = rows.abs().amax(-1, keepdim=True) / 127
    assert ((rows / step).round() > 127).any()  # what would not be an int8
    assert (round_vectors(rows, 127) / step).abs().max() <= 127.5

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Embedding(VOCABULARY, 4)})
            self.a_b = nn.Embedding(VOCABULARY, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.a["b"](x) + self.a_b(x)).mean(1))

    torch.manual_seed(0)
    fake = prepared(Two().eval(), "int8")
    with torch.no_grad():
        assert torch.equal(convert(fake)(words()), fake(words()))


def test_corrections_compare_with_the_table_in_floats() -> None:
    net = network()
    fake = prepared(net, make_assignment("int8", layers={"words": "w2a8"}))
    with torch.no_grad():
        torch.testing.assert_close(float_twin(fake)(words()), net(words()))


def test_tables_are_no_weights_that_could_overflow() -> None:
    fake = prepared(network(), make_assignment("int8_reduced", layers={"words": "int8"}))
    program = export_program(convert(fake), (words()[:2],))
    assert has_narrow_weights(program)
    assert mark_narrow(translate(program, target="onnxruntime"))
    assert not has_narrow_weights(export_program(convert(prepared(network(), "int8")), (words()[:2],)))


def test_the_first_layer_is_not_an_embedding() -> None:
    schemes = make_assignment("w4a8").resolve(["mix", "middle", "head"], ["words"])
    assert {name: scheme.name for name, scheme in schemes.items()} == {
        "mix": "int8",
        "middle": "w4a8",
        "head": "int8",
        "words": "int8",
    }


def test_engines_look_integers_up(tmp_path: Path) -> None:
    fake = prepared(network(), "int8_portable")
    program = export_program(convert(fake), (words()[:2],))
    path = tmp_path / "artifact"
    export_artifact(
        program,
        path,
        targets=ENGINES,
        reference=fake,
        held_out=(words(),),
        scheme="int8_portable",
        gates=Gates(max_relative_error=0.02),
    )
    floats = 4 * sum(parameter.numel() for parameter in network().parameters())
    targets = read_manifest(path).targets
    assert targets.keys() == set(ENGINES)
    for name, target in targets.items():
        holder = path / (next(iter(target.parts)) if target.parts else target.file)
        if name not in ("aoti", "executorch"):  # whose files hold more code than this network has weights
            assert holder.stat().st_size < 0.85 * floats, name
        found = compress.load(path, engine=name)(words())
        assert (found - fake(words()).detach()).abs().max() < 0.05

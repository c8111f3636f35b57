from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.errors import ExportError, ExportSkippedError
from compress.export import Gates, convert, export_artifact
from compress.export.gates import failures
from compress.export.outputs import flattened, named, output_form, structure_of
from compress.export.parity import check_parity, reference_outputs
from compress.export.targets import litert
from compress.quantize import convert as to_integers
from compress.quantize import prepare
from compress.runtime import load, read_manifest
from compress.runtime.manifest import TensorSpec
from compress.surgery.capture import export_program
from compress.surgery.lengths import Length
from tests.export.heads import HERE_SEVERAL, Encoder, encoder, fit, tokens, trained, two_heads
from tests.networks import images

ROWS = torch.arange(200.0).reshape(100, 2)


class Gives(nn.Module):
    """A network that gives whatever a function makes of features."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make, self.fc = make, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.make(self.fc(x))


class Engine:
    """An engine of several outputs."""

    takes, threads = "numpy", 1

    def __init__(self, run: Callable[[np.ndarray], Sequence[np.ndarray]]) -> None:
        self._run = run

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        return list(self._run(inputs[0]))


class Pair(NamedTuple):
    logits: Tensor
    boxes: Tensor


def export(directory: Path, network: nn.Module, **changes: Any) -> Any:
    torch.manual_seed(0)
    inputs = [torch.randn(70, 4)]
    given = {"targets": ["eager"], "reference": network, "held_out": inputs, **changes}
    program = given.pop("program", None) or export_program(network.eval(), [inputs[0][:2]])
    return export_artifact(program, directory, **given)


def test_a_tuple_has_an_entry_for_each_of_its_outputs() -> None:
    manifest = read_manifest(two_heads().artifact)
    assert manifest.structure == "tuple"
    assert manifest.outputs == (
        TensorSpec("output_0", "float32", (None, 3)),
        TensorSpec("output_1", "float32", (None, 2, 4)),
    )
    assert list(manifest.targets) == HERE_SEVERAL


def test_a_dict_names_its_outputs() -> None:
    manifest = read_manifest(encoder().artifact)
    assert manifest.structure == "dict"
    assert manifest.outputs == (
        TensorSpec("features", "float32", (None, 6, 16)),
        TensorSpec("logits", "float32", (None, 2)),
    )
    assert json.loads((encoder().artifact / "manifest.json").read_text())["structure"] == "dict"


@pytest.mark.parametrize("made", [two_heads, encoder])
def test_each_target_says_how_far_each_output_is(made: Callable[[], Any]) -> None:
    manifest = read_manifest(made().artifact)
    for target in manifest.targets.values():
        errors = target.agreement["relative_error_of"]
        assert list(errors) == [spec.name for spec in manifest.outputs]
        assert max(errors.values()) == target.agreement["relative_error"] < 1e-5
        assert target.agreement["top1_agreement"] == 1.0


@pytest.mark.parametrize(
    ("make", "structure", "names"),
    [
        (lambda x: x, None, ["output"]),
        (lambda x: (x,), "tuple", ["output_0"]),
        (lambda x: [x, x * 2], "tuple", ["output_0", "output_1"]),
        (lambda x: Pair(x, x * 2), "tuple", ["output_0", "output_1"]),
        (lambda x: {"only": x}, "dict", ["only"]),
        (lambda x: OrderedDict(b=x, a=x * 2), "dict", ["b", "a"]),
    ],
)
def test_structures_and_names(
    tmp_path: Path, make: Callable[[Tensor], Any], structure: str | None, names: list[str]
) -> None:
    network = Gives(make).eval()
    manifest = export(tmp_path / "a", network, targets=["eager", "onnxruntime"])
    assert (manifest.structure, [spec.name for spec in manifest.outputs]) == (structure, names)
    x = torch.randn(5, 4)
    with torch.no_grad():
        wanted = network(x)
    for engine in manifest.targets:
        found = load(tmp_path / "a", engine=engine)(x)
        assert structure_of(found) == structure
        torch.testing.assert_close(named(found, "found"), named(wanted, "wanted"), rtol=1e-5, atol=1e-6)


def test_one_tensor_is_written_as_it_has_always_been(tmp_path: Path) -> None:
    export(tmp_path / "a", Gives(lambda x: x))
    content = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert "structure" not in content
    assert content["outputs"] == [{"name": "output", "dtype": "float32", "shape": [None, 4], "ranges": {}}]
    assert "relative_error_of" not in content["targets"]["eager"]["agreement"]


def test_outputs_that_are_one_value_or_the_input_or_no_floats(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.fc(x)
            return {"y": y, "again": y, "alike": self.fc(x), "x": x, "best": y.argmax(-1), "positive": y > 0}

    network = Odd().eval()
    targets = [name for name in HERE_SEVERAL if name != "aoti"]
    manifest = export(tmp_path / "a", network, targets=targets)
    assert list(manifest.targets) == targets
    assert [spec.dtype for spec in manifest.outputs] == ["float32"] * 4 + ["int64", "bool"]
    x = torch.randn(9, 4)
    with torch.no_grad():
        wanted = network(x)
    for engine in targets:
        model = load(tmp_path / "a", engine=engine)
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)
        buffers = {name: torch.empty_like(value) for name, value in wanted.items()}
        torch.testing.assert_close(model(x, out=buffers), wanted, rtol=1e-5, atol=1e-6)


@dataclass
class Record:
    logits: Tensor


class Masked(nn.Module):
    """Rules classes out, as the decoder of a parser does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        return self.fc(x).masked_fill(~allowed, float("-inf"))


def test_classes_that_are_ruled_out_agree(tmp_path: Path) -> None:
    network = Masked().eval()
    x, allowed = torch.randn(70, 4), torch.rand(70, 3) > 0.3
    allowed[:, 0] = True
    program = export_program(network, [x[:2], allowed[:2]])
    given: dict[str, Any] = {"reference": network, "held_out": [x, allowed]}
    manifest = export_artifact(program, tmp_path / "a", targets=["eager", "onnxruntime"], **given)
    assert [target.agreement["relative_error"] < 1e-5 for target in manifest.targets.values()] == [True] * 2
    assert convert(tmp_path / "a", ["openvino"]).targets["openvino"].agreement["relative_error"] < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "a", engine="openvino")(x, allowed), network(x, allowed))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: (x, (x, x)), "network: expected a tensor, or a tuple, list or dict .* one with tuple as 'output_1'"),
        (lambda x: {"logits": x, "hidden": [x]}, "one with list as 'hidden'. Return tensors alone: put a module"),
        (lambda x: (x, None), "one with NoneType as 'output_1'"),
        (lambda x: {0: x}, "one with FakeTensor as 0"),
        (lambda x: (x, x.mean(0)), r"output_1: expected an output with a row for each sample, got shape \(4\)"),
        (lambda x: {"logits": x, "loss": x.mean()}, r"loss: expected .* got shape \(\)\. Leave it out of what forward"),
        (lambda x: (x, x.reshape(-1, 2)), r"output_1: expected .* got shape \(2\*N, 2\)"),
        (lambda x: x.mean(0), r"output: expected an output with a row for each sample, got shape \(4\)"),
    ],
)
def test_what_is_no_tensor_for_each_sample_is_refused(
    tmp_path: Path, make: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "a", Gives(make))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ((), "got an empty one"),
        ({}, "got an empty one"),
        (None, "got NoneType"),
        (Record(ROWS), "got Record"),
        ("text", "got str"),
        ({1: ROWS}, "one with Tensor as 1"),
    ],
)
def test_what_a_module_may_not_give(outputs: Any, message: str) -> None:
    with pytest.raises(ExportError, match=f"reference: expected a tensor, or a tuple, list or dict.*{message}"):
        reference_outputs(lambda x: outputs, [ROWS])


def test_a_reference_gives_what_the_program_gives(tmp_path: Path) -> None:
    network = Gives(lambda x: {"logits": x, "boxes": x * 2}).eval()
    for other, message in [
        (lambda x: network(x)["logits"], "reference: expected a dict of logits, boxes as output.*got one tensor"),
        (lambda x: tuple(network(x).values()), "got a tuple of 2"),
        (lambda x: {"logits": x, "masks": x}, "got a dict of logits, masks"),
    ]:
        with pytest.raises(ExportError, match=message):
            export(tmp_path / "a", network, reference=other)
    swapped = export(tmp_path / "a", network, reference=lambda x: dict(reversed(network(x).items())))
    assert [spec.name for spec in swapped.outputs] == ["logits", "boxes"]
    with pytest.raises(ExportError, match=r"reference: expected a row of output_1 for each of 63 inputs, got shape \("):
        reference_outputs(lambda x: (x, x.sum()), [ROWS])


def test_references_keep_their_structure_in_the_order_of_inputs() -> None:
    found = reference_outputs(lambda x: {"a": x * 3, "b": x[:, :1]}, [ROWS])
    assert isinstance(found, dict)
    assert np.array_equal(found["a"], ROWS.numpy() * 3)
    assert np.array_equal(found["b"], ROWS.numpy()[:, :1])
    pair = reference_outputs(lambda x: [x, x], [ROWS])
    assert isinstance(pair, tuple)
    assert np.array_equal(pair[1], ROWS.numpy())


def test_the_worst_output_counts_and_the_scores_tell_the_classes() -> None:
    logits = torch.eye(2).repeat(50, 1)
    wanted = reference_outputs(lambda x, y: {"features": x + 1, "logits": y}, [ROWS, logits])
    inputs = [torch.cat([ROWS, logits], 1)]
    parity = check_parity(Engine(lambda z: [2 * (z[:, :2] + 1), z[:, 2:]]), wanted, inputs)
    assert [each.batches.relative_error for each in parity.outputs.values()] == pytest.approx([1, 0])
    assert (parity.batches.relative_error, parity.singles.relative_error) == pytest.approx((1, 1))
    assert parity.batches.top1_agreement == 1
    reasons = list(failures("eager", Gates(), None, parity, quantized=False))
    assert [reason.split(" got ")[1] for reason in reasons] == [
        "1 in 'features' on 100 held-out inputs.",
        "1 in 'features' on 16 held-out inputs, one by one.",
    ]
    parity = check_parity(Engine(lambda z: [z[:, :2] + 1, z[:, :1:-1]]), wanted, inputs)
    assert parity.batches.top1_agreement == 0
    assert parity.outputs["features"].batches.top1_agreement == 1


def test_engines_that_give_other_outputs_are_caught() -> None:
    wanted = reference_outputs(lambda x: (x, x * 2), [ROWS])
    with pytest.raises(ExportError, match=r"Engine: expected 2 outputs \(output_0, output_1\), got 1"):
        check_parity(Engine(lambda x: [x]), wanted, [ROWS])
    with pytest.raises(ExportError, match=r"expected outputs of shape \(100, 2\).*got \(100, 1\)"):
        check_parity(Engine(lambda x: [x, x[:, :1]]), wanted, [ROWS])
    with pytest.raises(ExportSkippedError, match=r"expected outputs of dtype float32, got float64"):
        check_parity(Engine(lambda x: [x, x.astype(np.float64)]), wanted, [ROWS])


def test_a_wrong_head_fails_by_its_name(tmp_path: Path) -> None:
    network = Gives(lambda x: (x, x * 2)).eval()
    with pytest.raises(ExportError, match=r"got 0\.0099\d* in 'output_1' on 70 held-out inputs\."):
        export(tmp_path / "a", network, reference=lambda x: (network(x)[0], 1.01 * network(x)[1]))


def test_labels_are_those_of_the_scores(tmp_path: Path) -> None:
    network = Gives(lambda x: {"boxes": x, "logits": x[:, :2]}).eval()
    assert export(tmp_path / "a", network, metadata={"labels": ["no", "yes"]}).labels == ["no", "yes"]
    with pytest.raises(ExportError, match="got 1 labels for 2 classes"):
        export(tmp_path / "b", network, metadata={"labels": ["no"]})


def test_a_flattened_program_needs_no_names() -> None:
    x = torch.randn(3, 4)
    for network in (Gives(lambda x: x), Gives(lambda x: (x, x * 2))):
        program = export_program(network, [x])
        assert flattened(program) is program
    network = Gives(lambda x: {"a": x, "b": x * 2}).eval()
    program = export_program(network, [x])
    assert output_form(program).structure == "dict"
    found = flattened(program).module()(x)
    assert type(found) is tuple
    torch.testing.assert_close(found, tuple(network(x).values()))


def test_integers_with_two_heads(tmp_path: Path) -> None:
    network, x = trained(), images(130, seed=2)[0]
    prepared = prepare(network, [images(2)[0]], "int8")
    fit(prepared, 10)
    program = export_program(to_integers(prepared.eval()), [x[:2]])
    targets = ["eager", "onnxruntime", "openvino"]
    given: dict[str, Any] = {"reference": prepared, "held_out": [x], "scheme": "int8"}
    manifest = export_artifact(program, tmp_path / "a", targets=targets, gates=Gates(min_top1_agreement=0.95), **given)
    assert list(manifest.targets) == targets
    assert manifest.targets["onnxruntime"].census["float_kernels"] == 0
    with torch.no_grad():
        wanted = prepared(x)
    for engine in targets:
        for found, right in zip(load(tmp_path / "a", engine=engine)(x), wanted, strict=True):
            assert float((found - right).norm() / right.norm()) < 0.1
    added = convert(tmp_path / "a", ["executorch"]) if "executorch" in HERE_SEVERAL else manifest
    assert list(added.targets["executorch" if added is not manifest else "eager"].agreement["relative_error_of"]) == [
        "output_0",
        "output_1",
    ]


def test_sizes_that_vary_are_free_in_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, inputs = Encoder().eval(), tokens(70)
    program = export_program(network, [value[:2] for value in inputs], lengths=[Length(1, 2, 9)])
    targets = ["eager", "onnxruntime"]
    manifest = export_artifact(program, tmp_path / "a", targets=targets, reference=network, held_out=inputs)
    assert [spec.shape for spec in manifest.outputs] == [(None, None, 16), (None, 2)]
    assert list(manifest.targets["onnxruntime"].agreement["relative_error_at"]) == [
        "2 in dimension 1",
        "9 in dimension 1",
    ]
    few = tokens(3, 8)
    with torch.no_grad():
        wanted = network(*few)
    for engine in targets:
        model = load(tmp_path / "a", engine=engine)
        torch.testing.assert_close(model(*few), wanted, rtol=1e-4, atol=1e-5)
        buffers = {name: torch.full_like(value, torch.nan) for name, value in wanted.items()}
        torch.testing.assert_close(model(*few, out=buffers), wanted, rtol=1e-4, atol=1e-5)


def test_targets_are_added_to_what_has_several_outputs(tmp_path: Path) -> None:
    network = Gives(lambda x: {"boxes": x, "logits": x * 2}).eval()
    export(tmp_path / "a", network)
    manifest = convert(tmp_path / "a", ["onnxruntime"])
    assert (list(manifest.targets), manifest.structure) == (["eager", "onnxruntime"], "dict")
    assert list(manifest.targets["onnxruntime"].agreement["relative_error_of"]) == ["boxes", "logits"]
    x = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "a", engine="onnxruntime")(x), network(x), rtol=1e-5, atol=1e-6)


def test_litert_says_that_it_has_an_order_of_its_own(tmp_path: Path) -> None:
    program = export_program(Gives(lambda x: (x, x)).eval(), [torch.randn(2, 4)])
    with pytest.raises(ExportSkippedError, match=r"litert: expected one output, .* got 2\. Leave"):
        litert.build(program, tmp_path / litert.FILE)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from compress import load
from compress.export import Gates, export_artifact
from compress.export.onnx.recurrent import quantize_recurrent
from compress.export.onnx.translate import translate
from compress.export.targets.onnxruntime import census
from compress.prune import apply_removal, describe_removal, score_groups, study
from compress.prune.planner import least
from compress.quantize import calibrate, convert, coverage, prepare
from compress.quantize.graph import annotate
from compress.runtime.engines.onnxruntime import open_session
from compress.surgery import Captured
from compress.surgery.capture import export_program
from compress.surgery.lengths import Length

SERIES = torch.randn(24, 7, 4, generator=torch.Generator().manual_seed(0))
HIDDEN = 9


class Gated(nn.Module):
    """A GRU whose outputs at all steps count, or, begun with a state, those at the end."""

    def __init__(self, layers: int = 1, *, both: bool = False, bias: bool = True, begun: bool = False) -> None:
        super().__init__()
        self.gru = nn.GRU(4, HIDDEN, layers, bias=bias, batch_first=not begun, bidirectional=both)
        self.start = nn.Linear(4, layers * (1 + both) * HIDDEN) if begun else None
        self.fc = nn.Linear((1 + both) * HIDDEN, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)  # so large that every gate moves

    def forward(self, x: Tensor) -> Tensor:
        if self.start is None:
            return self.fc(self.gru(x)[0].mean(1))
        start = self.start(x.mean(1)).unflatten(1, (-1, HIDDEN)).transpose(0, 1)
        outputs, last = self.gru(x.transpose(0, 1), start)
        directions = outputs.shape[-1] // HIDDEN
        return self.fc(outputs[2] + last[-directions:].transpose(0, 1).flatten(1))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few units be enough, to test what happens and not how fast."""
    monkeypatch.setattr(annotate, "FEWEST_UNITS", 1)


def _prepared(network: nn.Module, lengths: tuple[Length, ...] = ()) -> Captured:
    prepared = prepare(network.eval(), [SERIES[:2]], "int8", lengths=lengths)
    calibrate(prepared, [(SERIES,)])
    assert coverage(prepared, [SERIES]).share == 1.0
    return prepared.eval()


@pytest.mark.parametrize(
    "network",
    [
        lambda: Gated(2, both=True, bias=False),
        lambda: Gated(2, both=True, begun=True),
    ],
    ids=["without_biases", "begun_with_a_state"],
)
def test_two_layers_in_both_directions_give_what_they_give_in_floats(
    network: Callable[[], Gated], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    prepared = _prepared(network())
    model = translate(export_program(convert(prepared), (SERIES[:2],)), target="onnxruntime")
    assert quantize_recurrent(model) == 2
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    counted = census(path)
    assert counted.float_kernels == 0
    assert counted.details["DynamicQuantizeMatMul"] == 8
    outputs = torch.from_numpy(open_session(path, 1)([SERIES.numpy()])[0])
    with torch.no_grad():
        wanted = prepared(SERIES)
    assert float((outputs - wanted).norm() / wanted.norm()) < 0.03


def test_any_number_of_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lengths = (Length(1, 2, 30),)
    prepared = _prepared(Gated(2), lengths)
    program = export_program(convert(prepared), [SERIES[:2]], lengths=lengths)
    export_artifact(
        program,
        tmp_path / "a",
        targets=["eager", "onnxruntime"],
        reference=prepared,
        held_out=[SERIES],
        scheme="int8",
        gates=Gates(max_relative_error=0.05),
    )
    for steps in (2, 30):
        given = torch.randn(5, steps, 4)
        floats, integers = (load(tmp_path / "a", engine=engine)(given) for engine in ("eager", "onnxruntime"))
        assert float((integers - floats).norm() / floats.norm()) < 0.05


def test_a_pruned_one_is_quantised() -> None:
    torch.manual_seed(0)
    network = Gated(2, both=True).eval()
    anatomy = study(network, (SERIES[:2],))
    scores = score_groups(anatomy, "l2")
    data = describe_removal(anatomy, least(scores, {name: width - 2 for name, width in anatomy.widths.items()}))
    assert data is not None
    pruned = apply_removal(network, data).eval()
    assert pruned.state_dict()["gru.weight_hh_l0"].shape == (3 * (HIDDEN - 2), HIDDEN - 2)
    prepared = _prepared(pruned)
    with torch.no_grad():
        wanted, fake, integers = pruned(SERIES), prepared(SERIES), convert(prepared)(SERIES)
    assert float((fake - wanted).norm() / wanted.norm()) < 0.1
    assert float((integers - fake).norm() / fake.norm()) < 0.01


def test_one_of_few_units_stays_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotate, "FEWEST_UNITS", HIDDEN + 1)
    prepared = prepare(Gated().eval(), [SERIES[:2]], "int8")
    found = coverage(prepared, [SERIES])
    assert {product.operator: product.integer for product in found.products} == {"gru": False, "linear": True}
    assert [reason for reason in found.reasons if "units" in reason]


@pytest.mark.parametrize(("after", "replaced"), [(1, 1), (0, 0)])
def test_a_gru_that_torch_does_not_have_stays(after: int, replaced: int) -> None:
    """One whose reset gate multiplies the state before the product: two products that depend on each other."""
    random = np.random.default_rng(0)
    constants = {"axis": np.array([0])}
    nodes = []
    for name, columns in (("w", 4), ("r", HIDDEN)):
        constants[name] = random.integers(-127, 128, (3 * HIDDEN, columns), dtype=np.int8)
        constants[f"{name}s"] = random.random(3 * HIDDEN, dtype=np.float32)
        constants[f"{name}z"] = np.zeros(3 * HIDDEN, np.int8)
        nodes.append(helper.make_node("DequantizeLinear", [name, f"{name}s", f"{name}z"], [f"{name}d"], axis=0))
        nodes.append(helper.make_node("Unsqueeze", [f"{name}d", "axis"], [f"{name}u"]))
    nodes.append(
        helper.make_node("GRU", ["x", "wu", "ru", "", "", "h"], ["y"], hidden_size=HIDDEN, linear_before_reset=after)
    )
    given, made = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names] for names in ("xh", "y")
    )
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = helper.make_model(helper.make_graph(nodes, "gru", given, made, stored))
    assert quantize_recurrent(model) == replaced
    assert [node.op_type for node in model.graph.node].count("GRU") == 1 - replaced

"""A pruned network comes back from its constructor, a JSON history and a plain state_dict; a foreign one is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compress
from compress.errors import EditError
from compress.prune import plan_removal, replay_prune
from compress.quantize import prepare
from compress.quantize.pt2e import describe_inputs
from compress.surgery import Captured, Edit, History, rebuild
from compress.surgery.slicing import shapes_of
from tests.networks import Residual, images
from tests.prune.test_graph_form import Written


def pruned_in_steps(network: nn.Module, steps: list[dict[str, int]]) -> tuple[nn.Module, History]:
    """Prune in several edits, each planned on what the last one left."""
    x, history = images(6)[0], History()
    for keep in steps:
        data = plan_removal(network, [x[:2]], keep)
        assert data is not None
        history.append(Edit("prune", json.loads(json.dumps(data))))
        network = replay_prune(network, Edit("prune", data))
    return network, history


@pytest.mark.parametrize(
    ("make", "steps", "form"),
    [
        (Residual, [{"conv1": 24}, {"conv1": 12, "stem": 8}], Residual),
        (Written, [{"stem": 8}, {"qkv": 2}], Captured),
    ],
)
def test_a_plain_state_dict_and_a_json_history_are_enough(
    tmp_path: Path, make: Any, steps: list[dict[str, int]], form: type
) -> None:
    torch.manual_seed(0)
    pruned, history = pruned_in_steps(make(), steps)
    history.save(tmp_path / "history.json")
    torch.save(pruned.state_dict(), tmp_path / "weights.pt")
    assert not list(tmp_path.glob("*.tmp"))
    torch.manual_seed(1)
    original = make()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    again = compress.rebuild(original, tmp_path / "history.json")
    assert type(again) is form
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = images(9)[0]
    assert torch.equal(again.eval()(x), pruned.eval()(x))
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the argument has changed"


WITHOUT_LIGHTNING = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pytorch_lightning", "lightning", "lightning_fabric", "torch_pruning"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from torch import nn
import compress

network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
network = compress.rebuild(network, sys.argv[1])
network.load_state_dict(torch.load(sys.argv[2], weights_only=True))
print(network(torch.ones(2, 3)).tolist())
"""


def test_lightning_need_not_be_installed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    data = plan_removal(network, [torch.ones(2, 3)], {"0": 4})
    assert data is not None
    history, weights = tmp_path / "history.json", tmp_path / "weights.pt"
    History([Edit("prune", data)]).save(history)
    pruned = replay_prune(network, Edit("prune", data))
    torch.save(pruned.state_dict(), weights)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIGHTNING, str(history), str(weights)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == pruned(torch.ones(2, 3)).tolist()


def test_a_list_a_history_and_a_handler_of_ones_own() -> None:
    _, history = pruned_in_steps(Residual(), [{"conv1": 8}])
    for given in (history, history.to_list()):
        assert rebuild(Residual(), given).get_parameter("conv1.weight").shape[0] == 8
    edits = [*history, Edit("mine", {"width": 5})]

    def widen(network: nn.Module, edit: Edit) -> nn.Module:
        network.head = nn.Linear(3, edit.data["width"])  # type: ignore[assignment]
        return network

    assert rebuild(Residual(), History(edits), handlers={"mine": widen}).get_parameter("head.weight").shape == (5, 3)
    with pytest.raises(EditError, match="got 'mine'"):
        rebuild(Residual(), History(edits))


class Wider(Residual):
    """Another architecture: its second convolution is the first layer that differs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(16, 32, 5, padding=2, bias=False)
        self.fc = nn.Linear(16, 4)


class Headless(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Identity()  # type: ignore[assignment]


class Longer(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("network", "first"),
    [
        (Wider(), r"conv1\.weight of Wider to have shape \(32, 16, 3, 3\), got shape \(32, 16, 5, 5\)"),
        (Residual(8), r"stem\.weight of Residual to have shape \(16, 1, 3, 3\), got shape \(8, 1, 3, 3\)"),
        (Headless(), r"fc\.weight of Headless to have shape \(3, 16\), got no such tensor"),
        (Longer(), r"extra\.weight of Longer to have no such tensor, got shape \(2, 2\)"),
    ],
)
@pytest.mark.parametrize("kind", ["module", "graph", "quantize"])
def test_another_architecture_is_refused_by_its_first_difference(network: nn.Module, first: str, kind: str) -> None:
    _, history = pruned_in_steps(Residual(), [{"conv1": 8}])
    (edit,) = history
    if kind == "quantize":
        inputs = describe_inputs([images(2)[0]])
        edit = Edit("quantize", {"scheme": "int8", "inputs": inputs, "shapes": shapes_of(Residual(), {})})
    else:
        edit = Edit("prune", {**edit.data, "form": kind})
    before = {name: (id(p), p.clone()) for name, p in network.named_parameters()}
    with pytest.raises(EditError, match=first):
        rebuild(network, [{"kind": edit.kind, "data": edit.data}])
    with pytest.raises(EditError, match=first):  # in place, as in a fit
        replay_prune(network, edit) if kind != "quantize" else rebuild(network, History([edit]))
    for name, parameter in network.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_a_history_without_shapes_still_loads() -> None:
    _, history = pruned_in_steps(Residual(), [{"conv1": 8}])
    old = [{"kind": e.kind, "data": {k: v for k, v in e.data.items() if k != "shapes"}} for e in history]
    assert rebuild(Residual(), old).get_parameter("conv1.weight").shape[0] == 8


def test_a_quantised_history_comes_back() -> None:
    torch.manual_seed(0)
    pruned, history = pruned_in_steps(Residual(), [{"conv1": 8}])
    x = images(6)[0]
    history.append(
        Edit(
            "quantize",
            {"scheme": "int8", "inputs": describe_inputs([x[:2]]), "shapes": shapes_of(pruned, {})},
        )
    )
    prepared = prepare(pruned, [x[:2]], "int8").train()
    prepared(x)
    again = rebuild(Residual(), history)
    again.load_state_dict(prepared.state_dict())
    assert torch.equal(again.eval()(x), prepared.eval()(x))


GOOD: dict[str, Any] = {"format": "compress-history", "version": 1, "edits": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "FileNotFoundError"),
        (b"", "JSONDecodeError"),
        (b"\xff\xfe\x00", "UnicodeDecodeError"),
        (b'{"format": "compress-hist', "JSONDecodeError"),
        (b"[]", "got other JSON"),
        (b'{"format": "something"}', "got other JSON"),
        (json.dumps({**GOOD, "version": 2}).encode(), "of version 1, got version 2. Update compress"),
        (json.dumps({**GOOD, "version": "x"}).encode(), "got version 'x'"),
        (b'{"format": "compress-history", "version": 1}', "got a damaged one"),
        (json.dumps({**GOOD, "edits": 3}).encode(), "got a damaged one"),
        (json.dumps({**GOOD, "edits": [{"kind": "prune"}]}).encode(), "got a damaged one"),
        (json.dumps({**GOOD, "edits": ["prune"]}).encode(), "got a damaged one"),
        (json.dumps({**GOOD, "edits": [{"kind": "quantize", "data": {}}] * 2}).encode(), "no edit after 'quantize'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "history.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EditError, match=r"history\.json: expected a history of edits.*" + message):
        History.load(path)


def test_nothing_half_written(tmp_path: Path) -> None:
    """A history that is no JSON leaves the file that was there."""
    path = tmp_path / "history.json"
    History([Edit("prune", {"a": 1})]).save(path)
    with pytest.raises(TypeError):
        History([Edit("prune", {"a": object()})]).save(path)
    assert History.load(path) == History([Edit("prune", {"a": 1})])

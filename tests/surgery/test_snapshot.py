from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.errors import EditError
from compress.prune import plan_removal, replay_prune
from compress.quantize import prepare, replay_quantize
from compress.quantize.pt2e import describe_inputs
from compress.surgery import Edit, History, load_snapshot, save_snapshot
from tests.networks import Residual, images

HANDLERS = {"prune": replay_prune, "quantize": replay_quantize}


def test_a_pruned_and_quantised_network_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = Residual(), images(12)[0]
    data = plan_removal(network, [x[:2]], {"conv1": 8})
    assert data is not None
    history = History([Edit("prune", data)])
    replay_prune(network, Edit("prune", data))
    history.append(Edit("quantize", {"scheme": "int8", "inputs": describe_inputs([x[:2]])}))
    prepared = prepare(network, [x[:2]], "int8").train()
    prepared(x)
    save_snapshot(tmp_path / "net.pt", prepared, history)
    torch.manual_seed(1)
    restored, again = load_snapshot(tmp_path / "net.pt", Residual(), HANDLERS)
    assert again == history
    assert torch.equal(restored.eval()(x), prepared.eval()(x))
    assert not list(tmp_path.glob(".*"))
    for name in ("a.pt", "b.pt"):
        save_snapshot(tmp_path / name, prepared, history)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert History.load(tmp_path / "net.history.json") == history


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_snapshot(tmp_path / "net.pt", Residual(8), History())
    with pytest.raises(EditError, match="expected weights of Residual"):
        load_snapshot(tmp_path / "net.pt", Residual(16), HANDLERS)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    with pytest.raises(EditError, match=r"net\.pt: expected a snapshot"):
        load_snapshot(path, Residual(), HANDLERS)


def test_an_unedited_snapshot_leaves_no_history_beside_it(tmp_path: Path) -> None:
    network, path = Residual(), tmp_path / "a.pt"
    save_snapshot(path, network, History([Edit("prune", {"slices": {}})]))
    assert (tmp_path / "a.history.json").exists()
    save_snapshot(path, network, History())
    assert not (tmp_path / "a.history.json").exists()

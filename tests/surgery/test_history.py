from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.errors import EditError
from compress.surgery import Edit, History, replay

json_values = st.recursive(
    st.integers() | st.text() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
edits = st.builds(
    Edit, kind=st.sampled_from(["prune", "other"]), data=st.dictionaries(st.text(), json_values, max_size=3)
)


@given(st.lists(edits, max_size=4))
def test_survives_json(items: list[Edit]) -> None:
    history = History(items)
    assert History.from_list(json.loads(json.dumps(history.to_list()))) == history


def test_survives_a_checkpoint_loaded_with_weights_only(tmp_path: object) -> None:
    history = History([Edit("prune", {"slices": {"a": {"0": [1, 2]}}, "attributes": {"a": {"width": 2}}})])
    path = f"{tmp_path}/history.pt"
    torch.save(history.to_list(), path)
    assert History.from_list(torch.load(path, weights_only=True)) == history


def test_nothing_follows_quantization() -> None:
    history = History([Edit("quantize")])
    with pytest.raises(EditError, match="expected no edit after 'quantize', got 'prune'"):
        history.append(Edit("prune"))


def test_replay_applies_edits_in_order() -> None:
    seen: list[str] = []

    def handler(network: nn.Module, edit: Edit) -> nn.Module:
        seen.append(edit.data["name"])
        return network

    replay(nn.Identity(), [Edit("a", {"name": "1"}), Edit("b", {"name": "2"})], {"a": handler, "b": handler})
    assert seen == ["1", "2"]


def test_replay_names_the_missing_handler() -> None:
    with pytest.raises(EditError, match="got 'unknown'"):
        replay(nn.Identity(), [Edit("unknown")], {})

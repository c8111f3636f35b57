from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress.errors import EditError, RecipeError
from compress.prune import Anatomy, score_groups, study
from compress.prune.allocation import Candidate, Target, fit_to_target, make_cost
from compress.prune.allocation.latency import LatencyCost, cost, layers, preferred_multiple, store, table
from compress.prune.allocation.latency.layers import Layer
from compress.prune.allocation.latency.store import Store
from compress.prune.allocation.latency.table import NOTHING, TimedWork
from compress.prune.allocation.sizes import Extent, Sizes
from compress.prune.allocation.work import Work, list_work
from compress.prune.planner import apply_removal, describe_removal, least
from tests.prune.coupling.networks import NETWORKS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "_SECONDS", 0.05)
    return tmp_path / "latency"


def small() -> tuple[Anatomy, list[Candidate]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 2, 1))
    anatomy = study(network, [torch.randn(2, 1, 8, 8)])
    scores = score_groups(anatomy, "l2")
    return anatomy, [Candidate(name, width, width, scores[name]) for name, width in anatomy.widths.items()]


def measured_networks(cache: Path) -> set[float]:
    (file,) = cache.iterdir()
    return set(json.loads(file.read_text())["networks"].values())


def test_onnxruntime_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anatomy, groups = small()
    # Targets that the noise of this machine does not decide.
    whole = fit_to_target(anatomy, groups, "uniform", Target(latency_ms=1e6, threads=1))
    assert whole.met
    assert whole.widths == anatomy.widths
    assert whole.currency == "latency_ms"
    assert 0 < whole.reached == whole.before < whole.wanted == 1e6
    target = Target(latency=1e-6, threads=1)
    assert len(measured_networks(cache)) == 1
    # Whether a fit measures another one is for noise to decide: narrower layers may be no faster.
    narrow = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    narrow_ms = make_cost(anatomy, target).measure(narrow, anatomy.inputs)
    assert measured_networks(cache) == {whole.before, narrow_ms}
    with pytest.raises(EditError, match=r"prune.target.latency: .* got .* where the narrowest network costs"):
        fit_to_target(anatomy, groups, "uniform", target)
    estimate = make_cost(anatomy, target).estimate(dict.fromkeys(anatomy.widths, 8))
    (file,) = cache.iterdir()
    content = json.loads(file.read_text())
    assert content["engine"] == "onnxruntime"
    assert content["threads"] == 1
    assert NOTHING.key in content["layers"]
    assert len(content["layers"]) > 10
    assert all(ms > 0 for name in ("layers", "networks") for ms in content[name].values())
    assert measured_networks(cache) >= {whole.before, narrow_ms}
    # From here on nothing may be timed.
    for module in (table, cost):
        monkeypatch.setattr(module, "time_calls", None)
    again = make_cost(anatomy, target)
    assert again.estimate(dict.fromkeys(anatomy.widths, 8)) == estimate
    assert again.measure(anatomy.network, anatomy.inputs) == whole.before
    assert again.measure(narrow, anatomy.inputs) == narrow_ms


def rounds(monkeypatch: pytest.MonkeyPatch, *seconds: tuple[float, float]) -> list[int]:
    """Let rounds of two calls take what is given, the last ones again and again; return a list of one for each."""
    seen: list[int] = []

    def timed(calls: Mapping[str, object], **_: object) -> dict[str, list[float]]:
        seen.append(1)
        return {key: [each] for key, each in zip(calls, seconds[min(len(seen), len(seconds)) - 1])}

    monkeypatch.setattr(cost, "time_calls", timed)
    return seen


def test_rounds_go_on_until_they_agree(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls = {"whole": lambda: None, "cut": lambda: None}
    seen = rounds(monkeypatch, (4e-3, 2e-3))
    assert cost._compare(calls, "whole", "cut") == (4.0, 0.5)
    assert len(seen) == 4
    # What meets both alike makes no difference, and a round that met one of them alone does not decide.
    seen = rounds(monkeypatch, (4e-3, 2e-3), (8e-3, 4e-3), (4e-3, 4e-3), (4e-3, 1e-3), (4e-3, 2e-3))
    assert cost._compare(calls, "whole", "cut") == (4.0, 0.5)
    assert 4 < len(seen) < 16
    assert not caplog.records
    seen = rounds(monkeypatch, *[(4e-3, 2e-3), (4e-3, 3e-3)] * 8)
    cost._compare(calls, "whole", "cut")
    assert len(seen) == 16
    assert "this machine is busy with other work" in caplog.text


def test_a_machine_that_became_faster_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    anatomy, groups = small()
    latency = LatencyCost(anatomy, Target(latency_ms=1.0, threads=1))
    rounds(monkeypatch, (4e-3, 0.0))
    assert latency.measure(anatomy.network, anatomy.inputs) == 4.0
    data = describe_removal(
        anatomy, least({each.name: each.scores for each in groups}, dict.fromkeys(anatomy.widths, 8))
    )
    assert data is not None
    cut = apply_removal(copy.deepcopy(anatomy.network), data)
    rounds(monkeypatch, (2e-3, 1e-3))
    assert latency.measure(cut, anatomy.inputs) == 2.0
    assert "takes 0.50 times what it took" in caplog.text
    assert str(latency._store.path) in caplog.text


def test_whole_networks_on_eager_leave_threads_as_they_were() -> None:
    anatomy, _ = small()
    before = torch.get_num_threads()
    eager = make_cost(anatomy, Target(latency_ms=1.0, engine="eager", threads=before + 1, batch=3))
    assert eager.measure(anatomy.network, anatomy.inputs) > 0
    assert torch.get_num_threads() == before


def test_networks_of_equal_parameters_are_not_confused() -> None:
    forms = []
    for stride in (1, 2):
        network = nn.Conv2d(1, 4, 3, stride=stride, padding=1)
        anatomy = study(nn.Sequential(network, nn.ReLU(), nn.Conv2d(4, 2, 1)), [torch.ones(2, 1, 8, 8)])
        latency = LatencyCost(anatomy, Target(latency_ms=1.0))
        forms.append(latency._before.key)
    assert forms[0] != forms[1]


def test_store_keeps_what_others_wrote_and_survives_damage() -> None:
    one, two = Store("eager", None), Store("eager", None)
    one.layers["a"], two.layers["b"] = 1.0, 2.0
    one.save()
    two.save()
    assert Store("eager", None).layers == {"a": 1.0, "b": 2.0}
    assert Store("eager", 1).layers == {}
    assert one.path is not None
    one.path.write_text('{"layers": {"a": -1, "b": "x"}, "networks": []}')
    assert Store("eager", None).layers == {}
    one.path.write_text("{")
    assert Store("eager", None).networks == {}


def test_a_user_without_a_home_has_a_store_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "user_cache", lambda: None)
    one = Store("eager", None)
    one.layers["a"] = 1.0
    one.save()
    assert (one.path, one.layers, Store("eager", None).layers) == (None, {"a": 1.0}, {})


def times(layer: TimedWork, ms: dict[tuple[int, int], float]) -> dict[str, float]:
    found = {each.key: ms[each.read, each.made] for each in layer.layers()}
    return {**found, NOTHING.key: 1.0}


def test_between_measured_widths_times_are_bilinear() -> None:
    read, made = Extent(16, ((("a", 1.0),),)), Extent(16, ((("b", 1.0),),))
    layer = TimedWork.of(Work("x", "linear", (read,), (made,), (Extent(2), Extent(5))), "onnxruntime", samples=0.5)
    assert layer.reads == layer.makes == (8, 16)
    assert layer.layer.rows == 5
    ms = times(layer, {(8, 8): 2.0, (8, 16): 3.0, (16, 8): 5.0, (16, 16): 9.0})
    assert layer.time({}, ms) == 8.0
    assert layer.time({"a": 8, "b": 8}, ms) == 1.0
    assert layer.time({"a": 4, "b": 4}, ms) == pytest.approx((2 + 3 + 5 + 9) / 4 - 1)
    assert layer.time({"a": 12, "b": 0}, ms) == pytest.approx(
        0.0, abs=1e-5
    )  # on the line through both points, not below nothing


def test_convolutions_go_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "step_width", lambda engine: 16)
    fixed = {"kernel": [1], "stride": [1], "dilation": [1], "padding": [[0, 0]], "image": [4], "transposed": False}
    made = Extent(64, ((("a", 1.0),),))
    work = Work("x", "conv", (Extent(3),), (made,), (Extent(2), Extent(4), Extent(1)), {**fixed, "groups": 1})
    layer = TimedWork.of(work, "onnxruntime", samples=0.5)
    assert layer.makes == (16, 32, 48, 64)
    ms = times(layer, {(3, 16 * i): 1.0 + i for i in range(1, 5)})
    assert [layer.time({"a": gone}, ms) for gone in (0, 1, 15, 16, 24, 32)] == [4.0, 4.0, 4.0, 3.0, 3.0, 2.0]


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_run_in_both_engines_alike(name: str, tmp_path: Path) -> None:
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    network: nn.Module = make()  # type: ignore[operator]
    anatomy = study(network, [x.float() if x.is_floating_point() else x])
    work = list_work(anatomy, Sizes(anatomy))
    assert work
    for each in work:
        for layer in TimedWork.of(each, "onnxruntime", samples=1.0).layers():
            ort: Any = layers.in_onnxruntime(layer, tmp_path, 1)()
            own: Any = layers.in_torch(layer, tmp_path, 1)()
            assert np.allclose(ort[0], own, atol=1e-4), layer


def test_paddings_that_differ_on_both_sides_run(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv1d(2, 4, 4, padding="same"), nn.ReLU(), nn.Conv1d(4, 2, 1))
    anatomy = study(network, [torch.ones(2, 2, 9)])
    first = list_work(anatomy, Sizes(anatomy))[0]
    layer = TimedWork.of(first, "onnxruntime", samples=0.5).layer
    got: Any = layers.in_onnxruntime(layer, tmp_path, 1)()
    assert got[0].shape == F.conv1d(torch.ones(1, 2, 9), torch.ones(4, 2, 4), padding="same").shape
    layers.in_torch(layer, tmp_path, 1)()


def test_unknown_engine() -> None:
    assert preferred_multiple("onnxruntime") in (8, 16)
    with pytest.raises(RecipeError, match=r"engine: expected one of .*, got 'abacus'"):
        preferred_multiple("abacus")
    assert Layer("nothing").key == NOTHING.key

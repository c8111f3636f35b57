"""One network trained once for int8, on every engine: they agree about what they see, without another calibration."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.export import Gates, census, export_artifact
from compress.measure.machine import has_vnni
from compress.quantize import convert, prepare
from compress.runtime import load
from compress.runtime.engines import missing_package
from compress.surgery.capture import export_program
from tests.export.networks import Transformer
from tests.export.programs import Small
from tests.networks import images

NUM = 400
ENGINES = ("eager", "aoti", "onnxruntime", "openvino", "executorch")
KINDS = ("cnn", "transformer")
FAST = {"cnn": ENGINES, "transformer": tuple(engine for engine in ENGINES if engine != "aoti")}
PRODUCTS = {"cnn": 7, "transformer": 5}


def why_not(engine: str) -> str | None:
    package = missing_package(engine)
    if package:
        return f"{package} is not installed"
    if engine == "aoti" and not has_vnni():
        return "without VNNI, sums of AOTInductor's int8 products overflow, and convolutions differ from call to call"
    return None


def sequences(num: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens, shape (N, 6, 16), around one of four patterns, and its number."""
    patterns = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num,), generator=draw)
    return patterns[labels] + torch.randn(num, 6, 16, generator=draw), labels


_MAKE = {"cnn": (Small, images), "transformer": (Transformer, sequences)}


@cache
def answers(kind: str, engines: tuple[str, ...]) -> dict[str, Tensor]:
    """Train a network of a kind once, for int8; return the logits of each engine that runs here, shape (NUM, classes).

    The trained network's own are among them, under ``trained``.
    """
    make, draw = _MAKE[kind]
    torch.manual_seed(0)
    network: nn.Module = make()
    fit(network, *draw(300, seed=1), steps=40, learning_rate=1e-2)
    inputs, labels = draw(NUM, seed=2)
    prepared = prepare(network, [inputs[:2]], "int8_portable")
    fit(prepared, *draw(300, seed=1), steps=10, learning_rate=1e-3)
    prepared.eval()
    folder = Path(tempfile.mkdtemp(prefix="portable"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    here = [engine for engine in engines if why_not(engine) is None]
    export_artifact(
        export_program(convert(prepared), [inputs[:2]]),
        folder / kind,
        targets=here,
        reference=prepared,
        held_out=[inputs],
        scheme="int8_portable",
        gates=Gates(min_top1_agreement=0.99, min_int8_fraction=0.8),
    )
    found = {engine: load(folder / kind, engine=engine)(inputs) for engine in here}
    for engine, counted in census(folder / kind).items():
        assert counted.int8_kernels == PRODUCTS[kind], (engine, counted)
    with torch.no_grad():
        found["trained"] = prepared(inputs)
    assert float((found["trained"].argmax(-1) == labels).float().mean()) > 0.8
    return found


def fit(network: nn.Module, inputs: Tensor, labels: Tensor, *, steps: int, learning_rate: float) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate)
    network.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), labels).backward()
            optimizer.step()


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        pytest.param(kind, *pair, marks=[pytest.mark.slow] if set(pair) - {"trained", *FAST[kind]} else [])
        for kind in KINDS
        for pair in combinations(["trained", *ENGINES], 2)
    ],
)
def test_any_two_engines_agree(kind: str, one: str, other: str) -> None:
    for engine in {one, other} - {"trained"}:
        if reason := why_not(engine):
            pytest.skip(reason)
    found = answers(kind, FAST[kind] if {one, other} <= {"trained", *FAST[kind]} else ENGINES)
    agreed = int((found[one].argmax(-1) == found[other].argmax(-1)).sum())
    assert agreed >= 0.99 * NUM

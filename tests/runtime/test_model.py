from __future__ import annotations

import pickle
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.utilities.parsing import is_picklable
from torch import nn

from compress.errors import ArtifactError
from compress.export import export_artifact
from compress.runtime import CompactModel, load
from compress.runtime.inputs import preprocess
from compress.runtime.manifest import Manifest, TensorSpec
from compress.surgery.capture import export_program
from tests.export.programs import HERE, LABELS, artifact, quantized

ENGINE_NAMES = HERE


@pytest.fixture(params=ENGINE_NAMES)
def model(request: pytest.FixtureRequest) -> CompactModel:
    return load(artifact(), engine=request.param)


def test_outputs_go_where_the_caller_wants_them(model: CompactModel) -> None:
    x = quantized().inputs[:5]
    wanted = model(x)
    buffer = torch.full((7, 3), torch.nan)
    given = buffer[1:6]
    assert model(x, out=given) is given
    assert buffer[[0, 6]].isnan().all()
    torch.testing.assert_close(buffer[1:6], wanted)
    array = np.full((5, 3), np.nan, dtype=np.float32)
    assert model(x.numpy(), out=array) is array
    np.testing.assert_array_equal(array, buffer[1:6].numpy())
    # Memory in another order, of input and output.
    columns = np.full((3, 5), np.nan, dtype=np.float32).T
    model(np.asfortranarray(x.numpy()), out=columns)
    np.testing.assert_allclose(columns, array, rtol=1e-5, atol=1e-6)


def test_a_buffer_takes_a_batch_in_parts() -> None:
    out = np.zeros((10, 3), dtype=np.float32)
    assert doubling()(np.ones((10, 3), dtype=np.float32), out=out) is out
    assert (out == 2).all()


def test_a_buffer_may_lie_where_the_input_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = nn.Linear(64, 64).eval(), torch.randn(12, 64)
    program = export_program(network, [x[:2]], largest_batch=8)
    export_artifact(program, tmp_path / "a", targets=["onnxruntime"], reference=network, held_out=[x[:8]])
    model = load(tmp_path / "a")  # computes into the buffer
    with torch.no_grad():
        wanted = network(x)
    for as_input in (torch.Tensor.clone, lambda value: value.numpy().copy()):
        same = as_input(x)
        torch.testing.assert_close(torch.as_tensor(model(same, out=same)), wanted, rtol=1e-4, atol=1e-5)
        moved = as_input(torch.cat([x, x[:1]]))  # the second part of the batch would read what the first has written
        torch.testing.assert_close(torch.as_tensor(model(moved[:-1], out=moved[1:])), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (np.zeros((4, 3), dtype=np.float32), r"out: expected shape \(N, 3\) with N = 5, got \(4, 3\)"),
        (np.zeros((5, 4), dtype=np.float32), r"out: expected shape \(N, 3\) with N = 5, got \(5, 4\)"),
        (np.zeros((5, 3)), r"out: expected dtype float32, got float64"),
        (torch.zeros(5, 3), r"out: expected what the inputs are, got torch"),
        (np.frombuffer(bytes(60), dtype=np.float32).reshape(5, 3), r"out: expected memory that can be written"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(out: Any, text: str) -> None:
    with pytest.raises(ArtifactError, match=text):
        doubling()(np.ones((5, 3), dtype=np.float32), out=out)


def test_what_fitted_once_lets_nothing_else_pass(model: CompactModel) -> None:
    x = quantized().inputs[:2]
    wanted = model(x)
    for wrong in (x.double(), x[:, :, 1:], x[:0], x.tolist()):
        with pytest.raises(ArtifactError, match="expected"):
            model(wrong)
        torch.testing.assert_close(model(x), wanted)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact with a table of ten rows, and a second input that is none of its business."""

    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return self.head((self.table(tokens) * weights[..., None]).sum(1))

    torch.manual_seed(0)
    path, network = tmp_path_factory.mktemp("tokens") / "a", Looked().eval()
    inputs = [torch.randint(10, (16, 5), dtype=torch.int32), torch.randint(100, (16, 5))]
    program = export_program(network, [value[:2] for value in inputs])
    targets = [name for name in HERE if name in ("eager", "onnxruntime", "openvino")]
    export_artifact(program, path, targets=targets, reference=network, held_out=inputs)
    return path


@pytest.mark.parametrize("engine", [name for name in HERE if name in ("eager", "onnxruntime", "openvino")])
def test_integers_beyond_the_table_are_refused(engine: str, tokens: Path) -> None:
    model = load(tokens, engine=engine)
    assert [spec.num_rows for spec in model.manifest.inputs] == [10, None]
    ids, weights = torch.arange(10, dtype=torch.int32).view(2, 5), torch.full((2, 5), 99)
    model(ids, weights)
    for wrong in (-1, 10, 109, -91, 2**31 - 1):
        given = ids.clone()
        given[1, 3] = wrong
        message = rf"tokens: expected whole numbers from 0 to 9, .* got {wrong} in samples 1\. Correct them\."
        for call in (
            lambda given=given: model(given, weights),
            lambda given=given: model(given.numpy().T.copy().T, weights.numpy()),
            lambda given=given: model.predict({"tokens": given, "weights": weights}),
        ):
            with pytest.raises(ArtifactError, match=message):
                call()
    assert '"num_rows"' not in (artifact() / "manifest.json").read_text()


def test_a_model_stays_in_its_process() -> None:
    for copy in (deepcopy, pickle.dumps):
        with pytest.raises(ArtifactError, match=r"doubling: expected a model that stays .* in each process\."):
            copy(doubling())
    assert not is_picklable(doubling())  # what Lightning asks of hyperparameters


class Doubling:
    """An engine that refuses large batches."""

    takes = "numpy"
    threads = 1

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sizes: list[int] = []

    def __call__(self, inputs: Any) -> list[Any]:
        self.sizes.append(len(inputs[0]))
        assert len(inputs[0]) <= self.limit
        return [sum(inputs) * 2]


class Minus:
    """An engine to which the order of its inputs matters."""

    takes = "numpy"
    threads = 1

    def __call__(self, inputs: Any) -> list[Any]:
        return [inputs[0] - inputs[1]]


def doubling(limit: int = 4, inputs: int = 1) -> CompactModel:
    specs = tuple(TensorSpec(f"x{i}", "float32", (None, 3)) for i in range(inputs))
    manifest = Manifest("doubling", "", "", specs, (TensorSpec("output", "float32", (None, 3)),), {}, max_batch=limit)
    engine = Doubling(limit)
    return CompactModel(
        manifest, {"onnxruntime": engine}, lambda name: engine, engines=["onnxruntime"], serves={1: "onnxruntime"}
    )


@pytest.mark.parametrize("num", [1, 2, 7, 64, 150])
def test_any_batch_size_as_torch_or_numpy(model: CompactModel, num: int) -> None:
    inputs = quantized().inputs[:num]
    with torch.no_grad():
        wanted = quantized().reference(inputs)
    as_torch, as_numpy = model(inputs), model(inputs.numpy())
    assert isinstance(as_torch, torch.Tensor)
    assert isinstance(as_numpy, np.ndarray)
    assert np.array_equal(as_torch.numpy(), as_numpy)
    assert float((as_torch - wanted).norm() / wanted.norm()) < 0.1
    assert not as_torch.requires_grad


def test_memory_layout_makes_no_difference(model: CompactModel) -> None:
    inputs = quantized().inputs[:6]
    wanted = model(inputs)
    tensors = [
        inputs.to(memory_format=torch.channels_last),
        inputs.as_strided(inputs.shape, (64, 1, 8, 1)),  # one channel: contiguous, yet with channels-last strides
        inputs.transpose(2, 3).contiguous().transpose(2, 3),
        inputs.clone().requires_grad_(),
    ]
    for tensor in tensors:
        assert torch.equal(model(tensor), wanted)
    arrays = [np.asfortranarray(inputs.numpy()), np.ascontiguousarray(inputs.numpy()[::-1])[::-1]]
    arrays.append(inputs.numpy().copy())
    arrays[-1].flags.writeable = False
    for array in arrays:
        assert np.array_equal(model(array), wanted.numpy())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), r"inputs: expected 1 \(x\), got 0"),
        ((torch.ones(2, 1, 8, 8),) * 2, "got 2"),
        ((torch.ones(2, 1, 8, 9),), r"x: expected shape \(N, 1, 8, 8\), got \(2, 1, 8, 9\)"),
        ((np.ones((1, 8, 8), np.float32),), r"expected shape \(N, 1, 8, 8\), got \(1, 8, 8\)"),
        ((torch.ones(0, 1, 8, 8),), "expected shape"),
        ((torch.tensor(1.0),), "expected shape"),
        ((np.ones((2, 1, 8, 8)),), "x: expected dtype float32, got float64"),
        ((torch.ones(2, 1, 8, 8, dtype=torch.bfloat16),), "got bfloat16"),
        (([[1.0]],), "inputs: expected arrays or tensors, got list"),
        ((torch.ones(2, 1, 8, 8).to_sparse(),), "x: expected a dense tensor with values, got torch.sparse_coo"),
        ((torch.ones(2, 1, 8, 8, device="meta"),), "got one on the meta device"),
    ],
)
def test_wrong_inputs_are_named(inputs: tuple[Any, ...], message: str) -> None:
    model = load(artifact(), engine="onnxruntime")
    model(torch.ones(2, 1, 8, 8))  # what has fitted is not looked at again
    with pytest.raises(ArtifactError, match=message):
        model(*inputs)


@pytest.mark.parametrize("inputs", [torch.rand(11, 3), np.random.default_rng(0).random((11, 3), np.float32)])
def test_batches_beyond_the_limit_are_split(inputs: Any) -> None:
    model = doubling(4)
    outputs = model(inputs)
    assert type(outputs) is type(inputs)
    assert np.array_equal(np.asarray(outputs), np.asarray(inputs) * 2)
    assert model._runs["onnxruntime"].sizes == [4, 4, 3]  # type: ignore[attr-defined]


def two_engines(limit: int = 64) -> tuple[CompactModel, Doubling, Doubling]:
    one, many = Doubling(limit), Doubling(limit)
    made = {"one": one, "many": many}
    serves = {1: "one", 4: "many", 16: "many", 32: "one"}
    manifest = replace(doubling().manifest, max_batch=limit)
    return CompactModel(manifest, made, made.__getitem__, engines=["one", "many"], serves=serves), one, many


def test_each_batch_size_has_its_engine() -> None:
    model, one, many = two_engines()
    for num in (1, 2, 3, 8, 22, 23, 64, 65):
        assert np.array_equal(model(np.ones((num, 3), np.float32)), np.full((num, 3), 2))
    assert (one.sizes, many.sizes) == ([1, 2, 23, 64, 64, 1], [3, 8, 22])
    assert [model.engine_for(num) for num in (1, 3, 22, 23, 1000)] == ["one", "many", "many", "one", "one"]
    assert two_engines(8)[0].engine_for(1000) == "many"
    assert (model.engine, model.engines) == ("one", ("one", "many"))
    assert repr(model) == (
        "CompactModel('doubling', engine='one', scheme=None, "
        "engines_by_batch={1: 'one', 4: 'many', 16: 'many', 32: 'one'})"
    )


def test_threads_may_call_at_once() -> None:
    model = load(artifact(), engine="onnxruntime")
    other = load(artifact(), engine="eager")
    both = CompactModel(
        model.manifest,
        {**model._runs, **other._runs},
        model._make,
        engines=["onnxruntime", "eager"],
        serves={1: "onnxruntime", 4: "eager"},
    )
    x = quantized().inputs.numpy()
    batches = [x[start : start + num] for num in (1, 3, 7) for start in range(20)]
    wanted = [(model if len(batch) == 1 else other)(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, right in zip(pool.map(both, batches * 3), wanted * 3):
            assert np.array_equal(got, right)


def test_several_inputs_go_together() -> None:
    model = doubling(inputs=2)
    assert np.array_equal(model(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)), np.full((2, 3), 4))
    with pytest.raises(ArtifactError, match="same batch size"):
        model(np.ones((2, 3), np.float32), np.ones((1, 3), np.float32))
    with pytest.raises(ArtifactError, match="numpy, torch"):
        model(np.ones((2, 3), np.float32), torch.ones(2, 3))


def test_inputs_come_in_one_collection_or_by_name() -> None:
    manifest = doubling(inputs=2).manifest
    model = CompactModel(manifest, {"minus": Minus()}, lambda name: Minus(), engines=["minus"], serves={1: "minus"})
    first, second = np.ones((2, 3), np.float32), np.full((2, 3), 5, np.float32)
    wanted = first - second
    for given in ((first, second), [first, second], {"x1": second, "x0": first}, UserDict(x0=first, x1=second)):
        assert np.array_equal(model(given), wanted)
    assert isinstance(model((torch.ones(2, 3), torch.ones(2, 3))), torch.Tensor)
    assert np.array_equal(doubling()({"x0": first}), 2 * first)
    for wrong, message in [
        ({"x0": first}, r"inputs: expected x0, x1, got x0\. Give each of these names, and no other"),
        ({"x0": first, "x1": second, "mask": first}, "inputs: expected x0, x1, got x0, x1, mask"),
        ({}, "inputs: expected x0, x1, got none"),
        ([first], r"inputs: expected 2 \(x0, x1\), got 1"),
        ((), r"inputs: expected 2 \(x0, x1\), got 0"),
        ([[1.0, 2.0], [3.0, 4.0]], "inputs: expected arrays or tensors, got list"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            model(wrong)


def test_predict_takes_raw_values(model: CompactModel) -> None:
    x = quantized().inputs[:20]
    raw = (x.numpy() * 2.0 + 0.1) / 0.5  # the inverse of the artefact's preprocessing
    labels, probabilities = model.predict(raw)
    logits = model(x)
    np.testing.assert_allclose(probabilities, logits.softmax(-1).numpy(), atol=0.02)
    assert labels == [LABELS[i] for i in probabilities.argmax(-1)]
    assert np.array_equal(model.predict(raw[:, 0])[1], probabilities)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.ones((2, 3, 8, 8)), r"x: expected shape \(N, 1, 8, 8\), got \(2, 3, 8, 8\)"),
        (np.ones((8, 8)), r"expected shape \(N, 1, 8, 8\), got \(8, 8\)"),
        ([], "expected shape"),
        (np.array(3.0), "expected shape"),
        (np.full((2, 8, 8), "7"), "x: expected numbers, got an array of <U1"),
        ([[1.0, 2.0], [3.0]], "x: expected numbers, got"),
        ([None], "x: expected numbers, got an array of object"),
        (
            np.stack([np.ones((8, 8)), np.full((8, 8), 1e300)]),
            r"x: expected numbers that float32 holds, got larger ones in samples 1\.",
        ),
        (torch.ones(2, 8, 8, device="meta"), "x: expected a dense tensor"),
    ],
)
def test_raw_values_that_do_not_fit_are_named(raw: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(artifact(), engine="onnxruntime").predict(raw)


def test_predict_takes_tensors_that_have_a_gradient() -> None:
    assert doubling().predict(torch.tensor([[0.0, 9.0, 1.0]], requires_grad=True))[0] == [1]


def test_what_is_missing_may_be_said_by_nan() -> None:
    raw = np.array([[0, np.nan, 1], [0, 9, 1], [np.nan, 9, 1]], np.float32)
    with pytest.raises(ArtifactError, match=r"got nan for samples 0, 2\."):
        doubling().predict(raw)
    assert np.isnan(preprocess(raw, doubling().manifest)).sum() == 2  # what a network makes of it is its own business


@pytest.mark.parametrize("raw", [[[1.0, 3e38, 1.0]], [[-3e38, -3e38, -3e38]]])
def test_scores_that_are_not_finite_give_no_label(raw: list[list[float]]) -> None:
    with pytest.raises(ArtifactError, match=r"doubling: expected finite scores of classes, got -?inf for samples 1\."):
        doubling().predict(np.array([[0.0, 9.0, 1.0], *raw], np.float32))
    assert doubling().predict(np.array([[0.0, -3e38, 1.0]], np.float32))[0] == [2]  # a class that cannot be


def test_preprocessing_is_by_channel() -> None:
    manifest = replace(
        doubling().manifest,
        inputs=(TensorSpec("x", "float32", (None, 2, 1, 1)),),
        preprocessing={"scale": 1 / 255, "mean": [0.5, 0.0], "std": [0.5, 2.0]},
    )
    raw = np.array([255, 0], np.uint8).reshape(1, 2, 1, 1)
    np.testing.assert_allclose(preprocess(raw, manifest).ravel(), [1.0, 0.0])
    assert preprocess(raw, manifest).dtype == np.float32


def test_without_labels_predict_gives_numbers() -> None:
    assert doubling().predict(np.array([[0, 9, 1]], np.float32))[0] == [1]


@pytest.mark.parametrize(
    ("shape", "task", "message"),
    [
        (
            (None,),
            "",
            r"doubling: expected an output of shape \(N, classes\) to predict a label of each sample, got \(N\) ",
        ),
        ((None, 1), "", r"got \(N, 1\)"),
        ((None, None), "", r"got \(N, any\)"),
        ((None, 7, 3), "", r"got \(N, 7, 3\)"),
        ((None, 3), "regression", r"got \(N, 3\) for the task 'regression'\. Call the model itself"),
        ((None, 3), "multilabel", r"for the task 'multilabel'"),
    ],
)
def test_without_classes_predict_says_so_before_anything_runs(
    shape: tuple[int | None, ...], task: str, message: str
) -> None:
    model = doubling()
    model.manifest = replace(model.manifest, outputs=(TensorSpec("output", "float32", shape),), task=task)
    with pytest.raises(ArtifactError, match=message):
        model.predict(np.ones((2, 3), np.float32))
    assert model._runs["onnxruntime"].sizes == []  # type: ignore[attr-defined]


def test_benchmark_has_a_row_for_each_engine_and_batch() -> None:
    model = load(artifact(), engine="eager")
    rows = model.benchmark((1, 3), seconds=0.01)
    assert [(row["batch"], row["engine"]) for row in rows] == [(1, "eager"), (3, "eager")]
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["threads"] == torch.get_num_threads()


def test_representation_says_what_serves() -> None:
    assert repr(load(artifact(), engine="eager")) == "CompactModel('small', engine='eager', scheme='int8')"

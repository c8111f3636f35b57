"""On a GPU: pytest -m gpu."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from compress.errors import ArtifactError
from compress.export import convert, export_artifact
from compress.runtime import CompactModel, load
from compress.runtime.engines.eager_cuda import mixes_samples
from compress.runtime.engines.on_cuda import OnCUDA
from compress.runtime.manifest import read_manifest
from compress.runtime.trust import sign
from compress.surgery.capture import export_program

pytestmark = pytest.mark.gpu
COMPILED = (
    *("aoti_cuda", "aoti_cuda_bf16", "aoti_cuda_fp16"),
    *("inductor_cuda", "inductor_cuda_bf16", "inductor_cuda_fp16"),
)
PORTABLE = ("cuda_bf16", "cuda_fp16")
ENGINES = ("eager_cuda", "cuda_bf16", "cuda_fp16", *COMPILED)
LIMITS = {name: 0.05 if "bf16" in name else 0.01 if "fp16" in name else 1e-4 for name in ENGINES}
KINDS = ("convolutions", "sentences", "lstm")


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16, eps=1e-3)
        self.wide, self.deep = nn.Conv2d(16, 32, 3, stride=2), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.wide(F.relu(self.norm(self.stem(x)))))
        return self.head((x + self.deep(x)).mean((2, 3)))


class Sentences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.projection = nn.Embedding(11, 32), nn.Linear(32, 96)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(tokens)
        bias = (1.0 - mask.to(x.dtype))[:, None, None] * torch.finfo(torch.float32).min
        parts = self.projection(x).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=bias)
        return self.head(self.norm(x + seen.transpose(1, 2).flatten(2))[:, 0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 16, num_layers=2, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def network(kind: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    if kind == "convolutions":
        return Convolutions().eval(), [torch.randn(100, 3, 16, 16)]
    if kind == "lstm":
        return Recurrent().eval(), [torch.randn(100, 12, 3)]
    mask = torch.ones(100, 9, dtype=torch.int64)
    mask[::3, 4:] = 0
    return Sentences().eval(), [torch.randint(0, 11, (100, 9)), mask]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


def artifact(folder: Path, kind: str, targets: tuple[str, ...] = PORTABLE) -> Path:
    path = folder / "_".join([kind, *targets])
    if not path.exists():
        made, inputs = network(kind)
        program = export_program(made, [value[:2] for value in inputs])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a target that is left out
            manifest = export_artifact(program, path, targets=["eager", *targets], reference=made, held_out=inputs)
        assert set(manifest.skipped) <= set(COMPILED)
    return path


def served(folder: Path, kind: str, engine: str) -> CompactModel:
    """Load an engine; skip the test where the machine's torch cannot load what it compiles."""
    path = artifact(folder, kind, (engine,) if engine in COMPILED else PORTABLE)
    skipped = read_manifest(path).skipped
    if engine in skipped:
        pytest.skip(skipped[engine])
    model = load(path, engine=engine)
    assert model.engine == engine
    return model


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_size_agrees_wherever_the_inputs_are(folder: Path, kind: str, engine: str) -> None:
    made, inputs = network(kind)
    model = served(folder, kind, engine)
    for num in (1, 3, 32, 33, 100, 2):
        some = [value[:num] for value in inputs]
        with torch.no_grad():
            wanted = made(*some)
        on_gpu = model(*[value.cuda() for value in some])
        assert on_gpu.device.type == "cuda"
        found = {"cpu": model(*some), "numpy": torch.from_numpy(model(*[v.numpy() for v in some])), "gpu": on_gpu.cpu()}
        for where, value in found.items():
            assert value.device.type == "cpu"
            assert value.dtype == torch.float32
            error = float((value - wanted).norm() / wanted.norm())
            assert error < LIMITS[engine], (where, num, error)


@pytest.mark.parametrize("engine", ENGINES)
def test_graphs_serve_small_batches(folder: Path, engine: str) -> None:
    model = served(folder, "convolutions", engine)
    x = torch.randn(32, 3, 16, 16)
    for num in (1, 3, 32):
        model(x[:num])
    runs = model._runs[engine]
    assert isinstance(runs, OnCUDA)
    captured = runs._graphs
    assert [sizes[0][0] for sizes in captured] == [1, 4, 32]


def test_what_cannot_be_captured_runs_and_harms_nobody() -> None:
    def run(inputs: list[Tensor]) -> list[Tensor]:
        return [inputs[0] * inputs[0].sum().item()]  # the host has to know the sum

    engine = OnCUDA(run, fills=False)
    x = torch.ones(4, 3, device="cuda")
    for num in (4, 2, 3):
        assert torch.equal(engine([x[:num]])[0], x[:num] * 3 * num)
    assert not engine._graphs
    torch.rand(3, device="cuda")  # outside of any capture
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        engine([torch.ones(1000, 1000, device="cuda")])
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < before + 20_000_000


def test_ranges_of_a_batch_see_that_batch_alone() -> None:
    class Ranged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.abs().amax()

    module = export_program(Ranged(), [torch.ones(2, 3)]).module(check_guards=False)
    assert isinstance(module, GraphModule)
    engine = OnCUDA(lambda inputs: [module(*inputs)], fills=not mixes_samples(module))
    engine([torch.full((4, 3), 1000.0)])
    assert torch.equal(engine([torch.ones(3, 3)])[0], torch.ones(3, 3))


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_are_the_callers_own(folder: Path, engine: str) -> None:
    model = served(folder, "convolutions", engine)
    x = torch.randn(3, 3, 16, 16, device="cuda")
    first = model(x)
    kept, given = first.clone(), x.clone()
    model(torch.randn(4, 3, 16, 16, device="cuda"))
    assert torch.equal(first, kept)
    assert torch.equal(x, given)


@pytest.mark.parametrize("engine", ENGINES)
def test_calls_follow_the_callers_stream(folder: Path, engine: str) -> None:
    model = served(folder, "convolutions", engine)
    x = torch.randn(4, 3, 16, 16, device="cuda")
    wanted = model(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        found = model(late) * 2
    stream.synchronize()
    assert torch.allclose(found, wanted * 2, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_get_their_own(folder: Path, engine: str) -> None:
    _, (inputs,) = network("convolutions")
    model = served(folder, "convolutions", engine)
    parts = [inputs[i : i + 10].numpy() for i in range(0, 60, 10)]
    wanted = [model(part) for part in parts]
    found: dict[int, list[np.ndarray]] = {}

    def serve(i: int) -> None:
        found[i] = [model(parts[i]) for _ in range(20)]

    threads = [Thread(target=serve, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.allclose(each, wanted[i], atol=1e-5) for i in found for each in found[i])
    assert {len(each) for each in found.values()} == {20}


def test_a_device_is_chosen(folder: Path) -> None:
    path = artifact(folder, "convolutions")
    on_gpu = {"eager_cuda", *PORTABLE}
    assert set(load(path, "cuda").engines) == on_gpu
    assert load(path, "cpu").engines == ("eager",)
    assert set(load(path).engines) == {"eager", *on_gpu}
    with pytest.raises(ArtifactError, match="expected one that runs on cpu, got eager_cuda"):
        load(path, "cpu", engine="eager_cuda")


@pytest.mark.parametrize("name", COMPILED)
def test_kernels_are_in_the_manifest(folder: Path, name: str) -> None:
    served(folder, "convolutions", name)
    target = read_manifest(artifact(folder, "convolutions", (name,))).targets[name]
    assert target.census["float_kernels"] >= 3, target.census
    assert target.requires["cuda"] == "{}.{}".format(*torch.cuda.get_device_capability())


def test_another_gpus_code_is_left_out(tmp_path: Path) -> None:
    made, inputs = network("convolutions")
    path = tmp_path / "other"
    program = export_program(made, [inputs[0][:2]])
    export_artifact(program, path, targets=["eager", "cuda_fp16"], reference=made, held_out=inputs)
    content = json.loads((path / "manifest.json").read_text())
    content["targets"]["cuda_fp16"]["requires"]["cuda"] = "1.0"
    (path / "manifest.json").write_text(json.dumps(content))
    sign(path)
    with pytest.warns(UserWarning, match="cuda_fp16: built for compute capability 1.0, this is"):
        assert "cuda_fp16" not in load(path).engines


def test_a_target_is_added_later(tmp_path: Path) -> None:
    made, inputs = network("lstm")
    path = tmp_path / "grown"
    export_artifact(export_program(made, [inputs[0][:2]]), path, targets=["eager"], reference=made, held_out=inputs)
    convert(path, ["cuda_fp16"])
    assert load(path, "cuda", engine="cuda_fp16")(inputs[0]).shape == (100, 5)

"""Teachers from files, among them one that another framework made."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compress.distill import (
    ArtifactTeacher,
    Classification,
    Distiller,
    Ensemble,
    Hint,
    OnnxTeacher,
    ProgramTeacher,
    SoftTarget,
    freeze,
)
from compress.errors import RecipeError
from compress.export import export_artifact
from compress.runtime import load
from compress.surgery.capture import export_program as capture_program
from tests.networks import Residual, images, trainer


def export_program(network: nn.Module, x: Tensor, path: Path) -> str:
    batch = torch.export.Dim("batch", min=1, max=1024)
    torch.export.save(torch.export.export(network, (x,), dynamic_shapes=({0: batch},)), path)
    return str(path)


def export_onnx(network: nn.Module, x: Tensor, path: Path, **arguments: Any) -> str:
    program = torch.onnx.export(network.eval(), (x,), dynamo=True, verbose=False, **arguments)
    assert program is not None
    program.save(str(path))
    return str(path)


def dynamic() -> dict[str, Any]:
    return {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=1024)},)}


@pytest.fixture(scope="module")
def digits() -> dict[str, Tensor]:
    """Real images, (N, 1, 8, 8) in [0, 1], and classes; 600 with the framework's answers, 400 to judge."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    x = torch.from_numpy(data.images[order] / 16).float()[:, None]
    y = torch.from_numpy(data.target[order])
    return {"x": x[:1000], "y": y[:1000], "test_x": x[1000:], "test_y": y[1000:]}


@pytest.fixture(scope="module")
def sklearn_teacher(digits: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A support-vector machine, exported by scikit-learn's own exporter."""
    from skl2onnx import to_onnx
    from sklearn.svm import SVC

    x = digits["x"].flatten(1).numpy()
    model = SVC(gamma=0.05, probability=True, random_state=0).fit(x, digits["y"].numpy())
    path = tmp_path_factory.mktemp("sklearn") / "svc.onnx"
    path.write_bytes(to_onnx(model, x[:1], options={"zipmap": False}).SerializeToString())
    return str(path), model


def accuracy(network: Any, digits: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float((network(digits["test_x"]).argmax(1) == digits["test_y"]).float().mean())


def test_another_frameworks_teacher_says_what_it_says_there(
    sklearn_teacher: tuple[str, Any], digits: dict[str, Tensor]
) -> None:
    path, model = sklearn_teacher
    teacher = OnnxTeacher(path, output="probabilities", layout="flat", gives="probabilities")
    expected = model.predict_proba(digits["test_x"].flatten(1).numpy())
    np.testing.assert_allclose(teacher(digits["test_x"]).softmax(1).numpy(), expected, atol=1e-4)
    assert accuracy(teacher, digits) > 0.97
    with pytest.raises(RecipeError, match=r"output: expected one of label, probabilities, got 'logits'"):
        OnnxTeacher(path, output="logits", layout="flat")(digits["test_x"])


def test_another_frameworks_teacher_teaches_without_any_label(
    sklearn_teacher: tuple[str, Any], digits: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    teacher = OnnxTeacher(sklearn_teacher[0], layout="flat", gives="probabilities")
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    before = accuracy(student, digits)
    module = Distiller(
        student,
        task=Classification(10),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        teacher=teacher,
        losses=[SoftTarget(temperature=2.0, weight=1.0)],
    )
    data = DataLoader(TensorDataset(digits["x"]), batch_size=50, shuffle=True)
    trainer(max_epochs=15).fit(module, data)
    assert before < 0.3
    assert accuracy(student.eval(), digits) > 0.9


def test_a_program_gives_what_the_network_gave(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, (x, _) = freeze(Residual(8)), images(12)
    teacher = ProgramTeacher(export_program(network, x, tmp_path / "teacher.pt2"))
    assert torch.allclose(teacher(x), network(x), atol=1e-5)
    assert torch.allclose(teacher(x[:5]), network(x[:5]), atol=1e-5)
    assert not list(teacher.parameters())
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert torch.equal(twin(x), teacher(x))


def test_a_program_in_training_mode_is_refused(tmp_path: Path) -> None:
    path = export_program(Residual(8).train(), images(12)[0], tmp_path / "teacher.pt2")
    with pytest.raises(RecipeError, match="expected a program exported in eval mode"):
        ProgramTeacher(path)(images(2)[0])


def test_an_onnx_file_in_its_own_layout_and_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class ChannelsLast(nn.Module):
        """As Keras would: (N, H, W, C), images in [0, 255]."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = Residual(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.permute(0, 3, 1, 2) / 255).softmax(1)

    network, (x, _) = freeze(ChannelsLast()), images(12)
    raw = (x * 0.5 + 0.4) * 255
    path = export_onnx(network, raw.permute(0, 2, 3, 1), tmp_path / "keras.onnx", **dynamic())
    teacher = OnnxTeacher(path, layout="NHWC", gives="probabilities", scale=127.5, offset=[102.0], num_threads=1)
    assert torch.allclose(teacher(x).softmax(1), network(raw.permute(0, 2, 3, 1)), atol=1e-5)
    assert torch.equal(pickle.loads(pickle.dumps(teacher))(x), teacher(x))


def test_a_file_that_knows_one_batch_size_only(tmp_path: Path) -> None:
    network, (x, _) = freeze(Residual(8)), images(12)
    teacher = OnnxTeacher(export_onnx(network, x[:4], tmp_path / "fixed.onnx"))
    assert torch.allclose(teacher(x), network(x), atol=1e-5)


def test_files_teach_together_and_have_no_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks, (x, y) = [freeze(Residual(8)), freeze(Residual(4))], images(12)
    files = [
        ProgramTeacher(export_program(networks[0], x, tmp_path / "a.pt2")),
        OnnxTeacher(export_onnx(networks[1], x, tmp_path / "b.onnx", **dynamic())),
    ]

    def module(teacher: nn.Module, *losses: Any) -> Distiller:
        return Distiller(
            Residual(4).eval(), task=Classification(3), optimizer=torch.optim.Adam, teacher=teacher, losses=losses
        )

    torch.manual_seed(1)
    ours = module(Ensemble(files), SoftTarget())
    torch.manual_seed(1)
    theirs = module(Ensemble(networks), SoftTarget())
    assert torch.allclose(ours.objective(ours.lesson((x, y)))[0], theirs.objective(theirs.lesson((x, y)))[0], atol=1e-5)
    with pytest.raises(RecipeError, match=r"layers \(teacher\): expected a layer of ProgramTeacher.*no layers"):
        module(files[0], Hint({"norm": "norm"})).prepare(lambda: (x, y))


def test_an_artefact_teaches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, (x, _) = freeze(Residual(8)), images(12)
    export_artifact(
        capture_program(network, (x,)), tmp_path / "artifact", targets=["eager"], reference=network, held_out=[x]
    )
    teacher = ArtifactTeacher(str(tmp_path / "artifact"), engine="eager")
    assert torch.allclose(teacher(x), network(x), atol=1e-4)
    assert torch.equal(teacher(x), load(tmp_path / "artifact", engine="eager")(x))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: OnnxTeacher("none.onnx"), r"path: expected a file, got none at none\.onnx"),
        (lambda path: OnnxTeacher(path, layout="CHWN"), "layout: expected NCHW, NHWC, flat, got 'CHWN'"),
        (lambda path: OnnxTeacher(path, gives="scores"), "gives: expected logits or probabilities, got 'scores'"),
        (lambda path: OnnxTeacher(path)(torch.zeros(1, 2)), "path: expected an ONNX file"),
        (lambda path: ProgramTeacher(path)(torch.zeros(1, 2)), "path: expected a program of torch.export.save"),
    ],
)
def test_mistakes_are_named(make: Any, error: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"not a network")
    with pytest.raises(RecipeError, match=error):
        make(str(path))

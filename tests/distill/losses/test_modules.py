"""Every loss as a module: it fits a student, learns what it has to learn, and says what is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from compress import distill
from compress.data import keyed_loader
from compress.distill import Classification, DistillationLoss, Distiller, View
from compress.distill import functional as F
from compress.distill.lesson import Lesson
from compress.errors import CompressError, DataError, RecipeError
from tests.networks import Residual, images, loader, trainer

PAIRS = {"norm": "norm", "norm1": "norm1"}
POINT = {"relu": "relu"}

CASES: dict[str, DistillationLoss] = {
    "SoftTarget": distill.SoftTarget(weight=0.5),
    "StandardizedSoftTarget": distill.StandardizedSoftTarget(weight=0.5),
    "DecoupledSoftTarget": distill.DecoupledSoftTarget(weight=0.5),
    "DIST": distill.DIST(weight=0.5),
    "LogitMSE": distill.LogitMSE(weight=0.5),
    "SoftLabels": distill.SoftLabels(weight=0.5),
    "MultiLabelSoftTarget": distill.MultiLabelSoftTarget(weight=0.5),
    "BoundedRegression": distill.BoundedRegression(weight=0.5),
    "Hint": distill.Hint(PAIRS),
    "AttentionTransfer": distill.AttentionTransfer(PAIRS),
    "SimilarityPreserving": distill.SimilarityPreserving(PAIRS, weight=1.0),
    "NeuronSelectivity": distill.NeuronSelectivity(PAIRS),
    "Flow": distill.Flow(PAIRS),
    "Overhaul": distill.Overhaul(PAIRS),
    "RelationalDistance": distill.RelationalDistance(POINT),
    "RelationalAngle": distill.RelationalAngle(POINT),
    "CorrelationCongruence": distill.CorrelationCongruence(POINT),
    "ProbabilisticTransfer": distill.ProbabilisticTransfer(POINT, weight=10.0),
    "VariationalInformation": distill.VariationalInformation(PAIRS),
    "KnowledgeReview": distill.KnowledgeReview(PAIRS, channels=8),
    "ContrastiveRepresentation": distill.ContrastiveRepresentation(POINT, num_samples=48, negatives=16, dim=8),
    "CosineEmbedding": distill.CosineEmbedding({"fc": "fc"}),
    "Exits": distill.Exits(["norm"]),
}
LEARNS = {
    "CosineEmbedding",
    "Hint",
    "Flow",
    "Overhaul",
    "VariationalInformation",
    "KnowledgeReview",
    "ContrastiveRepresentation",
    "Exits",
}


def make(losses: list[DistillationLoss], teacher: nn.Module | None, **arguments: Any) -> Distiller:
    return Distiller(
        Residual(4),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        teacher=teacher,
        losses=losses,
        **arguments,
    )


@pytest.mark.parametrize("name", CASES)
def test_a_fit_with_each_loss(name: str) -> None:
    torch.manual_seed(0)
    loss = CASES[name]
    target: Any = keyed_loader(loader(), seed=0)
    if name == "BoundedRegression":
        target = DataLoader(torch.utils.data.TensorDataset(images(48)[0], torch.randn(48, 3)), batch_size=12)
    module = make([loss], Residual(8))
    if name == "BoundedRegression":
        module.task = distill.Regression()
    before = {key: value.detach().clone() for key, value in module.student.named_parameters()}
    fit = trainer(max_epochs=1)
    fit.fit(module, target)
    value = float(fit.callback_metrics[f"train/{loss.name}_loss"])
    assert math.isfinite(value)
    assert all(not torch.equal(before[key], value) for key, value in module.student.named_parameters())
    learned = dict(module.losses.named_parameters())
    assert bool(learned) == (name in LEARNS)
    optimised = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in learned.values()} <= optimised
    assert not any(key.startswith("losses") for key in module.student.state_dict())


@pytest.mark.parametrize("name", [name for name in CASES if name not in {"BoundedRegression", "Exits"}])
def test_each_loss_alone_falls(name: str) -> None:
    """Without labels and on one batch, training on the loss makes the loss smaller."""
    torch.manual_seed(0)
    module = make([CASES[name]], Residual(8).eval(), task_weight=0.0)
    (x, y), keys = images(48), torch.stack([torch.arange(48), torch.zeros(48, dtype=torch.int64)], 1)
    module.prepare(lambda: (x, y, keys))
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    values = []
    for _ in range(25):
        optimizer.zero_grad()
        value, _ = module.objective(module.lesson((x, y, keys)))
        value.backward()
        optimizer.step()
        values.append(float(value))
    assert sum(values[-3:]) < sum(values[:3])


class Transformer(nn.Module):
    """Two layers of self-attention over tokens, with maps and projections that can be tapped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens)
        q, k, v = self.query(x), self.key(x), self.value(x)
        y, _ = self.attention(q, k, v, key_padding_mask=attention_mask == 0, average_attn_weights=False)
        return {"logits": self.head(x + y)}


def text(num: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 8, (num,), generator=generator)
    mask = (torch.arange(8)[None] < lengths[:, None]).long()
    tokens = torch.randint(1, 11, (num, 8), generator=generator) * mask
    return {"tokens": tokens, "attention_mask": mask, "labels": torch.where(mask.bool(), tokens % 5, -100)}


@pytest.mark.parametrize(
    "loss",
    [
        distill.TokenSoftTarget(weight=0.5),
        distill.HiddenStates({"embed": "embed"}),
        distill.CosineEmbedding({"embed": "embed"}),
        distill.AttentionMaps({"attention:1": "attention:1"}),
        distill.SelfAttentionRelation({"query": "query", "key": "key", "value": "value"}, num_heads=4),
    ],
    ids=lambda loss: loss.name,
)
def test_transformers_and_padding(loss: DistillationLoss) -> None:
    torch.manual_seed(0)
    module = Distiller(
        Transformer(8),
        task=Classification(5),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        teacher=Transformer(16),
        losses=[loss],
    )
    batch = text()
    module.prepare(lambda: batch)
    total, parts = module.objective(module.lesson(batch))
    total.backward()
    assert all(math.isfinite(float(part)) for part in parts.values())
    # What stands in the padding changes nothing.
    other = {**batch, "tokens": torch.where(batch["attention_mask"].bool(), batch["tokens"], 7)}
    again = module.objective(module.lesson(other))[0]
    assert torch.allclose(again, total, atol=1e-5)


def test_wildcards_pair_layers_in_order() -> None:
    loss = distill.Hint({"norm?": "norm?"})
    module = make([loss], Residual(8))
    module.prepare(lambda: images(2))
    assert loss.pairs == [("norm1", "norm1"), ("norm2", "norm2")]
    with pytest.raises(RecipeError, match=r"to match equally many layers, got 2 .* and 1"):
        make([distill.Hint({"norm?": "fc"})], Residual(8)).prepare(lambda: images(2))


def lesson(**arguments: Any) -> Lesson:
    view = View(torch.zeros(4, 3), {"relu": torch.randn(4, 4)})
    return Lesson(view, [view], **arguments)


def test_each_pair_of_activations_equals_the_function() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 4, 4)
    loss = distill.AttentionTransfer({"a": "b"})
    loss.resolve(lambda pattern: [pattern], lambda pattern: [pattern])
    given = Lesson(View(None, {"a": ours}), [View(None, {"b": theirs})])
    expected = F.attention_transfer(torch.nn.functional.adaptive_avg_pool2d(ours, 4), theirs)
    assert torch.allclose(loss(given), expected)


@pytest.mark.parametrize(
    ("make_loss", "error"),
    [
        (lambda: distill.Hint({}), "distill.losses.layers: expected pairs"),
        (lambda: distill.SoftTarget(temperature=0), "temperature: expected a value above 0"),
        (lambda: distill.SoftTarget(weight=-1), "weight: expected 0 or more, got -1"),
        (lambda: distill.DecoupledSoftTarget(alpha=-1), "alpha, beta: expected 0 or more"),
        (
            lambda: distill.ContrastiveRepresentation(POINT, num_samples=10, negatives=10),
            r"expected a number in \[1, 10\)",
        ),
        (lambda: distill.SelfAttentionRelation(POINT, num_heads=0), "num_heads: expected at least 1"),
        (lambda: distill.Exits([]), "expected names of student layers"),
        (lambda: distill.Exits(["norm"], soft=2), r"soft: expected a value in \[0, 1\]"),
        (lambda: distill.KnowledgeReview(PAIRS, channels=0), "channels: expected at least 1"),
    ],
)
def test_mistakes_are_named(make_loss: Any, error: str) -> None:
    with pytest.raises(RecipeError, match=error):
        make_loss()


@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (distill.Flow({"norm": "norm"}), "expected two pairs or more"),
        (distill.Overhaul({"relu": "relu"}), "expected BatchNorm layers"),
        (distill.KnowledgeReview({"fc": "fc"}), r"expected maps \(N, C, H, W\)"),
        (distill.Hint({"nrm": "norm"}), r"layers \(student\): expected a layer of Residual, got 'nrm'"),
        (distill.Hint({"norm": "nrm"}), r"layers \(teacher\): expected a layer of Residual, got 'nrm'"),
    ],
)
def test_layers_that_do_not_fit(loss: DistillationLoss, error: str) -> None:
    with pytest.raises(CompressError, match=error):
        make([loss], Residual(8)).prepare(lambda: images(2))


def test_what_batches_must_carry() -> None:
    contrast = distill.ContrastiveRepresentation(POINT, num_samples=48, negatives=16)
    contrast.resolve(lambda pattern: [pattern], lambda pattern: [pattern])
    with pytest.raises(DataError, match="expected keys of the samples"):
        contrast(lesson())
    with pytest.raises(DataError, match="num_samples: expected more than 99"):
        contrast(lesson(index=torch.tensor([99])))
    domains = distill.MaximumMeanDiscrepancy(["relu"])
    domains.resolve(lambda pattern: [pattern], lambda pattern: [pattern])
    with pytest.raises(DataError, match="'source': batch, 'target': batch"):
        domains(lesson())

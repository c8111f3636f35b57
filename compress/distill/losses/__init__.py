"""Distillation losses as modules that a recipe can name, each with its weight and its schedule."""

from compress.distill.losses.base import DistillationLoss, FeatureLoss, ResponseLoss
from compress.distill.losses.contrastive import ContrastiveRepresentation
from compress.distill.losses.learned import KnowledgeReview, VariationalInformation
from compress.distill.losses.maps import (
    AttentionTransfer,
    Flow,
    Hint,
    NeuronSelectivity,
    Overhaul,
    SimilarityPreserving,
)
from compress.distill.losses.relations import (
    CorrelationCongruence,
    ProbabilisticTransfer,
    RelationalAngle,
    RelationalDistance,
)
from compress.distill.losses.responses import (
    DIST,
    BoundedRegression,
    DecoupledSoftTarget,
    LogitMSE,
    MultiLabelSoftTarget,
    SoftLabels,
    SoftTarget,
    StandardizedSoftTarget,
    TokenSoftTarget,
)
from compress.distill.losses.student_only import CorrelationAlignment, Exits, MaximumMeanDiscrepancy
from compress.distill.losses.transformers import AttentionMaps, CosineEmbedding, HiddenStates, SelfAttentionRelation

__all__ = [
    "DIST",
    "AttentionMaps",
    "AttentionTransfer",
    "BoundedRegression",
    "ContrastiveRepresentation",
    "CorrelationAlignment",
    "CorrelationCongruence",
    "CosineEmbedding",
    "DecoupledSoftTarget",
    "DistillationLoss",
    "Exits",
    "FeatureLoss",
    "Flow",
    "HiddenStates",
    "Hint",
    "KnowledgeReview",
    "LogitMSE",
    "MaximumMeanDiscrepancy",
    "MultiLabelSoftTarget",
    "NeuronSelectivity",
    "Overhaul",
    "ProbabilisticTransfer",
    "RelationalAngle",
    "RelationalDistance",
    "ResponseLoss",
    "SelfAttentionRelation",
    "SimilarityPreserving",
    "SoftLabels",
    "SoftTarget",
    "StandardizedSoftTarget",
    "TokenSoftTarget",
    "VariationalInformation",
]

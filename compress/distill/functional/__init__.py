"""Distillation losses as pure functions: each formula once, with its paper."""

from compress.distill.functional.distributions import (
    correlation_alignment,
    maximum_mean_discrepancy,
    noise_contrastive,
    variational,
)
from compress.distill.functional.maps import (
    attention_transfer,
    flow,
    hierarchical_context,
    hint,
    margin_of,
    margin_relu,
    neuron_selectivity,
    overhaul,
    similarity_preserving,
)
from compress.distill.functional.relations import (
    correlation_congruence,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
)
from compress.distill.functional.responses import (
    bounded_regression,
    decoupled,
    dist,
    logit_mse,
    multi_label,
    soft_labels,
    soft_target,
    standardized_soft_target,
)
from compress.distill.functional.sequences import (
    attention_maps,
    cosine_embedding,
    hidden_states,
    self_attention_relation,
    token_soft_target,
)

__all__ = [
    "attention_maps",
    "attention_transfer",
    "bounded_regression",
    "correlation_alignment",
    "correlation_congruence",
    "cosine_embedding",
    "decoupled",
    "dist",
    "flow",
    "hidden_states",
    "hierarchical_context",
    "hint",
    "logit_mse",
    "margin_of",
    "margin_relu",
    "maximum_mean_discrepancy",
    "multi_label",
    "neuron_selectivity",
    "noise_contrastive",
    "overhaul",
    "probabilistic_transfer",
    "relational_angle",
    "relational_distance",
    "self_attention_relation",
    "similarity_preserving",
    "soft_labels",
    "soft_target",
    "standardized_soft_target",
    "token_soft_target",
    "variational",
]

"""Losses: pure functions, each a scalar that has a gradient. Supervised and self-supervised, as the survey divides
them."""

from mmllmrec.losses.self_supervised import alignment, bootstrap, info_nce, reconstruction, uniformity
from mmllmrec.losses.supervised import (
    adaptive_hinge,
    bce,
    bpr,
    embedding_norm,
    hinge,
    l2,
    matched_softmax,
    mean_squares,
    mse,
    sampled_softmax,
    softmax,
)

__all__ = [
    "adaptive_hinge",
    "alignment",
    "bce",
    "bootstrap",
    "bpr",
    "embedding_norm",
    "hinge",
    "info_nce",
    "l2",
    "matched_softmax",
    "mean_squares",
    "mse",
    "reconstruction",
    "sampled_softmax",
    "softmax",
    "uniformity",
]

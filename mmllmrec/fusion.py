"""Fusion: many vectors of one item into one, with whatever is absent left out.

Legend: B batch, M vectors (modalities and others), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmllmrec.data.interactions import DataError


def masked_softmax(logits: Tensor, present: Tensor) -> Tensor:
    """Softmax over the present ones of the last dim: (..., M), (..., M) bool -> (..., M).

    The weight of an absent one is exactly 0, and so is the gradient of its logit; a row with none present is all zeros.
    """
    some = present.any(dim=-1, keepdim=True)
    # a row of -inf alone would be NaN inside, forward and backward: such rows are computed unmasked, then zeroed
    weights = torch.softmax(logits.masked_fill(~present & some, float("-inf")), dim=-1)
    return weights.masked_fill(~present, 0.0)


def mean(vectors: Tensor, present: Tensor) -> Tensor:
    """Mean of the vectors that are present: (B, M, D), (B, M) bool -> (B, D); zeros where none is."""
    _check(vectors, present)
    total = vectors.masked_fill(~present[..., None], 0.0).sum(dim=1)
    return total / present.sum(dim=1, keepdim=True).clamp(min=1)


class Gate(nn.Module):
    """Dense softmax gate: (B, M, D), (B, M) bool -> fused (B, D), weights (B, M).

    weights = softmax over present m of (W [v_1; ...; v_M] + b)_m with absent v set to zero; fused = sum of
    weights_m v_m. A mixture of experts in which every expert is kept (Jacobs et al. 1991, with the vectors as the
    experts' outputs and, as a departure, also as the gate's input). W and b start at zero, so training starts from the
    mean of what is present. What an absent vector holds, NaN included, has weight, influence and gradient exactly 0;
    a row with none present is exactly zero. Raises ``DataError`` on other shapes.
    """

    def __init__(self, dim: int, vectors: int):
        super().__init__()
        self.shape = (vectors, dim)
        self.linear = nn.Linear(vectors * dim, vectors)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        _check(vectors, present)
        if vectors.shape[1:] != self.shape:
            raise DataError(f"Gate: vectors {tuple(vectors.shape)}; expected (B, {self.shape[0]}, {self.shape[1]})")
        vectors = vectors.masked_fill(~present[..., None], 0.0)
        weights = masked_softmax(self.linear(vectors.flatten(1)), present)
        return (weights[..., None] * vectors).sum(dim=1), weights


class Mean(nn.Module):
    """Unweighted: (B, M, D), (B, M) bool -> the mean of what is present (B, D), its weights (B, M)."""

    def __init__(self, dim: int, vectors: int):
        super().__init__()

    def forward(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        return mean(vectors, present), present / present.sum(dim=1, keepdim=True).clamp(min=1)


class Concat(nn.Module):
    """Side by side and through one linear map: (B, M, D), (B, M) bool -> fused (B, D), weights (B, M).

    fused = W [v_1; ...; v_M] + b, an absent v zero and its presence a column of its own; the weights are those of
    presence, for the map has none a row. A row with none present is exactly zero.
    """

    def __init__(self, dim: int, vectors: int):
        super().__init__()
        self.linear = nn.Linear(vectors * (dim + 1), dim)

    def forward(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        _check(vectors, present)
        flat = vectors.masked_fill(~present[..., None], 0.0).flatten(1)
        fused = self.linear(torch.cat([flat, present.to(flat.dtype)], dim=1))
        return fused * present.any(dim=1, keepdim=True), present / present.sum(dim=1, keepdim=True).clamp(min=1)


class Attentive(nn.Module):
    """Each vector weighed by its own content: (B, M, D), (B, M) bool -> fused (B, D), weights (B, M).

    weights = softmax over present m of a . tanh(W v_m + e_m), fused = sum of weights_m v_m (Bahdanau et al. 2015, eq.
    6, with e_m, a vector a modality, in place of the query). Unlike ``Gate`` a weight does not see the other vectors
    but through the softmax.
    """

    def __init__(self, dim: int, vectors: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.kind = nn.Parameter(torch.zeros(vectors, dim))
        self.score = nn.Linear(dim, 1, bias=False)

    def forward(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        _check(vectors, present)
        vectors = vectors.masked_fill(~present[..., None], 0.0)
        logits = self.score(torch.tanh(self.linear(vectors) + self.kind))[..., 0]
        weights = masked_softmax(logits, present)
        return (weights[..., None] * vectors).sum(dim=1), weights


FUSIONS: dict[str, type[nn.Module]] = {"gate": Gate, "mean": Mean, "concat": Concat, "attentive": Attentive}


def _check(vectors: Tensor, present: Tensor) -> None:
    if vectors.ndim != 3 or present.shape != vectors.shape[:2] or present.dtype != torch.bool:
        raise DataError(
            f"fusion: vectors {tuple(vectors.shape)} and presence {tuple(present.shape)} {present.dtype}; "
            "expected (B, M, D) and (B, M) bool"
        )

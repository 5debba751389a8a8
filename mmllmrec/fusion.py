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


class Sum(nn.Module):
    """Added up: (B, M, D), (B, M) bool -> the sum of what is present (B, D), its weights (B, M), each 1."""

    def __init__(self, dim: int, vectors: int):
        super().__init__()

    def forward(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        _check(vectors, present)
        return vectors.masked_fill(~present[..., None], 0.0).sum(dim=1), present.to(vectors.dtype)


class Max(nn.Module):
    """The largest entry of each column: (B, M, D), (B, M) bool -> fused (B, D), weights (B, M).

    fused_d = max over present m of v_md; the weight of a vector is the share of columns it gives. A row with none
    present is exactly zero.
    """

    def __init__(self, dim: int, vectors: int):
        super().__init__()
        self.shape = (vectors, dim)

    def forward(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        _check(vectors, present)
        some = present.any(dim=1, keepdim=True)
        # a row with none present is computed unmasked, then zeroed: -inf would be NaN in the backward
        best, which = (
            vectors.masked_fill(~present[..., None], 0.0)
            .masked_fill(~(present | ~some)[..., None], float("-inf"))
            .max(dim=1)
        )
        weights = nn.functional.one_hot(which, self.shape[0]).to(vectors.dtype).mean(dim=1)
        return best * some, weights * some


class Experts(nn.Module):
    """Mixture of experts: (B, M, D), (B, M) bool -> fused (B, D), weights (B, M).

    x = [v_1; ...; v_M; presence] with an absent v zero; of E linear experts those with the ``top`` largest gate logits
    G x are kept, and fused = sum over them of softmax(G x)_e (W_e x + b_e), Shazeer et al. 2017, eqs. 1 and 5, without
    the noise. The weights are those of presence, for a row has them an expert and not a vector. A row with none present
    is exactly zero. Raises ``DataError`` for ``top`` outside 1..E.
    """

    def __init__(self, dim: int, vectors: int, *, experts: int = 4, top: int = 2):
        super().__init__()
        if not 1 <= top <= experts:
            raise DataError(f"top={top}: between 1 and the {experts} experts")
        width = vectors * (dim + 1)
        self.top, self.gate = top, nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, dim) for _ in range(experts))

    def forward(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        _check(vectors, present)
        flat = vectors.masked_fill(~present[..., None], 0.0).flatten(1)
        x = torch.cat([flat, present.to(flat.dtype)], dim=1)
        logits = self.gate(x)
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(self.top, dim=1).indices, True)
        share = masked_softmax(logits, kept)
        fused = sum(share[:, e, None] * expert(x) for e, expert in enumerate(self.experts))
        return fused * present.any(dim=1, keepdim=True), present / present.sum(dim=1, keepdim=True).clamp(min=1)


class Heuristic(nn.Module):
    """A rule without parameters: what is known of an item decides how far its first vector, the ID, is trusted.

    (B, M, D), (B, M) bool, counts (B,) -> fused (B, D), weights (B, M). The first vector has weight n / (n + ``half``)
    with n the item's training events (without ``counts``: 1/2); the other present ones share the rest equally. Where
    either side is absent the other has all of it; a row with none present is exactly zero. ``half`` is in events.
    """

    def __init__(self, dim: int, vectors: int, *, half: float = 10.0):
        super().__init__()
        self.scale = half

    def forward(self, vectors: Tensor, present: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _check(vectors, present)
        own = torch.full(present.shape[:1], 0.5) if counts is None else counts / (counts + self.scale)
        own = own.to(vectors)[:, None]
        first, rest = present[:, :1], present[:, 1:]
        others = rest.any(dim=1, keepdim=True)
        share = torch.where(others, own, 1.0) * first
        left = torch.where(first, 1 - share, 1.0)
        weights = torch.cat([share, left * rest / rest.sum(dim=1, keepdim=True).clamp(min=1)], dim=1)
        return (weights[..., None] * vectors.masked_fill(~present[..., None], 0.0)).sum(dim=1), weights


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


FUSIONS: dict[str, type[nn.Module]] = {
    "sum": Sum,
    "mean": Mean,
    "max": Max,
    "concat": Concat,
    "gate": Gate,
    "attentive": Attentive,
    "experts": Experts,
    "heuristic": Heuristic,
}


def _check(vectors: Tensor, present: Tensor) -> None:
    if vectors.ndim != 3 or present.shape != vectors.shape[:2] or present.dtype != torch.bool:
        raise DataError(
            f"fusion: vectors {tuple(vectors.shape)} and presence {tuple(present.shape)} {present.dtype}; "
            "expected (B, M, D) and (B, M) bool"
        )

"""Supervised losses: pointwise, pairwise and softmax, and the penalties that go with them.

Pure functions of scores and embeddings, each a scalar that has a gradient. Survey (arXiv 2502.15711), section VI.A.

Legend: B batch, K negatives, C candidates, D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllmrec.data.interactions import DataError

BLOCK = 1 << 18  # scores that ``matched_softmax`` holds at once (1 MiB, which stays in cache)


def bce(positive: Tensor, negative: Tensor) -> Tensor:
    """Binary cross-entropy, pointwise: a positive is a yes, each of its negatives a no, and every pair counts alike.

    (sum_b -log sigmoid(positive_b) + sum_bk -log(1 - sigmoid(negative_bk))) / (B (1 + K)), He et al. 2017 (NCF), eq. 7,
    as a mean; (B,), (B, K) -> (). At scores of zero it is log 2.

    >>> round(bce(torch.zeros(3), torch.zeros(3, 2)).item(), 4)
    0.6931
    """
    _pairs("bce", positive, negative)
    total = F.softplus(-positive).sum() + F.softplus(negative).sum()
    return total / (positive.numel() + negative.numel())


def mse(positive: Tensor, negative: Tensor) -> Tensor:
    """Squared error, pointwise: a positive's score should be 1, a negative's 0.

    (sum_b (positive_b - 1)^2 + sum_bk negative_bk^2) / (B (1 + K)); (B,), (B, K) -> (). Of implicit feedback as Hu et
    al. 2008, eq. 3, with sampled negatives and every confidence 1.

    >>> mse(torch.tensor([1.0, 0.0]), torch.tensor([[0.0], [1.0]])).item()
    0.5
    """
    _pairs("mse", positive, negative)
    return ((positive - 1).square().sum() + negative.square().sum()) / (positive.numel() + negative.numel())


def bpr(positive: Tensor, negative: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Bayesian personalised ranking: a positive should score above its negatives.

    mean over b, k of -log sigmoid(positive_b - negative_bk), Rendle et al. 2009, section 4.1; (B,), (B, K) -> ().
    ``mask`` (B, K) bool names the pairs that count; where none does it is 0, with gradient 0. The paper's regulariser
    is a term of its own (``l2``, ``embedding_norm``). At equal scores it is log 2.

    >>> round(bpr(torch.zeros(3), torch.zeros(3, 2)).item(), 4)
    0.6931
    """
    _pairs("bpr", positive, negative)
    each = F.softplus(negative - positive[:, None])
    if mask is None:
        return each.mean()
    return (each * mask).sum() / mask.sum().clamp(min=1)


def hinge(positive: Tensor, negative: Tensor, *, margin: float = 1.0) -> Tensor:
    """Pairwise hinge: a positive should be ``margin`` above each of its negatives, and no more is asked.

    mean over b, k of max(0, margin - positive_b + negative_bk), Weston et al. 2011, eq. 1 without its rank weights;
    (B,), (B, K) -> (). ``margin`` has the units of a score.

    >>> hinge(torch.tensor([2.0, 0.0]), torch.tensor([[0.0], [0.0]])).item()
    0.5
    """
    _pairs("hinge", positive, negative)
    return F.relu(margin - positive[:, None] + negative).mean()


def adaptive_hinge(positive: Tensor, negative: Tensor, *, margin: float = 1.0) -> Tensor:
    """Hinge against the hardest of K negatives: the one with the highest score now.

    mean over b of max(0, margin - positive_b + max_k negative_bk); (B,), (B, K) -> (). The sampled search for a
    violating negative of WARP (Weston et al. 2011, section 3), all K at once and without the weight of the rank. The
    other negatives have gradient exactly 0; with K = 1 it is ``hinge``.

    >>> adaptive_hinge(torch.tensor([1.0]), torch.tensor([[-5.0, 1.5]])).item()
    1.5
    """
    _pairs("adaptive_hinge", positive, negative)
    return F.relu(margin - positive + negative.amax(dim=1)).mean()


def softmax(scores: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Full softmax: each row picks its positive among all C candidates.

    mean over b of -log softmax_c(scores_bc)[target_b]; (B, C), (B,) int64 in 0..C-1 -> (). ``mask`` (B, C) bool names
    what leaves a row's sum, such as the user's other positives: weight and gradient exactly 0; the target is never
    masked. Equal scores give log C. In float32.

    >>> round(softmax(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 4)  # log 4
    1.3863
    """
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise DataError(f"softmax: scores {tuple(scores.shape)}, target {tuple(target.shape)}; expected (B, C), (B,)")
    logits = _wide(scores)
    if mask is not None:
        if mask.shape != logits.shape:
            raise DataError(f"softmax: mask {tuple(mask.shape)}; expected (B, C) = {tuple(logits.shape)}")
        logits = logits.masked_fill(mask.scatter(1, target[:, None], False), float("-inf"))
    return F.cross_entropy(logits, target)


class _Matched(torch.autograd.Function):
    """``matched_softmax``: a block of rows at a time, whose gradients are computed while its scores are at hand."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
        of_queries, of_candidates = torch.empty_like(queries), torch.zeros_like(candidates)
        total = queries.new_zeros(())
        with torch.autocast(queries.device.type, enabled=False):
            for rows in torch.arange(len(queries), device=queries.device).split(max(BLOCK // len(candidates), 1)):
                part = queries[rows]
                each = part @ candidates.T
                each -= each.amax(dim=1, keepdim=True)
                own = each.gather(1, target[rows, None])
                whole = each.exp_().sum(dim=1, keepdim=True)  # one exponential a score: what divides it is a row's
                total += (whole.log() - own).sum()
                of_queries[rows] = each @ candidates / whole
                of_candidates.addmm_(each.T, part / whole)
            of_queries -= candidates[target]
            of_candidates.index_add_(0, target, queries, alpha=-1)
        ctx.save_for_backward(of_queries, of_candidates)
        return total / len(queries)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        of_queries, of_candidates = ctx.saved_tensors
        share = grads[0] / len(of_queries)
        return of_queries * share, of_candidates * share, None


def matched_softmax(queries: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
    """``softmax(queries @ candidates.T, target)`` of factors, of which the (B, C) scores are never held at once.

    (B, D), (C, D), (B,) int64 in 0..C-1 -> (). Has a gradient, and none of its gradient; in float32.

    >>> round(matched_softmax(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 3])).item(), 4)  # log 4
    1.3863
    """
    if queries.ndim != 2 or candidates.shape[1:] != queries.shape[1:] or target.shape != queries.shape[:1]:
        shapes = f"queries {tuple(queries.shape)}, candidates {tuple(candidates.shape)}, target {tuple(target.shape)}"
        raise DataError(f"matched_softmax: {shapes}; expected (B, D), (C, D), (B,)")
    return cast(Tensor, _Matched.apply(_wide(queries), _wide(candidates), target))


def l2(*embeddings: Tensor) -> Tensor:
    """Squared L2 penalty of a batch: 1 / (2B) times the sum of the squared norms of its rows.

    The regulariser of BPR (Rendle et al. 2009) and LightGCN (He et al. 2020, eq. 15) on the embeddings a batch
    touches; each (B, ..., D) -> (). B is the first size of the first one. Being a mean over the batch it does not
    depend on how the batch is divided among processes. A row that a batch has twice counts twice.

    >>> l2(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).item()
    6.25
    """
    return torch.stack([_wide(e).square().sum() for e in embeddings]).sum() / (2 * max(len(embeddings[0]), 1))


def mean_squares(*embeddings: Tensor) -> Tensor:
    """The mean of the squared entries of each, added up: each of any shape -> (). The penalty of the MMGCN family.

    >>> mean_squares(torch.tensor([1.0, 3.0]), torch.tensor([[2.0]])).item()
    9.0
    """
    return torch.stack([_wide(e).square().mean() for e in embeddings]).sum()


class _Norm(torch.autograd.Function):
    """||X||_F of X of any shape, -> (): two passes over X in all, where PyTorch's own takes several times as many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        flat = x.flatten()
        norm = torch.dot(flat, flat).sqrt()
        ctx.save_for_backward(x, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, norm = ctx.saved_tensors
        return x * torch.where(norm > 0, grads[0] / norm, 0.0)


def embedding_norm(*embeddings: Tensor) -> Tensor:
    """The penalty that the RecBole and MMRec family trains with: Frobenius norms (not squared) over the batch size.

    sum over e of ||e||_F / B; each (B, ..., D) -> (). Its gradient X / (B ||X||_F) shrinks every row by the same
    direction of the batch matrix, whatever its scale, so a coefficient means something else than it does for ``l2``:
    published coefficients of that family hold for this one. It depends on the batch size (about B^-1/2), so it does
    on the batch a process holds. The gradient at all-zero embeddings is zero.

    >>> embedding_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).item()
    2.5
    """
    norms = [cast(Tensor, _Norm.apply(_wide(e))) for e in embeddings]
    return torch.stack(norms).sum() / max(len(embeddings[0]), 1)


def sampled_softmax(
    users: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    log_q: Tensor | None = None,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """In-batch sampled softmax with the popularity (logQ) correction: each user picks its positive among C candidates.

    mean over b of -log softmax_c(u_b . v_c / temperature - log q_c)[target_b], Yi et al. 2019, eqs. 3 to 5;
    users (B, D), items (C, D), target (B,) int64 in 0..C-1 -> (). ``log_q`` (C,) is the log of the chance that a
    candidate is in a batch (``sampling.log_inclusion``); None: no correction. ``mask`` (B, C) bool names the row's
    other positives and near-duplicates, which leave the sum (their logit is -inf: weight and gradient exactly 0); the
    target is never masked. ``temperature`` has the units of a score. Departure: the paper normalises both towers,
    here the caller does or does not. Uniform scores give log C. Softmax in float32.

    A batch that has a user several times is cheaper by distinct users: users (R, D), mask (R, C), and ``rows`` (B,)
    int64 in 0..R-1 the user of each target. All targets of a user are then masked for each other.
    """
    if target.shape != (users.shape[:1] if rows is None else rows.shape) or users.shape[-1] != items.shape[-1]:
        raise DataError(
            f"sampled_softmax: users {tuple(users.shape)}, items {tuple(items.shape)}, target {tuple(target.shape)}; "
            "expected (B, D), (C, D) and (B,), or with rows (B,) users (R, D)"
        )
    logits = _wide(users @ items.T)
    if isinstance(temperature, Tensor) or temperature != 1:
        logits = logits / temperature
    if log_q is not None:
        logits = logits - log_q.to(logits)
    if rows is None:
        return softmax(logits, target, mask=mask)
    if mask is not None and mask.shape != logits.shape:
        raise DataError(f"sampled_softmax: mask {tuple(mask.shape)}; expected a row a user, {tuple(logits.shape)}")
    own = logits[rows, target]
    mask = torch.zeros_like(logits, dtype=torch.bool) if mask is None else mask.clone()
    mask[rows, target] = True
    # -log(e^own / (e^own + the others)), where the others are the same for every target of a user
    others = logits.masked_fill(mask, float("-inf")).logsumexp(dim=1)
    return F.softplus(others.index_select(0, rows) - own).mean()


def _pairs(name: str, positive: Tensor, negative: Tensor) -> None:
    if positive.ndim != 1 or negative.ndim != 2 or len(negative) != len(positive):
        raise DataError(
            f"{name}: positive {tuple(positive.shape)} and negative {tuple(negative.shape)}; expected (B,) and (B, K)"
        )


def _wide(x: Tensor) -> Tensor:
    """Half precision is widened to float32; float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

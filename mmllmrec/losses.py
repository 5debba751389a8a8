"""Losses: pure functions of scores and embeddings, each a scalar that has a gradient.

Legend: B batch, K negatives, C candidates, D width, N rows of any kind.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllmrec.data.interactions import DataError


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """Bayesian personalised ranking: a positive should score above its negatives.

    mean over b, k of -log sigmoid(positive_b - negative_bk), Rendle et al. 2009, section 4.1; (B,), (B, K) -> ().
    The paper's regulariser is a term of its own (``l2``, ``embedding_norm``). At equal scores it is log 2.

    >>> round(bpr(torch.zeros(3), torch.zeros(3, 2)).item(), 4)
    0.6931
    """
    if positive.ndim != 1 or negative.ndim != 2 or len(negative) != len(positive):
        raise DataError(
            f"bpr: positive {tuple(positive.shape)} and negative {tuple(negative.shape)}; expected (B,) and (B, K)"
        )
    return F.softplus(negative - positive[:, None]).mean()


def l2(*embeddings: Tensor) -> Tensor:
    """Squared L2 penalty of a batch: 1 / (2B) times the sum of the squared norms of its rows.

    The regulariser of BPR (Rendle et al. 2009, eq. 4) and LightGCN (He et al. 2020, eq. 15) on the embeddings a batch
    touches; each (B, ..., D) -> (). B is the first size of the first one. Being a mean over the batch it does not
    depend on how the batch is divided among processes. A row that a batch has twice counts twice.

    >>> l2(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).item()
    6.25
    """
    return torch.stack([_wide(e).square().sum() for e in embeddings]).sum() / (2 * max(len(embeddings[0]), 1))


def embedding_norm(*embeddings: Tensor) -> Tensor:
    """The penalty that the RecBole and MMRec family trains with: Frobenius norms (not squared) over the batch size.

    sum over e of ||e||_F / B; each (B, ..., D) -> (). Its gradient X / (B ||X||_F) shrinks every row by the same
    direction of the batch matrix, whatever its scale, so a coefficient means something else than it does for ``l2``:
    published coefficients of that family hold for this one. It depends on the batch size (about B^-1/2), so it does
    on the batch a process holds. The gradient at all-zero embeddings is zero.

    >>> embedding_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).item()
    2.5
    """
    norms = [torch.linalg.vector_norm(_wide(e)) for e in embeddings]
    return torch.stack(norms).sum() / max(len(embeddings[0]), 1)


def sampled_softmax(
    users: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    log_q: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """In-batch sampled softmax with the popularity (logQ) correction: each user picks its positive among C candidates.

    mean over b of -log softmax_c(u_b . v_c / temperature - log q_c)[target_b], Yi et al. 2019, eqs. 3 to 5;
    users (B, D), items (C, D), target (B,) int64 in 0..C-1 -> (). ``log_q`` (C,) is the log of the chance that a
    candidate is in a batch (``sampling.log_inclusion``); None: no correction. ``mask`` (B, C) bool names the row's
    other positives and near-duplicates, which leave the sum (their logit is -inf: weight and gradient exactly 0); the
    target is never masked. ``temperature`` has the units of a score. Departure: the paper normalises both towers,
    here the caller does or does not. Uniform scores give log C. Softmax in float32.
    """
    if target.shape != users.shape[:1] or users.shape[-1] != items.shape[-1]:
        raise DataError(
            f"sampled_softmax: users {tuple(users.shape)}, items {tuple(items.shape)}, target {tuple(target.shape)}; "
            "expected (B, D), (C, D) and (B,)"
        )
    logits = _wide(users @ items.T) / temperature
    if log_q is not None:
        logits = logits - log_q.to(logits)
    if mask is not None:
        if mask.shape != logits.shape:
            raise DataError(f"sampled_softmax: mask {tuple(mask.shape)}; expected (B, C) = {tuple(logits.shape)}")
        keep = F.one_hot(target, len(items)).bool()
        logits = logits.masked_fill(mask & ~keep, float("-inf"))
    return F.cross_entropy(logits, target)


def info_nce(a: Tensor, b: Tensor, *, temperature: float | Tensor = 0.1) -> Tensor:
    """Symmetrical InfoNCE: row n of ``a`` belongs to row n of ``b``, all other rows are negatives.

    (L(a, b) + L(b, a)) / 2 with L(a, b) = mean over n of -log softmax_m(cos(a_n, b_m) / temperature)[n], van den Oord
    et al. 2018, eq. 4, in the two-way form of Radford et al. 2021, section 2.3; (N, D), (N, D) -> (). Rows are
    L2-normalised here. Rows that show the same thing twice are each other's negatives: de-duplicate before. Equal
    cosines give log N. Softmax in float32.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise DataError(f"info_nce: a {tuple(a.shape)} and b {tuple(b.shape)}; expected both (N, D)")
    logits = F.normalize(_wide(a), dim=-1) @ F.normalize(_wide(b), dim=-1).T / temperature
    own = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _wide(x: Tensor) -> Tensor:
    """Half precision is widened to float32; float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

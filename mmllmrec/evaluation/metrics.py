"""Ranking metrics: pure functions of where the hits are, per user first; and of what was shown, right or wrong.

Legend: n users, K ranked places, I items, F width of an item's description. ``hits`` (n, K) bool, best place first;
``positives`` (n,) how many there were; ``items`` (n, K) what was shown, ``real`` (n, K) bool whether it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor


def recall(hits: Tensor, positives: Tensor, k: int) -> Tensor:
    """Found positives over all of them: |hits in the first k| / |positives|; (n, K), (n,) -> (n,)."""
    return hits[:, :k].sum(1).double() / positives


def precision(hits: Tensor, positives: Tensor, k: int) -> Tensor:
    """|hits in the first k| / k; (n, K), (n,) -> (n,)."""
    return hits[:, :k].sum(1).double() / k


def hit(hits: Tensor, positives: Tensor, k: int) -> Tensor:
    """1 where the first k hold a positive; (n, K), (n,) -> (n,)."""
    return hits[:, :k].any(1).double()


def mrr(hits: Tensor, positives: Tensor, k: int) -> Tensor:
    """1 / place of the first hit, 0 without one in the first k; (n, K), (n,) -> (n,)."""
    places = torch.arange(1, min(k, hits.shape[1]) + 1, dtype=torch.float64)
    return (hits[:, :k] / places).amax(1)


def average_precision(hits: Tensor, positives: Tensor, k: int) -> Tensor:
    """Sum of the precision at each hit in the first k, over min(|positives|, k); (n, K), (n,) -> (n,).

    The denominator is that of Kaggle's MAP@K; some tools divide by |positives|.
    """
    first = hits[:, :k].double()
    at = first.cumsum(1) / torch.arange(1, first.shape[1] + 1)
    return (at * first).sum(1) / positives.clamp(max=k)


def ndcg(hits: Tensor, positives: Tensor, k: int) -> Tensor:
    """DCG / ideal DCG with gains 0 and 1 and discount log2(place + 1), Jarvelin and Kekalainen 2002; the ideal has
    min(|positives|, k) hits at the top, whatever was found; (n, K), (n,) -> (n,)."""
    discount = 1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64))
    ideal = discount.cumsum(0)[positives.clamp(max=k) - 1]
    return (hits[:, :k] * discount[: hits.shape[1]]).sum(1) / ideal


METRICS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "recall": recall,
    "precision": precision,
    "ndcg": ndcg,
    "hit": hit,
    "mrr": mrr,
    "map": average_precision,
}


def compute(name: str, hits: Tensor, positives: Tensor) -> Tensor:
    """A metric by its written name, per user in float64.

    >>> compute("ndcg@2", torch.tensor([[False, True]]), torch.tensor([1])).item()
    0.6309297535714575
    """
    metric, _, k = name.partition("@")
    if metric not in METRICS or not k.isdecimal() or int(k) < 1:
        raise ValueError(f"metric {name!r}: write one of {sorted(METRICS)} as name@K, such as 'ndcg@20'")
    return METRICS[metric](hits, positives, int(k)).double()


# -- beyond accuracy: of the lists alone -----------------------------------------------------------------------------


def coverage(items: np.ndarray, real: np.ndarray, n_items: int) -> float:
    """Share of the catalogue that at least one user is shown: (n, K), (n, K) -> in [0, 1]."""
    return float((_exposure(items, real, n_items) > 0).mean())


def gini(items: np.ndarray, real: np.ndarray, n_items: int) -> float:
    """Gini coefficient of how often each item is shown: 0 all alike, (I - 1) / I one item alone; (n, K), (n, K) -> ().

    sum_i (2 i - I - 1) x_(i) / (I sum x) over the counts x in ascending order, i from 1. Nothing shown gives 0.
    """
    x = np.sort(_exposure(items, real, n_items))
    weight = 2 * np.arange(1, n_items + 1) - n_items - 1
    return float((weight * x).sum() / (n_items * max(x.sum(), 1)))


def novelty(items: np.ndarray, real: np.ndarray, counts: np.ndarray, n_users: int) -> np.ndarray:
    """Mean self-information of a list in bits, -log2 of the share of users who have taken each item in training
    (Zhou et al. 2010); (n, K), (n, K), counts (I,) -> (n,). An item nobody took counts as though one user had."""
    bits = -np.log2(np.maximum(counts, 1) / n_users)
    return (bits[items] * real).sum(1) / np.maximum(real.sum(1), 1)


def diversity(items: np.ndarray, real: np.ndarray, vectors: np.ndarray | sp.spmatrix) -> np.ndarray:
    """Intra-list diversity: mean over the pairs of a list of 1 - cosine (Ziegler et al. 2005, as a distance);
    (n, K), (n, K), vectors (I, F) of unit or zero length -> (n,). A list of one item has 0.

    The sum over pairs of v_i . v_j is (|sum v|^2 - sum |v|^2) / 2, so no pair is formed.
    """
    row, place = np.nonzero(real)
    shown = sp.csr_matrix(
        (np.ones(len(row), np.float32), (row, items[row, place])), shape=(len(items), vectors.shape[0])
    )
    total = shown @ vectors
    own, whole = shown @ _squared_length(vectors), _squared_length(total)
    pairs = real.sum(1) * (real.sum(1) - 1.0)
    return np.where(pairs > 0, 1 - (whole - own) / np.maximum(pairs, 1), 0.0)


def _squared_length(rows: Any) -> np.ndarray:
    """|x|^2 of each row of a dense or sparse table: (n, F) -> (n,)."""
    return np.asarray((rows.multiply(rows) if sp.issparse(rows) else rows * rows).sum(1)).reshape(-1)


def _exposure(items: np.ndarray, real: np.ndarray, n_items: int) -> np.ndarray:
    return np.bincount(items[real], minlength=n_items)

"""Ranking metrics: pure functions of where the hits are, per user first.

Legend: n users, K ranked places. ``hits`` (n, K) bool, best place first; ``positives`` (n,) how many there were.
"""

from __future__ import annotations

from collections.abc import Callable

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

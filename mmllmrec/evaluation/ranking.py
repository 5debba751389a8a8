"""Full ranking: every candidate item scored for every user, in blocks, with no Python a user.

Legend: B users of a block, n users ranked, I items, D width, K places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.evaluation.metrics import compute
from mmllmrec.seed import generator


@dataclass
class Ranking:
    """The first K places of n users: users (n,), items (n, K), hits (n, K) bool, positives (n,) how many to find."""

    users: np.ndarray
    items: np.ndarray
    hits: Tensor
    positives: Tensor

    def per_user(self, metric: str) -> np.ndarray:
        """Values of ``"ndcg@20"`` and the like, (n,) float64."""
        return compute(metric, self.hits, self.positives).numpy()


def name_of(scorer: Any) -> str:
    """A scorer's name in tables."""
    return str(getattr(scorer, "name", type(scorer).__name__))


def rank(
    scorer: Any,
    positives: Interactions,
    *,
    seen: sp.csr_matrix | None,
    k: int = 50,
    candidates: np.ndarray | None = None,
    users: np.ndarray | None = None,
    seed: int = 0,
    block: int = 2048,
) -> Ranking:
    """Rank all items for each user who has a positive.

    ``scorer`` has ``embed() -> users (U, D), items (I, D)`` or ``score(users) -> (B, I)``. ``seen`` (U, I) entries are
    masked with -inf; ``candidates`` (I,) bool limits items and positives alike; ``users`` limits the users. Equal
    scores are ordered by one permutation of the items drawn from ``seed``, so a constant scorer ranks at random. A
    masked item never counts, even where fewer than K items are left. Raises ``DataError`` naming the scorer when a
    score is NaN.
    """
    n_items = positives.n_items
    wanted = positives.csr if candidates is None else positives.csr @ sp.diags(candidates.astype(np.float32))
    wanted = wanted.tocsr()
    wanted.eliminate_zeros()
    counts = np.diff(wanted.indptr)
    chosen = np.flatnonzero(counts > 0)
    if users is not None:
        chosen = np.intersect1d(chosen, users)
    order = generator(seed, "ties").permutation(n_items)  # column j of the permuted scores is item order[j]
    column = np.empty(n_items, dtype=np.int64)
    column[order] = np.arange(n_items)
    outside = None if candidates is None else torch.from_numpy(~candidates[order])
    k = min(k, n_items)
    wanted_cells = np.sort(np.repeat(np.arange(positives.n_users), counts) * n_items + wanted.indices)
    top = np.zeros((len(chosen), k), dtype=np.int64)
    valid = np.zeros((len(chosen), k), dtype=bool)
    start = 0
    for scores in _blocks(scorer, chosen, order, block):
        part = chosen[start : start + len(scores)]
        if bool(torch.isnan(scores).any()):
            raise DataError(f"{name_of(scorer)} gives NaN scores: its training diverged or an input was not finite")
        if seen is not None:
            rows = seen[part]
            place = np.repeat(np.arange(len(part)), np.diff(rows.indptr))
            scores[torch.from_numpy(place), torch.from_numpy(column[rows.indices])] = -torch.inf
        if outside is not None:
            scores[:, outside] = -torch.inf
        value, index = _top(scores, k)
        top[start : start + len(part)] = order[index.numpy()]
        valid[start : start + len(part)] = torch.isfinite(value).numpy()
        start += len(part)
    cells = chosen[:, None] * n_items + top
    place = np.minimum(np.searchsorted(wanted_cells, cells), max(len(wanted_cells) - 1, 0))
    hits = (wanted_cells[place] == cells) & valid if len(wanted_cells) else np.zeros_like(valid)
    return Ranking(chosen, top, torch.from_numpy(hits), torch.from_numpy(counts[chosen].astype(np.int64)))


def _blocks(scorer: Any, users: np.ndarray, order: np.ndarray, block: int) -> Iterator[Tensor]:
    """Scores of users in blocks, columns permuted: (B, I) each, ours to write to."""
    permuted = torch.from_numpy(order)
    with torch.no_grad():
        if hasattr(scorer, "embed"):
            all_users, items = (x.float().cpu() for x in scorer.embed())
            items = items[permuted].T.contiguous()
            for part in np.split(users, range(block, len(users), block)):
                yield all_users[torch.from_numpy(part)] @ items
        else:
            for part in np.split(users, range(block, len(users), block)):
                yield scorer.score(part).float().cpu()[:, permuted]


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, equal ones in column order: (B, I) -> (B, k) values and columns.

    ``torch.topk`` leaves the order of equal values open. Rows in which a tie can matter, among the first k or across
    the k-th place, are the few that are sorted in full.
    """
    extra = min(k + 1, scores.shape[1])
    value, index = scores.topk(extra, dim=1)
    tied = (value[:, 1:] == value[:, :-1]).any(1) & torch.isfinite(value[:, 0])
    if bool(tied.any()):
        value_tied, index_tied = scores[tied].sort(dim=1, descending=True, stable=True)
        value[tied], index[tied] = value_tied[:, :extra], index_tied[:, :extra]
    return value[:, :k], index[:, :k]

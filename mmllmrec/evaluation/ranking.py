"""Full ranking: every candidate item scored for every user, in blocks, with no Python a user.

Legend: B users of a block, n users ranked, I items, D width, K places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.evaluation.metrics import compute
from mmllmrec.seed import generator

BLOCK = 128  # users ranked at once: their scores of ten thousand items stay in a core's cache, twice as fast as 2,048
SCORED = 2048  # users that a scorer without embeddings is asked for at once
WIDTH = 16  # columns of a group, of which ``_top`` looks at the best first


class Scorer(Protocol):
    """What can be evaluated: ``score(users (B,)) -> (B, I)``, larger is better. ``embed() -> users (U, D), items
    (I, D)``, whose inner products are the scores, does instead, and is preferred where both are there.

    Optional: ``name`` and ``loss_name`` (for tables), ``with_history(Interactions)`` (k-shot curves) and
    ``with_catalog(Catalog)`` (controls), each giving a scorer like this one that sees something else.
    """

    def score(self, users: np.ndarray) -> Tensor:
        """Scores of all items for some users."""
        ...


@dataclass
class Frozen:
    """Embeddings computed once, as a scorer: users (U, D), items (I, D)."""

    name: str
    users: Tensor
    items: Tensor

    def embed(self) -> tuple[Tensor, Tensor]:
        """Users (U, D) and items (I, D)."""
        return self.users, self.items


@dataclass
class Lists:
    """The first K places of n users: users (n,) ascending, items (n, K), and real (n, K) bool, False where fewer than
    K candidates were left."""

    users: np.ndarray
    items: np.ndarray
    real: np.ndarray


@dataclass
class Ranking(Lists):
    """Lists held against what was to be found: hits (n, K) bool, positives (n,) how many there were."""

    hits: Tensor
    positives: Tensor

    def per_user(self, metric: str) -> np.ndarray:
        """Values of ``"ndcg@20"`` and the like, (n,) float64."""
        return compute(metric, self.hits, self.positives).numpy()


def name_of(scorer: Any) -> str:
    """A scorer's name in tables."""
    return str(getattr(scorer, "name", type(scorer).__name__))


def frozen(scorer: Any) -> Any:
    """The scorer with its embeddings computed now, so that several rankings share them; itself without ``embed``."""
    return Frozen(name_of(scorer), *scorer.embed()) if hasattr(scorer, "embed") else scorer


def rank(
    scorer: Any,
    positives: Interactions,
    *,
    seen: sp.csr_matrix | None,
    k: int = 50,
    candidates: np.ndarray | None = None,
    users: np.ndarray | None = None,
    seed: int = 0,
    block: int = BLOCK,
) -> Ranking:
    """Rank all items for each user who has a positive (among ``candidates``), and mark the hits: ``top``, then
    ``find``. ``users`` limits the users."""
    if candidates is not None:
        positives = positives.select(candidates[positives.items])
    chosen = np.flatnonzero(positives.user_counts > 0)
    if users is not None:
        chosen = np.intersect1d(chosen, users)
    lists = top(scorer, chosen, positives.n_items, seen=seen, k=k, candidates=candidates, seed=seed, block=block)
    return find(lists, positives)


def top(
    scorer: Any,
    users: np.ndarray,
    n_items: int,
    *,
    seen: sp.csr_matrix | None,
    k: int = 50,
    candidates: np.ndarray | None = None,
    seed: int = 0,
    block: int = BLOCK,
) -> Lists:
    """The first k candidate items of each of ``users`` (n,) ascending.

    ``seen`` (U, I) entries are masked with -inf, as is what is outside ``candidates`` (I,) bool. Equal scores are
    ordered by one permutation of the items drawn from ``seed``, so a constant scorer ranks at random. A masked item is
    never real, even where fewer than k items are left. Raises ``DataError`` naming the scorer when a score is NaN.
    """
    order = generator(seed, "ties").permutation(n_items)  # column j of the permuted scores is item order[j]
    column = np.empty(n_items, dtype=np.int64)
    column[order] = np.arange(n_items)
    outside = None if candidates is None else torch.from_numpy(~candidates[order])
    k = min(k, n_items)
    items = np.zeros((len(users), k), dtype=np.int64)
    real = np.zeros((len(users), k), dtype=bool)
    start = 0
    for scores in _blocks(scorer, users, order, block):
        part = users[start : start + len(scores)]
        # infinities can sum to NaN too: a sum that is none, at a tenth of the price, is proof enough
        if bool(torch.isnan(scores.sum())) and bool(torch.isnan(scores).any()):
            raise DataError(f"{name_of(scorer)} gives NaN scores: its training diverged or an input was not finite")
        if seen is not None:
            rows = seen[part]
            place = np.repeat(np.arange(len(part)), np.diff(rows.indptr))
            scores[torch.from_numpy(place), torch.from_numpy(column[rows.indices])] = -torch.inf
        if outside is not None:
            scores[:, outside] = -torch.inf
        value, index = _top(scores.numpy(), k)
        items[start : start + len(part)] = order[index]
        real[start : start + len(part)] = np.isfinite(value)
        start += len(part)
    return Lists(users, items, real)


def find(lists: Lists, positives: Interactions) -> Ranking:
    """Which places hold a positive, for those users of ``lists`` who have one."""
    chosen = np.intersect1d(lists.users, np.flatnonzero(positives.user_counts > 0))
    rows = np.searchsorted(lists.users, chosen)
    items, real = lists.items[rows], lists.real[rows]
    wanted = np.sort(positives.users * positives.n_items + positives.items)
    cells = chosen[:, None] * positives.n_items + items
    place = np.minimum(np.searchsorted(wanted, cells), max(len(wanted) - 1, 0))
    hits = (wanted[place] == cells) & real if len(wanted) else np.zeros_like(real)
    return Ranking(chosen, items, real, torch.from_numpy(hits), torch.from_numpy(positives.user_counts[chosen]))


def _blocks(scorer: Any, users: np.ndarray, order: np.ndarray, block: int) -> Iterator[Tensor]:
    """Scores of users in blocks, columns permuted: (B, I) each, to be written to and done with before the next."""
    permuted = torch.from_numpy(order)
    with torch.no_grad():
        if hasattr(scorer, "embed"):
            all_users, items = (x.float().cpu() for x in scorer.embed())
            items = items[permuted].T.contiguous()
            held = torch.empty(min(block, len(users)), len(order))
            for part in np.split(users, range(block, len(users), block)):
                yield torch.mm(all_users[torch.from_numpy(part)], items, out=held[: len(part)])
        else:
            for part in np.split(users, range(SCORED, len(users), SCORED)):
                yield from scorer.score(part).float().cpu()[:, permuted].split(block)


def _top(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, equal ones in column order: (B, I) -> (B, k) values and columns.

    The k-th largest of the groups' best columns is no larger than the k-th largest of all: what reaches it, few more
    than k where values differ, is all that is sorted. A third of the time of ``torch.topk``, which leaves the order of
    equal values open besides.
    """
    n, columns = scores.shape
    if not n:
        return scores[:, :k], np.zeros((0, k), dtype=np.int64)
    width = min(WIDTH, columns // k)
    groups = columns // width  # group g: columns g, g + groups, ...; the last few columns are in no group
    best = torch.from_numpy(scores)[:, : width * groups].view(n, width, groups).amax(1).numpy()
    least = np.partition(best, groups - k, axis=1)[:, groups - k, None]
    row, column = np.divmod(np.flatnonzero(scores >= least), columns)
    counts = np.bincount(row, minlength=n)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    value, where = np.full((n, counts.max()), -np.inf, dtype=scores.dtype), np.zeros((n, counts.max()), dtype=np.int64)
    value[row, place], where[row, place] = scores[row, column], column
    order = np.argsort(-value, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(value, order, axis=1), np.take_along_axis(where, order, axis=1)

"""Batches: a whole epoch of positives and negatives at once, and the item frequencies that logQ needs.

Legend: N events, B batch, K negatives, U users, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch

from mmllmrec.data.interactions import DataError, Interactions

K = TypeVar("K")
SHARED = 16  # tokens that rows must begin with alike to be read together


@dataclass
class Batch:
    """users (B,), items (B,), negatives (B, K) or None: int64 tensors of internal ids. ``by_item``: all events of some
    items, as ``item_blocks`` makes them. A process (``rank`` of ``world``) may hold a share of the rows; ``pool`` and
    ``whole`` are the whole batch's. ``chunk``: how many items a model that reads content encodes at once, None for
    all."""

    users: torch.Tensor
    items: torch.Tensor
    negatives: torch.Tensor | None = None
    by_item: bool = False
    rank: int = 0
    world: int = 1
    chunk: int | None = None
    _pool: torch.Tensor | None = None
    _whole: torch.Tensor | None = None

    @property
    def pool(self) -> torch.Tensor:
        """The distinct items of the whole batch, ascending, (C,): found when asked for, which only some models do."""
        if self._pool is None:
            self._pool = self.items.unique()
        return self._pool

    @property
    def whole(self) -> torch.Tensor:
        """Users and items of the whole batch's events, (2, N)."""
        if self._whole is None:
            self._whole = torch.stack([self.users, self.items])
        return self._whole

    def __len__(self) -> int:
        return len(self.users)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in held.items()}
        return Batch(**moved)

    def share(self, rank: int, world: int) -> Batch:
        """The rows of one of ``world`` processes; the pool stays that of the whole batch. Where there are fewer rows
        than processes, one without a row gets the first: a mean needs one, and ``fit`` gives it no weight."""
        if world == 1:
            return self
        mine = slice(rank, None, world) if rank < len(self) else slice(0, 1)
        return replace(self.part(mine), rank=rank, world=world)

    def part(self, rows: torch.Tensor | slice) -> Batch:
        """Some of the rows, such as (B,) bool; the pool stays that of the whole batch."""
        negatives = None if self.negatives is None else self.negatives[rows]
        users, items, pool, whole = self.users[rows], self.items[rows], self.pool, self.whole
        return replace(self, users=users, items=items, negatives=negatives, _pool=pool, _whole=whole)


@dataclass
class InBatch:
    """What an in-batch softmax chooses among: users (R,), items (C,) distinct, target (B,) places in them, mask (R, C)
    bool of what is no negative, log_q (C,) the correction, None where the candidates are a uniform sample, and rows
    (B,), the places of the events' users; None where each has its own (R = B)."""

    users: torch.Tensor
    items: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor
    log_q: torch.Tensor | None
    rows: torch.Tensor | None


def in_batch(train: Interactions, batch: Batch, *, same: torch.Tensor | None = None, distinct: bool = False) -> InBatch:
    """The candidates of a batch: its distinct items, each event's own among them.

    Masked are the user's other training positives and, with ``same`` (I,) int64 (equal numbers: items that cannot be
    told apart), copies of the positive. ``log_q`` is that of a batch of events (``log_inclusion``); a block of items
    needs none. ``distinct`` has a row a user, not one an event, unless there is ``same``: copies are an event's own.
    """
    items, whole, users, rows = batch.pool, batch.whole, batch.users, None
    if distinct and same is None:
        users, rows = batch.users.unique(return_inverse=True)
    target = torch.searchsorted(items, batch.items)
    where = items.cpu().numpy()
    mask = torch.from_numpy(train.csr[users.cpu().numpy()][:, where].toarray() > 0).to(items.device)
    if same is not None:
        alike = same.to(items.device)[items]
        mask |= alike[target][:, None] == alike[None]
    log_q = None
    if not batch.by_item:
        log_q = torch.from_numpy(log_inclusion(train.item_counts, whole.shape[1])[where]).to(items.device)
    return InBatch(users, items, target, mask, log_q, rows)


def sample_negatives(
    train: Interactions,
    users: np.ndarray,
    k: int,
    *,
    rng: np.random.Generator,
    weights: np.ndarray | None = None,
    candidates: np.ndarray | None = None,
) -> np.ndarray:
    """Negatives for each of ``users``, never one of the user's training positives: (N,) -> (N, K) int64.

    ``weights`` (I,) draws in proportion (``train.item_counts ** 0.75`` is the usual popularity weighting); uniform
    without. ``candidates`` (I,) bool limits the items drawn from: by default those with a training event, since an
    item that training never shows as a positive must not be pushed down as a negative. Only training positives are
    avoided: avoiding test positives would leak them. Rejected draws are drawn again against one sorted key, all at
    once. Raises ``DataError`` when a user has taken every candidate.
    """
    n_items = train.n_items
    allowed = train.item_counts > 0 if candidates is None else np.asarray(candidates, dtype=bool)
    if weights is not None:
        allowed = allowed & (np.asarray(weights) > 0)
    pool = np.flatnonzero(allowed)
    taken = np.bincount(train.users[allowed[train.items]], minlength=train.n_users)
    full = np.flatnonzero(taken[users] >= len(pool)) if len(users) else np.zeros(0, int)
    if full.size:
        user = train.user_ids[int(users[full[0]])]
        raise DataError(f"user {user!r} has taken all {len(pool)} candidate items: no negative is left to draw")
    cumulative = None
    if weights is not None:
        mass = np.asarray(weights, dtype=np.float64)[pool]
        cumulative = np.cumsum(mass / mass.sum())
        cumulative[-1] = 1.0

    def draw(n: int) -> np.ndarray:
        if cumulative is None:
            return pool[rng.integers(0, len(pool), n)]
        return pool[np.searchsorted(cumulative, rng.random(n), side="right")]

    known = train.keys
    owner = np.repeat(np.asarray(users, dtype=np.int64), k)
    drawn = draw(len(owner))
    todo = np.arange(len(owner))
    while todo.size:
        key = owner[todo] * n_items + drawn[todo]
        place, order = np.empty(len(key), dtype=np.int64), np.argsort(key)
        # looked up in ascending order, one after another in memory: a fifth of the time where there are many
        place[order] = np.minimum(np.searchsorted(known, key[order]), len(known) - 1)
        todo = todo[known[place] == key]
        drawn[todo] = draw(len(todo))
    return drawn.reshape(-1, k)


def epoch(
    train: Interactions,
    *,
    batch_size: int,
    negatives: int = 1,
    rng: np.random.Generator,
    weights: np.ndarray | None = None,
    shuffle: bool = True,
) -> Iterator[Batch]:
    """One pass over the training events in random order, with ``negatives`` a positive (0: none, for in-batch losses).

    Everything is drawn before the first batch is given, so that ``rng`` moves by the same amount whoever consumes it.
    """
    order = rng.permutation(len(train)) if shuffle else np.arange(len(train))
    users, items = train.users[order], train.items[order]
    drawn = sample_negatives(train, users, negatives, rng=rng, weights=weights) if negatives else None
    for start in range(0, len(order), batch_size):
        part = slice(start, start + batch_size)
        extra = None if drawn is None else torch.from_numpy(drawn[part])
        yield Batch(torch.from_numpy(users[part].copy()), torch.from_numpy(items[part].copy()), extra)


def item_blocks(train: Interactions, *, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """One pass over the training events in blocks of ``size`` items, each with all of its events, for in-batch losses.

    A model that reads content encodes an item once an epoch, where batches of events would encode a popular one in
    nearly every batch. Every item with an event is as likely as any other to be in a block, so the candidates are a
    uniform sample and need no logQ correction. A short last block is shared out, so that none has few candidates.
    """
    items = rng.permutation(np.flatnonzero(train.item_counts > 0))
    blocks = np.array_split(items, blocks_of(train, size))
    number = np.full(train.n_items, -1)
    for position, block in enumerate(blocks):
        number[block] = position
    owner = number[train.items]
    order = np.argsort(owner, kind="stable")
    for part in np.split(order, np.searchsorted(owner[order], np.arange(1, len(blocks)))):
        yield Batch(torch.from_numpy(train.users[part]), torch.from_numpy(train.items[part]), by_item=True)


def blocks_of(train: Interactions, size: int) -> int:
    """How many blocks of about ``size`` items an epoch has."""
    return max(round(int((train.item_counts > 0).sum()) / size), 1)


def packed(order: Iterable[K], lengths: Mapping[K, int], tokens: int) -> Iterator[list[K]]:
    """Rows of text in the order given, as many a batch as ``tokens`` allow with their padding, one at least.

    >>> list(packed("abc", {"a": 3, "b": 2, "c": 9}, tokens=6))
    [['a', 'b'], ['c']]
    """
    batch: list[K] = []
    widest = 0
    for n in order:
        if batch and (len(batch) + 1) * max(widest, lengths[n]) > tokens:
            yield batch
            batch, widest = [], 0
        widest = max(widest, lengths[n])
        batch.append(n)
    if batch:
        yield batch


def sharing(
    rows: Sequence[Sequence[int]], ends: Sequence[int], fits: Callable[[int, Sequence[int]], bool]
) -> list[tuple[int, list[int]]]:
    """Rows of tokens that follow one another and begin alike: (how many tokens they share, the numbers of the rows).

    The last ``ends`` tokens of a row are never shared. Rows are put together where they share at least ``SHARED``
    tokens and half of the longest, and where ``fits`` says so of the number of shared tokens and the rows' numbers.

    >>> sharing([[*range(20), 1], [*range(20), 2], [3, 4]], [1, 1, 1], lambda size, some: len(some) < 9)
    [(20, [0, 1]), (0, [2])]
    """
    groups: list[tuple[int, list[int]]] = []
    for n, row in enumerate(rows):
        if groups:
            size, some = groups[-1]
            most = min(size if len(some) > 1 else len(rows[some[0]]) - ends[some[0]], len(row) - ends[n])
            alike = next((k for k in range(most) if row[k] != rows[some[0]][k]), most)
            longest = max(len(rows[m]) for m in (*some, n))
            if alike >= max(SHARED, longest // 2) and fits(alike, [*some, n]):
                groups[-1] = alike, [*some, n]
                continue
        groups.append((0, [n]))
    return groups


def log_inclusion(counts: np.ndarray, batch_size: int) -> np.ndarray:
    """log of the chance that an item is in a batch: counts (I,) -> (I,) float32.

    Items of a batch are de-duplicated, so an item is a candidate with probability 1 - (1 - p)^B where p is its share
    of the training events (the logQ correction of Yi et al. 2019, eq. 3, with the inclusion probability in place of
    the frequency). Items without events get the smallest such value, which stays finite.
    """
    share = np.maximum(counts, 1) / max(int(np.sum(counts)), 1)
    return np.log(-np.expm1(batch_size * np.log1p(-np.minimum(share, 1 - 1e-12)))).astype(np.float32)

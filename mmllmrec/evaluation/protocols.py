"""Protocols: which users, items and masks a number is about."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.splits import Split
from mmllmrec.evaluation.ranking import Ranking, find, frozen, rank, top

ROWS = ("all", "warm", "cold", "cold only", "cold users")
MASKS = ("train+valid", "train")


def validation_score(
    scorer: Any, train: Interactions, valid: Interactions, *, metric: str = "ndcg@20", seed: int = 0
) -> float:
    """Mean of a metric over the users with a validation event, train positives masked, at full precision."""
    k = int(metric.partition("@")[2] or 0)
    return float(rank(scorer, valid, seen=train.csr, k=k, seed=seed).per_user(metric).mean())


def of_known(split: Split, target: Interactions) -> np.ndarray:
    """Which positives are of an item and of a user with a training event, (n,) bool: those of the row ``warm``."""
    return np.asarray(split.warm_items[target.items] & ~split.cold_users[target.users])


def rankings(
    scorer: Any, split: Split, target: Interactions, *, seen: sp.csr_matrix, k: int, seed: int
) -> dict[str, Ranking]:
    """A ranking for each row of a table that the split has.

    ``all``: every positive of every user. ``warm``, ``cold``: positives that have, have not, a training event, ranked
    among the whole catalogue; ``cold only``: cold positives among cold items; these three of users with a training
    event, so that one thing at a time is new. ``cold users``: users without a training event. Rows that share their
    candidates share one ranking; embeddings are computed once.
    """
    scorer = frozen(scorer)
    users = np.flatnonzero(target.user_counts > 0)
    lists = top(scorer, users, target.n_items, seen=seen, k=k, seed=seed)
    warm = split.warm_items
    of_cold_users = split.cold_users[target.users]
    is_warm = of_known(split, target)
    is_cold = ~is_warm & ~of_cold_users
    found = {"all": find(lists, target)}
    if is_cold.any():
        if is_warm.any():
            found["warm"] = find(lists, target.select(is_warm))
        cold = target.select(is_cold)
        found["cold"] = find(lists, cold)
        found["cold only"] = rank(scorer, cold, seen=seen, k=k, seed=seed, candidates=~warm)
    if of_cold_users.any():
        found["cold users"] = find(lists, target.select(of_cold_users))
    return found


def harmonic(warm: float, cold: float) -> float:
    """Harmonic mean of warm and cold, 0 where either is 0.

    >>> harmonic(0.5, 0.25)
    0.3333333333333333
    """
    return 2 * warm * cold / (warm + cold) if warm > 0 and cold > 0 else 0.0


def seen_matrix(split: Split, *, on: str, mask: str) -> sp.csr_matrix:
    """What is masked: train for validation; train and validation for test (``mask="train"``: train alone, as the MMRec
    family does)."""
    if on not in ("valid", "test"):
        raise DataError(f"on={on!r}: use 'valid' or 'test'")
    if mask not in MASKS:
        raise DataError(f"mask={mask!r}: use one of {MASKS}")
    if on == "valid" or mask == "train":
        return split.train.csr
    return (split.train.csr + split.valid.csr).tocsr()

"""How much room new items get: one number, chosen on validation by the same rule for every system.

Legend: U users, I items, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllmrec.data.interactions import DataError
from mmllmrec.data.splits import Split
from mmllmrec.evaluation.protocols import of_known, validation_score
from mmllmrec.evaluation.ranking import Frozen, name_of, rank

STEPS = 12  # halvings of the range that is searched, 16 deviations of the scores wide


def lifted(users: Tensor, items: Tensor, new: Tensor, offset: float | Tensor) -> tuple[Tensor, Tensor]:
    """``offset`` more for the items ``new`` (I,) bool, as a column more of users (U, D) and items (I, D)."""
    column = new.to(items)[:, None] * offset
    return torch.cat([users, users.new_ones(len(users), 1)], dim=1), torch.cat([items, column], dim=1)


def known_score(scorer: Any, split: Split, *, metric: str = "ndcg@20", seed: int = 0) -> float:
    """``validation_score`` on the row ``warm``, ranked among the whole catalogue: a floor for others."""
    known = split.valid.select(of_known(split, split.valid))
    return validation_score(scorer, split.train, known, metric=metric, seed=seed)


def cold_room(
    scorer: Any, split: Split, *, cost: float, floor: float | None = None, metric: str = "ndcg@20", seed: int = 0
) -> float | None:
    """The most that can be added to the scores of items without a training event before ``known_score`` falls below
    (1 - ``cost``) of what it is with new items left out or, where that is lower, below ``floor``; None where validation
    has no new items, or no known ones.

    Training cannot say how often a new item is taken: scores of new and of known items have no common scale, and a
    system can look strong on either at the other's cost. One price for all makes systems comparable; a floor, such as
    the score of a model that knows IDs alone, lets what content gains on known items be spent on new ones. It is the
    calibrated stacking of Chao et al. 2016, its constant chosen by a price and not by the area under the curve.
    ``scorer`` needs ``embed``. Raises ``DataError`` for a cost that is no share.
    """
    if not 0 < cost < 1:
        raise DataError(f"cold_cost={cost}: a share of the metric on known items, between 0 and 1")
    warm, known = split.warm_items, split.valid.select(of_known(split, split.valid))
    if not len(known) or bool(warm[split.valid.items].all()):
        return None
    users, items = (x.float().cpu() for x in scorer.embed())
    new, k, name = torch.from_numpy(~warm), int(metric.partition("@")[2] or 0), name_of(scorer)
    alone = rank(Frozen(name, users, items), known, seen=split.train.csr, k=k, candidates=warm, seed=seed)
    least = min((1 - cost) * float(alone.per_user(metric).mean()), np.inf if floor is None else floor)
    some = users[torch.from_numpy(np.flatnonzero(known.user_counts > 0)[:256])]
    low, high = (side * 8 * float((some @ items.T).std()) for side in (-1, 1))
    for _ in range(STEPS):
        middle = (low + high) / 2
        enough = known_score(Frozen(name, *lifted(users, items, new, middle)), split, metric=metric, seed=seed) >= least
        low, high = (middle, high) if enough else (low, middle)
    return low


def priced(scorer: Any, split: Split, *, cost: float, metric: str = "ndcg@20", seed: int = 0) -> Frozen | None:
    """The scorer with as much room for new items as costs it ``cost`` of its own score on known ones at validation, by
    ``cold_room`` without a floor; None where there is no such room to choose."""
    offset = cold_room(scorer, split, cost=cost, metric=metric, seed=seed)
    if offset is None:
        return None
    users, items = (x.float().cpu() for x in scorer.embed())
    return Frozen(name_of(scorer), *lifted(users, items, torch.from_numpy(~split.warm_items), offset))

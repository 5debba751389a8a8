"""Views of the user-item graph: fewer edges, fewer nodes. What structure-based self-supervision and denoising drop.

Legend: E training events, U users, I items.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllmrec.data.interactions import DataError, Interactions


def noised(rows: Tensor, length: float) -> Tensor:
    """Rows (N, D) with a random vector of this length added to each, in the row's own orthant (Yu et al. 2022)."""
    return rows + length * torch.sign(rows) * F.normalize(torch.rand_like(rows), dim=-1)


def keep_edges(train: Interactions, share: float, *, rng: np.random.Generator, by_degree: bool = False) -> np.ndarray:
    """A random ``share`` of the training events: indices, ascending, (round(share E),).

    Every event is as likely (Wu et al. 2021 (SGL), eq. 8), or with ``by_degree`` an event of user u and item i in
    proportion to 1 / (sqrt(d_u) sqrt(d_i)), without replacement: those of popular nodes go first (Zhou and Shen 2023
    (FREEDOM), eq. 6; Zhou et al. 2023 (LayerGCN), eq. 6). At least one event stays. Raises ``DataError`` for a share
    outside 0..1.
    """
    if not 0 <= share <= 1:
        raise DataError(f"share={share}: the share of events to keep, between 0 and 1")
    size = max(round(share * len(train)), 1)
    if not by_degree:
        return np.sort(rng.permutation(len(train))[:size])
    weights = 1 / np.sqrt(train.user_counts[train.users] * train.item_counts[train.items].astype(np.float64))
    # the largest u^(1/w) are a sample without replacement in proportion to w (Efraimidis and Spirakis 2006)
    keys = np.log(rng.random(len(train))) / weights
    return np.sort(np.argpartition(-keys, size - 1)[:size])


def keep_nodes(train: Interactions, share: float, *, rng: np.random.Generator) -> np.ndarray:
    """The events both of whose nodes are among a random ``share`` of all users and items: a mask (E,).

    Wu et al. 2021 (SGL), eq. 7. May be empty. Raises ``DataError`` for a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise DataError(f"share={share}: the share of nodes to keep, between 0 and 1")
    users, items = rng.random(train.n_users) < share, rng.random(train.n_items) < share
    kept: np.ndarray = users[train.users] & items[train.items]
    return kept

"""Floors: what a table's numbers must beat. Legend: B users asked for, I items."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmllmrec.data.interactions import Interactions
from mmllmrec.seed import generator


class Random:
    """Every (user, item) its own seeded random score."""

    name, loss_name = "Random", "-"

    def __init__(self, train: Interactions, *, seed: int = 0):
        self.n_items, self.seed = train.n_items, seed

    def score(self, users: np.ndarray) -> Tensor:
        """(B,) -> (B, I); a user's scores do not depend on who else is asked for."""
        rows = [generator(self.seed, "random", int(u)).random(self.n_items, dtype=np.float32) for u in users]
        return torch.from_numpy(np.stack(rows))


class Popularity:
    """Score = number of training events of the item, the same for every user."""

    name, loss_name = "Popularity", "-"

    def __init__(self, train: Interactions):
        self.counts = torch.from_numpy(train.item_counts).float()

    def score(self, users: np.ndarray) -> Tensor:
        """(B,) -> (B, I)."""
        return self.counts.expand(len(users), -1).clone()

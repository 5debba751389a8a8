"""Worlds and scorers whose answer is known."""

import datasets
import numpy as np
import torch

from mmllmrec.data import splits
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import IdMap, Interactions


def groups(users: int = 61, items: int = 97, kinds: int = 3, share: float = 0.4) -> splits.Split:
    """Each user takes ``share`` of the items of the own kind, and no other."""
    rng = np.random.default_rng(0)
    cells = (np.arange(users)[:, None] % kinds == np.arange(items) % kinds) & (rng.random((users, items)) < share)
    u, i = np.nonzero(cells)
    ids = IdMap(range(items), what="item id")
    events = Interactions(u, i, None, IdMap(range(users), what="user id"), ids)
    data = RecDataset("groups", events, Catalog(datasets.Dataset.from_dict({"item_id": ids.ids}), ids))
    return splits.random_per_user(data, seed=0)


def few(users: int, items: int, *, new: int = 1) -> Interactions:
    """31 events; the last user and the last ``new`` items have none."""
    known = items - new
    cells = np.random.default_rng(0).choice((users - 1) * known, size=31, replace=False)
    ids = IdMap([f"u{u}" for u in range(users)], what="user id"), IdMap([f"i{i}" for i in range(items)], what="item id")
    return Interactions(cells // known, cells % known, None, *ids)


class Table:
    """A scorer that is its own table of scores, (U, I)."""

    name = "Table"

    def __init__(self, scores):
        self.scores = torch.as_tensor(scores, dtype=torch.float32)

    def score(self, users):
        return self.scores[torch.as_tensor(users)]


def probe(states, levels, *, train):
    """How well a ridge classifier on the first ``train`` rows reads ``levels`` off ``states`` (B, D) on the others."""
    x = np.concatenate(
        [(states - states[:train].mean(0)) / states[:train].std(0).clip(1e-6), np.ones((len(states), 1))], 1
    )
    known, target = x[:train], np.eye(levels.max() + 1)[levels[:train]]
    weights = np.linalg.solve(known.T @ known + np.eye(x.shape[1]), known.T @ target)
    return float(((x[train:] @ weights).argmax(1) == levels[train:]).mean())

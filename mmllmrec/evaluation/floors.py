"""Floors: what a table's numbers must beat. Legend: B users asked for, I items."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.descriptors import describe
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


class ContentKNN:
    """Items that look, read or sound like those a user took, by training-free descriptors.

    score(u, i) = mean over the modalities that i has of the cosine of i's descriptor with the mean descriptor of the
    items in u's history that have it. Descriptors are ``data.descriptors`` and the catalogue's own features,
    standardised on the training items; a modality that i lacks has no say, and an item without any scores 0.
    """

    name, loss_name = "ContentKNN", "-"

    def __init__(self, train: Interactions, *, catalog: Catalog):
        self.train, self.catalog = train, catalog
        self.history = train.csr
        fit_on = train.item_counts > 0
        tables = describe(catalog, fit_on=fit_on)
        for name, table in catalog.features.items():
            tables.setdefault(name, (table, catalog.present(name)))
        self.views = [(_unit(_standard(t, present & fit_on, present)), present) for t, present in tables.values()]

    def vectors(self) -> np.ndarray:
        """One description an item, (I, F) float32: its views side by side, of unit length (zero where it has none)."""
        return _unit(np.concatenate([view for view, _ in self.views], axis=1))

    def with_catalog(self, catalog: Catalog) -> ContentKNN:
        """The same floor reading another catalogue of the same items (controls)."""
        other = ContentKNN(self.train, catalog=catalog)
        other.history = self.history
        return other

    def with_history(self, history: Interactions) -> ContentKNN:
        """The same floor seeing other events of its users (k-shot)."""
        other = ContentKNN(self.train, catalog=self.catalog)
        other.history = history.csr
        return other

    def score(self, users: np.ndarray) -> Tensor:
        """(B,) -> (B, I) float32."""
        own = self.history[np.asarray(users)]
        total = np.zeros(own.shape, dtype=np.float32)
        count = np.zeros(own.shape[1], dtype=np.float32)
        for view, present in self.views:
            total += _unit(own @ view) @ view.T
            count += present
        return torch.from_numpy(total / np.maximum(count, 1))


def _standard(table: np.ndarray, fit_on: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 on ``fit_on``; absent rows 0, and all of them where there is nothing to fit on."""
    if not fit_on.any():
        return np.zeros(table.shape, dtype=np.float32)
    mean, spread = table[fit_on].mean(0), table[fit_on].std(0)
    return np.where(present[:, None], (table - mean) / np.where(spread > 1e-6, spread, 1.0), 0.0).astype(np.float32)


def _unit(table: np.ndarray) -> np.ndarray:
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)

"""BM3: bootstrapped representations of users, items and modalities; no negative, no second graph.

Legend: B batch, U users, I items, M modalities, D width, F_m width of a modality's features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec import losses as loss_functions
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import MultimodalModel
from mmllmrec.models.vectors import rows_of


class BM3(MultimodalModel):
    """One predictor g meets targets under dropout: the other side of the event, the ID by its content, content itself.

    Zhou et al. 2023 (arXiv 2207.05969). H_u, H_i = LightGCN's encoder, items with their ID added again; Z_m a linear
    map of modality m. With T = dropout(., without gradient): (1 - cos(g(H_u), T(H_i))) + (1 - cos(g(H_i), T(H_u))), and
    ``content_weight`` times the sum over m of (1 - cos(g(Z_m), T(H_i))) + (1 - cos(g(Z_m), T(Z_m))) over the items that
    have m. score(u, i) = g(H_u) . g(H_i). ``reg`` weighs (||H_u|| + ||H_i||) / I, norms of all nodes, as the published
    code does. Content shapes IDs and is no part of a score: an item without an event is unknown, and scores 0.
    Departures: features are frozen (``trained_features=True`` trains the tables, as published).
    """

    losses: ClassVar[tuple[str, ...]] = ("bootstrap",)
    supports_cold_items: ClassVar[bool] = False

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 1,
        dropout: float = 0.3,
        content_weight: float = 2.0,
        reg: float = 0.1,
        feature_dim: int = 64,
        trained_features: bool = False,
        loss: str = "bootstrap",
    ):
        super().__init__(train, **arguments(locals()))
        self.dropout, self.content_weight = dropout, content_weight
        self.maps, self.predictor = self.linear_each(dim), nn.Linear(dim, dim)
        for layer in (*self.maps, self.predictor):
            nn.init.xavier_normal_(layer.weight)

    def _online(self) -> tuple[Tensor, Tensor]:
        ids = self.ids()
        users, items = self.graph(*ids)
        return users, items + ids[1]

    def encode(self) -> Encoded:
        users, items = self._online()
        return Encoded(self.predictor(users) * self.known[:, None], self.predictor(items) * self.warm[:, None])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``bootstrap``: user and item; ``content``: modalities with the ID and with themselves; ``reg``."""
        users, items = self._online()
        u, i = rows_of(users, batch.users), rows_of(items, batch.items)
        to_users, to_items = self._target(u), self._target(i)
        boot = loss_functions.bootstrap
        terms = {"bootstrap": boot(self.predictor(u), to_items) + boot(self.predictor(i), to_users)}
        if self.content_weight:
            parts = []
            for m, layer in zip(self.modalities, self.maps, strict=True):
                here = self.present(m)[batch.items]
                (z,) = self.mapped(m, layer, batch.items[here])
                told = self.predictor(z)
                both = boot(told, to_items[here]) + boot(told, self._target(z)) if len(z) else told.sum()
                parts.append(both)
            terms["content"] = self.content_weight * torch.stack(parts).sum()
        if self.reg:
            terms["reg"] = self.reg * (users.norm() + items.norm()) / self.n_items
        return terms

    def _target(self, rows: Tensor) -> Tensor:
        return F.dropout(rows.detach(), self.dropout)

"""AlphaRec: no ID at all; what frozen extractors say of items, projected and smoothed over the graph.

Legend: U users, I items, F width of all features, M modalities, D width.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.encoders.graph import LightGraph
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.content import ContentModel, tower
from mmllmrec.models.graphs import GraphModel
from mmllmrec.models.vectors import FIT, means_of


class AlphaRec(GraphModel, ContentModel):
    """Users and items from content alone: e_i^(0) = MLP(z_i), e_u^(0) = MLP(mean of z_i over u's items), propagated.

    Sheng et al. 2024 (arXiv 2407.05441): a nonlinear projection W_2 LeakyReLU(W_1 z), LightGCN's propagation
    and mean of layers (``GraphModel``), and the contrastive loss on cosines, here the main loss of a table
    (``loss="softmax"``; ``"bpr"`` for comparison). ``features`` or ``catalog``, ``feature_dim``: see ``ContentModel``.
    An item without an event has no neighbours and keeps its own layer; a user with events that training did not have is
    the mean of their features (``with_history``), so cold users cost nothing. A user without events is a zero vector.
    Departures: z is all modalities' whitened features side by side where the paper reads one language model's embedding
    of the title; biases are a modality's and act where it is present; the temperature is learned, candidates are the
    batch's items with the logQ correction, where the paper fixes it and samples negatives.
    """

    losses: ClassVar[tuple[str, ...]] = ("softmax", "bpr")
    fit_defaults: ClassVar[dict[str, Any]] = FIT

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        hidden: int = 128,
        layers: int = 2,
        feature_dim: int = 64,
        loss: str = "softmax",
    ):
        options: dict[str, Any] = {"dim": dim, "hidden": hidden, "layers": layers}
        super().__init__(train, catalog=catalog, features=features, feature_dim=feature_dim, loss=loss, **options)
        self.tower = tower(self.described.shape[1], hidden=hidden, dim=dim)
        self.graph = LightGraph(train, layers=layers)

    tastes: Tensor

    def _use(self, features: FeatureTable) -> None:
        super()._use(features)
        self._average()

    def _average(self) -> None:
        """Mean description of each user's items, (U, F + M)."""
        events = self.train_data.csr if self.history is None else self.history
        self.register_buffer("tastes", means_of(events, self.described), persistent=False)

    def own(self) -> tuple[Tensor, Tensor]:
        users, items = self.tower(torch.cat([self.tastes, self.described])).split([self.n_users, self.n_items])
        return users, items

    def with_history(self, history: Interactions) -> Self:
        other = super().with_history(history)
        other._average()
        return other

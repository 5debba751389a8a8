"""LightGCN: neighbourhood averaging on the user-item graph; of IDs alone, or of IDs and content.

Legend: U users, I items, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.encoders.graph import LightGraph
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.content import ContentModel
from mmllmrec.models.graphs import IDGraph


class LightGCN(IDGraph):
    """Embeddings smoothed over the user-item graph of the training events: score(u, i) = e_u . e_i.

    He et al. 2020, eqs. 3 to 5 (``encoders.graph.LightGraph``), trained with BPR (eq. 15). ``dim`` is D, ``layers`` the
    number of propagations, ``reg`` weighs the norms of the batch's embeddings *before* propagation, as the paper does.
    With ``loss="softmax"`` the propagated embeddings meet the main loss (``VectorModel``). Departures: the penalty is
    the unsquared one of the RecBole and MMRec family (``losses.embedding_norm``), and Xavier-uniform is the start. With
    BPR, a node without a training event keeps its (shrunken) random start: finite, and meaningless. It is gone in
    ``with_history``, where such a node is made of its neighbours alone.
    """

    def __init__(self, train: Interactions, *, dim: int = 64, layers: int = 2, reg: float = 1e-4, loss: str = "bpr"):
        super().__init__(train, dim=dim, layers=layers, reg=reg, loss=loss)
        self.users = nn.Embedding(self.n_users, dim)
        self.items = nn.Embedding(self.n_items, dim)
        for table in (self.users, self.items):
            nn.init.xavier_uniform_(table.weight)
        self.graph = LightGraph(train, layers=layers)

    def own(self) -> tuple[Tensor, Tensor]:
        if self.history is None:
            return self.users.weight, self.items.weight
        return self.trained(self.users.weight, self.items.weight)


class LightGCNContent(IDGraph, ContentModel):
    """LightGCN whose items are an ID and frozen features: e_i^(0) = present_i id_i + E f_i, smoothed over the graph.

    The two-stage row beside ``Unified``: features extracted first, LightGCN's encoder (He et al. 2020, eqs. 3 and 4)
    afterwards. No paper of its own; E has no bias, so an absent modality adds nothing, and an item without a training
    event, whose ID is absent, stands on its content. ``id_dropout`` is the chance that an item's ID is absent for a
    step of training, so that content learns to stand alone. ``features`` or ``catalog``, ``feature_dim``: see
    ``ContentModel``; ``dim``, ``layers``, ``reg`` and ``loss``: see ``LightGCN``.
    """

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 2,
        reg: float = 1e-4,
        feature_dim: int = 64,
        id_dropout: float = 0.3,
        loss: str = "bpr",
    ):
        options: dict[str, Any] = {"dim": dim, "layers": layers, "reg": reg, "id_dropout": id_dropout}
        super().__init__(train, catalog=catalog, features=features, feature_dim=feature_dim, loss=loss, **options)
        self.users = nn.Embedding(self.n_users, dim)
        self.items = nn.Embedding(self.n_items, dim)
        self.project = nn.Linear(self.width, dim, bias=False)
        for weight in (self.users.weight, self.items.weight, self.project.weight):
            nn.init.xavier_uniform_(weight)
        self.id_dropout = id_dropout
        self.graph = LightGraph(train, layers=layers)

    def own(self) -> tuple[Tensor, Tensor]:
        users, ids = self.trained(self.users.weight, self.items.weight)
        if self.training and self.id_dropout:
            ids = ids * (torch.rand(len(ids), 1, device=ids.device) >= self.id_dropout)
        return users, ids + self.project(self.frozen)

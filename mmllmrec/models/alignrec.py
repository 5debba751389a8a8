"""AlignRec: content aligned with IDs, users with items, and content with itself.

Legend: B batch, U users, I items, N = U + I nodes, D width, F width of all features side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import Propagation, normalised_events
from mmllmrec.encoders.heads import unit
from mmllmrec.encoders.item_graph import item_graph
from mmllmrec.features.table import FeatureTable
from mmllmrec.losses import alignment, l2
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import MultimodalModel, side_contrast


class AlignRec(MultimodalModel):
    """The second stage of AlignRec: one content vector an item, gating its ID, aligned at three levels.

    Liu et al. 2024 (arXiv 2403.12384). M_i = S (Q * sigmoid(G (W x + b) + g)), S the graph of alike items, M_u = R M_i;
    C = LightGCN's encoder; vectors C + M. BPR, ``reg`` times ``losses.l2`` of the batch's final vectors;
    ``contrast_weight`` times the InfoNCE of M against C (content-category alignment); ``similarity_weight`` times ||M_B
    M_B^T - K||_F / B, B the batch's distinct items, with K the cosines of the batch's features, the mean over the
    modalities that both have, as in S; ``user_item_weight`` times 1 - cosine of the batch's users and items, in the
    mean (user-item alignment). Departures: x is all modalities side by side, each of unit length, where the paper has
    the output of a multimodal encoder that it pretrains and the published code one feature file; features are frozen
    (published: trained); items are de-duplicated.
    """

    penalty: ClassVar[Callable[..., Tensor]] = staticmethod(l2)

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 2,
        neighbours: int = 10,
        contrast_weight: float = 0.01,
        similarity_weight: float = 0.1,
        user_item_weight: float = 0.1,
        temperature: float = 0.2,
        reg: float = 1e-4,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        self.similarity_weight, self.user_item_weight = similarity_weight, user_item_weight
        self.map, self.gate = nn.Linear(self.width, dim), nn.Linear(dim, dim)
        self.events = Propagation(normalised_events(train))

    content: Tensor

    def _use(self, features: FeatureTable) -> None:
        super()._use(features)
        content = torch.cat([unit(self.rows(m)) for m in self.modalities], dim=1)
        self.register_buffer("content", content, persistent=False)
        k = int(self.config["neighbours"])
        self.alike = Propagation(item_graph(content.numpy(), features.presence, k=k, weighted=True))

    def encode(self) -> Encoded:
        ids = self.ids()
        behaviour = torch.cat(self.graph(*ids))
        items = self.alike(ids[1] * torch.sigmoid(self.gate(self.map(self.content))))
        side = torch.cat([self.events(items), items])
        users, items = (behaviour + side).split([self.n_users, self.n_items])
        return Encoded(users, items, {"behaviour": behaviour, "side": side})

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``contrast``, ``similarity`` and ``user-item``."""
        terms = side_contrast(self, batch, encoded)
        if self.similarity_weight:
            items = batch.items.unique()
            rows, content = encoded.parts["side"][items + self.n_users], self.content[items]
            here = self.all_present()[items].float()
            alike = content @ content.T / (here @ here.T).clamp(min=1)
            terms["similarity"] = self.similarity_weight * (rows @ rows.T - alike).norm() / len(items)
        if self.user_item_weight:
            apart = alignment(encoded.users[batch.users], encoded.items[batch.items]) / 2
            terms["user-item"] = self.user_item_weight * apart
        return terms

"""FREEDOM: a frozen graph of alike items beside a user-item graph that is thinned out every epoch.

Legend: U users, I items, M modalities, D width, F_m width of a modality's features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import MultimodalModel, PrunedGraph


class FREEDOM(MultimodalModel, PrunedGraph):
    """Items are LightGCN's output plus their IDs smoothed over a frozen graph of alike items.

    Zhou and Shen 2023 (arXiv 2211.06924). S = sum over m of shares_m S_m, S_m the graph of each item's ``neighbours``
    nearest in modality m, itself included, each row a mean. q_i = LightGCN(u, i) + (S^item_layers Q)_i; in training
    LightGCN runs on the epoch's sample of events (``PrunedGraph``). BPR, and ``content_weight`` times BPR between the
    users and what a linear map makes of each modality's features alone. ``shares`` (M,): how much each modality counts
    in S, alike by default (published: 0.1 image, 0.9 text). An item without an event has its neighbours' IDs.
    Departures: features are frozen; the published code trains the raw tables, ``trained_features=True``.
    """

    graphs = "mixed"

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 2,
        item_layers: int = 1,
        neighbours: int = 10,
        shares: Sequence[float] | None = None,
        prune: float = 0.8,
        content_weight: float = 1e-3,
        feature_dim: int = 64,
        trained_features: bool = False,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        self.content_weight = content_weight
        self.maps = self.linear_each(dim, bias=False)  # a bias is the same for a positive and its negative

    def encode(self) -> Encoded:
        ids = self.ids()
        users, items = self.graph(*ids, through=self.through_graph)
        return Encoded(users, items + self.smoothed(ids[1]))

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``content``: each modality alone, ranked for the same users."""
        if not self.content_weight:
            return {}
        terms = []
        for m, layer in zip(self.modalities, self.maps, strict=True):
            alone = self.ranked(
                batch,
                lambda u, *i, m=m, layer=layer: (encoded.users[u], *self.mapped(m, layer, *i)),  # type: ignore[misc]
                present=self.present(m),
            )
            terms.append(alone)
        return {"content": self.content_weight * torch.stack(terms).sum()}

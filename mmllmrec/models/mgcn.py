"""MGCN: content as a gate on IDs, propagated apart from behaviour, and as much of each as behaviour asks for.

Legend: U users, I items, N = U + I nodes, M modalities, D width, F_m width of a modality's features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.encoders.graph import Propagation, normalised_events
from mmllmrec.features.table import FeatureTable
from mmllmrec.fusion import masked_softmax
from mmllmrec.models.base import arguments
from mmllmrec.models.multimodal import SideModel


class MGCN(SideModel):
    """Purified content on item graphs, behaviour on the user-item graph, and a fuser that behaviour steers.

    Yu et al. 2023 (arXiv 2308.03588). E_m = S_m (Q * sigmoid(G_m W_m x_m)): the IDs, gated by content, over the graph
    of each item's ``neighbours`` nearest in m, weighed by their cosines; users have R times their items', R the
    normalised events. C = LightGCN's encoder. With weights w_m = softmax over m of q . tanh(W E_m): shared H = sum of
    w_m E_m, specific T_m = sigmoid(K_m C) * (E_m - H), side Y = (H + sum of T_m) / (M + 1), and score (C + Y)_u . (C +
    Y)_i. BPR, ``reg`` times ``losses.l2`` of the batch's final vectors, and ``contrast_weight`` times the InfoNCE of Y
    against C among the batch's users, and among its items. A modality an item lacks has weight 0 and no specific part
    there, and Y is divided by M + 1 all the same: what is known of it in fewer ways has a smaller say. Departures:
    features are frozen (``trained_features=True`` trains the tables, as published); nodes are de-duplicated before the
    contrast.
    """

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
        temperature: float = 0.2,
        reg: float = 1e-4,
        feature_dim: int = 64,
        trained_features: bool = False,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        self.maps = self.linear_each(dim)
        self.purifiers = nn.ModuleList(nn.Linear(dim, dim) for _ in self.modalities)
        self.preferences = nn.ModuleList(nn.Linear(dim, dim) for _ in self.modalities)
        self.attention = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias=False))
        self.events = Propagation(normalised_events(train))

    def spread(self) -> tuple[Tensor, Tensor]:
        ids = self.ids()
        behaviour = torch.cat(self.graph(*ids))
        views = []
        for told, gate, graph in zip(self.through(self.maps), self.purifiers, self.modal_graphs, strict=True):
            items = graph(ids[1] * torch.sigmoid(gate(told)))
            views.append(torch.cat([self.events(items), items]))
        return behaviour, torch.stack(views, dim=1)

    def fused(self, behaviour: Tensor, views: Tensor, present: Tensor) -> Tensor:
        weights = masked_softmax(self.attention(views)[..., 0], present)
        shared = (weights[..., None] * views).sum(dim=1)
        specific = [
            torch.sigmoid(preference(behaviour)) * (views[:, m] - shared) * present[:, m, None]
            for m, preference in enumerate(self.preferences)
        ]
        return (shared + torch.stack(specific).sum(dim=0)) / (len(specific) + 1)

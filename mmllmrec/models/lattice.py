"""LATTICE: item-item structure mined from content while the recommender trains.

Legend: U users, I items, M modalities, D width, F_m width of a modality's features.
"""

from __future__ import annotations

import torch
from torch import nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.encoders.heads import unit
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import LearnedModel


class LATTICE(LearnedModel):
    """Items' IDs smoothed over a learned graph of alike items, added to LightGCN's output at unit length.

    Zhang et al. 2021 (arXiv 2104.09036). A graph a modality, frozen and learned (``LearnedGraph``, ``keep`` the share
    of the frozen one), mixed by learned weights alpha: h = A ... A Q with A = sum over m of alpha_m A_m, q_i =
    LightGCN(i) + h_i / |h_i|. BPR, and ``reg`` times ``losses.l2`` of the batch's final vectors. The weights are a
    softmax over the modalities that an item has. Departures: LightGCN's graph is the usual one (published: self-loops
    and row means); features are frozen (``trained_features=True`` trains the tables, as published); see
    ``LearnedGraph``.
    """

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
        keep: float = 0.9,
        reg: float = 1e-4,
        feature_dim: int = 64,
        trained_features: bool = False,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        self.mixture = nn.Parameter(torch.zeros(len(self.modalities)))

    def encode(self) -> Encoded:
        users, items = self.ids()
        layer = items if self.item_layers else torch.zeros_like(items)
        for _ in range(self.item_layers):
            layer = self.learned.mixed(self, layer, self.mixture)
        out_users, out_items = self.graph(users, items)
        return Encoded(out_users, out_items + unit(layer))

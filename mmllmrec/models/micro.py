"""MICRO: a learned item graph a modality, fused by attention and by contrast with what is fused.

Legend: C distinct items of a batch, U users, I items, M modalities, D width, F_m width of a modality's features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.heads import unit
from mmllmrec.features.table import FeatureTable
from mmllmrec.fusion import masked_softmax
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import LearnedModel


class MICRO(LearnedModel):
    """LATTICE's graphs kept apart; their item vectors are fused by attention, and each is drawn to what is fused.

    Zhang et al. 2022 (arXiv 2111.00678). h_m = A_m Q over each modality's graph (``LearnedGraph``), h = sum of w_m h_m
    with w = softmax over the present m of q . tanh(W h_m + b); q_i = LightGCN(i) + h_i / |h_i|. BPR, ``reg`` times
    ``losses.l2`` of the batch's final vectors, and ``contrast_weight`` times the InfoNCE of each h_m against h, other
    items' h_m among the negatives. Departures: as in
    ``LATTICE``, and the contrast is among the batch's distinct items, where the published code takes all items in every
    step.
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
        contrast_weight: float = 0.03,
        temperature: float = 0.5,
        reg: float = 1e-5,
        feature_dim: int = 64,
        trained_features: bool = False,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        if item_layers < 1:
            raise DataError(f"item_layers={item_layers}: views are what an item graph makes of IDs, one layer at least")
        self.contrast_weight, self.temperature = contrast_weight, temperature
        self.attention = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias=False))

    def encode(self) -> Encoded:
        users, items = self.ids()
        views = [items] * len(self.modalities)
        for _ in range(self.item_layers):
            views = self.learned(self, views)
        stacked = torch.stack(views, dim=1)
        weights = masked_softmax(self.attention(stacked)[..., 0], self.all_present())
        fused = (weights[..., None] * stacked).sum(dim=1)
        out_users, out_items = self.graph(users, items)
        return Encoded(out_users, out_items + unit(fused), {"fused": fused, "views": stacked})

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``contrast``: each modality's view of an item against what is fused of it."""
        if not self.contrast_weight:
            return {}
        items = batch.items.unique()
        fused, terms = encoded.parts["fused"][items], []
        for m, name in enumerate(self.modalities):
            here = self.present(name)[items]
            view = encoded.parts["views"][items, m][here]
            if not len(view):
                terms.append(view.sum())
                continue
            near = losses.info_nce(view, fused[here], temperature=self.temperature, both_ways=False, within=True)
            terms.append(near)
        return {"contrast": self.contrast_weight * torch.stack(terms).sum()}

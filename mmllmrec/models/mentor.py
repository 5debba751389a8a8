"""MENTOR: modalities aligned under the guidance of IDs, and a general enhancement by noise and by masks.

Legend: U users, I items, N = U + I nodes, M modalities, D width a modality, F_m width of a modality's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import ModalEncoder, ModalModel


class MENTOR(ModalModel):
    """Multi-level self-supervision beside BPR on the concatenated modalities.

    Xu et al. 2025 (arXiv 2402.19407). Each modality, and an ID table, has a graph encoder (``ModalEncoder``); with [;]
    concatenation, fused users are [w_u1 U_1; ...], items [V_1; ...], the ID guide and each modality repeated to that
    width, and all items over the frozen graph of alike items beside themselves. ``align_weight`` times, over all pairs
    of guide, fused and modalities, |mean - mean| + |variance - variance| of all their entries; ``graph_weight`` times
    the InfoNCE of two passes with ``noise``, of the batch's nodes; ``mask_weight`` times the masked-feature loss: what
    a linear map makes of the fused vector should be what dropout leaves of it (1 - cos), users and items apart.
    ``shares`` (M,): how much each modality counts in the item graph, alike by default (published: 0.1 image, 0.9 text).
    A modality an item lacks is what the graph makes of it. Departures: the masked loss is trained, its dropout copy
    without gradient; the published code computes it without any gradient (``train_mask=False``: it is left out, which
    trains the same). Noisy passes share the encoders, where that code gives them networks of their own that nothing
    else reads; the contrast is of the batch's nodes, not of all; natural logarithm.
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
        hidden: int = 256,
        neighbours: int = 10,
        shares: Sequence[float] | None = None,
        align_weight: float = 0.1,
        graph_weight: float = 1e-3,
        mask_weight: float = 1.5,
        train_mask: bool = True,
        dropout: float = 0.5,
        noise: float = 0.1,
        temperature: float = 0.2,
        reg: float = 1e-3,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        self.noise, self.temperature, self.dropout = noise, temperature, dropout
        self.align_weight, self.graph_weight = align_weight, graph_weight
        self.mask_weight = mask_weight if train_mask else 0.0
        if align_weight:
            self.item_ids = nn.Parameter(nn.init.xavier_normal_(torch.empty(self.n_items, dim)))
            self.guide = ModalEncoder(self.n_users, dim, dim=dim, hidden=hidden, layers=layers)
        if self.mask_weight:
            wide = len(self.modalities) * dim
            self.decoder = nn.Linear(wide, wide)

    def encode(self) -> Encoded:
        users, items = self.each(self.encoders)
        fused = self._fused(users, items)
        parts = {"fused": fused}
        if self.training and self.align_weight:
            id_users, id_items = self.guide(self.item_ids, self.warm, self.known, self.graph.propagation)
            parts["guide"] = self._over_items(id_users.repeat(1, items.shape[1]), id_items.repeat(1, items.shape[1]))
            for column, m in enumerate(self.modalities):
                wide = (x[:, column].repeat(1, items.shape[1]) for x in (users, items))
                parts[f"view of {m}"] = self._over_items(*wide)
        if self.training and self.graph_weight:
            parts["one"], parts["other"] = (self._fused(*self.each(self.encoders, noise=self.noise)) for _ in range(2))
        users, items = fused.split([self.n_users, self.n_items])
        return Encoded(users, items, parts)

    def _fused(self, users: Tensor, items: Tensor) -> Tensor:
        return self._over_items((self.personal[..., None] * users).flatten(1), items.flatten(1))

    def _over_items(self, users: Tensor, items: Tensor) -> Tensor:
        """All nodes, items over the graph of alike items beside themselves: (U, D), (I, D) -> (N, D)."""
        return torch.cat([users, items + self.smoothed(items)])

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``align``, ``graph`` and ``mask``."""
        terms, parts = {}, encoded.parts
        if self.align_weight and "guide" in parts:
            views = [x for name, x in parts.items() if name in ("guide", "fused") or name.startswith("view of ")]
            apart = [(a.mean() - b.mean()).abs() + (a.var() - b.var()).abs() for a, b in combinations(views, 2)]
            terms["align"] = self.align_weight * torch.stack(apart).sum()
        if self.graph_weight and "one" in parts:
            value = self.two_views(parts["one"], parts["other"], encoded.distinct(batch), temperature=self.temperature)
            terms["graph"] = self.graph_weight * value
        if self.mask_weight:
            each = []
            for nodes in encoded.distinct(batch):
                fused = parts["fused"][nodes]
                masked = F.dropout(fused.detach(), self.dropout, self.training)
                each.append(losses.reconstruction(self.decoder(fused), masked))
            terms["mask"] = self.mask_weight * torch.stack(each).sum()
        return terms

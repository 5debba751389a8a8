"""LayerGCN: propagation whose every layer is weighed by how far a node still resembles itself.

Legend: U users, I items, N = U + I nodes, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import Propagation, normalised_adjacency
from mmllmrec.losses import l2
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import PrunedGraph
from mmllmrec.models.vectors import batch_rows


class LayerGCN(PrunedGraph):
    """Layers refined by their similarity to the ego layer, on a graph that is pruned by degree anew every epoch.

    Zhou et al. 2023 (arXiv 2207.11088). With E^(0) the embeddings: Y = A E^(l-1), E^(l)_n = cos(Y_n, E^(0)_n) Y_n, and
    Z = E^(1) + ... + E^(L); A is the epoch's pruned graph (``prune`` of the events, ``PrunedGraph``) in training, and
    the whole graph elsewhere. BPR, and ``reg`` times ``losses.l2`` of the batch's E^(0), as published; with
    ``loss="softmax"`` see ``VectorModel``. Departures: every epoch prunes by degree, where the published code does in
    one of two and draws at random in the other; the paper's small constant beside the cosine is left out, as there.
    """

    penalty: ClassVar[Callable[..., Tensor]] = staticmethod(l2)

    def __init__(
        self,
        train: Interactions,
        *,
        dim: int = 64,
        layers: int = 4,
        prune: float = 0.1,
        reg: float = 1e-3,
        loss: str = "bpr",
    ):
        super().__init__(train, dim=dim, layers=layers, prune=prune, reg=reg, loss=loss)
        self.layers = layers
        self.users, self.items = nn.Embedding(self.n_users, dim), nn.Embedding(self.n_items, dim)
        for table in (self.users, self.items):
            nn.init.xavier_uniform_(table.weight)
        self.propagation = Propagation(normalised_adjacency(train), symmetric=True)

    def encode(self) -> Encoded:
        propagation = self.through_graph or self.propagation
        own = torch.cat([self.users.weight, self.items.weight])
        layer, total = own, torch.zeros_like(own)
        for _ in range(self.layers):
            passed = propagation(layer)
            layer = F.cosine_similarity(passed, own, dim=-1)[:, None] * passed
            total = total + layer
        users, items = total.split([self.n_users, self.n_items])
        return Encoded(users, items)

    def penalised(self, batch: Batch, *rows: Tensor) -> tuple[Tensor, ...]:
        return batch_rows(batch, self.users.weight, self.items.weight)

"""SimGCL: two views of the graph's embeddings that differ by a little noise, and nothing dropped.

Legend: U users, I items, N = U + I nodes, D width, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import Propagation, normalised_adjacency
from mmllmrec.encoders.views import noised
from mmllmrec.models.graphs import Encoded, EncodedModel


class SimGCL(EncodedModel):
    """LightGCN's propagation without its own layer, and a contrast of two noisy passes.

    Yu et al. 2022 (arXiv 2112.08679). Z = mean of layers 1..L of E^(l) = A E^(l-1), A = D^-1/2 A D^-1/2. A view adds,
    at every layer, noise of length ``noise`` in the orthant of the embedding: E + sign(E) * noise * r / |r|, r uniform
    in 0..1. The term is ``weight`` times the InfoNCE between two views of the batch's distinct users, plus that of its
    distinct positive items, at ``temperature``, one way. With ``loss="softmax"`` the main loss takes BPR's place
    (``VectorModel``). Departures: the penalty is the family's unsquared norm (``losses.embedding_norm``) of propagated
    vectors; the two views' first product, which has no noise yet, is the clean pass's.
    """

    def __init__(
        self,
        train: Interactions,
        *,
        dim: int = 64,
        layers: int = 2,
        weight: float = 0.5,
        noise: float = 0.1,
        temperature: float = 0.2,
        reg: float = 1e-4,
        loss: str = "bpr",
    ):
        options = {"dim": dim, "layers": layers, "weight": weight, "noise": noise, "temperature": temperature}
        super().__init__(train, loss=loss, reg=reg, **options)
        if layers < 1:
            raise DataError(f"layers={layers}: 1 or more, the embeddings themselves are not among them")
        self.layers, self.weight, self.noise, self.temperature = layers, weight, noise, temperature
        self.users, self.items = nn.Embedding(self.n_users, dim), nn.Embedding(self.n_items, dim)
        for table in (self.users, self.items):
            nn.init.xavier_uniform_(table.weight)
        self.propagation = Propagation(normalised_adjacency(train), symmetric=True)

    def encode(self) -> Encoded:
        first = self.propagation(torch.cat([self.users.weight, self.items.weight]))
        whole = {"clean": self._mean(first, noisy=False)}
        if self.training and self.weight:
            whole |= {"one": self._mean(first, noisy=True), "other": self._mean(first, noisy=True)}
        users, items = whole.pop("clean").split([self.n_users, self.n_items])
        return Encoded(users, items, whole)

    def _mean(self, layer: Tensor, *, noisy: bool) -> Tensor:
        """Mean of layers 1..L, the first of which is given: (N, D)."""
        total = torch.zeros_like(layer)
        for depth in range(self.layers):
            layer = layer if depth == 0 else self.propagation(layer)
            if noisy:
                layer = noised(layer, self.noise)
            total = total + layer
        return total / self.layers

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``contrast``: two views of the same nodes."""
        if not self.weight or not encoded.parts:
            return {}
        one, other = encoded.parts["one"], encoded.parts["other"]
        return {
            "contrast": self.weight * self.two_views(one, other, encoded.distinct(batch), temperature=self.temperature)
        }

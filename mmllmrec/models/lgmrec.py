"""LGMRec: local views on the user-item graph, and global ones through a few learned hyperedges.

Legend: B batch, U users, I items, N = U + I nodes, M modalities, D width, K hyperedges, F_m width of a modality.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllmrec import losses
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import Propagation, normalised_events
from mmllmrec.encoders.heads import unit
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import MultimodalModel
from mmllmrec.models.vectors import rows_of


class LGMRec(MultimodalModel):
    """Behaviour and content propagated apart, and content's hyperedges that tie far nodes together.

    Guo et al. 2024 (arXiv 2312.16400). Local: C = LightGCN's encoder of IDs, and for each modality G_m = A^modal_layers
    [mean of a user's Y_m; Y_m], Y_m = x_m W_m. Global: items belong to K hyperedges by H_i = softmax((x_m V_m + g) /
    temperature), users by the sum of their items' logits, with Gumbel noise g and ``dropout`` of memberships in
    training; ``hyper_layers`` times items -> hyperedges -> items and users, from C. F = C + sum of unit G_m +
    ``global_weight`` unit(sum of the global vectors). BPR, ``reg`` times ``losses.embedding_norm`` of the batch's F,
    and ``contrast_weight`` times the InfoNCE of two modalities' global vectors, the batch's nodes among all nodes that
    have both and an event. An item without a modality has no content and no membership there. Departures: no noise when
    scoring, where the published code's scores change from call to call; the contrast is a mean over the batch, of every
    pair of modalities (published: a sum, with weight 1e-4, so 0.2 at 2,048 rows).
    """

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 2,
        modal_layers: int = 2,
        hyperedges: int = 4,
        hyper_layers: int = 1,
        dropout: float = 0.5,
        global_weight: float = 0.3,
        contrast_weight: float = 0.2,
        temperature: float = 0.2,
        reg: float = 1e-6,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        if hyper_layers < 1:
            raise DataError(f"hyper_layers={hyper_layers}: 1 or more; without the hypergraph, global_weight=0")
        self.modal_layers, self.hyper_layers, self.dropout = modal_layers, hyper_layers, dropout
        self.global_weight, self.contrast_weight, self.temperature = global_weight, contrast_weight, temperature
        self.maps, self.members = self.linear_each(dim, bias=False), self.linear_each(hyperedges, bias=False)
        for layer in (*self.maps, *self.members):
            torch.nn.init.xavier_uniform_(layer.weight)
        self.means, self.sums = Propagation(normalised_events(train, mean=True)), Propagation(train.csr)

    has: Tensor  # (M, N) nodes with an event and a modality, of users those who took an item that has it

    def _use(self, features: FeatureTable) -> None:
        super()._use(features)
        items = features.presence & (self.train_data.item_counts > 0)[:, None]
        has = np.concatenate([self.train_data.csr @ items.astype(np.float32) > 0, items]).T
        self.register_buffer("has", torch.from_numpy(has.copy()), persistent=False)

    def encode(self) -> Encoded:
        users, items = self.graph(*self.ids())
        local = torch.cat([users, items])
        everywhere = torch.zeros_like(local)
        parts = {}
        told, members = self.through(self.maps), self.through(self.members)
        for m, content, logits in zip(self.modalities, told, members, strict=True):
            layer = torch.cat([self.means(content), content])
            for _ in range(self.modal_layers):
                layer = self.graph.propagation(layer)
            local = local + unit(layer)
            parts[m], edges = self._global(logits, self.present(m), items)
            parts[f"{m} edges"] = edges
            everywhere = everywhere + parts[m] @ edges
        whole = local + self.global_weight * unit(everywhere)
        users, items = whole.split([self.n_users, self.n_items])
        return Encoded(users, items, parts)

    def _global(self, logits: Tensor, present: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Memberships in one modality's hyperedges, and these, whose product are the global vectors: (I, K), (I,),
        (I, D) -> (N, K), (K, D)."""
        of_items = self._membership(logits) * present[:, None]
        of_users = self._membership(self.sums(logits)) * self.known[:, None]
        edges = of_items.T @ items
        for _ in range(self.hyper_layers - 1):
            edges = of_items.T @ (of_items @ edges)
        return torch.cat([of_users, of_items]), edges

    def _membership(self, logits: Tensor) -> Tensor:
        if self.training:
            logits = logits - torch.log(-torch.log(torch.rand_like(logits).clamp(1e-10, 1 - 1e-7)))
        return F.dropout(torch.softmax(logits / self.temperature, dim=-1), self.dropout, self.training)

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``contrast``: the same node through two modalities' hyperedges."""
        if not self.contrast_weight:
            return {}
        terms = []
        for (first, one), (second, other) in combinations(enumerate(self.modalities), 2):
            edges, others = encoded.parts[f"{one} edges"], encoded.parts[f"{other} edges"]
            norms = torch.linalg.vector_norm(encoded.parts[other] @ others, dim=1, keepdim=True).clamp(min=1e-12)
            # (N, K) for (N, D): among all nodes, cosines of vectors that K hyperedges span are products of K numbers
            scaled = encoded.parts[other] / norms
            both = (self.has[first] & self.has[second]).split([self.n_users, self.n_items])
            halves = slice(0, self.n_users), slice(self.n_users, None)
            for rows, nodes, some in zip(halves, (batch.users, batch.items), both, strict=True):
                nodes = nodes[some[nodes]]
                anchors = unit(rows_of(encoded.parts[one][rows], nodes) @ edges) / self.temperature
                place = some.cumsum(0) - 1
                if len(nodes):
                    terms.append(losses.matched_softmax(anchors @ others.T, scaled[rows][some], place[nodes]))
                else:
                    terms.append(anchors.sum())  # 0; all processes have the same terms
        return {"contrast": self.contrast_weight * torch.stack(terms).sum()} if terms else {}

"""PGL: trained on the principal part of the user-item graph, used on all of it; content in place of item IDs.

Legend: U users, I items, N = U + I nodes, M modalities, D width a modality, F_m width of a modality's features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import Propagation, normalised_adjacency
from mmllmrec.encoders.heads import unit
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import MultimodalModel, PrunedGraph

SUBGRAPHS = ("local", "global")


class PGL(MultimodalModel, PrunedGraph):
    """Principal graph learning: a subgraph in training, the whole graph when scoring.

    Yu et al. 2025 (AAAI, doi 10.1609/aaai.v39i12.33429). Items are unit linear maps of their features, users free
    vectors, side by side over the modalities (M D wide); LightGCN's encoder on the subgraph, and for items their
    content over the frozen graph of alike items beside it. ``subgraph="local"``: the epoch's sample of events,
    ``prune`` of them left out by degree; ``"global"``: from the leading ``rank`` singular triples s, U, V of the
    adjacency, the sum of s_j s_(rank-q+j) U_j V_j over the q = rank / 4 leading ones, entries below 1e-3 in size zero,
    built once. BPR, and ``contrast_weight`` times the mean of the InfoNCE of two dropout copies of the batch's users
    and of its items. ``shares`` (M,): how much each modality counts in the item graph, alike by default (published: 0.1
    image, 0.9 text). An item without any content is zero before the graph. Departures: features are frozen
    (``trained_features=True`` trains the tables, as published); nodes are de-duplicated before the contrast.
    """

    with_item_ids = False
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
        subgraph: str = "local",
        prune: float = 0.7,
        rank: int = 64,
        contrast_weight: float = 0.05,
        dropout: float = 0.2,
        temperature: float = 0.2,
        feature_dim: int = 64,
        trained_features: bool = False,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        if subgraph not in SUBGRAPHS:
            raise DataError(f"subgraph={subgraph!r}: one of {SUBGRAPHS}")
        self.contrast_weight = contrast_weight
        self.dropout, self.temperature = dropout, temperature
        if subgraph == "global":
            self.prune = 0.0
        self.preferences = nn.ParameterList(torch.empty(self.n_users, dim) for _ in self.modalities)
        for table in self.preferences:
            nn.init.xavier_uniform_(table)
        self.maps = self.linear_each(dim)
        if subgraph == "global":
            self.sampled = Propagation(principal(normalised_adjacency(train), rank=rank))

    def encode(self) -> Encoded:
        users = torch.cat(list(self.preferences), dim=1) * self.known[:, None]
        told = [
            unit(layer(self.rows(m))) * self.present(m)[:, None]
            for m, layer in zip(self.modalities, self.maps, strict=True)
        ]
        content = torch.cat(told, dim=1)
        users, items = self.graph(users, content, through=self.through_graph)
        return Encoded(users, items + self.smoothed(content))

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``contrast``: the same node under two draws of dropout."""
        if not self.contrast_weight:
            return {}
        terms = []
        for rows in (encoded.users[batch.users.unique()], encoded.items[batch.items.unique()]):
            one, other = (F.dropout(rows, self.dropout) for _ in range(2))
            terms.append(losses.info_nce(one, other, temperature=self.temperature, both_ways=False))
        return {"contrast": self.contrast_weight * torch.stack(terms).mean()}


def principal(adjacency: sp.csr_matrix, *, rank: int, threshold: float = 1e-3, block: int = 1024) -> sp.csr_matrix:
    """The global-aware principal subgraph of a normalised adjacency (N, N), built in blocks of rows; see ``PGL``."""
    size = min(rank, adjacency.shape[0] - 2)
    left, values, right = scipy.sparse.linalg.svds(adjacency.astype(np.float64), k=size, random_state=0)
    order = np.argsort(-values)
    left, values, right = left[:, order], values[order], right[order]
    kept = max(size // 4, 1)
    scaled = left[:, :kept] * (values[:kept] * values[size - kept :])
    rows = []
    for start in range(0, len(scaled), block):
        dense = scaled[start : start + block] @ right[:kept]
        rows.append(sp.csr_matrix(np.where(np.abs(dense) < threshold, 0.0, dense).astype(np.float32)))
    return sp.vstack(rows, format="csr")

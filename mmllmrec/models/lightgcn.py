"""LightGCN: neighbourhood averaging on the user-item graph, and nothing else.

Legend: B batch, C some items, U users, I items, D width, K layers.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import LightGraph
from mmllmrec.models.vectors import VectorModel


class GraphModel(VectorModel):
    """A ``VectorModel`` whose vectors are embeddings of users and items (``own``) smoothed over the graph of events.

    ``encoders.graph.LightGraph``: He et al. 2020, eqs. 3 and 4. An item that stands on its content and has no event has
    layer 0 alone, and its mean is over the one layer it has (the encoder's own mean would shrink it by K + 1 beside the
    warm ones, which the inner product of BPR sees and a cosine does not). A subclass calls ``_join`` once.
    """

    def _join(self, events: Interactions, layers: int) -> None:
        """Build the graph of some events."""
        self.graph = LightGraph(events, layers=layers)
        alone = torch.from_numpy(events.item_counts == 0) & self.supports_cold_items
        self.register_buffer("item_factor", (1.0 + layers * alone)[:, None], persistent=False)

    item_factor: Tensor

    @abstractmethod
    def own(self) -> tuple[Tensor, Tensor]:
        """Embeddings before propagation, E^(0): users (U, D), items (I, D)."""

    def vectors(self, users: Tensor | slice, *items: Tensor | slice) -> tuple[Tensor, ...]:
        all_users, all_items = self.graph(*self.own())
        all_items = all_items * self.item_factor
        return all_users[users], *(all_items[i] for i in items)

    def with_history(self, history: Interactions) -> Self:
        """The same weights on the graph of other events: a node new to it takes its neighbours' embeddings."""
        other = self._beside(history)
        other.history = history.csr
        other._know(history)
        other._join(history, self.graph.layers)
        return other.to(self.device)

    def _folded(self, users: Tensor, items: Tensor) -> Tensor:
        return users  # the graph has done it

    def _trained(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of IDs (U, D), (I, D), those that no training event moved at zero: absent."""
        known = (
            torch.from_numpy(c > 0).to(users.device) for c in (self.train_data.user_counts, self.train_data.item_counts)
        )
        return users * next(known)[:, None], items * next(known)[:, None]


class LightGCN(GraphModel):
    """Embeddings smoothed over the user-item graph of the training events: score(u, i) = e_u . e_i.

    He et al. 2020, eqs. 3 to 5 (``encoders.graph.LightGraph``), trained with BPR (eq. 15). ``dim`` is D, ``layers`` the
    number of propagations, ``reg`` weighs the norms of the batch's embeddings *before* propagation, as the paper does.
    With ``loss="softmax"`` the propagated embeddings meet the main loss (``VectorModel``). Departures: the penalty is
    the unsquared one of the RecBole and MMRec family (``losses.embedding_norm``), and Xavier-uniform is the start. With
    BPR, a node without a training event keeps its (shrunken) random start: finite, and meaningless. It is gone in
    ``with_history``, where such a node is made of its neighbours alone.
    """

    def __init__(self, train: Interactions, *, dim: int = 64, layers: int = 2, reg: float = 1e-4, loss: str = "bpr"):
        super().__init__(train, dim=dim, layers=layers, reg=reg, loss=loss)
        self.users = nn.Embedding(self.n_users, dim)
        self.items = nn.Embedding(self.n_items, dim)
        for table in (self.users, self.items):
            nn.init.xavier_uniform_(table.weight)
        self._join(train, layers)

    def own(self) -> tuple[Tensor, Tensor]:
        if self.history is None:
            return self.users.weight, self.items.weight
        return self._trained(self.users.weight, self.items.weight)

    def penalised(self, batch: Batch, *rows: Tensor) -> tuple[Tensor, ...]:
        assert batch.negatives is not None
        return self.users(batch.users), self.items(batch.items), self.items(batch.negatives)

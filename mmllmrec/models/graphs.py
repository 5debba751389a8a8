"""Models whose vectors are smoothed over the user-item graph.

Legend: U users, I items, D width, K layers.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor

from mmllmrec.data.interactions import Interactions
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

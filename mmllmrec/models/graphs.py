"""Models whose vectors are smoothed over the user-item graph.

Legend: U users, I items, D width, K layers.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

from torch import Tensor, nn

from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import LightGraph
from mmllmrec.models.vectors import VectorModel


class GraphModel(VectorModel):
    """A ``VectorModel`` whose vectors are embeddings of users and items (``own``) smoothed over the graph of events.

    ``encoders.graph.LightGraph``: He et al. 2020, eqs. 3 and 4. An item that stands on its content and has no event
    keeps its own layer, E^(0) / (K + 1): what its content adds to a warm item too, whose neighbours add the rest. (A
    mean over the one layer it has would be K + 1 times as long, and under BPR put every cold item before every warm
    one; a cosine sees no difference.) A subclass sets ``graph``.
    """

    graph: LightGraph

    @abstractmethod
    def own(self) -> tuple[Tensor, Tensor]:
        """Embeddings before propagation, E^(0): users (U, D), items (I, D)."""

    def vectors(self, users: Tensor | slice, *items: Tensor | slice) -> tuple[Tensor, ...]:
        all_users, all_items = self.graph(*self.own())
        return all_users[users], *(all_items[i] for i in items)

    def with_history(self, history: Interactions) -> Self:
        """The same weights on the graph of other events: a node new to it takes its neighbours' embeddings."""
        other = self._beside(history)
        other.history = history.csr
        other._know(history)
        other.graph = LightGraph(history, layers=self.graph.layers)
        return other.to(self.device)

    def _folded(self, users: Tensor, items: Tensor) -> Tensor:
        return users  # the graph has done it

    def _trained(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of IDs (U, D), (I, D), those that no training event moved at zero: absent."""
        return users * self.known[:, None], items * self.warm[:, None]


class IDGraph(GraphModel):
    """A ``GraphModel`` with an embedding an ID, ``users`` and ``items``; BPR's penalty weighs the batch's, *before*
    propagation."""

    users: nn.Embedding
    items: nn.Embedding

    def penalised(self, batch: Batch, *rows: Tensor) -> tuple[Tensor, ...]:
        assert batch.negatives is not None
        return self.users(batch.users), self.items(batch.items), self.items(batch.negatives)

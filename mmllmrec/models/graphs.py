"""Models whose vectors are smoothed over the user-item graph.

Legend: U users, I items, D width, K layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import LightGraph
from mmllmrec.models.vectors import VectorModel, batch_rows, rows_of, rows_of_each


@dataclass
class Encoded:
    """Vectors of all users (U, D) and items (I, D), and ``parts``: what else a step of training needs of the same pass.

    ``places``: which row is whose, (U,) and (I,), where only some are held, those of a batch; None where all are.
    """

    users: Tensor
    items: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    places: tuple[Tensor, Tensor] | None = None

    def pick(self, users: Tensor | slice, *items: Tensor | slice) -> tuple[Tensor, ...]:
        """Rows, as ``VectorModel.vectors`` gives them."""
        if self.places is not None:
            users, items = self.places[0][users], tuple(self.places[1][i] for i in items)
        return rows_of(self.users, users), *rows_of_each(self.items, *items)

    def held(self, users: Tensor, items: Tensor, sizes: tuple[int, int]) -> Self:
        """The same, told whose rows it has: distinct users and items, of so many in all."""
        places = []
        for some, size in zip((users, items), sizes, strict=True):
            place = some.new_full((size,), -1)
            place[some] = torch.arange(len(some), device=some.device)
            places.append(place)
        self.places = places[0], places[1]
        return self

    def distinct(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where the batch's distinct users, and its distinct items, are in the rows of ``parts``, users first."""
        users, items = batch.users.unique(), self.where_items(batch.items.unique())
        return users if self.places is None else self.places[0][users], items + len(self.users)

    def where_items(self, items: Tensor) -> Tensor:
        """Which rows of ``items`` these are."""
        return items if self.places is None else self.places[1][items]


class EncodedModel(VectorModel):
    """A ``VectorModel`` whose vectors are computed all at once, with terms of its own beside the ranking one.

    A subclass defines ``encode`` and, for more terms, ``auxiliary``, which sees the same pass.
    """

    @abstractmethod
    def encode(self) -> Encoded:
        """All vectors; in training mode with what the method drops or perturbs there."""

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """Further named terms of a batch, already weighted."""
        return {}

    def two_views(self, one: Tensor, other: Tensor, nodes: Sequence[Tensor], *, temperature: float) -> Tensor:
        """InfoNCE of some nodes, ``one`` against ``other`` (both (N, D), users first), one way; those of each list
        apart (``Encoded.distinct``), added up: a scalar."""
        terms = [
            losses.info_nce(rows_of(one, some), rows_of(other, some), temperature=temperature, both_ways=False)
            for some in nodes
        ]
        return torch.stack(terms).sum()

    def ends(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The distinct users and the distinct items, negatives and the pool among them, that a step's loss reads."""
        items = [batch.pool, *([] if batch.negatives is None else [batch.negatives.flatten()])]
        return batch.users.unique(), torch.cat(items).unique()

    def vectors(self, users: Tensor | slice, *items: Tensor | slice) -> tuple[Tensor, ...]:
        return self.encode().pick(users, *items)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of ``VectorModel.loss``, and ``auxiliary``'s."""
        encoded = self.encode()
        return self.ranking(batch, encoded.pick) | self.auxiliary(batch, encoded)


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
        return rows_of(all_users, users), *rows_of_each(all_items, *items)

    def with_history(self, history: Interactions) -> Self:
        """The same weights on the graph of other events: a node new to it takes its neighbours' embeddings."""
        other = self._beside(history)
        other.history = history.csr
        other._know(history)
        other.graph = LightGraph(history, layers=self.graph.layers)
        return other.to(self.device)

    def _folded(self, users: Tensor, items: Tensor) -> Tensor:
        return users  # the graph has done it


class IDGraph(GraphModel):
    """A ``GraphModel`` with an embedding an ID, ``users`` and ``items``; BPR's penalty weighs the batch's, *before*
    propagation."""

    users: nn.Embedding
    items: nn.Embedding

    def penalised(self, batch: Batch, *rows: Tensor) -> tuple[Tensor, ...]:
        return batch_rows(batch, self.users.weight, self.items.weight)

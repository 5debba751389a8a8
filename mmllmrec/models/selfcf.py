"""SelfCF: users and items drawn together without a negative, one of the two always standing still.

Legend: B batch, U users, I items, N = U + I nodes, D width, L layers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec import losses as loss_functions
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import LightGraph
from mmllmrec.models.graphs import Encoded, EncodedModel
from mmllmrec.models.vectors import rows_of

TARGETS = ("dropout", "history", "edges")


class SelfCF(EncodedModel):
    """A predictor meets the other side's embedding, perturbed and without gradient; no negatives.

    Zhou et al. 2023 (arXiv 2107.03019). H = LightGCN's encoder of the embeddings; loss = (1 - cos(p(H_u), T_i)) / 2 +
    (1 - cos(p(H_i), T_u)) / 2 with p linear and T the target: H after ``dropout`` (``target="dropout"``), H mixed with
    the output when the node was last seen, ``momentum`` parts of that (``"history"``), or H propagated once more over a
    graph with ``dropout`` of its edges gone, each direction drawn for itself (``"edges"``). score(u, i) = p(H_u) . H_i
    + H_u . p(H_i). Departures: the history starts at H itself, where the published code starts at standard normal
    noise; the online side drops no edges, which that of the MMRec toolkit does; no norm penalty (its published weight
    is 0).
    """

    losses: ClassVar[tuple[str, ...]] = ("bootstrap",)
    seen_users: Tensor
    seen_items: Tensor

    def __init__(
        self,
        train: Interactions,
        *,
        dim: int = 64,
        layers: int = 2,
        target: str = "dropout",
        dropout: float = 0.5,
        momentum: float = 0.05,
        loss: str = "bootstrap",
    ):
        options: dict[str, Any] = {"dim": dim, "layers": layers, "target": target}
        super().__init__(train, loss=loss, dropout=dropout, momentum=momentum, **options)
        if target not in TARGETS:
            raise DataError(f"target={target!r}: one of {TARGETS}")
        self.target, self.dropout, self.momentum = target, dropout, momentum
        self.users, self.items = nn.Embedding(self.n_users, dim), nn.Embedding(self.n_items, dim)
        for table in (self.users, self.items):
            nn.init.xavier_uniform_(table.weight)
        self.graph = LightGraph(train, layers=layers)
        self.predictor = nn.Linear(dim, dim)
        if target == "history":  # rows of nodes not seen yet are zero
            self.register_buffer("seen_users", torch.zeros(self.n_users, dim))
            self.register_buffer("seen_items", torch.zeros(self.n_items, dim))

    def encode(self) -> Encoded:
        users, items = self.graph(*self.trained(self.users.weight, self.items.weight))
        both = torch.cat([self.predictor(users), users], 1), torch.cat([items, self.predictor(items)], 1)
        present = self.known[:, None], self.warm[:, None]  # the bias of the predictor is nobody's taste
        return Encoded(both[0] * present[0], both[1] * present[1])

    def _folded(self, users: Tensor, items: Tensor) -> Tensor:
        if self.history is None:
            return users
        first, second = items.chunk(2, dim=1)  # a user's halves are the other way round: [p(H); H]
        return super()._folded(users, torch.cat([second, first], dim=1))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``bootstrap``: both directions."""
        users, items = self.graph(*self.trained(self.users.weight, self.items.weight))
        u, i = rows_of(users, batch.users), rows_of(items, batch.items)
        to_users, to_items = self._targets(users, items, batch)
        value = loss_functions.bootstrap(self.predictor(u), to_items) + loss_functions.bootstrap(
            self.predictor(i), to_users
        )
        return {"bootstrap": value / 2}

    def _targets(self, users: Tensor, items: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the batch's users and items are to be met as: (B, D), (B, D)."""
        users, items = users.detach(), items.detach()
        if self.target == "edges":
            every = self.graph.propagation.csr
            thinned = every._replace(values=F.dropout(every.values, self.dropout))
            users, items = (thinned @ torch.cat([users, items])).split([self.n_users, self.n_items])
        u, i = rows_of(users, batch.users), rows_of(items, batch.items)
        if self.target == "dropout":
            return F.dropout(u, self.dropout), F.dropout(i, self.dropout)
        if self.target == "history":
            mixed = []
            for seen, rows, index in ((self.seen_users, u, batch.users), (self.seen_items, i, batch.items)):
                old = torch.where((seen[index] != 0).any(-1, keepdim=True), seen[index], rows)
                mixed.append(self.momentum * old + (1 - self.momentum) * rows)
                seen[index] = rows
            return mixed[0], mixed[1]
        return u, i

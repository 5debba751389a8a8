"""LightGCN: neighbourhood averaging on the user-item graph, and nothing else.

Legend: B batch, K negatives, U users, I items, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import LightGraph
from mmllmrec.models.base import Recommender


class LightGCN(Recommender):
    """Embeddings smoothed over the user-item graph of the training events: score(u, i) = e_u . e_i.

    He et al. 2020, eqs. 3 to 5 (``encoders.graph.LightGraph``), trained with BPR (eq. 15). ``dim`` is D, ``layers`` the
    number of propagations, ``reg`` weighs the norms of the batch's embeddings *before* propagation, as the paper does.
    Departures: the penalty is the unsquared one of the RecBole and MMRec family (``losses.embedding_norm``), and
    Xavier-uniform is the start. A node without a training event keeps its (shrunken) random start: finite, and
    meaningless.
    """

    def __init__(self, train: Interactions, *, dim: int = 64, layers: int = 2, reg: float = 1e-4):
        super().__init__(train, dim=dim, layers=layers, reg=reg)
        self.reg = reg
        self.users = nn.Embedding(self.n_users, dim)
        self.items = nn.Embedding(self.n_items, dim)
        for table in (self.users, self.items):
            nn.init.xavier_uniform_(table.weight)
        self.graph = LightGraph(train, layers=layers)

    def forward(self) -> tuple[Tensor, Tensor]:
        users, items = self.graph(self.users.weight, self.items.weight)
        return users, items

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """BPR on the propagated embeddings and the weighted norm of the batch's own ones."""
        assert batch.negatives is not None
        users, items = self()
        u, i, j = users[batch.users], items[batch.items], items[batch.negatives]
        terms = {"bpr": losses.bpr((u * i).sum(-1), (u[:, None] * j).sum(-1))}
        if self.reg:
            own = self.users(batch.users), self.items(batch.items), self.items(batch.negatives)
            terms["reg"] = self.reg * losses.embedding_norm(*own)
        return terms

"""BPR-MF: matrix factorisation trained to rank.

Legend: B batch, K negatives, U users, I items, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.models.base import Recommender


class BPR(Recommender):
    """Matrix factorisation with the BPR loss: score(u, i) = p_u . q_i.

    Rendle et al. 2009, section 5.1.1. ``dim`` is D; ``reg`` weighs the norms of the batch's embeddings
    (``losses.embedding_norm``, as the RecBole and MMRec family does, Xavier-normal start). Departures: Adam and
    batches where the paper draws single triples with SGD; no biases; the penalty is the family's unsquared norm, where
    eq. 4 squares. A user or an item without a training event keeps its random start: finite, and meaningless.
    """

    def __init__(self, train: Interactions, *, dim: int = 64, reg: float = 1e-2):
        super().__init__(train, dim=dim, reg=reg)
        self.reg = reg
        self.users = nn.Embedding(self.n_users, dim)
        self.items = nn.Embedding(self.n_items, dim)
        for table in (self.users, self.items):
            nn.init.xavier_normal_(table.weight)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.users.weight, self.items.weight

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """BPR and the weighted norm of the batch's embeddings."""
        assert batch.negatives is not None
        u, i, j = self.users(batch.users), self.items(batch.items), self.items(batch.negatives)
        terms = {"bpr": losses.bpr((u * i).sum(-1), (u[:, None] * j).sum(-1))}
        if self.reg:
            terms["reg"] = self.reg * losses.embedding_norm(u, i, j)
        return terms

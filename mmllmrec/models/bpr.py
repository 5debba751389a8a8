"""BPR-MF: matrix factorisation trained to rank.

Legend: B batch, C some items, U users, I items, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmllmrec.data.interactions import Interactions
from mmllmrec.models.vectors import VectorModel, rows_of, rows_of_each


class BPR(VectorModel):
    """Matrix factorisation with the BPR loss: score(u, i) = p_u . q_i.

    Rendle et al. 2009, BPR-Opt with matrix factorisation. ``dim`` is D; ``reg`` weighs the norms of the batch's
    embeddings (``losses.embedding_norm``, as the RecBole and MMRec family does, Xavier-normal start). With
    ``loss="softmax"`` it is matrix factorisation under the main loss (``VectorModel``). Departures: Adam and batches
    where the paper draws single triples with SGD; no biases; the penalty is the family's unsquared norm, where the
    paper squares. With BPR, a user or an item without a training event keeps its random start: finite, and meaningless.
    """

    def __init__(self, train: Interactions, *, dim: int = 64, reg: float = 1e-2, loss: str = "bpr"):
        super().__init__(train, dim=dim, reg=reg, loss=loss)
        self.users = nn.Embedding(self.n_users, dim)
        self.items = nn.Embedding(self.n_items, dim)
        for table in (self.users, self.items):
            nn.init.xavier_normal_(table.weight)

    def vectors(self, users: Tensor | slice, *items: Tensor | slice) -> tuple[Tensor, ...]:
        return rows_of(self.users.weight, users), *rows_of_each(self.items.weight, *items)

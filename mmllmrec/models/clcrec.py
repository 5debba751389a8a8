"""CLCRec: content is pulled towards what collaboration says of an item, so that it can stand in for it.

Legend: B batch, C distinct items of a batch, U users, I items, D width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch, in_batch
from mmllmrec.encoders.heads import unit
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.content import ContentModel, tower
from mmllmrec.models.vectors import FIT, cosine_softmax


class CLCRec(ContentModel):
    """Contrastive learning for cold start: (1 - weight) L_UI + weight L_RE.

    Wei et al. 2021 (arXiv 2107.05315). With collaborative embeddings z_u, z_i and a feature representation
    f_i = MLP(x_i):

    1. L_RE = mean over the batch's distinct items of -log softmax_j(cos(z_i, f_j) / temperature)[i]: which content
       belongs to this embedding, the mutual information of embedding (E) and representation (R);
    2. L_UI = the main loss of a table (``cosine_softmax``) between z_u and v_i: which item did this user take;
    3. v_i = f_i with probability ``replace``, z_i otherwise, so that users learn to meet content.

    A warm item is scored by z_i, one without a training event by f_i. ``features`` or ``catalog``, ``feature_dim``: see
    ``ContentModel``. An item without any content has no part in L_RE, and is never replaced. Raises ``DataError`` for a
    ``weight`` or a ``replace`` outside 0..1, and for another loss. Departures: contrasts are among the batch's items,
    logQ-corrected and with known positives masked, where the paper draws a number of negatives; L_UI's temperature is
    learned, L_RE's given, cosines in both; features as they come (published: each modality's at unit length, 256 hidden
    units); weight decay (``fit_defaults``) in place of the norm penalty; biases as in ``content.tower``.
    """

    losses: ClassVar[tuple[str, ...]] = ("softmax",)
    fit_defaults: ClassVar[dict[str, Any]] = FIT

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        hidden: int = 128,
        weight: float = 0.5,
        replace: float = 0.5,
        temperature: float = 0.1,
        feature_dim: int = 64,
        loss: str = "softmax",
    ):
        options: dict[str, Any] = {
            "dim": dim,
            "hidden": hidden,
            "weight": weight,
            "replace": replace,
            "temperature": temperature,
        }
        super().__init__(train, catalog=catalog, features=features, feature_dim=feature_dim, loss=loss, **options)
        if not (0 <= weight <= 1 and 0 <= replace <= 1):
            raise DataError(f"weight={weight}, replace={replace}: shares, between 0 and 1")
        self.weight, self.replace, self.temperature = weight, replace, temperature
        self.users, self.items = nn.Embedding(self.n_users, dim), nn.Embedding(self.n_items, dim)
        for table in (self.users, self.items):
            nn.init.xavier_normal_(table.weight)
        self.tower = tower(self.described.shape[1], hidden=hidden, dim=dim)

    def _represent(self, items: Tensor | slice) -> Tensor:
        """Feature representations f of some items, of unit length."""
        return unit(self.tower(self.described[items]))

    def vectors(self, users: Tensor | slice, *items: Tensor | slice) -> tuple[Tensor, ...]:
        def of(i: Tensor | slice) -> Tensor:
            return torch.where(self.warm[i][..., None], unit(self.items.weight[i]), self._represent(i))

        return self.users.weight[users], *(of(i) for i in items)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``softmax``: the user-item term; ``content``: the embedding-representation term; both weighted."""
        assert self.log_scale is not None
        found = in_batch(self.train_data, batch, same=self.same)
        z, f = unit(self.items(found.items)), self._represent(found.items)
        some = (self.described[found.items] != 0).any(dim=-1)
        replaced = (torch.rand(len(z), 1, device=z.device) < self.replace) & some[:, None]
        p, v = unit(self.users(batch.users)), torch.where(replaced, f, z)
        terms = {"softmax": (1 - self.weight) * cosine_softmax(p, v, found, log_scale=self.log_scale)}
        own = torch.arange(len(z), device=z.device)
        alike = self.same.to(z.device)[found.items] if self.same is not None else own
        value = losses.sampled_softmax(
            z[some], f, own[some], mask=((alike[:, None] == alike) | ~some)[some], temperature=self.temperature
        )
        terms["content"] = self.weight * (value if bool(some.any()) else f.sum())  # no anchor: f is all zero
        return terms

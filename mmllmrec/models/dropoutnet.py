"""DropoutNet: a network over a latent and content that is trained to do without the latent.

Legend: B batch, K negatives, C some items, U users, I items, L width of the latents, D width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.content import tower
from mmllmrec.models.latents import LatentModel


class DropoutNet(LatentModel):
    """score(u, i) = f_U(U_u) . f_V([V_i; x_i]), Volkovs et al. 2017, with latents U, V of a trained model.

    ``loss="reconstruction"`` is the paper's (eq. 2): the squared difference to the first stage's scores, mean over the
    positives and over sampled negatives alike; with ``"softmax"`` and ``"bpr"`` the same towers meet the losses of
    ``VectorModel``. In training (algorithm 1) an item's latent is zero with probability ``dropout`` (item dropout), and
    a user's is replaced with the mean of its items' latents as often (user transform). An item without a training event
    has a zero latent, and a new user the mean of its items' (section 4.3; ``with_history``). ``features`` or
    ``catalog``, ``feature_dim``: see ``ContentModel``.

        first = mm.fit(mm.models.BPR(split.train), split, epochs=200, lr=5e-3)
        model = mm.models.DropoutNet.pretrained(first, catalog=split.catalog)
        run = mm.fit(model, split, **model.fit_defaults)

    Departures: users have no content here, so theirs is never dropped to zero; no item transform; latents enter with
    unit entries and their scores are divided by sqrt(L), which moves no ranking; two layers without batch
    normalisation; batches of events with one negative each, where the paper draws items a user.
    """

    losses: ClassVar[tuple[str, ...]] = ("reconstruction", "softmax", "bpr")

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        latents: tuple[Tensor, Tensor] | None = None,
        dim: int = 64,
        hidden: int = 128,
        dropout: float = 0.5,
        feature_dim: int = 64,
        loss: str = "reconstruction",
    ):
        content = {"catalog": catalog, "features": features, "feature_dim": feature_dim}
        super().__init__(train, latents=latents, loss=loss, dim=dim, hidden=hidden, dropout=dropout, **content)
        if not 0 <= dropout < 1:
            raise DataError(f"dropout={dropout}: the chance to lose a latent, from 0 to below 1")
        self.dropout = dropout
        width = self.latent_users.shape[1]
        self.user_tower = tower(width, hidden=hidden, dim=dim)
        self.item_tower = tower(width + self.described.shape[1], hidden=hidden, dim=dim)
        self.register_buffer("transformed", self.averages(train), persistent=False)

    transformed: Tensor

    def vectors(self, users: Tensor | slice, *items: Tensor | slice) -> tuple[Tensor, ...]:
        latent = self.latent_users[users]
        latent = torch.where(self._lost(latent), self.transformed[users], latent)
        return self.user_tower(latent / self.user_unit), *(self._items(i) for i in items)

    def _items(self, items: Tensor | slice) -> Tensor:
        latent = self.latent_items[items]
        latent = latent.masked_fill(self._lost(latent), 0.0)
        return self.item_tower(torch.cat([latent / self.item_unit, self.described[items]], dim=-1))

    def _lost(self, latent: Tensor) -> Tensor:
        """Which rows go without their own latent in this step, (..., L) -> (..., 1) bool; none outside training."""
        rate = self.dropout if self.training else 0.0
        return torch.rand(*latent.shape[:-1], 1, device=latent.device) < rate

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"reconstruction"}``, or what ``VectorModel`` says of the other losses."""
        if self.loss_name != "reconstruction":
            return super().loss(batch)
        assert batch.negatives is not None
        items = torch.cat([batch.items[:, None], batch.negatives], dim=1)
        u, v = self.vectors(batch.users, items)
        mine = (u[:, None] * v).sum(-1)
        theirs = (self.latent_users[batch.users][:, None] * self.latent_items[items]).sum(-1)
        unit = self.user_unit * self.item_unit * self.latent_items.shape[1] ** 0.5
        error = (mine - theirs / unit).square()
        return {"reconstruction": (error[:, :1].mean() + error[:, 1:].mean()) / 2}

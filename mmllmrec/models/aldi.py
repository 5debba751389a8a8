"""ALDI: warm items, scored by a trained model, teach a student that has only content to score like it.

Legend: B batch, K negatives, U users, I items, L width of the latents, D width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllmrec import losses
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch, in_batch
from mmllmrec.encoders.heads import unit
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.content import tower
from mmllmrec.models.latents import LatentModel
from mmllmrec.models.vectors import cosine_softmax, scale_of


class ALDI(LatentModel):
    """Aligning distillation (Huang et al. 2023): the teacher's score where an item is warm, the student's elsewhere.

    Teacher: t_ui = U_u . V_i, the latents of a trained model. Student: s_ui = g(U_u) . f(x_i). With a positive i and a
    negative j, CE(a, b) = -sigmoid(b) log sigmoid(a) - (1 - sigmoid(b)) log(1 - sigmoid(a)), and d = the mean of f(x)
    (for the teacher, of V) over the batch's negatives, the terms are means over the batch of

    1. supervised: ``losses.bpr`` on the student's own scores (``loss="softmax"``: ``cosine_softmax``, and then the
       student's scores are cosines over the learned temperature);
    2. rating: ``rating`` (gamma) times |t_ui - s_ui| + |t_uj - s_uj|;
    3. ranking: ``ranking`` (alpha) times w_i CE(s_ui - s_uj, t_ui - t_uj);
    4. identification: ``identification`` (beta) times w_i CE(f_i . f_i - f_i . d, V_i . V_i - V_i . d): an item is as
       distinct among others for the student as it is for the teacher.

    w_i = tanh(min(a n_i, cap)) is how far a teacher can be trusted: n_i sums 1 / |events of u| over i's users, a is
    ``cap`` over its mean. Weights' defaults are those of the authors' program. ``features`` or ``catalog``,
    ``feature_dim``: see ``ContentModel``. A new user's latent is the mean of its items' (``with_history``).

        teacher = mm.fit(mm.models.LightGCN(split.train), split, epochs=200, lr=5e-3)
        model = mm.models.ALDI.pretrained(teacher, catalog=split.catalog)
        run = mm.fit(model, split, **model.fit_defaults | {"patience": 40})  # validation dips before it rises

    Departures: LeakyReLU, no batch normalisation; w_i always, which the authors' program has as an option; weight decay
    (``fit_defaults``) in place of the norm penalty.
    """

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        latents: tuple[Tensor, Tensor] | None = None,
        dim: int = 64,
        hidden: int = 128,
        rating: float = 0.1,
        ranking: float = 0.9,
        identification: float = 0.05,
        cap: float = 4.0,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        content = {"catalog": catalog, "features": features, "feature_dim": feature_dim}
        strengths = {"rating": rating, "ranking": ranking, "identification": identification}
        options = {"dim": dim, "hidden": hidden, "cap": cap, **strengths}
        super().__init__(train, latents=latents, loss=loss, **content, **options)
        self.strengths = strengths
        self.negatives = 1  # the alignments compare with a sampled item under either supervised loss
        self.user_tower = tower(self.latent_users.shape[1], hidden=hidden, dim=dim)
        self.item_tower = tower(self.described.shape[1], hidden=hidden, dim=dim)
        count = train.csr.T @ (1 / np.maximum(train.user_counts, 1))
        trust = np.tanh(np.minimum(cap * count / max(count.mean(), 1e-12), cap)).astype(np.float32)
        self.register_buffer("trust", torch.from_numpy(trust), persistent=False)

    trust: Tensor

    def vectors(self, users: Tensor | slice, *items: Tensor | slice) -> tuple[Tensor, ...]:
        """The student's: users (..., D) and items (..., D) whose inner products are its scores."""
        p = self.user_tower(self.latent_users[users] / self.user_unit)
        q = [self.item_tower(self.described[i]) for i in items]
        if self.log_scale is None:
            return p, *q
        return unit(p) * scale_of(self.log_scale), *(unit(x) for x in q)

    def forward(self) -> tuple[Tensor, Tensor]:
        p, q = self.vectors(slice(None), slice(None))
        warm = self.warm[:, None]
        return torch.cat([self.latent_users, p], dim=1), torch.cat([self.latent_items * warm, q * ~warm], dim=1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The four terms of the class's docstring, weighted; the supervised one under its loss's name."""
        assert batch.negatives is not None
        s = self.vectors(batch.users, batch.items, batch.negatives)
        t = (self.latent_users[batch.users], self.latent_items[batch.items], self.latent_items[batch.negatives])
        (s_i, s_j), (t_i, t_j) = _ratings(*s), _ratings(*t)
        if self.log_scale is None:
            terms = {"bpr": losses.bpr(s_i, s_j)}
        else:
            found = in_batch(self.train_data, batch, same=self.same)
            p, q = self.vectors(batch.users, found.items)
            terms = {"softmax": cosine_softmax(unit(p), q, found, log_scale=self.log_scale)}
        w = self.trust[batch.items]
        rank = F.binary_cross_entropy_with_logits(s_i[:, None] - s_j, (t_i[:, None] - t_j).sigmoid(), reduction="none")
        same = F.binary_cross_entropy_with_logits(_distinct(*s), _distinct(*t).sigmoid(), reduction="none")
        rating = (t_i - s_i).abs().mean() + (t_j - s_j).abs().mean()
        aligned = {"rating": rating, "ranking": (w[:, None] * rank).mean(), "identification": (w * same).mean()}
        return terms | {k: self.strengths[k] * v for k, v in aligned.items() if self.strengths[k]}


def _ratings(u: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of positives (B,) and of negatives (B, K)."""
    return (u * i).sum(-1), (u[:, None] * j).sum(-1)


def _distinct(u: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """How much more an item is like itself than like the batch's negatives, (B,)."""
    return (i * (i - j.flatten(0, 1).mean(0))).sum(-1)

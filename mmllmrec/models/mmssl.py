"""MMSSL: modalities that a critic cannot tell from behaviour, and users alike through each of them.

Legend: B distinct users of a batch, U users, I items, M modalities, D width, F_m width of a modality's features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, cast

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mmllmrec import losses
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import Propagation, normalised_events
from mmllmrec.encoders.heads import unit
from mmllmrec.features.table import FeatureTable
from mmllmrec.losses import l2
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import WrittenGraphs


class MMSSL(WrittenGraphs):
    """Adversarial structure learning and cross-modal contrast beside BPR.

    Wei et al. 2023 (arXiv 2302.10632). U_m = R W_m x_m, V_m = R^T U_m; for a batch's users the rows U_m V_m^T without
    known items, at unit length, should look to a critic (Wasserstein, gradient penalty ``penalty_weight``) like their
    rows of events softened by Gumbel noise plus the model's own scores. The ``top`` items of every user by U_m V_m^T
    that it has not taken, chosen once an epoch, are a graph a modality; IDs over it, mixed over the modalities by
    attention and brought to unit length, are added to the IDs times ``id_weight`` before LightGCN, and unit U_m, V_m
    times ``content_weight`` after it. ``contrast_weight`` times the InfoNCE of the users over each modality's graph and
    their final vectors, negatives from both. An absent modality is zero; an item without an event has no vector:
    content comes in through users. The critic's first layers have I^2 / 4 + I^2 / 32 weights, as published, and are not
    saved with a model. Departures: critic and model take their steps together, each term with the other's part held
    still; attention works (in the published code it is one linear map, and the modalities' graphs are empty but for the
    first steps of an epoch); no softmax over coordinates at the end of the graph; LightGCN's normalisation; leaky
    rectifiers and layer norm in the critic, no dropout and no sigmoid (published: 100 times a sigmoid); no penalty of
    the features' squares.
    """

    supports_cold_items: ClassVar[bool] = False
    penalty: ClassVar[Callable[..., Tensor]] = staticmethod(l2)

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        top: int = 10,
        id_weight: float = 0.36,
        content_weight: float = 0.55,
        contrast_weight: float = 0.03,
        adversarial_weight: float = 1e-4,
        penalty_weight: float = 0.3,
        dropout: float = 0.2,
        temperature: float = 0.5,
        reg: float = 1e-5,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        self.dropout, self.temperature = dropout, temperature
        self.id_weight, self.content_weight, self.contrast_weight = id_weight, content_weight, contrast_weight
        self.adversarial_weight, self.penalty_weight = adversarial_weight, penalty_weight
        self.maps = self.linear_each(dim)
        self.attention = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True)
        self.to_users, self.to_items = (Propagation(m) for m in _both(normalised_events(train)))
        if adversarial_weight:
            wide = max(self.n_items // 4, 8), max(self.n_items // 8, 4)
            self.critic = nn.Sequential(
                nn.Linear(self.n_items, wide[0]),
                nn.LeakyReLU(),
                nn.LayerNorm(wide[0]),
                nn.Linear(wide[0], wide[1]),
                nn.LeakyReLU(),
                nn.Linear(wide[1], 1, bias=False),  # it would cancel
            )
        self._start(top)

    # -- the graphs of an epoch ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self) -> list[Tensor]:
        written = []
        for told in self.through(self.maps):
            users = self.to_users(told)
            items, near = self.to_items(users), []
            for some in torch.arange(self.n_users).split(1024):
                known = torch.from_numpy(self.train_data.csr[some.numpy()].toarray() > 0).to(items.device)
                scores = (users[some] @ items.T).masked_fill(known | ~self.warm, float("-inf"))
                values, best = scores.topk(self.top, dim=1)
                silent = torch.isinf(values) | (users[some] == 0).all(dim=1, keepdim=True)
                near.append(best.masked_fill(silent, -1))  # nothing speaks for these
            written.append(torch.cat(near))
        return written

    def linked(self, chosen: sp.csr_matrix) -> list[Propagation]:
        degree = [np.maximum(np.asarray(chosen.sum(axis=a)).ravel(), 1) ** -0.5 for a in (1, 0)]
        return [Propagation(m) for m in _both((sp.diags(degree[0]) @ chosen @ sp.diags(degree[1])).tocsr())]

    def weights(self) -> dict[str, Tensor]:
        """What is saved: not the critic, which no score reads."""
        return {k: v for k, v in super().weights().items() if not k.startswith("critic.")}

    # -- encoding ------------------------------------------------------------------------------------------------------

    def encode(self) -> Encoded:
        users, items = self.ids()
        parts: dict[str, Tensor] = {}
        through_users, through_items, contents = [], [], []
        # outside training by the weights and features as they are, not those of the epoch's start
        links = self.links if self.training else self.graphs_of(self.write())
        for column, (m, told) in enumerate(zip(self.modalities, self.through(self.maps), strict=True)):
            of_users = self.to_users(F.dropout(told, self.dropout, self.training))
            contents.append((of_users, self.to_items(of_users)))
            through_users.append(links[2 * column](items))
            through_items.append(links[2 * column + 1](users))
            parts[f"users by {m}"] = through_users[-1]
        attended = []
        for views in (through_users, through_items):
            x = torch.stack(views, dim=1)
            attended.append(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))
        out_users, out_items = self.graph(
            users + self.id_weight * unit(attended[0]), items + self.id_weight * unit(attended[1])
        )
        for of_users, of_items in contents:
            out_users = out_users + self.content_weight * unit(of_users)
            out_items = out_items + self.content_weight * unit(of_items)
        parts |= {f"content users {c}": u for c, (u, _) in enumerate(contents)}
        parts |= {f"content items {c}": i for c, (_, i) in enumerate(contents)}
        return Encoded(out_users, out_items, parts)

    # -- terms ---------------------------------------------------------------------------------------------------------

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``contrast``, and the critic's game: ``adversarial`` moves the model, ``critic`` the critic."""
        terms, users = {}, batch.users.unique()
        if self.contrast_weight:
            each = [
                losses.info_nce(
                    encoded.parts[f"users by {m}"][users],
                    encoded.users[users],
                    temperature=self.temperature,
                    both_ways=False,
                    within=True,
                )
                for m in self.modalities
            ]
            terms["contrast"] = self.contrast_weight * torch.stack(each).sum()
        if self.adversarial_weight:
            known = torch.from_numpy(self.train_data.csr[users.cpu().numpy()].toarray().astype(np.float32))
            known = known.to(encoded.users.device)
            views = range(len(self.modalities))
            fake = torch.cat(
                [
                    _unseen(encoded.parts[f"content users {c}"][users], encoded.parts[f"content items {c}"], known)
                    for c in views
                ]
            )
            still = {name: p.detach() for name, p in self.critic.named_parameters()}
            terms["adversarial"] = -self.adversarial_weight * functional_call(self.critic, still, fake).mean()
            terms["critic"] = self._critic(fake.detach(), self._real(users, known, encoded))
        return terms

    @torch.no_grad()
    def _real(self, users: Tensor, known: Tensor, encoded: Encoded) -> Tensor:
        """Rows of events as the critic sees them: softened by Gumbel noise, with the model's scores of the rest."""
        gumbel = -torch.log(-torch.log(torch.rand_like(known).clamp(1e-8, 1 - 1e-7)))
        soft = torch.softmax(known + 2e-3 * gumbel, dim=1)
        return unit(soft + 100 * _unseen(encoded.users[users], encoded.items, known))

    def _critic(self, fake: Tensor, real: Tensor) -> Tensor:
        """The critic's loss on rows (M B, I) and (B, I); each of the real ones stands beside M others.

        The penalty is on the slope in I columns between the two. The first layer W is linear: what it makes of a row
        between is between what it makes of both, and with g the slope behind it, |W^T g|^2 = g^T (W W^T) g. So neither
        rows between nor slopes are made in I columns, which is two thirds of the critic's multiplications.
        """
        first, rest = cast(nn.Linear, self.critic[0]), self.critic[1:]
        made, true = first(fake), first(real)
        share = torch.rand(len(fake), 1, device=fake.device)
        between = share * true.repeat(len(made) // len(true), 1) + (1 - share) * made
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(rest(between).sum(), between, create_graph=True)
        squared = (slope @ (first.weight @ first.weight.T) * slope).sum(dim=1)
        steep = (squared.clamp_min(1e-12).sqrt() - 1).square().mean()
        return rest(made).mean() - rest(true).mean() + self.penalty_weight * steep


def _unseen(users: Tensor, items: Tensor, known: Tensor) -> Tensor:
    """Scores of what users have not taken, at unit length: (B, D), (I, D), (B, I) -> (B, I)."""
    return unit((users @ items.T) * (1 - known))


def _both(matrix: sp.csr_matrix) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    return matrix, matrix.T.tocsr()

"""Content and IDs under one score: what the unified model and its two-stage twin share.

Legend: B batch, C candidates (distinct items of a batch), U users, I items, L events of a history, D width.
"""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch, InBatch, in_batch
from mmllmrec.encoders.gather import encode_pool
from mmllmrec.encoders.graph import LightGraph
from mmllmrec.encoders.heads import EARLY, Content, unit
from mmllmrec.encoders.history import HISTORIES, Moments
from mmllmrec.models.base import Recommender
from mmllmrec.models.vectors import check_ids

USERS_A_STEP = 96  # whose histories are read in a step of training


class Hybrid(Recommender):
    """score(u, i) = p_u . q_i + b_i, with q_i = c_i + present_i z_i, where c_i is content of unit length.

    item: the ID z_i says what content does not, and b_i its popularity; both are absent where an item has no training
    event, and dropped with probability ``id_dropout`` in training, so that content learns to stand alone. An absent
    bias is b_0, learned there, plus ``cold_offset``: how much more often a new item is taken than training can know
    (``fit(cold_cost=)`` chooses it on validation).
    user: p_u = w_u id_u + (1 - w_u) h_u, w_u = n_u / (n_u + ``mix``) with n_u training events, 0 for a user whom
    training has not seen; h_u is what ``history`` makes of the content of u's events: ``"transformer"``
    (``encoders.HistoryEncoder``), ``"discriminant"`` (its closed form alone, three learned numbers), or ``"mean"``
    (``encoders.HistoryMean``: the frozen baseline, nothing learned and no loss term of its own). With ``graph_layers``
    the IDs are smoothed over the graph of training events (``encoders.LightGraph``).

    loss ``softmax``: in-batch sampled softmax over the batch's distinct items, with the user's other training positives
    and copies of the positive masked, corrected by log(1 - (1 - p)^B) for batches of events; ``reg``: squared norms of
    the batch's user IDs, item IDs and biases, times ``reg_user``, ``reg_item``, ``reg_bias`` (the prior under which the
    score is a maximum a posteriori: without it IDs learn by heart what content could say); ``history``: the same
    softmax for the history tower alone, items held fixed, each history without the events of the batch, and a share
    ``history_cut`` of them cut at random, so that short ones are met too. Further terms, none without its weight:
    ``modality_weight``: the softmax of each path alone, against neglect; ``cross_weight``: InfoNCE between pairs of
    modalities on heads of their own; ``collaborative_weight``: InfoNCE between content and the mean of the users who
    took the item (as in CLCRec, Wei et al. 2021).

    ``lr_ids`` is the learning rate of IDs and biases, in multiples of the one that ``fit`` is given.

    Departures from a cosine over a temperature: users keep their length, which says how sure their taste is, and the
    prior bounds it. A subclass says what content is: ``content``.
    """

    supports_cold_items: ClassVar[bool] = True
    supports_cold_users: ClassVar[bool] = True
    negatives: int = 0
    loss_name: str = "softmax"
    item_present: Tensor
    user_count: Tensor
    bank: Tensor

    def __init__(
        self,
        train: Interactions,
        *,
        dim: int = 64,
        id_dropout: float = 0.1,
        cold_offset: float = 0.5,
        reg_user: float = 0.02,
        reg_item: float = 2.0,
        reg_bias: float = 0.002,
        graph_layers: int = 0,
        mix: float = 10.0,
        history: str = "transformer",
        history_cut: float = 0.5,
        lr_ids: float = 20.0,
        modality_weight: float = 0.0,
        cross_weight: float = 0.0,
        collaborative_weight: float = 0.0,
        paths: tuple[str, ...] = (),
        **config: Any,
    ):
        shared = {
            "dim": dim,
            "id_dropout": id_dropout,
            "cold_offset": cold_offset,
            "reg_user": reg_user,
            "reg_item": reg_item,
            "reg_bias": reg_bias,
            "graph_layers": graph_layers,
            "mix": mix,
            "history": history,
            "history_cut": history_cut,
            "lr_ids": lr_ids,
            "modality_weight": modality_weight,
            "cross_weight": cross_weight,
            "collaborative_weight": collaborative_weight,
        }
        super().__init__(train, **shared, **config)
        if not 0 <= id_dropout <= 1:
            raise DataError(f"id_dropout={id_dropout}: a chance, between 0 and 1")
        if history not in HISTORIES:
            raise DataError(f"history={history!r}: one of {list(HISTORIES)}")
        known = {k for kind in type(self).__mro__ for k in inspect.signature(kind.__init__).parameters}  # type: ignore[misc]
        unknown = sorted(set(config) - known)
        if unknown:
            raise TypeError(
                f"{type(self).__name__} got an unexpected keyword argument {unknown[0]!r}; {list(shared)} are known"
            )
        check_rate("lr_ids", lr_ids)
        self.lr_ids = lr_ids
        self.id_dropout, self.mix = id_dropout, mix
        self.cold_offset.fill_(cold_offset)
        self.history_cut = history_cut
        self.reg = {"user": reg_user, "item": reg_item, "bias": reg_bias}
        self.weighed = {"modality": modality_weight, "cross": cross_weight, "collaborative": collaborative_weight}
        self.user_ids = nn.Embedding(self.n_users, dim)
        self.item_ids = nn.Embedding(self.n_items, dim)
        for table in (self.user_ids, self.item_ids):
            nn.init.normal_(table.weight, std=0.01)
        self.bias = nn.Parameter(torch.zeros(self.n_items))
        self.absent_bias = nn.Parameter(torch.zeros(()))
        self.graph = LightGraph(train, layers=graph_layers) if graph_layers else None
        self.history_tower = HISTORIES[history](dim)
        self.paths = paths
        late = [p for p in paths if p != EARLY]
        self.shared = nn.ModuleDict({p: nn.Linear(dim, dim, bias=False) for p in late if cross_weight})
        self.align = nn.Linear(dim, dim, bias=False) if collaborative_weight else None
        self.history: Interactions | None = None
        self.said: Tensor | None = None
        self.read_last: tuple[Any, Tensor] | None = None  # what ``reading`` was, and the content then
        self.same: Tensor | None = None
        self.register_buffer("item_present", torch.from_numpy(train.item_counts > 0), persistent=False)
        self.register_buffer("user_count", torch.from_numpy(train.user_counts).float(), persistent=False)
        # the content that training met last: what a history is made of between two readings of an item
        self.register_buffer("bank", torch.zeros(self.n_items, dim))

    @abstractmethod
    def content(self, index: Tensor) -> Content:
        """Content of some items, (C,) int64; ``fused`` need not have unit length."""

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """``ids``: IDs and biases, at ``lr_ids`` lr (a row gets few gradients) without decay (they have a prior); and
        ``heads``: the rest, at lr."""
        ids = [self.item_ids.weight, self.user_ids.weight, self.bias]
        known = {id(p) for p in ids}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        return [
            {"params": ids, "lr": self.lr_ids * lr, "weight_decay": 0.0, "name": "ids"},
            {"params": rest, "lr": lr, "name": "heads"},
        ]

    def _lifted(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """As they are: an absent bias has the offset in it."""
        return users, items

    # -- vectors ----------------------------------------------------------------------------------------------------

    def ids(self) -> tuple[Tensor, Tensor]:
        """ID vectors of users (U, D) and items (I, D), smoothed over the graph where there is one."""
        if self.graph is None:
            return self.user_ids.weight, self.item_ids.weight
        users, items = self.graph(self.user_ids.weight, self.item_ids.weight)
        return users, items

    def _biases(self, index: Tensor, present: Tensor) -> Tensor:
        offset = 0.0 if self.training else self.cold_offset
        return torch.where(present, self.bias[index], self.absent_bias + offset)

    def settled(self) -> Self:
        """A copy that reads its items now and never again: for many histories of one catalogue (``with_history``). It
        does not follow training."""
        other = copy.copy(self)
        with self.evaluating():
            other.said = self.all_content()
        return other

    def all_content(self) -> Tensor:
        """Content of every item, (I, D) of unit length, in blocks. Outside training it is kept for as long as nothing
        that reads is written to (``reading``): measuring a run asks for it again and again."""
        if self.said is not None:
            return self.said
        now = None if self.training or torch.is_grad_enabled() else self.reading()
        if now is not None and self.read_last is not None and self.read_last[0] == now:
            return self.read_last[1]
        blocks = torch.arange(self.n_items, device=self.device).split(512)
        content = torch.cat([unit(self.content(b).fused) for b in blocks])
        if now is not None:
            self.read_last = now, content
        return content

    def reading(self) -> Any:
        """What decides ``all_content``, to compare; None where that costs less to compute than to keep."""
        return None

    def told(self, content: Tensor) -> Tensor:
        """Users as their histories say, h (U, D), from all items' content (I, D)."""
        events = (self.train_data if self.history is None else self.history).csr
        blocks = [slice(a, a + 1024) for a in range(0, self.n_users, 1024)]
        return torch.cat([self._told(content, events[b].toarray() > 0) for b in blocks])

    def _told(self, content: Tensor, rows: np.ndarray) -> Tensor:
        """h (B, D) of users with these events, rows (B, I) bool."""
        read = (content != 0).any(dim=1)  # items that training has not met yet have no content in the bank
        here = torch.from_numpy(rows).to(content.device) & read
        counts = here.sum(dim=1)
        length = max(min(int(counts.max()) if len(counts) else 0, self.history_tower.length), 1)
        # long histories are cut at random in training, and to their first events otherwise
        order = torch.rand(here.shape, device=content.device) if self.training else torch.zeros(here.shape)
        index = (order.to(content.device) - 2 * here.float()).argsort(dim=1, stable=True)[:, :length]
        present = here.gather(1, index)
        moments = Moments.of(content[self.item_present & read])
        with torch.autocast(content.device.type, enabled=False):
            sums = here.float() @ content.float()
        found: Tensor = self.history_tower(content[index], present, sums, counts.float(), moments)
        return found

    def forward(self) -> tuple[Tensor, Tensor]:
        users, ids = self.ids()
        content = self.all_content()
        p = self._users(users, content)
        return _with_one(p), self._items(ids, content, p)

    def _users(self, users: Tensor, content: Tensor) -> Tensor:
        """p (U, D) from ID vectors (U, D) and all items' content (I, D)."""
        weight = (self.user_count / (self.user_count + self.mix).clamp(min=1e-6))[:, None]
        return weight * users + (1 - weight) * self.told(content)

    def _items(self, ids: Tensor, content: Tensor, p: Tensor | None) -> Tensor:
        """q and bias of all items (I, D + 1) from ID vectors and content (I, D); ``p`` (U, D) is read where ``history``
        moves cold items."""
        q = content + self.item_present[:, None] * ids
        if self.history is not None:
            assert p is not None
            q = self._folded(p, q)
        index = torch.arange(self.n_items, device=self.device)
        return torch.cat([q, self._biases(index, self.item_present)[:, None]], dim=1)

    def _folded(self, p: Tensor, q: Tensor) -> Tensor:
        """Items that training has not seen and ``history`` has: their content, moved by the users who took them.

        Where users are spread like a Gaussian of mean m and covariance C, those who take an item q have mean m + C q
        (the softmax tilts the density by exp(p . q)), so that n of them, under a prior N(c, I / l), have their maximum
        a posteriori at q = c + n (l I + n C)^-1 (mean of the n - m - C c). l is the precision that ``reg_item`` gives
        one event, 2 ``reg_item``.
        """
        assert self.history is not None
        events = self.history.csr.T.tocsr()
        new = np.flatnonzero((np.diff(events.indptr) > 0) & ~self.item_present.cpu().numpy())
        if not len(new):
            return q
        moments = Moments.of(p[self.user_count > 0])
        spread, axes = torch.linalg.eigh(moments.covariance)
        counts = torch.from_numpy(np.diff(events.indptr)[new]).float().to(q.device)[:, None]
        sums = torch.from_numpy(events[new].toarray()).float().to(q.device) @ p
        where = torch.from_numpy(new).to(q.device)
        residual = sums - counts * (moments.mean + q[where] @ moments.covariance)
        step = (residual @ axes / (2 * self.reg["item"] + counts * spread.clamp(min=1e-6))) @ axes.T
        return q.index_copy(0, where, q[where] + step)

    def with_history(self, history: Interactions) -> Self:
        """The same weights seeing other events: users whom training has not seen become what these events say of them,
        items that training has not seen are moved towards the users who took them; nothing is trained again."""
        check_ids(f"{type(self).__name__}.with_history", history, self.train_data)
        other = copy.copy(self)
        other.history = history
        return other

    def users_from(self, histories: np.ndarray) -> Tensor:
        """Vectors of users that are nothing but these events, (B, I) bool -> (B, D + 1), as ``embed`` gives users."""
        with self.evaluating():
            return _with_one(self._told(self.all_content(), np.asarray(histories, dtype=bool)))

    def score_from(self, histories: np.ndarray) -> Tensor:
        """Scores of all items for users that are nothing but these events, (B, I) bool -> (B, I): ``users_from`` times
        the items of ``embed``, reading the catalogue once and no other user's history."""
        with self.evaluating():
            users, ids = self.ids()
            content = self.all_content()
            told = _with_one(self._told(content, np.asarray(histories, dtype=bool)))
            return told @ self._items(ids, content, None if self.history is None else self._users(users, content)).T

    def _grown(self, train: Interactions) -> Self:
        """A copy that shares every weight, with rows for further items whose IDs are absent."""
        other = copy.copy(self)
        other._modules, other._parameters = dict(self._modules), dict(self._parameters)
        other._buffers = dict(self._buffers)
        other.train_data, other.n_items, other.history, other.said = train, train.n_items, None, None
        more = train.n_items - self.n_items

        def padded(x: Tensor) -> Tensor:
            return torch.cat([x.detach(), x.new_zeros(more, *x.shape[1:])])

        other.item_ids = nn.Embedding.from_pretrained(padded(self.item_ids.weight), freeze=False)
        other.bias = nn.Parameter(padded(self.bias))
        other.bank, other.item_present = padded(self.bank), padded(self.item_present)
        if self.graph is not None:
            other.graph = LightGraph(train, layers=self.graph.layers).to(self.device)
        return other

    # -- training ---------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the class's docstring."""
        found = in_batch(self.train_data, batch, same=self.same)
        users, ids = self.ids()

        def encode(items: Tensor) -> Tensor:
            content = self.content(items)
            if not self._reads_paths:
                return content.fused
            here = torch.stack(list(content.present.values()), dim=1)
            return torch.cat([content.fused, *content.vectors.values(), here.to(content.fused)], dim=1)

        encoded = encode_pool(encode, batch)
        dim = self.user_ids.embedding_dim
        c = unit(encoded[:, :dim])
        present = self.item_present[found.items]
        if self.id_dropout:
            present = present & (torch.rand(len(present), device=c.device) >= self.id_dropout)
        z = ids[found.items]
        q = c + present[:, None] * z
        biases = self._biases(found.items, present)
        p = users[batch.users]
        terms = {"softmax": self._softmax(p, q, biases, found)}
        own = self.user_ids(batch.users), self.item_ids(found.items), self.bias[found.items]
        terms["reg"] = (
            self.reg["user"] * own[0].square().sum(1).mean()
            + self.reg["item"] * own[1].square().sum(1).mean()
            + self.reg["bias"] * own[2].square().mean()
        )
        if self.history_tower.trains:
            with torch.no_grad():
                self.bank[found.items] = c.detach().to(self.bank.dtype)
            terms["history"] = self._history_loss(batch, found, q.detach(), biases.detach())
        if self._reads_paths:
            first = dim * (len(self.paths) + 1)
            vectors = {m: encoded[:, dim * (n + 1) : dim * (n + 2)] for n, m in enumerate(self.paths)}
            here = {m: encoded[:, first + n] > 0.5 for n, m in enumerate(self.paths)}
            terms |= self._path_terms(vectors, here, p.detach(), biases.detach(), found)
        if self.align is not None:
            terms["collaborative"] = self.weighed["collaborative"] * self._collaborative(c, p.detach(), found)
        return terms

    @property
    def _reads_paths(self) -> bool:
        return bool(self.weighed["modality"] or self.weighed["cross"])

    def _softmax(self, p: Tensor, q: Tensor, biases: Tensor, found: InBatch) -> Tensor:
        users = torch.cat([p, p.new_ones(len(p), 1)], dim=1)
        items = torch.cat([q, biases[:, None]], dim=1)
        return losses.sampled_softmax(users, items, found.target, log_q=found.log_q, mask=found.mask)

    def _history_loss(self, batch: Batch, found: InBatch, q: Tensor, biases: Tensor) -> Tensor:
        """The softmax of some of the batch's users as their other events say them."""
        users = batch.users.unique()
        if len(users) > USERS_A_STEP:
            users = users[torch.randperm(len(users), device=users.device)[:USERS_A_STEP]].sort().values
        place = torch.searchsorted(users, batch.users).clamp(max=len(users) - 1)
        mine = users[place] == batch.users
        numbers = users.cpu().numpy()
        rows = self.train_data.csr[numbers].toarray() > 0
        taking, taken = batch.whole.cpu().numpy()
        where = np.minimum(np.searchsorted(numbers, taking), len(numbers) - 1)
        own = numbers[where] == taking
        rows[where[own], taken[own]] = False
        # some histories keep a random share of their events
        share = torch.rand(len(users), 1)
        keep = torch.where(torch.rand(len(users), 1) < self.history_cut, share, torch.ones(()))
        rows &= (torch.rand(rows.shape) < keep).numpy()
        h = self._told(self.bank, rows)
        part = replace(found, target=found.target[mine], mask=found.mask[mine])
        return self._softmax(h[place[mine]], q, biases, part)

    def _path_terms(
        self, vectors: dict[str, Tensor], here: dict[str, Tensor], p: Tensor, biases: Tensor, found: InBatch
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self.weighed["modality"]:
            each = []
            for m, vector in vectors.items():
                known = here[m][found.target]
                if bool(known.any()):
                    mask = found.mask[known] | ~here[m]
                    part = replace(found, target=found.target[known], mask=mask)
                    each.append(self._softmax(p[known], unit(vector), biases, part))
            terms["modality"] = self.weighed["modality"] * torch.stack(each).mean()
        if self.weighed["cross"]:
            heads = {m: head(vectors[m]) for m, head in self.shared.items()}
            pairs = [(a, b) for n, a in enumerate(heads) for b in list(heads)[n + 1 :]]
            both = [(a, b, here[a] & here[b] & self._first(found.items)) for a, b in pairs]
            each = [losses.info_nce(heads[a][k], heads[b][k]) for a, b, k in both if int(k.sum()) > 1]
            if each:
                terms["cross"] = self.weighed["cross"] * torch.stack(each).mean()
        return terms

    def _first(self, items: Tensor) -> Tensor:
        """Which of some items are not copies of an earlier one: copies would be each other's negatives."""
        if self.same is None:
            return torch.ones_like(items, dtype=torch.bool)
        kind = self.same.to(items.device)[items]
        equal = kind[:, None] == kind[None]
        return ~(equal & torch.ones_like(equal).tril(-1)).any(dim=1)

    def _collaborative(self, c: Tensor, p: Tensor, found: InBatch) -> Tensor:
        """InfoNCE between content and the mean of the users who took the item, in this batch."""
        assert self.align is not None
        counts = torch.zeros(len(c), device=c.device).index_add(0, found.target, torch.ones_like(p[:, 0]))
        sums = torch.zeros_like(c).index_add(0, found.target, p)
        took = (counts > 0) & self._first(found.items)
        means = sums[took] / counts[took, None]
        return losses.info_nce(self.align(c[took]), means - means.mean(dim=0))

    def log_candidates(self, batch: Batch) -> float:
        """log of the number of candidates a positive is picked from: the loss of a model that knows nothing."""
        return float(np.log(len(batch.pool)))

    def weights(self) -> dict[str, Tensor]:
        """Everything but the bank, which only training reads."""
        return {k: v for k, v in super().weights().items() if k != "bank"}


def _with_one(users: Tensor) -> Tensor:
    """(B, D) -> (B, D + 1), with 1 where items have their bias."""
    return torch.cat([users, users.new_ones(len(users), 1)], dim=1)


def check_rate(name: str, value: float) -> None:
    """Raise ``DataError`` unless ``value`` can multiply a learning rate."""
    if not 0 <= value < float("inf"):
        raise DataError(f"{name}={value}: a multiple of fit's lr, 0 or more")

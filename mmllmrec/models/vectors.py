"""Models of two vectors, one a user and one an item, under either of the two losses of a table.

Legend: B batch, C distinct items of a batch, U users, I items, D width.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch, InBatch, in_batch
from mmllmrec.encoders.heads import unit
from mmllmrec.losses import embedding_norm
from mmllmrec.models.base import Recommender

# what ``fit`` gets for the cold-start rivals: chosen on Atelier's validation part, split seed 0
FIT: dict[str, Any] = {"epochs": 200, "batch_size": 2048, "lr": 1e-3, "weight_decay": 1.0, "patience": 20}


def temperature_start() -> nn.Parameter:
    """The log of one over the temperature, as every model with the softmax loss starts it: log 10, a scalar."""
    return nn.Parameter(torch.tensor(10.0).log())


def scale_of(log_scale: Tensor) -> Tensor:
    """One over the temperature, () -> (): exp, bounded at e^4.6 (about 100), where a cosine saturates any softmax."""
    return log_scale.clamp(max=4.6).exp()


def cosine_softmax(p: Tensor, q: Tensor, found: InBatch, *, log_scale: Tensor) -> Tensor:
    """The main loss of a table: in-batch sampled softmax of cosines over a learned temperature, logQ-corrected.

    ``losses.sampled_softmax`` of users p (R, D) against the batch's distinct items q (C, D), both of unit length (a
    zero row, an absent ID, scores 0 with everyone), among the candidates ``found`` (``sampling.in_batch``) -> ().
    """
    scaled = p * scale_of(log_scale)
    return losses.sampled_softmax(scaled, q, found.target, log_q=found.log_q, mask=found.mask, rows=found.rows)


class VectorModel(Recommender):
    """A recommender that gives each user and each item a vector, trainable with BPR or with the softmax.

    ``loss="bpr"``: score(u, i) = p_u . q_i, one sampled negative a positive, and ``reg`` times ``penalty``
    (``losses.embedding_norm``) of what ``penalised`` names. ``loss="softmax"``: score(u, i) = cos(p_u, q_i) /
    temperature, learned, with ``cosine_softmax``; no negative is sampled and ``reg`` does nothing, since a cosine has
    no norms to penalise. There, a user without an event, and in a model that reads no content an item without one, is a
    zero vector: its ID is absent. A subclass defines ``vectors``. Raises ``DataError`` for a loss that is not among
    ``losses``.
    """

    losses: ClassVar[tuple[str, ...]] = ("bpr", "softmax")  # the published one first
    penalty: ClassVar[Callable[..., Tensor]] = staticmethod(embedding_norm)  # of BPR, times ``reg``
    known: Tensor  # (U,) users, and warm (I,) items, with a training event
    warm: Tensor
    user_present: Tensor  # (U,) and (I,) whose vector there is, with the events at hand
    item_present: Tensor
    same: Tensor | None = None  # (I,) equal numbers: items that cannot be told apart are not each other's negatives

    def __init__(self, train: Interactions, *, loss: str, **config: Any):
        super().__init__(train, loss=loss, **config)
        if loss not in self.losses:
            raise DataError(f"loss={loss!r}: {type(self).__name__} has {self.losses}")
        self.loss_name, self.negatives = loss, int(loss not in ("softmax", "bootstrap"))
        self.reg = float(config.get("reg", 0.0))
        self.log_scale = temperature_start() if loss == "softmax" else None
        self.history: sparse.csr_matrix | None = None
        self.register_buffer("known", torch.from_numpy(train.user_counts > 0), persistent=False)
        self.register_buffer("warm", torch.from_numpy(train.item_counts > 0), persistent=False)
        self._know(train)

    def _know(self, events: Interactions) -> None:
        """Users with one of these events, and items that have one or stand on their content."""
        self.register_buffer("user_present", torch.from_numpy(events.user_counts > 0), persistent=False)
        items = torch.from_numpy((events.item_counts > 0) | self.supports_cold_items)
        self.register_buffer("item_present", items, persistent=False)

    @property
    def name(self) -> str:
        """The class's name, and the loss where it is not the published one: ``LightGCN (softmax)``."""
        kind = type(self).__name__
        return kind if self.loss_name == self.losses[0] else f"{kind} ({self.loss_name})"

    @abstractmethod
    def vectors(self, users: Tensor | slice, *items: Tensor | slice) -> tuple[Tensor, ...]:
        """Rows of some users, and of one or more lists of items: (B,), (C,), ... -> (B, D), (C, D), ..."""

    def trained(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of IDs (U, D), (I, D), those that no training event moved at zero: absent."""
        return users * self.known[:, None], items * self.warm[:, None]

    def penalised(self, batch: Batch, *rows: Tensor) -> tuple[Tensor, ...]:
        """What BPR's penalty weighs: the batch's ``vectors`` (users, items, negatives), unless a model knows better."""
        return rows

    def forward(self) -> tuple[Tensor, Tensor]:
        users, items = self.vectors(slice(None), slice(None))
        if self.log_scale is None:
            return self._folded(users, items), items
        items = unit(items) * self.item_present[:, None]
        users = unit(self._folded(unit(users) * self.user_present[:, None], items))
        return users * scale_of(self.log_scale), items

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"bpr", "reg"}`` or ``{"softmax"}``, as the class's docstring says."""
        return self.ranking(batch, self.vectors)

    def ranking(self, batch: Batch, vectors: Callable[..., tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """The main term of a batch, of rows that ``vectors`` gives, and BPR's penalty."""
        if self.log_scale is not None:
            return {"softmax": self.ranked(batch, vectors)}
        assert batch.negatives is not None
        rows = vectors(batch.users, batch.items, batch.negatives)
        terms = {"bpr": self.pairwise(*rows)}
        if self.reg:
            terms["reg"] = self.reg * self.penalty(*self.penalised(batch, *rows))
        return terms

    def ranked(
        self, batch: Batch, vectors: Callable[..., tuple[Tensor, ...]], *, present: Tensor | None = None
    ) -> Tensor:
        """BPR or the softmax, whichever is the model's, of rows that ``vectors`` gives: a scalar.

        ``present`` (I,) bool are the items that have such a vector: only they are positives, negatives and candidates;
        a batch without a pair of them costs 0.
        """
        if self.log_scale is None:
            assert batch.negatives is not None
            rows = vectors(batch.users, batch.items, batch.negatives)
            mask = None if present is None else present[batch.items, None] & present[batch.negatives]
            return self.pairwise(*rows, mask=mask)
        if present is not None:
            batch = batch.part(present[batch.items])
        found = in_batch(self.train_data, batch, same=self.same, distinct=True)
        p, q = vectors(found.users, found.items)
        if not len(batch):
            return (p.sum() + q.sum()) * 0.0
        if present is not None:
            found.mask |= ~present[found.items]
        return cosine_softmax(unit(p), unit(q), found, log_scale=self.log_scale)

    def pairwise(self, u: Tensor, i: Tensor, j: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """BPR of users (B, D), positives (B, D) and negatives (B, K, D), of the pairs in ``mask`` (B, K) -> ()."""
        return losses.bpr((u * i).sum(-1), (u[:, None] * j).sum(-1), mask=mask)

    def log_candidates(self, batch: Batch) -> float:
        """log of the number of candidates a positive is picked from: the loss of a model that knows nothing."""
        return math.log(1 + self.negatives if self.log_scale is None else len(batch.pool))

    # -- other events -----------------------------------------------------------------------------------------------

    def with_history(self, history: Interactions) -> Self:
        """The same weights seeing other events of its users (k-shot protocols); nothing is trained again.

        A user whose events are not those of training becomes the mean of its history's item vectors (an empty history:
        zero); the others keep what was learnt of them. No paper of these models says what to do; the mean needs no
        constant and is what DropoutNet (Volkovs et al. 2017, section 4.3) does for such users.
        """
        other = self._beside(history)
        other.history = history.csr
        return other

    def _beside(self, history: Interactions | None = None) -> Self:
        """A shallow copy that shares parameters and may be given buffers and modules of its own."""
        if history is not None:
            check_ids(f"{type(self).__name__}.with_history", history, self.train_data)
        other = copy.copy(self)
        other._buffers, other._modules = dict(self._buffers), dict(self._modules)
        return other

    def _folded(self, users: Tensor, items: Tensor) -> Tensor:
        """Users (U, D), those with events of ``history`` that training did not have replaced by means of items."""
        if self.history is None:
            return users
        others = torch.from_numpy(changed(self.history, self.train_data)).to(users.device)
        return torch.where(others[:, None], means_of(self.history, items), users)


def rows_of(table: Tensor, which: Tensor | slice) -> Tensor:
    """``table[which]``: (N, D) and (...,) -> (..., D). Selected, not indexed: forward and backward take half as long on
    a CPU, and the sums of the backward are the same."""
    if isinstance(which, slice):
        return table[which]
    return table.index_select(0, which.flatten()).view(*which.shape, *table.shape[1:])


def rows_of_each(table: Tensor, *which: Tensor | slice) -> tuple[Tensor, ...]:
    """``rows_of`` for several lists at once: the backward then fills one table of zeros, and adds to it, for all."""
    if any(isinstance(w, slice) for w in which) or len(which) == 1:
        return tuple(rows_of(table, w) for w in which)
    lists = [w for w in which if isinstance(w, Tensor)]
    found = rows_of(table, torch.cat([w.flatten() for w in lists])).split([w.numel() for w in lists])
    return tuple(part.view(*w.shape, *table.shape[1:]) for part, w in zip(found, lists, strict=True))


def batch_rows(batch: Batch, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a batch's users, items and negatives: (U, D), (I, D) -> (B, D), (B, D), (B, K, D)."""
    assert batch.negatives is not None
    taken, others = rows_of_each(items, batch.items, batch.negatives)
    return rows_of(users, batch.users), taken, others


def changed(history: sparse.csr_matrix, train: Interactions) -> np.ndarray:
    """Which users have other events in ``history`` (U, I) than in training: (U,) bool."""
    return np.diff((history != train.csr).tocsr().indptr) > 0


def means_of(events: sparse.csr_matrix, items: Tensor) -> Tensor:
    """Each user's mean over its items, (U, I) and (I, D) -> (U, D) without gradient; zero for a user without events."""
    counts = np.maximum(np.diff(events.indptr), 1)[:, None]
    return torch.from_numpy(((events @ items.detach().cpu().numpy()) / counts).astype(np.float32)).to(items.device)


def check_ids(what: str, history: Interactions, train: Interactions) -> None:
    """Raise ``DataError`` unless both have the same id maps."""
    if (history.user_ids, history.item_ids) != (train.user_ids, train.item_ids):
        raise DataError(f"{what}: the history's ids are not those of the training events")

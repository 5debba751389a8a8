"""Models of a second stage: they stand on the embeddings of a model that was trained before.

Legend: U users, I items, L width of the latents.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.models.content import ContentModel
from mmllmrec.models.vectors import FIT, VectorModel, changed, means_of
from mmllmrec.runcard import content_hash


class LatentModel(ContentModel):
    """A ``ContentModel`` with ``latents`` = users (U, L), items (I, L) of a first stage, fixed, saved with the weights.

    Their inner products are the first stage's scores. Rows without a training event were never trained there and are
    set to zero: absent. ``pretrained`` takes them from a fitted run or model. Raises ``DataError`` without ``latents``
    and for other shapes.
    """

    fit_defaults: ClassVar[dict[str, Any]] = FIT
    latent_users: Tensor
    latent_items: Tensor

    def __init__(self, train: Interactions, *, latents: tuple[Tensor, Tensor] | None, **rest: Any):
        super().__init__(train, **rest)
        kind = type(self).__name__
        if latents is None:
            raise DataError(
                f"{kind} stands on a trained model: use {kind}.pretrained(run, ...), or pass latents=(users, items)"
            )
        users, items = (x.detach().float().cpu() for x in latents)
        if users.shape != (self.n_users, items.shape[-1]) or len(items) != self.n_items or items.ndim != 2:
            raise DataError(
                f"latents are {tuple(users.shape)} and {tuple(items.shape)}; "
                f"expected ({self.n_users}, L) and ({self.n_items}, L)"
            )
        self.register_buffer("latent_users", users * self.user_present[:, None])
        self.register_buffer("latent_items", items * self.warm[:, None])
        # what one coordinate of either is worth: scores fix only the product of both scales
        self.user_unit, self.item_unit = _spread(self.latent_users), _spread(self.latent_items)

    @classmethod
    def pretrained(cls, first: Any, **options: Any) -> Self:
        """This model on the embeddings of ``first``, a fitted ``Run`` or ``Recommender`` with ``embed()``, of the same
        training events; ``options`` go to the constructor."""
        model = getattr(first, "model", first)
        if not hasattr(model, "embed"):
            raise DataError(f"{cls.__name__}.pretrained: {first!r} has no embeddings; fit BPR or LightGCN first")
        if not isinstance(model, VectorModel):
            return cls(model.train_data, latents=model.embed(), **options)
        with model.evaluating():  # without cold_offset, which is no part of what was learnt
            return cls(model.train_data, latents=model(), **options)

    def averages(self, events: Interactions) -> Tensor:
        """The latents of users as the mean of their items' latents, in the users' unit: (U, L)."""
        return means_of(events.csr, self.latent_items) * (self.user_unit / self.item_unit)

    def with_history(self, history: Interactions) -> Self:
        """The same weights seeing other events: a user whose events are not those of training gets the mean of its
        items' latents as its own (``averages``); the others keep theirs."""
        other = self._beside(history)
        other.history = history.csr
        other._know(history)
        mean = self.averages(history)
        others = torch.from_numpy(changed(history.csr, self.train_data))[:, None].to(mean.device)
        other.latent_users = torch.where(others, mean, self.latent_users)
        return other.to(self.device)

    def _folded(self, users: Tensor, items: Tensor) -> Tensor:
        return users  # their latents have been

    def provenance(self) -> dict[str, Any]:
        """Hashes of the features and of the latents it stands on."""
        both = content_hash(self.latent_users.cpu().numpy(), self.latent_items.cpu().numpy())
        return {**super().provenance(), "latents": both}

    @classmethod
    def _given(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        return {"latents": (state["latent_users"], state["latent_items"])}


def _spread(rows: Tensor) -> float:
    """Root mean square of the entries of the rows that are not zero; 1 where all are."""
    some = rows[(rows != 0).any(dim=1)]
    return float(some.square().mean().sqrt()) if len(some) else 1.0

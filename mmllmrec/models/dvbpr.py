"""DVBPR: an image tower trained end to end with the ranking loss; an item is what its picture looks like.

Legend: B batch, C some items, U users, I items, D width, S pixels a side.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.gather import in_chunks
from mmllmrec.losses import l2
from mmllmrec.models.vectors import VectorModel, rows_of
from mmllmrec.runcard import content_hash

CHUNK = 256  # pictures that are looked at together when all items are embedded


def tower(width: int, dim: int) -> nn.Sequential:
    """Pictures (B, 3, S, S) in -1..1 -> (B, dim): five convolutions and three full layers, as CNN-F has them."""

    def block(of: int, to: int, size: int, *, stride: int = 1, pool: bool = False) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Conv2d(of, to, size, stride=stride, padding=size // 2), nn.ReLU()]
        return [*layers, nn.MaxPool2d(2)] if pool else layers

    layers = nn.Sequential(
        *block(3, width, 5, stride=2, pool=True),
        *block(width, 2 * width, 5, pool=True),
        *block(2 * width, 2 * width, 3),
        *block(2 * width, 2 * width, 3),
        *block(2 * width, 2 * width, 3),
        nn.AdaptiveMaxPool2d(3),
        nn.Flatten(),
        nn.Linear(18 * width, 8 * width),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8 * width, 8 * width),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8 * width, dim),
    )
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            layer.bias.data.zero_()  # type: ignore[union-attr]
    return layers


class DVBPR(VectorModel):
    """score(u, i) = theta_u . Phi(picture of i): no ID of items, no bias, from pixels.

    Kang et al. 2017 (arXiv 1711.02231), the recommender; its generative part is not here. Phi is a convolutional net
    from scratch (``tower``), ``width`` its first channels, ``size`` the pixels a side. BPR with ``reg`` times
    ``losses.l2`` of the batch's users; decay of the net is ``fit``'s. An item without a picture is a zero vector and in
    no pair; a new one is scored like any other. Departures: a smaller net of the same plan for smaller pictures (the
    paper: 224 pixels, 64 channels, 71 M weights), ``reg`` a thousandth of the published 1, a learning rate ten times
    the published 1e-4, and decay of users too; a batch's pictures are looked at once each, so that a positive and a
    negative that are one item share their dropout; ``loss="softmax"``: see ``VectorModel``. Raises ``DataError`` for a
    catalogue without pictures, or of other items.
    """

    supports_cold_items: ClassVar[bool] = True
    fit_defaults: ClassVar[dict[str, object]] = {"epochs": 20, "lr": 1e-3, "weight_decay": 1e-3}

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog,
        dim: int = 64,
        size: int = 64,
        width: int = 16,
        reg: float = 1e-3,
        loss: str = "bpr",
    ):
        super().__init__(train, dim=dim, size=size, width=width, reg=reg, loss=loss)
        self.modalities = ("image",)
        self.users = nn.Embedding(self.n_users, dim)
        nn.init.uniform_(self.users.weight, 0.0, 0.01)
        self.look = tower(width, dim)
        self._see(catalog)

    def _see(self, catalog: Catalog) -> None:
        if catalog.item_ids != self.train_data.item_ids:
            raise DataError(f"{catalog.name}: the catalogue's items are not those of the training events")
        if "image" not in catalog.dataset.column_names:
            raise DataError(f"{catalog.name}: DVBPR looks at pictures, and this catalogue has no column 'image'")
        self.pixels = torch.from_numpy(catalog.pixels(int(self.config["size"])).copy())  # moved with the batch
        self.register_buffer("seen", torch.from_numpy(catalog.present("image")), persistent=False)
        numbers: dict[bytes, int] = {}
        looks = (hashlib.sha256(picture.tobytes()).digest() for picture in self.pixels.numpy())
        self.same = torch.tensor([numbers.setdefault(look, len(numbers)) for look in looks])

    seen: Tensor  # (I,) which items have a picture

    def with_catalog(self, catalog: Catalog) -> Self:
        """The same weights looking at another catalogue's pictures of the same items."""
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        other._see(catalog)
        return other.to(self.device)

    def provenance(self) -> dict[str, str]:
        """The hash of the pictures."""
        return {"pixels": content_hash(self.pixels.numpy())}

    def _looks(self, items: Tensor) -> Tensor:
        """Some items as they look: (C,) -> (C, D), zero without a picture."""
        pictures = self.pixels[items.cpu()].to(items.device).float() / 127.5 - 1
        return self.look(pictures) * self.seen[items, None]

    def vectors(self, users: Tensor | slice, *items: Tensor | slice) -> tuple[Tensor, ...]:
        return self._rows(None, users, *items)

    def _rows(self, chunk: int | None, users: Tensor | slice, *items: Tensor | slice) -> tuple[Tensor, ...]:
        own = self.users.weight * self.known[:, None]
        everything = torch.arange(self.n_items, device=own.device)
        wanted = [everything[i] for i in items]
        distinct, place = torch.cat([i.flatten() for i in wanted]).unique(return_inverse=True)
        if self.training:
            looks = in_chunks(self._looks, distinct, size=chunk or len(distinct))[place]
        else:
            looks = torch.cat([self._looks(part) for part in distinct.split(CHUNK)])[place]
        rows = [
            part.view(*i.shape, -1) for part, i in zip(looks.split([i.numel() for i in wanted]), wanted, strict=True)
        ]
        return own[users], *rows

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return self.ranking(batch, partial(self._rows, batch.chunk))

    def ranking(self, batch: Batch, vectors: Callable[..., tuple[Tensor, ...]]) -> dict[str, Tensor]:
        terms = {self.loss_name: self.ranked(batch, vectors, present=self.seen)}
        if self.reg and self.loss_name == "bpr":
            terms["reg"] = self.reg * l2(rows_of(self.users.weight, batch.users))
        return terms

"""Models that read frozen features of items: how the features come in, are saved, and are exchanged.

Legend: I items, M modalities, F width of all features side by side.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import Recommender, read_tensors
from mmllmrec.models.vectors import VectorModel, rows_of, rows_of_each


def tower(width: int, *, hidden: int, dim: int) -> nn.Sequential:
    """Two layers, W_2 act(W_1 x), (..., width) -> (..., dim), without biases: what is all zero stays zero."""
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.LeakyReLU(), nn.Linear(hidden, dim, bias=False))


class ReadsFeatures(Recommender):
    """How frozen features come into a model, are saved with it, and are exchanged for those of another catalogue.

    ``frozen`` (I, F) are all modalities side by side, an absent one zero; ``described`` adds a column a modality, 1
    where it is present; ``same`` (I,) numbers items with equal features alike. A constructor calls ``_read``, and takes
    ``features=`` beside what ``config`` holds.
    """

    frozen: Tensor
    described: Tensor
    features: FeatureTable
    same: Tensor | None

    def _read(self, catalog: Catalog | None, features: FeatureTable | None, feature_dim: int) -> None:
        warm = self.train_data.item_counts > 0
        if features is None:
            if catalog is None:
                raise DataError(f"{type(self).__name__} reads items' content: pass catalog= or features=")
            features = FeatureTable.from_catalog(catalog, fit_on=warm).whiten(warm, feature_dim)
        if len(features) != self.n_items:
            raise DataError(f"features have {len(features)} rows; there are {self.n_items} items")
        self.modalities = features.modalities
        self.width = sum(features.widths.values())  # F; described has F + M columns
        ends = np.cumsum(list(features.widths.values()))
        self._columns = {m: slice(int(e) - d, int(e)) for e, (m, d) in zip(ends, features.widths.items(), strict=True)}
        self._use(features)

    def _use(self, features: FeatureTable) -> None:
        self.features = features
        content = features.concatenated()
        described = np.concatenate([content, features.presence.astype(np.float32)], axis=1)
        self.register_buffer("frozen", torch.from_numpy(content), persistent=False)
        self.register_buffer("described", torch.from_numpy(described), persistent=False)
        self.same = torch.from_numpy(np.unique(described, axis=0, return_inverse=True)[1].reshape(-1))

    def with_catalog(self, catalog: Catalog) -> Self:
        """The same weights reading another catalogue of the same items (``FeatureTable.of``)."""
        if catalog.item_ids != self.train_data.item_ids:
            raise DataError(
                f"{type(self).__name__}.with_catalog: the catalogue's items are not those of the training events"
            )
        other = copy.copy(self)  # it shares parameters, not the features, nor what is made of them
        other._buffers, other._modules = dict(self._buffers), dict(self._modules)
        other._use(self.features.of(catalog, fit_on=self.train_data.item_counts > 0))
        return other.to(self.device)

    def rows(self, modality: str) -> Tensor:
        """The features of one modality, (I, D_m), an absent one zero."""
        return self.frozen[:, self._columns[modality]]

    def present(self, modality: str) -> Tensor:
        """Which items have a modality, (I,) bool."""
        return self.described[:, self.width + self.modalities.index(modality)] > 0

    def provenance(self) -> dict[str, Any]:
        """The hash of the features it reads."""
        return {"features": self.features.hash}

    def weights(self) -> dict[str, Tensor]:
        """Parameters, and the features with the maps that made them."""
        arrays = self.features.arrays()
        return super().weights() | {f"features.{k}": torch.tensor(v) for k, v in arrays.items()}

    @classmethod
    def _restore(cls, folder: Path, train: Interactions, catalog: Catalog | None, about: dict[str, Any]) -> Recommender:
        state = read_tensors(folder / "model.safetensors")
        saved = {k.removeprefix("features."): state.pop(k).numpy() for k in list(state) if k.startswith("features.")}
        features = FeatureTable.from_arrays(saved, modalities=about["modalities"])
        model = cls(train, features=features, **cls._given(state), **about["config"])  # type: ignore[call-arg]
        own = model.state_dict()
        model.load_state_dict({k: own[k] for k in own.keys() - model.weights().keys()} | state)  # not all is saved
        return model

    @classmethod
    def _given(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of the constructor that are tensors, from what was saved."""
        return {}


class ContentModel(ReadsFeatures, VectorModel):
    """A ``VectorModel`` with ``frozen`` (I, F), all modalities' features side by side, an absent one zero.

    ``described`` adds a column a modality, 1 where it is present: the weights on it are a bias that only a present
    modality has, so that a network can tell an absent one from one with mean features. ``features`` are used as given;
    without, ``catalog``'s are whitened to ``feature_dim`` columns a modality, fitted on train items. Some published
    systems train the raw feature tables themselves: ``trained_features=True``, where a model offers it. They are saved
    with the weights: a loaded model scores with them and not with those of the catalogue it is given. With the softmax
    loss, items with the same features are not each other's negatives. Raises ``DataError`` without ``catalog`` and
    ``features``, and for features of another number of items.
    """

    supports_cold_items: ClassVar[bool] = True

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None,
        features: FeatureTable | None,
        feature_dim: int,
        loss: str,
        trained_features: bool | None = None,
        **config: Any,
    ):
        if trained_features is not None:
            config["trained_features"] = trained_features
        super().__init__(train, loss=loss, feature_dim=feature_dim, **config)
        self._read(catalog, features, feature_dim)
        if trained_features:
            self.tables = nn.ParameterList(self.rows(m).clone() for m in self.modalities)

    def rows(self, modality: str) -> Tensor:
        if "tables" in self._modules:
            return self.tables[self.modalities.index(modality)]
        return super().rows(modality)

    def mapped(self, modality: str, layer: nn.Module, *items: Tensor) -> tuple[Tensor, ...]:
        """What ``layer`` makes of a modality of some lists of items: (...,) -> (..., D) each.

        Of a trained table, wide as it is, each distinct item is read once: of 4,480 columns a step of FREEDOM takes
        half as long so, and one of BM3 three quarters.
        """
        table = self.rows(modality)
        if not table.requires_grad:
            return tuple(layer(table[some]) for some in items)
        distinct, places = torch.cat([some.flatten() for some in items]).unique(return_inverse=True)
        rows = layer(rows_of(table, distinct))
        parts = places.split([some.numel() for some in items])
        return rows_of_each(rows, *(part.view(some.shape) for part, some in zip(parts, items, strict=True)))

    def with_catalog(self, catalog: Catalog) -> Self:
        if "tables" in self._modules:
            raise DataError(
                f"{type(self).__name__}(trained_features=True) has trained its items' features: they are no catalogue's"
            )
        return super().with_catalog(catalog)

"""The two-stage twin of the unified model: the same score, losses and fusion over features extracted beforehand.

Legend: C items asked for, I items, F width of all features side by side, D width.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.encoders.heads import EARLY, Content, Heads
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.content import ReadsFeatures
from mmllmrec.models.hybrid import Hybrid


class TwoStage(ReadsFeatures, Hybrid):
    """``Hybrid`` whose content is frozen features: nothing but heads, fusion and IDs trains.

    Heads and fusion are ``encoders.Heads``, those of the unified model. Its twin on the same towers reads
    ``Unified.tower_features()``. Given the true factors of a planted world as ``features`` it is the factor-fed twin,
    the ceiling of perception. ``features`` or ``catalog``, ``feature_dim``: as in ``ContentModel``; ``paths``,
    ``fusion`` and ``early``: as in ``Heads``.
    """

    fit_defaults: ClassVar[dict[str, Any]] = {"epochs": 20, "item_batch": 128, "eval_every": 4, "lr": 5e-3}
    fit_defaults |= {"schedule": "cosine", "warmup": 0.05, "clip": 1.0}

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        feature_dim: int = 64,
        dim: int = 64,
        paths: tuple[str, ...] | None = None,
        fusion: str = "concat",
        early: tuple[str, ...] | None = None,
        **options: Any,
    ):
        names = features.modalities if features is not None else catalog.modalities if catalog is not None else ()
        paths = (EARLY, *names) if paths is None else tuple(paths)
        super().__init__(train, dim=dim, paths=paths, feature_dim=feature_dim, fusion=fusion, **options)
        self.config |= {"paths": list(paths), "early": None if early is None else list(early)}
        self._read(catalog, features, feature_dim)
        self.heads = Heads(self.features.widths, dim, paths=paths, fusion=fusion, early=early)

    def _use(self, features: FeatureTable) -> None:
        super()._use(features)
        self.said = None

    def content(self, index: Tensor) -> Content:
        rows = self.described[index]
        here = (rows[:, self.width :] > 0.5).unbind(dim=1)
        states = rows[:, : self.width].split(list(self.features.widths.values()), dim=1)
        kinds = self.features.modalities
        found: Content = self.heads(dict(zip(kinds, states, strict=True)), dict(zip(kinds, here, strict=True)))
        return found

"""The two-stage twin of the unified model: the same score, losses and fusion over features extracted beforehand.

Legend: C items asked for, I items, F width of all features side by side, D width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.encoders.backbone import EARLY, Content
from mmllmrec.features.table import FeatureTable
from mmllmrec.fusion import FUSIONS
from mmllmrec.models.content import ReadsFeatures
from mmllmrec.models.hybrid import Hybrid


class TwoStage(ReadsFeatures, Hybrid):
    """``Hybrid`` whose content is frozen features: nothing but heads, fusion and IDs trains.

    early: e = LN(W [f_1; ...; f_M; presence]); late: l_m = LN(W_m f_m); fused by presence, as ``Backbone`` fuses. Given
    the true factors of a planted world as ``features`` it is the factor-fed twin, the ceiling of perception.
    ``features`` or ``catalog``, ``feature_dim``: as in ``ContentModel``. ``paths`` and ``fusion``: as in ``Backbone``.
    """

    fit_defaults: ClassVar[dict[str, Any]] = {"epochs": 24, "item_batch": 128, "eval_every": 4, "lr": 4e-3}
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
        **options: Any,
    ):
        names = features.modalities if features is not None else catalog.modalities if catalog is not None else ()
        paths = (EARLY, *names) if paths is None else tuple(paths)
        super().__init__(train, dim=dim, paths=paths, feature_dim=feature_dim, fusion=fusion, **options)
        self.config["paths"] = list(paths)
        self._read(catalog, features, feature_dim)
        self.early = nn.Sequential(nn.Linear(self.described.shape[1], dim), nn.LayerNorm(dim))
        self.late = nn.ModuleDict(
            {m: nn.Sequential(nn.Linear(w, dim), nn.LayerNorm(dim)) for m, w in self.features.widths.items()}
        )
        self.gate = FUSIONS[fusion](dim, len(paths))

    def content(self, index: Tensor) -> Content:
        rows = self.described[index]
        here = rows[:, self.width :] > 0.5
        present = {EARLY: here.any(dim=1)} | {m: here[:, n] for n, m in enumerate(self.features.modalities)}
        vectors, start = {EARLY: self.early(rows)}, 0
        for m, width in self.features.widths.items():
            vectors[m] = self.late[m](rows[:, start : start + width])
            start += width
        vectors, present = {p: vectors[p] for p in self.paths}, {p: present[p] for p in self.paths}
        fused, weights = self.gate(torch.stack(list(vectors.values()), 1), torch.stack(list(present.values()), 1))
        return Content(fused, vectors, present, weights)

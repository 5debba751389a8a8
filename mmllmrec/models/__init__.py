"""Recommenders: published systems, one file each, and the unified model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmllmrec.models.aldi import ALDI
    from mmllmrec.models.alpharec import AlphaRec
    from mmllmrec.models.base import Recommender
    from mmllmrec.models.bpr import BPR
    from mmllmrec.models.clcrec import CLCRec
    from mmllmrec.models.dropoutnet import DropoutNet
    from mmllmrec.models.ease import EASE
    from mmllmrec.models.itemknn import ItemKNN
    from mmllmrec.models.lightgcn import LightGCN, LightGCNContent
    from mmllmrec.models.twostage import TwoStage
    from mmllmrec.models.unified import Unified
    from mmllmrec.models.vbpr import VBPR

WHERE = {
    "Recommender": "base",
    "ItemKNN": "itemknn",
    "EASE": "ease",
    "BPR": "bpr",
    "VBPR": "vbpr",
    "LightGCN": "lightgcn",
    "LightGCNContent": "lightgcn",
    "AlphaRec": "alpharec",
    "CLCRec": "clcrec",
    "DropoutNet": "dropoutnet",
    "ALDI": "aldi",
    "TwoStage": "twostage",
    "Unified": "unified",
}

__all__ = [
    "ALDI",
    "BPR",
    "EASE",
    "VBPR",
    "AlphaRec",
    "CLCRec",
    "DropoutNet",
    "ItemKNN",
    "LightGCN",
    "LightGCNContent",
    "Recommender",
    "TwoStage",
    "Unified",
    "classes",
]


def __getattr__(name: str) -> Any:
    if name in WHERE:
        return getattr(importlib.import_module(f"mmllmrec.models.{WHERE[name]}"), name)
    raise AttributeError(f"module 'mmllmrec.models' has no attribute {name!r}; models are {sorted(WHERE)}")


def classes() -> dict[str, type[Recommender]]:
    """Every model by its name."""
    return {name: __getattr__(name) for name in WHERE if name != "Recommender"}

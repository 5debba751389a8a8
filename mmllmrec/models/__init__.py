"""Recommenders: published systems, one file each, and the unified model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmllmrec.models.aldi import ALDI
    from mmllmrec.models.alignrec import AlignRec
    from mmllmrec.models.alpharec import AlphaRec
    from mmllmrec.models.base import Recommender
    from mmllmrec.models.bm3 import BM3
    from mmllmrec.models.bpr import BPR
    from mmllmrec.models.clcrec import CLCRec
    from mmllmrec.models.cohesion import COHESION
    from mmllmrec.models.composed import Composed
    from mmllmrec.models.damrs import DAMRS
    from mmllmrec.models.diffmm import DiffMM
    from mmllmrec.models.dragon import DRAGON
    from mmllmrec.models.dropoutnet import DropoutNet
    from mmllmrec.models.dualgnn import DualGNN
    from mmllmrec.models.dvbpr import DVBPR
    from mmllmrec.models.ease import EASE
    from mmllmrec.models.freedom import FREEDOM
    from mmllmrec.models.grcn import GRCN
    from mmllmrec.models.ials import IALS, ImplicitBPR
    from mmllmrec.models.itemknn import ItemKNN
    from mmllmrec.models.lattice import LATTICE
    from mmllmrec.models.layergcn import LayerGCN
    from mmllmrec.models.lgmrec import LGMRec
    from mmllmrec.models.lightgcn import LightGCN, LightGCNContent
    from mmllmrec.models.llmrec import LLMRec
    from mmllmrec.models.mentor import MENTOR
    from mmllmrec.models.mgcn import MGCN
    from mmllmrec.models.micro import MICRO
    from mmllmrec.models.mmgcn import MMGCN
    from mmllmrec.models.mmssl import MMSSL
    from mmllmrec.models.pgl import PGL
    from mmllmrec.models.selfcf import SelfCF
    from mmllmrec.models.simgcl import SimGCL
    from mmllmrec.models.slmrec import SLMRec
    from mmllmrec.models.smore import SMORE
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
    "SimGCL": "simgcl",
    "LayerGCN": "layergcn",
    "SelfCF": "selfcf",
    "FREEDOM": "freedom",
    "BM3": "bm3",
    "MGCN": "mgcn",
    "LGMRec": "lgmrec",
    "MMGCN": "mmgcn",
    "PGL": "pgl",
    "LATTICE": "lattice",
    "MICRO": "micro",
    "SLMRec": "slmrec",
    "DualGNN": "dualgnn",
    "DRAGON": "dragon",
    "MENTOR": "mentor",
    "COHESION": "cohesion",
    "GRCN": "grcn",
    "SMORE": "smore",
    "AlignRec": "alignrec",
    "DAMRS": "damrs",
    "IALS": "ials",
    "ImplicitBPR": "ials",
    "DVBPR": "dvbpr",
    "Composed": "composed",
    "DiffMM": "diffmm",
    "LLMRec": "llmrec",
    "MMSSL": "mmssl",
    "Unified": "unified",
}

__all__ = [
    "ALDI",
    "BM3",
    "BPR",
    "COHESION",
    "DAMRS",
    "DRAGON",
    "DVBPR",
    "EASE",
    "FREEDOM",
    "GRCN",
    "IALS",
    "LATTICE",
    "MENTOR",
    "MGCN",
    "MICRO",
    "MMGCN",
    "MMSSL",
    "PGL",
    "SMORE",
    "VBPR",
    "AlignRec",
    "AlphaRec",
    "CLCRec",
    "Composed",
    "DiffMM",
    "DropoutNet",
    "DualGNN",
    "ImplicitBPR",
    "ItemKNN",
    "LGMRec",
    "LLMRec",
    "LayerGCN",
    "LightGCN",
    "LightGCNContent",
    "Recommender",
    "SLMRec",
    "SelfCF",
    "SimGCL",
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

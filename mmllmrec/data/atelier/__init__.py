"""Atelier: a planted multimodal shop. Every taste is known, so every claim about a model can be checked."""

from mmllmrec.data.atelier.recovery import recovery
from mmllmrec.data.atelier.world import TERMS, Atelier, Oracle, Weights, atelier

__all__ = ["TERMS", "Atelier", "Oracle", "Weights", "atelier", "recovery"]

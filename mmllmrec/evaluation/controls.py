"""Controls: the same fitted system reading content that is gone, dealt to other items, or noise.

A claim that content helps is one that these rows do not share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError

# what is done to one modality of the catalogue, at scoring time: (catalogue, modality, seed) -> catalogue
KINDS: dict[str, Callable[[Catalog, str, int], Catalog]] = {
    "without": lambda catalog, modality, seed: catalog.without(modality),
    "shuffled": lambda catalog, modality, seed: catalog.shuffled(modality, seed=seed),
    "random": lambda catalog, modality, seed: catalog.randomised(modality, seed=seed),
    "noised": lambda catalog, modality, seed: catalog.noised(modality, seed=seed),
}


class Controlled:
    """A scorer under another name: ``"Unified, shuffled text"``."""

    def __init__(self, scorer: Any, name: str):
        self.scorer, self.name = scorer, name
        self.loss_name = getattr(scorer, "loss_name", "-")
        if hasattr(scorer, "embed"):
            self.embed = scorer.embed
        else:
            self.score = scorer.score


def controls_of(
    scorer: Any, catalog: Catalog, asked: bool | Sequence[str], *, name: str, seed: int = 0
) -> list[Controlled]:
    """The controls of a scorer that reads content (``with_catalog``), none retrained, called after its row's ``name``.

    ``asked`` is True for every kind on every modality the scorer reads, or names some: ``"without image"``,
    ``"shuffled text"``, ``"random audio"``, ``"noised sensor"``. Raises ``DataError`` for a scorer that reads no
    content and for a name that is none.
    """
    if not asked:
        return []
    if not hasattr(scorer, "with_catalog"):
        raise DataError(f"controls: {name} reads no content (it has no with_catalog); leave controls out")
    reads = [m for m in getattr(scorer, "modalities", catalog.modalities) if m in catalog.modalities]
    names = [f"{kind} {m}" for m in reads for kind in KINDS] if asked is True else list(asked)
    made = []
    for control in names:
        kind, _, modality = control.partition(" ")
        if kind not in KINDS or modality not in reads:
            raise DataError(
                f"control {control!r}: write one of {sorted(KINDS)} and a modality of {reads}, as 'without image'"
            )
        other = scorer.with_catalog(KINDS[kind](catalog, modality, seed))
        made.append(Controlled(other, f"{name}, {control}"))
    return made

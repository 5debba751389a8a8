"""What the frozen layers below the adapters say of items: computed once, in memory or in a store.

Legend: I items, N tokens, W width of a state, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmllmrec.encoders.backbone import PAD, Backbone, Items
from mmllmrec.features.extractor import source_name
from mmllmrec.features.store import Store
from mmllmrec.features.towers import Language, Vision
from mmllmrec.runcard import content_hash

BLOCK = 256


@dataclass(frozen=True)
class Frozen:
    """The lower layers of a backbone: ``enter`` of its language model and ``look`` of its image tower.

    ``vision`` and ``language`` are the towers they are the layers of, with the ``names`` of their sources. With a
    ``store`` what they say is kept there, an entry an item: a space is the hash of the layers, and a key the hash of a
    row as they read it: token ids are what prompt, tokenizer and words came to, pixels what a picture was cut to.
    """

    backbone: Backbone
    vision: Vision
    language: Language
    names: tuple[str, str]
    store: Store | None = None

    @torch.no_grad()
    def states(self, items: Items, before: Items | None, *, device: torch.device) -> Tensor | None:
        """Of the rows of tokens, (I, N, W) on the CPU; ``before``'s where they had the same. None without layers."""
        enter = self.backbone.enter
        if not enter:
            return None
        if before is not None and torch.equal(items.tokens, before.tokens):
            return before.states
        about = {"name": source_name(self.names[1], "below", enter), "modality": "text"}
        space = content_hash("below", self.language.hash, enter)
        lengths = (items.tokens != PAD).sum(dim=1)
        return self._kept(self.backbone.below, items.tokens, lengths, space=space, about=about, device=device)

    @torch.no_grad()
    def seen(self, items: Items, before: Items | None, *, device: torch.device) -> Tensor | None:
        """Of the pictures, (I, N, W) on the CPU; ``before``'s where they were the same. None without layers."""
        look, pixels = self.backbone.frozen_layers, items.raw["image"]
        if not look:
            return None
        if before is not None and torch.equal(pixels, before.raw["image"]):
            return before.seen
        about = {"name": source_name(self.names[0], "below", look), "modality": "image"}
        space = content_hash("below", self.vision.hash, look, self.vision.mean, self.vision.std)
        here = items.present["image"].long()
        return self._kept(self.backbone.seen, pixels, here, space=space, about=about, device=device)

    def _kept(
        self,
        run: Callable[[Tensor], Tensor],
        rows: Tensor,
        lengths: Tensor,
        *,
        space: str,
        about: dict[str, str],
        device: torch.device,
    ) -> Tensor:
        """``run`` on rows (I, ...), in blocks, -> (I, N, W); with a store, only on those that it does not have.

        ``lengths`` (I,) says how many tokens of a row are no padding, which is not kept; of a picture 1 or, where there
        is none, 0.
        """
        if self.store is None:
            return torch.cat([run(block.to(device)).cpu() for block in rows.split(BLOCK)])
        padded = about["modality"] == "text"
        here = lengths.nonzero()[:, 0]
        ends = [int(n) if padded else None for n in lengths[here]]
        own = [rows[i, :end] if padded else rows[i] for i, end in zip(here, ends, strict=True)]

        def compute(positions: list[int]) -> list[np.ndarray]:
            found = run(rows[here[positions]].to(device)).cpu().numpy()
            return [states[: ends[p]] for states, p in zip(found, positions, strict=True)]

        keys = [content_hash(part.numpy()) for part in own]
        kept = self.store.get_or_compute(keys, compute, space=space, about=about, batch=BLOCK)
        tokens = rows.shape[1] if padded else len(kept[0]) if kept else 0
        table = torch.zeros(len(rows), tokens, kept[0].shape[1] if kept else 0)
        for i, states in zip(here.tolist(), kept, strict=True):
            table[i, : len(states)] = torch.from_numpy(states)
        return table

"""Extractor: a frozen tower with all that can change what it says of an item, under one hash.

Legend: n items asked for, D width of the pooled state, L_i tokens of item i, W width of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mmllmrec.data.interactions import DataError
from mmllmrec.runcard import content_hash

if TYPE_CHECKING:
    from mmllmrec.data.catalog import Catalog

Content = bytes | str | np.ndarray  # an encoded picture, a rendered text, a wave: what one item gives the tower
Encode = Callable[[list[Any], list[str], bool], tuple[np.ndarray, list[np.ndarray]]]


@dataclass(frozen=True)
class Extractor:
    """Raw content of one modality -> a pooled vector and token states, nothing of it trainable.

    ``hash`` covers the weights as they are when it is built, adapters included, and everything in ``settings``
    (preprocessing, tokenizer, prompt, layer, pooling); ``contents(catalog)`` gives a reader of one item's own
    content; ``encode`` (contents, their names for errors, whether tokens are wanted) is the tower. Made by
    ``features.image``, ``features.text`` and ``features.audio``; give your own tower by these same fields.
    """

    name: str
    modality: str
    hash: str
    contents: Callable[[Catalog], Callable[[int], Content]]
    encode: Encode
    settings: dict[str, Any] = field(default_factory=dict)

    def extract(self, catalog: Catalog, items: Sequence[int] | np.ndarray, *, batch: int = 64) -> np.ndarray:
        """Pooled states of ``items``, (n, D) float32. Raises ``DataError`` naming an item without the modality."""
        return self._through(catalog, items, batch, tokens=False)[0]

    def states(
        self, catalog: Catalog, items: Sequence[int] | np.ndarray, *, batch: int = 64
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Pooled states (n, D) and the token states of each item, n arrays (L_i, W); all float32."""
        return self._through(catalog, items, batch, tokens=True)

    def keys(self, catalog: Catalog, items: Sequence[int] | np.ndarray) -> list[str]:
        """A hash of each item's own content, n of them: equal contents have equal keys."""
        content = self.contents(catalog)
        return [content_hash(content(int(item))) for item in items]

    def _through(
        self, catalog: Catalog, items: Sequence[int] | np.ndarray, batch: int, *, tokens: bool
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        from tqdm.auto import tqdm

        items = np.asarray(items, dtype=np.int64)
        absent = items[~catalog.present(self.modality)[items]]
        if absent.size or not items.size:
            which = f"item {catalog.item_ids[absent[0]]!r} has" if absent.size else "no items given that have"
            raise DataError(f"{self.name}: {which} no {self.modality}; ask for those of catalog.present alone")
        content = self.contents(catalog)
        pooled, states = [], []
        with tqdm(total=len(items), desc=self.name, unit=" items", disable=None, leave=False) as bar:
            for part in np.split(items, range(batch, len(items), batch)):
                rows, words = self.encode([content(int(i)) for i in part], self.names(catalog, part), tokens)
                pooled.append(rows)
                states += words
                bar.update(len(part))
        return np.concatenate(pooled), states

    def names(self, catalog: Catalog, items: np.ndarray) -> list[str]:
        """What an error calls the content of ``items``."""
        return [f"{self.modality} of item {catalog.item_ids[int(item)]!r}" for item in items]


def source_name(source: str, *parts: object) -> str:
    """A short name for a tower: its last path part and what was chosen, ``all-MiniLM-L6-v2:mean``."""
    return ":".join([source.rstrip("/").rsplit("/", 1)[-1], *(str(p) for p in parts)])

"""RecDataset: interactions and catalogue under one name, and ``load_dataset`` that finds one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions


@dataclass(frozen=True)
class RecDataset:
    """Interactions and the catalogue of their items, sharing one item id map.

    ``parts`` is the source's own division, (N,) int: 0 train, 1 validation, 2 test (``splits.given`` uses it), or None.
    """

    name: str
    interactions: Interactions
    catalog: Catalog
    parts: np.ndarray | None = None
    about: dict[str, Any] = field(default_factory=dict)  # source, threshold, licence; "loaded" goes into run cards

    def __post_init__(self) -> None:
        if self.catalog.item_ids != self.interactions.item_ids:
            raise DataError(f"{self.name}: catalogue and interactions have different item id maps")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {self.interactions!r}, {self.catalog!r})"


def load_dataset(name: str, path: str | os.PathLike[str] | None = None, **options: Any) -> RecDataset:
    """Load a dataset by name.

    ``"atelier"`` and ``"atelier-b"`` are built in. ``"movielens-small"`` and ``"lastfm-2k"`` are read from ``path``,
    else from their folder under the one the environment variable ``MMLLMREC_DATA`` names. ``"folder"`` is your own
    data, read from ``path`` alone: interactions.csv and items.csv (or .parquet), images/ and features/, laid out as
    ``data.sources.folder`` says. ``options`` go to the reader. Raises ``DataError`` when the data is not there, with
    the one sentence on how to get it.
    """
    if name in ("atelier", "atelier-b"):
        from mmllmrec.data.atelier import atelier

        return atelier(name, **options)
    from mmllmrec.data import sources

    if name not in sources.READERS:
        raise DataError(f"unknown dataset {name!r}; known are {['atelier', 'atelier-b', *sources.READERS]}")
    reader = sources.READERS[name]
    data: RecDataset = reader.read(find(name, path, folder=reader.FOLDER, get=reader.GET), **options)
    # what was found under MMLLMREC_DATA is found there again, on another machine too: only a given path is kept
    place = str(Path(path).resolve()) if path is not None else None
    data.about["loaded"] = {"name": name, "path": place, "options": options}
    return data


def find(name: str, path: str | os.PathLike[str] | None, *, folder: str, get: str) -> Path:
    """A dataset's folder: ``path``, or ``folder`` below ``MMLLMREC_DATA``; ``DataError`` with ``get`` if neither."""
    root = os.environ.get("MMLLMREC_DATA")
    place = Path(path) if path is not None else Path(root) / folder if root and folder else None
    if place is None or not place.is_dir():
        unset = " and MMLLMREC_DATA is not set" if folder else ""
        looked = f"looked in {place}" if place else f"no path was given{unset}"
        raise DataError(f"dataset {name!r} is not here ({looked}): {get}")
    return place

"""Public formats, one file each: ``read(folder, **options) -> RecDataset``, with ``FOLDER`` and ``GET`` beside it."""

from __future__ import annotations

from types import ModuleType

from mmllmrec.data.sources import folder, inter_files, movielens

READERS: dict[str, ModuleType] = {"movielens-small": movielens, "lastfm-2k": inter_files, "folder": folder}

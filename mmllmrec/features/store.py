"""Store: what frozen towers computed, kept on disk by content, so that nothing is computed twice.

Legend: I items, D width, L_i tokens of item i, W width of a token.
"""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmllmrec.data.interactions import DataError
from mmllmrec.runcard import content_hash, write_atomically, write_json

if TYPE_CHECKING:
    import pandas as pd

    from mmllmrec.data.catalog import Catalog
    from mmllmrec.features.extractor import Extractor

MADE_BY = "mmllmrec.features.store"
SHARD = re.compile(r"[0-9a-f]{16}\.safetensors")
LEFT_OVER = re.compile(r"\.([0-9a-f]{16}\.safetensors|about\.json)\..+")  # beside-files of a process that was killed
DAY = 86400.0  # seconds


class Store:
    """A folder of shards, ``<space>/<hash of its keys>.safetensors``, one tensor a key, and ``<space>/about.json``.

    A space is one extractor (its hash) and a key one item's content, so a changed picture, prompt or adapter is another
    key or another space: nothing has to be invalidated, and what did not change is found again. The index is the
    header (JSON) of each shard: there is no shared file that two processes could both change. A shard is written beside
    and renamed, after every batch, so a killed run loses one batch. Two processes at once are safe, and may both
    compute what neither had found. A shard that cannot be read is dropped with a warning and computed again.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r})"

    def extract(
        self, extractor: Extractor, catalog: Catalog, *, batch: int = 64, progress: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pooled states of all items that have the extractor's modality: table (I, D) float32, present (I,) bool.

        Absent rows are zero. Every item's content is read, to know its key; only what is new goes through the tower.
        Raises ``DataError`` when no item has the modality.
        """
        present = catalog.present(extractor.modality)
        items = np.flatnonzero(present)
        if not items.size:
            raise DataError(f"{extractor.name}: no item of {catalog.name} has {extractor.modality!r}; leave it out")
        content = extractor.contents(catalog)

        def compute(positions: list[int]) -> list[np.ndarray]:
            part = items[positions]
            return list(extractor.encode([content(int(i)) for i in part], extractor.names(catalog, part), False)[0])

        rows = self.get_or_compute(
            [content_hash(content(int(i))) for i in items],
            compute,
            space=extractor.hash,
            about={"name": extractor.name, "modality": extractor.modality, "settings": extractor.settings},
            batch=batch,
            progress=progress,
        )
        table = np.zeros((len(catalog), len(rows[0])), dtype=np.float32)
        table[items] = rows
        return table, present

    def get_or_compute(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], list[np.ndarray]],
        *,
        space: str = "states",
        about: dict[str, Any] | None = None,
        batch: int = 64,
        progress: bool = True,
    ) -> list[np.ndarray]:
        """The array of each key, from disk where it is there; shapes may differ from key to key, as in (L_i, W).

        ``compute`` takes positions in ``keys``, at most ``batch`` of them and of distinct keys, and gives their arrays.
        A key must name all that its array depends on but what ``space`` names (letters, digits, ``._-``). Raises
        ``DataError`` for a space that is no folder name and for a ``compute`` that gives another number of arrays.
        """
        from tqdm.auto import tqdm

        if not re.fullmatch(r"\w[\w.-]*", space, re.ASCII) or batch < 1:
            raise DataError(f"space={space!r}, batch={batch}: letters, digits and ._- alone; at least 1")
        folder = self.folder / space
        found = self._read(folder, set(keys))
        first = {key: position for position, key in reversed(list(enumerate(keys))) if key not in found}
        missing = sorted(first.values())
        about = {"name": space} | (about or {})
        with tqdm(total=len(missing), desc=about["name"], unit=" items", disable=not (progress and missing)) as bar:
            for begin in range(0, len(missing), batch):
                part = missing[begin : begin + batch]
                rows = compute(part)
                if len(rows) != len(part):
                    raise DataError(f"{about['name']}: compute gave {len(rows)} arrays for {len(part)} keys")
                new = {keys[p]: np.ascontiguousarray(row) for p, row in zip(part, rows, strict=True)}
                self._write(folder, new, about)
                found |= new
                bar.update(len(part))
        return [found[key] for key in keys]

    # -- keeping house ----------------------------------------------------------------------------------------------

    def info(self) -> pd.DataFrame:
        """What is kept, a row an extractor: name, modality, hash (the space), items, bytes, written (of its newest
        shard, UTC)."""
        import pandas as pd

        rows = []
        for folder, about in self._spaces():
            items, size, newest = set[str](), 0, 0.0
            for shard in _shards(folder):
                status = shard.stat()
                size, newest = size + status.st_size, max(newest, status.st_mtime)
                with safe_open(shard, framework="np") as file:
                    items.update(file.keys())
            date = datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds") if newest else "never"
            rows.append((about["name"], about.get("modality", ""), folder.name, len(items), size, date))
        return pd.DataFrame(rows, columns=["name", "modality", "hash", "items", "bytes", "written"])

    def prune(self, extractor: str | None = None, *, older_than: float | None = None) -> int:
        """Delete shards of one extractor (its name or hash), or written more than ``older_than`` days ago, or both;
        gives the bytes freed.

        Deletes files that a store wrote and no others, and folders only when nothing else is in them. Raises
        ``DataError`` when neither is given, and for an extractor that is not kept here.
        """
        if extractor is None and older_than is None:
            raise DataError("prune: say which extractor (its name or hash), or older_than how many days, or both")
        chosen = [(f, a) for f, a in self._spaces() if extractor in (None, a["name"], f.name)]
        if extractor is not None and not chosen:
            raise DataError(f"prune: {extractor!r} is not kept here; kept are {[a['name'] for _, a in self._spaces()]}")
        now, freed = time.time(), 0
        for folder, _ in chosen:
            for shard in _shards(folder):
                status = shard.stat()
                if older_than is None or now - status.st_mtime > older_than * DAY:
                    shard.unlink(missing_ok=True)
                    freed += status.st_size
            for left in folder.iterdir():  # an hour: no living process takes as long to write one shard
                if LEFT_OVER.fullmatch(left.name) and now - left.stat().st_mtime > DAY / 24:
                    for file in left.iterdir():
                        freed += file.stat().st_size
                        file.unlink()
                    left.rmdir()
            if {p.name for p in folder.iterdir()} == {"about.json"}:
                (folder / "about.json").unlink()
                folder.rmdir()
        return freed

    def _spaces(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in sorted(self.folder.glob("*/about.json")):
            try:
                about = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(about, dict) and about.get("made_by") == MADE_BY:
                yield path.parent, about

    # -- shards -----------------------------------------------------------------------------------------------------

    def _read(self, folder: Path, wanted: set[str]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for shard in _shards(folder):
            try:
                with safe_open(shard, framework="np") as file:
                    for key in wanted.intersection(file.keys()) - found.keys():
                        found[key] = file.get_tensor(key)
            except FileNotFoundError:  # pruned since it was listed
                continue
            except (SafetensorError, OSError) as error:
                warnings.warn(f"{shard} cannot be read and is computed again: {error}", stacklevel=3)
                shard.unlink(missing_ok=True)
        return found

    def _write(self, folder: Path, new: dict[str, np.ndarray], about: dict[str, Any]) -> None:
        if not (folder / "about.json").exists():
            write_json(folder / "about.json", about | {"made_by": MADE_BY})
        write_atomically(folder / f"{content_hash(sorted(new))}.safetensors", lambda path: save_file(new, path))


def _shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if SHARD.fullmatch(path.name))

"""Your own data in one folder: interactions, items, pictures, and features computed elsewhere.

``interactions.csv`` or ``.parquet``: ``user_id``, ``item_id``, and where you have them ``timestamp`` (seconds since
1970) and ``split`` (train, valid, test, or 0, 1, 2). ``items.csv`` or ``.parquet``: ``item_id``, and where you have
them ``title``, ``text`` and ``image`` (a file below ``images/``; an empty cell is an absent picture). Without an
``image`` column a picture is ``images/<item_id>`` with the ending .jpg, .jpeg, .png or .webp, the first that is there.
``features/<modality>.npy``: row i belongs to row i of the items. Other columns and files are not read. CSV is UTF-8
with a header; rows in errors count from 0 below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import ITEM, TIME, USER, DataError, IdMap, Interactions
from mmllmrec.data.sources.tables import cells, k_core, named_file, read_features, read_table

FOLDER = ""  # it has no place of its own below MMLLMREC_DATA
GET = (
    "pass path= (--path) to a folder of yours that holds interactions.csv (user_id, item_id and, where you have them, "
    "timestamp, split) and items.csv (item_id and, where you have them, title, text, image), or the same as .parquet, "
    "with pictures in images/ and tables of numbers in features/<modality>.npy"
)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
PARTS = {"train": 0, "valid": 1, "test": 2, "0": 0, "1": 1, "2": 2}


def read(
    folder: Path, *, text_columns: Sequence[str] = (), min_events: int = 1, duplicates: str = "error"
) -> RecDataset:
    """Read a folder of this layout; ``split`` becomes ``RecDataset.parts``, the dataset's name is the folder's.

    An item's text is ``text`` and the ``text_columns``, what is there of them joined by ". "; its title is only shown
    to people where there is none. Every row of the items is an item, one without an event too, unless ``min_events``
    is above 1: then users and items with fewer events leave, until none has fewer (a k-core). ``duplicates="first"``
    keeps a repeated pair's earliest event.
    Raises ``DataError`` on ids that are empty, repeated (items) or unknown, on a picture that is named and not there,
    or that lies outside ``images/``, and on features that do not fit the items.
    """
    text_columns = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns)
    if min_events < 1:
        raise DataError(f"min_events={min_events}: at least 1, which keeps everything")
    events_file, events = _table(folder, "interactions", ids=(USER, ITEM))
    items_file, items = _table(folder, "items", ids=(ITEM,), needs=text_columns)
    twice = np.flatnonzero(items[ITEM].duplicated().to_numpy())
    if twice.size:
        raise DataError(
            f"{items_file}, row {twice[0]}: {ITEM} {items[ITEM][twice[0]]!r} appears twice; keep one row an item"
        )
    if "split" in events.columns:
        labels = events["split"]
        events["split"] = labels.astype(str).map(PARTS)
        odd = np.flatnonzero(events["split"].isna().to_numpy())
        if odd.size:
            raise DataError(f"{events_file}, row {odd[0]}: split {labels[odd[0]]!r}; use train, valid, test or 0, 1, 2")
    item_ids = IdMap(items[ITEM].tolist(), what="item id")
    time = TIME if TIME in events.columns else None
    source = str(events_file)
    x = Interactions.from_frame(events, time=time, item_ids=item_ids, duplicates=duplicates, source=source)
    columns = _content(folder, items, items_file, text_columns)
    features = {path.stem: read_features(path) for path in sorted((folder / "features").glob("*.npy"))}
    for name, table in features.items():
        file = folder / "features" / f"{name}.npy"
        if len(table) != len(items):
            raise DataError(
                f"{file}: {len(table)} rows for {len(items)} items; row i must belong to row i of the items"
            )
        if name in columns:
            raise DataError(f"{file}: the items have {name} of their own; give the table another name")
    if duplicates == "first" or min_events > 1:
        # the whole table has passed above, where errors have the file's rows: now what is kept of it
        if time:
            events = events.assign(**{time: pd.to_numeric(events[time])}).sort_values(time, kind="stable")
        events = k_core(events.drop_duplicates([USER, ITEM]).sort_index(), (USER, ITEM), min_events=min_events)
        if events.empty:
            raise DataError(f"{folder}: no event is left with min_events={min_events}; lower it")
        if min_events > 1:
            kept = np.flatnonzero(items[ITEM].isin(set(events[ITEM])).to_numpy())
            item_ids = IdMap(items[ITEM].iloc[kept].tolist(), what="item id")
            columns = {c: [values[k] for k in kept] for c, values in columns.items()}
            features = {m: table[kept] for m, table in features.items()}
        x = Interactions.from_frame(events, time=time, item_ids=item_ids, source=source)
    kinds: dict[str, Any] = {c: datasets.Value("string") for c in (ITEM, *columns)}
    if "image" in kinds:
        kinds["image"] = datasets.Image(decode=False)
    rows = datasets.Dataset.from_dict({ITEM: item_ids.ids, **columns}, features=datasets.Features(kinds))
    name = folder.resolve().name
    parts = events["split"].to_numpy(dtype=np.int8) if "split" in events.columns else None
    about = {"source": "folder", "text_columns": list(text_columns), "min_events": min_events, "duplicates": duplicates}
    return RecDataset(name, x, Catalog(rows, item_ids, features=features, name=name), parts, about)


def _table(folder: Path, stem: str, *, ids: tuple[str, ...], needs: tuple[str, ...] = ()) -> tuple[Path, pd.DataFrame]:
    """A table and its file, with the columns ``ids`` as strings, none empty."""
    found = [p for p in (folder / f"{stem}.csv", folder / f"{stem}.parquet") if p.is_file()]
    if not found:
        raise DataError(f"{folder}: {stem}.csv (or .parquet) is missing; {GET}")
    if len(found) > 1:
        raise DataError(f"{folder}: both {stem}.csv and {stem}.parquet are here; keep one")
    frame = read_table(found[0], needs=(*ids, *needs), as_text=True)
    for column in ids:
        empty = np.flatnonzero(frame[column].isna().to_numpy())
        if empty.size:
            raise DataError(f"{found[0]}, row {empty[0]}: column {column!r} is empty; fill it or drop the row")
        if pd.api.types.is_float_dtype(frame[column]):  # 7.0 would be another id than the other table's 7
            raise DataError(f"{found[0]}: column {column!r} holds {frame[column].dtype}; save ids as integers or text")
        frame[column] = frame[column].astype(str)
    return found[0], frame


def _content(folder: Path, items: pd.DataFrame, file: Path, text_columns: tuple[str, ...]) -> dict[str, list[Any]]:
    """The catalogue's columns beside the ids; a modality that no item has is left out."""
    columns: dict[str, list[Any]] = {"title": cells(items["title"])} if "title" in items.columns else {}
    names = dict.fromkeys([*(c for c in ("text",) if c in items.columns), *text_columns])
    texts = [". ".join(c for c in row if c) for row in zip(*(cells(items[n]) for n in names), strict=True)]
    if any(texts):
        columns["text"] = texts
    pictures = _pictures(folder / "images", items, file)
    if any(pictures):
        columns["image"] = [p and {"path": str(p), "bytes": None} for p in pictures]
    return columns


def _pictures(images: Path, items: pd.DataFrame, file: Path) -> list[Path | None]:
    """Each item's picture, or None where it is absent; none of them outside ``images``, links followed."""
    if "image" in items.columns:
        names = cells(items["image"])
    else:
        here = {(p.stem, p.suffix.lower()): p.name for p in sorted(images.iterdir())} if images.is_dir() else {}
        names = [next((here[i, e] for e in ENDINGS if (i, e) in here), "") for i in items[ITEM]]
    return [named_file(images, n, source=f"{file}, row {row}") if n else None for row, n in enumerate(names)]

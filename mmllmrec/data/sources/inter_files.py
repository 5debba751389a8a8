"""The field's ``.inter`` + ``.npy`` layout: events with their part, and features whose row i is item i.

``<name>.inter`` (tab separated: userID, itemID, rating, x_label with 0 train, 1 validation, 2 test), any number of
``<modality>.npy`` float tables, and optionally ``items.tsv`` (itemID and the item's name in the second column; every
further column is text). An item that has no features is a row of zeros there; where ``presence.json`` is beside
({"absent": {"<file's stem>": [rows]}}, as ``FeatureTable.as_inter_files`` writes it), its rows are absent here.
"""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.data.sources.tables import read_features, read_table

FOLDER = "lastfm-2k-audio"
GET = "put a folder with one .inter file and its .npy features there and pass path=, or set MMLLMREC_DATA to its parent"


def read(folder: Path) -> RecDataset:
    """Read a folder of this layout; its ``x_label`` becomes ``RecDataset.parts``.

    Items without an event are items all the same: there are as many items as rows in the ``.npy`` files (in the events
    where there is no such file).
    Raises ``DataError`` on several or no ``.inter`` files, unknown labels, row counts that differ, values that are not
    finite, and object arrays, which only pickle could load.
    """
    found = sorted(folder.glob("*.inter"))
    if len(found) != 1:
        raise DataError(
            f"{folder}: {len(found)} .inter files, expected one; it holds {sorted(p.name for p in folder.iterdir())}"
        )
    frame = read_table(found[0], sep="\t", needs=("userID", "itemID", "x_label"))
    odd = np.flatnonzero(~frame["x_label"].isin([0, 1, 2]).to_numpy())
    if odd.size:
        raise DataError(
            f"{found[0]}, row {odd[0]}: x_label {frame['x_label'][odd[0]]}; use 0 (train), 1 (valid), 2 (test)"
        )
    tables = {path.stem: read_features(path) for path in sorted(folder.glob("*.npy"))}
    if frame.empty:
        raise DataError(f"{found[0]}: no interactions; there is nothing to learn from")
    n_items = len(next(iter(tables.values()))) if tables else int(frame["itemID"].max()) + 1
    item_ids = IdMap(range(n_items), what="item id")
    for name, table in tables.items():
        if len(table) != n_items:
            raise DataError(f"{folder / (name + '.npy')}: {len(table)} rows for {n_items} items; row i must be item i")
    absent = _absent(folder / "presence.json", tables)
    interactions = Interactions.from_frame(
        frame, user="userID", item="itemID", time=None, item_ids=item_ids, source=str(found[0])
    )
    rows: dict[str, list[str]] = {"item_id": item_ids.ids}
    if (folder / "items.tsv").is_file():
        items = read_table(folder / "items.tsv", sep="\t", needs=("itemID",)).fillna("")
        place = item_ids.index(items["itemID"].tolist())
        title, text = [""] * n_items, [""] * n_items
        for row, position in enumerate(place):
            values = [str(v) for c, v in items.iloc[row].items() if c != "itemID"]
            title[position], text[position] = (values or [""])[0], ". ".join(v for v in values if v)
        rows |= {"title": title, "text": text}
    catalog = Catalog(datasets.Dataset.from_dict(rows), item_ids, features=tables, absent=absent, name=folder.name)
    about = {"source": "inter_files", "file": found[0].name, "features": {k: list(v.shape) for k, v in tables.items()}}
    return RecDataset(folder.name, interactions, catalog, frame["x_label"].to_numpy(dtype=np.int8), about)


def _absent(path: Path, tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Which rows of which table are absent, {name: (I,) bool}; none where there is no such file."""
    if not path.is_file():
        return {}
    found = {}
    try:
        for name, rows in json.loads(path.read_text(encoding="utf-8"))["absent"].items():
            found[name] = np.zeros(len(tables[name]), dtype=bool)
            found[name][np.array(rows, dtype=np.int64)] = True
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(f"{path}: expected {{'absent': {{file: [rows]}}}} for {sorted(tables)}: {error!r}") from None
    return found

"""Tables from files, and the files that tables name, with errors that say where; and the k-core of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmllmrec.data.interactions import DataError


def read_table(path: Path, *, sep: str = ",", needs: tuple[str, ...] = (), as_text: bool = False) -> pd.DataFrame:
    """A UTF-8 table with a header, or a ``.parquet`` file; all ids and words as read (strings where not numbers).

    ``as_text`` keeps the cells of a UTF-8 table as they are written: an id 007 stays 007, a title NA is no empty cell.
    Raises ``DataError`` naming the file when it is missing, not UTF-8 (with the line), not a table, or lacks a column.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; this reader needs it")
    frame = _parquet(path) if path.suffix == ".parquet" else _delimited(path, sep, as_text)
    for column in needs:
        if column not in frame.columns:
            raise DataError(f"{path}: column {column!r} is missing; it has {list(frame.columns)}")
    return frame


def _delimited(path: Path, sep: str, as_text: bool) -> pd.DataFrame:
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}); save it as UTF-8") from None
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""]} if as_text else {}
    try:
        frame = pd.read_csv(path, sep=sep, encoding="utf-8", **options)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise DataError(f"{path} is not a table separated by {sep!r}: {error}") from None
    if not isinstance(frame.index, pd.RangeIndex):  # pandas took the first cells for names of rows: all is shifted
        raise DataError(f"{path}: its rows have more cells than its header {list(frame.columns)}; name every column")
    return frame


def _parquet(path: Path) -> pd.DataFrame:
    try:
        frame = pq.read_table(path).to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None
    return frame.reset_index(drop=frame.index.names == [None])  # a saved index is a column, where it has a name


def read_features(path: Path) -> np.ndarray:
    """A ``.npy`` table as (I, D) float32; ``DataError`` naming file and row when it wants pickle or is not finite."""
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: not a plain array of numbers (pickle is never loaded): {error}") from None
    if not isinstance(table, np.ndarray):
        raise DataError(f"{path}: an archive of arrays; save one table of numbers with numpy.save")
    if table.ndim != 2 or table.dtype.kind not in "iuf":
        raise DataError(f"{path}: {table.dtype} of shape {table.shape}; expected a table of numbers, one row an item")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        table = table.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if bad.size:
        raise DataError(f"{path}, row {bad[0]}: NaN or infinite; mend it before loading")
    return table


def cells(column: pd.Series) -> list[str]:
    """A column's cells as stripped strings, empty where there is none, whatever type a Parquet file gave them."""
    words: list[str] = column.astype(object).where(column.notna(), "").astype(str).str.strip().tolist()
    return words


def named_file(folder: Path, name: str, *, source: str) -> Path:
    """The file that a table's cell names, below ``folder`` with links followed; ``source`` is the cell's file and row.

    Raises ``DataError`` when it lies outside ``folder``, is not there, or is no name of a file.
    """
    root = folder.resolve()
    try:
        place = (root / name).resolve()
        inside, there = place.is_relative_to(root), place.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL in it, a circle of links
        raise DataError(f"{source}: {name!r} is no name of a file ({error}); correct it") from None
    if not inside:
        raise DataError(f"{source}: {name!r} leads out of {folder}; put the file there and name it from there")
    if not there:
        raise DataError(
            f"{source}: {name!r} is not in {folder}; correct the name, add the file, or empty the cell (then absent)"
        )
    return place


def k_core(events: pd.DataFrame, columns: tuple[str, ...], *, min_events: int) -> pd.DataFrame:
    """The rows left when values of ``columns`` on fewer than ``min_events`` rows leave, until none has fewer."""
    size = -1
    while len(events) != size:
        size = len(events)
        for column in columns:
            events = events[events.groupby(column)[column].transform("size") >= min_events]
    return events

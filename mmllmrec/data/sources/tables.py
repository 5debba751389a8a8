"""Tables from files, with errors that name the file and the place in it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mmllmrec.data.interactions import DataError


def read_table(path: Path, *, sep: str = ",", needs: tuple[str, ...] = ()) -> pd.DataFrame:
    """A UTF-8 table with a header, all ids and words as read (strings where not numbers).

    Raises ``DataError`` naming the file when it is missing, not UTF-8 (with the line), not a table, or lacks a column.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; this reader needs it")
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}); save it as UTF-8") from None
    try:
        frame = pd.read_csv(path, sep=sep, encoding="utf-8")
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise DataError(f"{path} is not a table separated by {sep!r}: {error}") from None
    for column in needs:
        if column not in frame.columns:
            raise DataError(f"{path}: column {column!r} is missing; it has {list(frame.columns)}")
    return frame

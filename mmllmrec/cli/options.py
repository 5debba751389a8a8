"""What commands share: their options, and a table on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Data = Annotated[
    str,
    typer.Option(
        "--data", "--dataset", help="atelier, atelier-b, movielens-small, lastfm-2k, or folder: your own, at --path"
    ),
]
At = Annotated[Path | None, typer.Option("--path", help="the dataset's folder; otherwise found under MMLLMREC_DATA")]
Kind = Annotated[
    str, typer.Option("--split", help="random_per_user, leave_last, temporal, cold_items, cold_users, cold_both, given")
]
Seed = Annotated[int, typer.Option(help="of the split, the weights and the batches")]
Folder = Annotated[Path, typer.Option("--folder", help="where cards and checkpoints go; a run cut off goes on from it")]


def show(frame: Any, title: str = "") -> None:
    """A data frame as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    frame = frame.reset_index() if frame.index.name else frame
    table = Table(title=title or None, title_justify="left")
    for name in frame.columns:
        table.add_column(str(name))
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row))
    # a pipe has no width of its own, and a table cut to 80 columns cannot be read by the next program
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)

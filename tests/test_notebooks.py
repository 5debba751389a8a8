"""Every notebook runs at smoke size, and its paired script says the same."""

from pathlib import Path

import jupytext
import pytest

from mmllmrec.cli import execute

BOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_pair_is_in_step(book):
    cells, script = (jupytext.read(p).cells for p in (book, book.with_suffix(".py")))
    assert [(c.cell_type, c.source) for c in cells] == [(c.cell_type, c.source) for c in script]


@pytest.mark.slow
@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_runs_at_smoke_size(book):
    execute(book, smoke=True)

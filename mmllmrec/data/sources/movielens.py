"""MovieLens (ml-latest-small) with posters and plots: ratings.csv, movies.csv, overviews.csv, posters/<movieId>.jpg."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pandas as pd

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.data.sources.tables import k_core, read_table

FOLDER = "movielens-small-posters"
GET = (
    "take ml-latest-small from GroupLens, add posters/<movieId>.jpg and, where you have them, plots in overviews.csv "
    "(movieId, overview), and pass path= or set MMLLMREC_DATA to the folder that holds it as movielens-small-posters"
)


def read(folder: Path, *, threshold: float = 0.5, min_events: int = 5, bad_rows: str = "error") -> RecDataset:
    """Ratings of at least ``threshold`` stars are events; users and items with fewer than ``min_events`` leave, again
    and again until none has fewer (a k-core). 0.5 keeps every rating: that a film was watched is the event.

    A rating whose cells are not numbers is an error that names its line; ``bad_rows="drop"`` leaves such rows out and
    says how many in ``about``. Text is title, year and genres, and the plot where there is one; a film without a poster
    file has no image.
    """
    ratings = read_table(folder / "ratings.csv", needs=("userId", "movieId", "rating", "timestamp"))
    movies = read_table(folder / "movies.csv", needs=("movieId", "title", "genres")).astype({"movieId": str})
    if bad_rows not in ("error", "drop"):
        raise DataError(f"bad_rows={bad_rows!r}: use 'error' or 'drop'")
    numbers = ratings[["userId", "movieId", "rating", "timestamp"]].apply(pd.to_numeric, errors="coerce")
    bad = np.flatnonzero(numbers.isna().any(axis=1).to_numpy())
    if bad.size and bad_rows == "error":
        raise DataError(
            f"{folder / 'ratings.csv'}, line {bad[0] + 2}: {ratings.iloc[bad[0]].tolist()} is not userId, movieId, "
            f"rating, timestamp; mend it, or pass bad_rows='drop' to leave out the {bad.size} such row(s)"
        )
    ratings = numbers.dropna().astype({"userId": int, "movieId": int, "timestamp": int})
    ratings = ratings[ratings["rating"] >= threshold].astype({"userId": str, "movieId": str})
    ratings = k_core(ratings, ("userId", "movieId"), min_events=min_events)
    if ratings.empty:
        raise DataError(
            f"{folder}: no event is left with threshold={threshold} and min_events={min_events}; lower them"
        )
    doubled = movies["movieId"][movies["movieId"].duplicated()]
    if len(doubled):
        raise DataError(f"{folder / 'movies.csv'}: movieId {doubled.iloc[0]} appears twice; keep one row a movie")
    items = sorted(set(ratings["movieId"]), key=int)
    unknown = sorted(set(items) - set(movies["movieId"]), key=int)
    if unknown:
        raise DataError(f"{folder / 'ratings.csv'}: movieId {unknown[0]} is not in movies.csv; add it or drop its rows")
    item_ids = IdMap(items, what="item id")
    interactions = Interactions.from_frame(
        ratings, user="userId", item="movieId", item_ids=item_ids, source=str(folder / "ratings.csv")
    )
    plots: dict[str, str] = {}
    if (folder / "overviews.csv").is_file():
        frame = read_table(folder / "overviews.csv", needs=("movieId", "overview")).dropna().astype({"movieId": str})
        plots = dict(zip(frame["movieId"], frame["overview"], strict=True))
    known = movies.set_index("movieId").loc[items]
    genres = ["" if g.startswith("(no") else g.replace("|", ", ") for g in known["genres"]]
    text = [
        ". ".join(p for p in (g, plots.get(i, "")) if p) or t
        for i, g, t in zip(items, genres, known["title"], strict=True)
    ]
    posters = [folder / "posters" / f"{i}.jpg" for i in items]
    table = datasets.Dataset.from_dict(
        {
            "item_id": items,
            "title": known["title"].tolist(),
            "text": text,
            "image": [{"path": str(p), "bytes": None} if p.is_file() else None for p in posters],
        },
        features=datasets.Features(
            item_id=datasets.Value("string"),
            title=datasets.Value("string"),
            text=datasets.Value("string"),
            image=datasets.Image(decode=False),
        ),
    )
    about = {
        "source": "movielens",
        "threshold": threshold,
        "min_events": min_events,
        "dropped_rows": int(bad.size),
        "plots": int(np.isin(items, list(plots)).sum()),
        "licence": "GroupLens: research, non-commercial; posters: research use only",
    }
    return RecDataset("movielens-small", interactions, Catalog(table, item_ids, name="movielens-small"), None, about)

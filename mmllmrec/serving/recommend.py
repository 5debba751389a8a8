"""recommend(): a fitted model's first k items for some users, with external ids, titles and pictures.

Legend: B users asked for, I items.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import ITEM, USER, DataError, Interactions
from mmllmrec.models.base import Recommender

COLUMNS = [USER, "rank", ITEM, "title", "score", "basis"]
THUMBNAIL = 96  # pixels a side, in a notebook's grid


@dataclass(repr=False)
class Recommendations:
    """What was recommended to whom. ``frame`` has a row a recommendation, best first: user_id, rank (from 1), item_id,
    title, score, and ``basis``: ``"history"`` where the model scored the user, ``"popularity"`` where it could not."""

    frame: pd.DataFrame
    catalog: Catalog | None = None

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        users = self.frame["user_id"].nunique()
        return f"Recommendations({len(self)} for {users} {'user' if users == 1 else 'users'})"

    def __str__(self) -> str:
        return self.frame.to_string(index=False, float_format="{:.4f}".format)

    def _repr_html_(self) -> str:
        """A grid of pictures and titles, one line of cards a user."""
        users = [self._line(str(user), part) for user, part in self.frame.groupby(USER, sort=False)]
        return f"<div class='mmllmrec'>{''.join(users)}</div>"

    def _line(self, user: str, part: pd.DataFrame) -> str:
        basis = part["basis"].iloc[0]
        note = "" if basis == "history" else " (no history the model can use: most popular items)"
        cards = "".join(self._card(row) for row in part.to_dict("records"))
        style = "display:flex;flex-wrap:wrap;gap:8px;margin:4px 0 12px"
        return f"<b>{html.escape(user)}</b>{note}<div style='{style}'>{cards}</div>"

    def _card(self, row: dict[Any, Any]) -> str:
        title, item = html.escape(str(row["title"])), html.escape(str(row[ITEM]))
        source = self._picture(str(row[ITEM]))
        size = f"width:{THUMBNAIL}px;height:{THUMBNAIL}px"
        picture = (
            f"<img src='{source}' alt='' style='{size}'>" if source else f"<div style='{size};background:#eee'></div>"
        )
        label = f"<small>{row['rank']}. {title}</small>"
        return f"<div style='width:{THUMBNAIL}px' title='{item}: {row['score']:.3f}'>{picture}{label}</div>"

    def _picture(self, item: str) -> str | None:
        """The item's picture as a data URI, or None where it has none."""
        if self.catalog is None or "image" not in self.catalog.modalities:
            return None
        picture = self.catalog.image(int(self.catalog.item_ids.index([item])[0]))
        if picture is None:
            return None
        held = io.BytesIO()
        ImageOps.fit(picture, (THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC).save(held, format="PNG")
        return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()

    def show(self) -> None:
        """The picture grid in a notebook, the table elsewhere."""
        from IPython.core.getipython import get_ipython

        shell = get_ipython()
        if shell is not None and hasattr(shell, "kernel"):
            from IPython.display import display

            display(self)
        else:
            print(self)


def recommend(
    model: Any,
    users: str | Sequence[Any],
    *,
    k: int = 10,
    catalog: Catalog | None = None,
    exclude_seen: bool = True,
    history: Interactions | Sequence[Any] | None = None,
    among: Sequence[Any] | None = None,
    exclude: Sequence[Any] = (),
    unknown: str = "popular",
) -> Recommendations:
    """The first ``k`` items for each of ``users`` (external ids), best first; equal scores in catalogue order.

    ``model`` is a ``Run``, a ``Recommender`` or the folder ``save_pretrained`` wrote (content models then need
    ``catalog``). ``catalog`` gives titles and pictures; by default the model's own. Items a user has taken in training
    (and in ``history``) are left out unless ``exclude_seen=False``; ``history`` also replaces the training events in
    models that take one (``with_history``). A list of item ids as ``history`` is what one user took, known or not: a
    model with ``score_from`` scores from these events alone. ``among`` limits the candidates, ``exclude`` removes some.
    Items without a training event are candidates only of models with ``supports_cold_items``.

    A user whose ID is absent gets the most popular items and says so in the column ``basis``: one the model has never
    heard of, and one without an event in models without ``supports_cold_users``. ``unknown="error"`` refuses the
    former with a ``DataError``. Raises ``DataError`` too for an unknown item in ``among`` or ``exclude``, for
    ``k < 1``, and for a catalogue of other items. A user with fewer than ``k`` candidates gets fewer rows.
    """
    if k < 1:
        raise DataError(f"k={k}: ask for at least one item")
    if unknown not in ("popular", "error"):
        raise DataError(f"unknown={unknown!r}: use 'popular' or 'error'")
    model = _recommender(model, catalog)
    train: Interactions = model.train_data
    catalog = catalog if catalog is not None else getattr(model, "catalog", None)
    if catalog is not None and catalog.item_ids != train.item_ids:
        raise DataError("the catalogue's items are not those the model was trained on: pass the training catalogue")
    told = None
    if history is not None and not isinstance(history, Interactions):
        told, history = _told(model, history, users), None
    if history is not None and (history.user_ids, history.item_ids) != (train.user_ids, train.item_ids):
        raise DataError("history has other id maps than the training events: build it with user_ids= and item_ids=")
    wanted = list(dict.fromkeys([users] if isinstance(users, str) else [str(u) for u in users]))
    if unknown == "error":
        train.user_ids.index(wanted)
    allowed = _candidates(train, among, exclude)
    counts = train.user_counts
    if history is not None and hasattr(model, "with_history"):
        model, counts = model.with_history(history), history.user_counts
    known = np.array([u in train.user_ids for u in wanted], dtype=bool)
    index = train.user_ids.index([u for u in wanted if u in train.user_ids])
    place = np.full(len(wanted), -1)
    place[known] = index
    scored = known & ((counts[place] > 0) | model.supports_cold_users)
    scored |= told is not None

    scores = torch.from_numpy(train.item_counts).float().expand(len(wanted), -1).clone()
    if told is not None:
        scores[:] = model.score_from(told[None]).float().cpu()
    elif scored.any():
        scores[torch.from_numpy(scored)] = model.score(place[scored]).detach().float().cpu()
        if not model.supports_cold_items:
            untaught = torch.from_numpy(train.item_counts == 0)
            scores[torch.from_numpy(scored)[:, None] & untaught[None]] = -torch.inf
    scores[:, torch.from_numpy(~allowed)] = -torch.inf
    if exclude_seen:
        seen = train.csr if history is None else (train.csr + history.csr).tocsr()
        row, column = seen[index].nonzero()
        scores[torch.from_numpy(np.flatnonzero(known)[row]), torch.from_numpy(column)] = -torch.inf
        if told is not None:
            scores[:, torch.from_numpy(told)] = -torch.inf
    best, items = scores.sort(dim=1, descending=True, stable=True)
    titles = train.item_ids.ids if catalog is None else catalog.titles
    rows = [
        (user, r + 1, train.item_ids[i], titles[i], s, "history" if scored[b] else "popularity")
        for b, user in enumerate(wanted)
        for r, (i, s) in enumerate(zip(items[b, :k].tolist(), best[b, :k].tolist(), strict=True))
        if s > -torch.inf
    ]
    return Recommendations(pd.DataFrame(rows, columns=COLUMNS), catalog)


def _told(model: Any, history: Sequence[Any], users: str | Sequence[Any]) -> np.ndarray:
    """A list of item ids as a row of events, (I,) bool."""
    if not hasattr(model, "score_from"):
        raise DataError(
            f"history=[...]: {model.name} cannot read a user from events alone; Unified and TwoStage can, others take "
            "an Interactions"
        )
    if isinstance(history, str) or (not isinstance(users, str) and len(users) != 1):
        raise DataError("history=[...]: a list of item ids, and one user")
    row = np.zeros(model.n_items, dtype=bool)
    try:
        row[model.train_data.item_ids.index(list(history))] = True
    except DataError as error:
        raise DataError(f"history=, {error}") from None
    return row


def _recommender(model: Any, catalog: Catalog | None) -> Any:
    """A fitted model from a run, a folder or itself."""
    if isinstance(model, str | os.PathLike):
        return Recommender.from_pretrained(Path(model), catalog=catalog)
    model = getattr(model, "model", model) if not isinstance(model, Recommender) else model
    if not isinstance(model, Recommender):
        raise DataError(f"cannot recommend with a {type(model).__name__}: pass a run, a model or its saved folder")
    return model


def _candidates(train: Interactions, among: Sequence[Any] | None, exclude: Sequence[Any]) -> np.ndarray:
    """Which items may be recommended, (I,) bool."""
    allowed = np.ones(train.n_items, dtype=bool)
    for name, ids in (("among", among), ("exclude", exclude)):
        if isinstance(ids, str):
            raise DataError(f"{name}={ids!r}: give a list of item ids")
    try:
        if among is not None:
            allowed[:] = False
            allowed[train.item_ids.index(list(among))] = True
    except DataError as error:
        raise DataError(f"among=, {error}") from None
    try:
        allowed[train.item_ids.index(list(exclude))] = False
    except DataError as error:
        raise DataError(f"exclude=, {error}") from None
    return allowed

"""Per-factor recovery: which of the true tastes a model's scores follow. Legend: U users, I items, L levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from mmllmrec.data.atelier.world import Atelier

FACTORS = ("hue", "pattern", "material", "occasion", "kind", "interaction", "chime", "scent")


def recovery(scorer: Any, data: Atelier, *, items: np.ndarray | None = None, relative_to: Any = None) -> pd.DataFrame:
    """Squared correlation, over users and levels, of the mean score of a factor's level with its true partial utility.

    A negative correlation counts as 0. Averaging over the items of a level averages the other factors out; for the
    interaction the four cells of its two attributes are taken, less their main effects. ``items`` (I,) bool limits to,
    say, cold items. ``relative_to`` is the factor-fed twin, another scorer: a second column gives the share of its
    recovery that was reached.
    """
    found = {
        name: _squared(scorer, data, items)
        for name, scorer in (("recovery", scorer), ("twin", relative_to))
        if scorer is not None
    }
    frame = pd.DataFrame(found)
    if relative_to is not None:
        frame["relative"] = frame["recovery"] / frame["twin"]
    return frame


def _squared(scorer: Any, data: Atelier, items: np.ndarray | None) -> dict[str, float]:
    users = np.arange(data.interactions.n_users)
    chosen = np.arange(data.interactions.n_items) if items is None else np.flatnonzero(items)
    if hasattr(scorer, "embed"):
        p, q = scorer.embed()
        scores = (p @ q.T).cpu().numpy()[:, chosen].astype(np.float64)
    else:
        scores = scorer.score(users).cpu().numpy()[:, chosen].astype(np.float64)
    scores -= scores.mean(1, keepdims=True)
    result = {}
    for name in FACTORS:
        tastes = data.terms[name].tastes.astype(np.float64)
        if name == "interaction":
            cells = 2 * data.table["backdrop"][chosen] + data.table["maker"][chosen]
            m = _means(scores, cells, 4)
            ours = (m[:, 0] - m[:, 1] - m[:, 2] + m[:, 3])[:, None]
            true = (tastes[:, 0] - tastes[:, 1])[:, None]
        else:
            levels = data.terms[name].levels[chosen]
            ours, true = _means(scores, levels, tastes.shape[1]), tastes
        ours, true = (x - x.mean(1, keepdims=True) if x.shape[1] > 1 else x for x in (ours, true))
        varies = ours.std() > 0 and true.std() > 0
        found = float(np.corrcoef(ours.ravel(), true.ravel())[0, 1]) if varies else 0.0
        result[name] = max(found, 0.0) ** 2  # scores that go against a taste have not found it
    return result


def _means(scores: np.ndarray, levels: np.ndarray, count: int) -> np.ndarray:
    """Mean score of each level: (U, I), (I,) -> (U, L)."""
    one_hot = np.eye(count)[levels]
    return (scores @ one_hot) / np.maximum(one_hot.sum(0), 1)

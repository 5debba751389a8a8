"""The tables of the README: the quickstart's and MovieLens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmllmrec.bench.rows import setup
from mmllmrec.bench.run import Summary, entry, over_seeds
from mmllmrec.data import splits
from mmllmrec.data.dataset import RecDataset, load_dataset

QUICKSTART = ("LightGCN", "LightGCN (softmax)", "VBPR", "VBPR (softmax)", "TwoStage", "Unified")


def quickstart(
    *,
    seeds: int = 3,
    folder: str | os.PathLike[str] = "runs/quickstart",
    data: RecDataset | None = None,
    systems: Sequence[str] = QUICKSTART,
    quick: int | None = None,
) -> Summary:
    """The quickstart's table over seeds: Atelier, cold items held out, floors and oracle beside ``systems``."""
    data = data or load_dataset("atelier")
    entries = [entry(s) for s in systems]
    entries[-1] = replace(entries[-1], controls=entries[-1].name == "Unified")
    return over_seeds(
        "quickstart",
        lambda s: splits.cold_items(data, seed=s),
        entries,
        seeds=seeds,
        folder=Path(folder),
        quick=quick,
        command=f"mmllmrec bench quickstart --seeds {seeds}",
    )


def movielens(
    *,
    seeds: int = 3,
    folder: str | os.PathLike[str] = "runs/movielens",
    path: str | os.PathLike[str] | None = None,
    systems: Sequence[str] = ("LightGCN", "VBPR", "Unified"),
    kinds: Sequence[str] = ("random_per_user", "cold_items"),
    quick: int | None = None,
) -> list[Summary]:
    """Real posters and words, random-per-user and cold-items splits; Unified reads with ``minilm``.

    ``kinds`` limits the splits. MiniLM is large for two cores: the cached trainer, with its own settings.
    """
    asked = setup("movielens-small", path)
    data = asked.data
    entries = [entry(s, preset=asked.preset, trainer=asked.trainer) for s in systems]
    if entries[-1].name == "Unified":
        entries[-1] = replace(entries[-1], controls=("shuffled image", "shuffled text"))

    def one(kind: str) -> Summary:
        place = Path(folder) / kind
        return over_seeds(
            f"movielens {kind}",
            lambda s: splits.by_name(kind, data, seed=s),
            entries,
            seeds=seeds,
            folder=place,
            quick=quick,
            command=f"mmllmrec bench movielens --seeds {seeds} --split {kind}",
        )

    return [one(kind) for kind in kinds]

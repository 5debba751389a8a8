"""Ranking metrics as modules of Hugging Face ``evaluate``: ``evaluate.load(str(hf.path("ndcg_at_k")))``, no network.

Rows are users: ``predictions`` their ranked item ids, best first, ``references`` the ids of their positives, both
strings or both integers. Each module only calls ``evaluation.metrics``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmllmrec.data.interactions import DataError
from mmllmrec.evaluation.metrics import compute

if TYPE_CHECKING:
    import evaluate

MODULES = ("recall_at_k", "ndcg_at_k")


def path(name: str) -> Path:
    """The folder of a module, for ``evaluate.load``. Raises ``DataError`` with the list of modules for another name.

    >>> path("ndcg_at_k").name
    'ndcg_at_k'
    """
    if name not in MODULES:
        raise DataError(f"unknown module {name!r}; modules are {list(MODULES)}")
    return Path(__file__).parent / name


def info(*, description: str, inputs: str) -> evaluate.MetricInfo:
    """What a module declares of itself: lists of item ids in, all strings or all integers."""
    import datasets
    import evaluate

    kinds = [datasets.Sequence(datasets.Value(kind)) for kind in ("string", "int64")]
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=inputs,
        features=[datasets.Features({"predictions": kind, "references": kind}) for kind in kinds],
    )


def mean(
    metric: str, predictions: Sequence[Sequence[Hashable]], *, references: Sequence[Sequence[Hashable]]
) -> dict[str, float]:
    """Mean over the rows of ``"ndcg@20"`` and the like, {metric: value}; a list shorter than K leaves its places empty.

    Raises ``DataError`` naming the row for one without a positive, where ranking metrics are undefined (leave such
    users out: the evaluator does), and for an item that a row predicts, or refers to, twice.

    >>> mean("recall@2", [["b", "a", "c"]], references=[["c", "a"]])
    {'recall@2': 0.5}
    """
    hits = torch.zeros(len(predictions), max(map(len, predictions), default=0), dtype=torch.bool)
    for row, (ranked, wanted) in enumerate(zip(predictions, references, strict=True)):
        positives = set(wanted)
        if not positives:
            raise DataError(f"row {row}: references are empty, and {metric} is undefined there; leave the row out")
        for what, ids in (("predictions", ranked), ("references", wanted)):
            if len(set(ids)) < len(ids):
                twice = next(i for n, i in enumerate(ids) if i in ids[:n])
                raise DataError(f"row {row}: {what} hold {twice!r} twice; keep the first")
        hits[row, : len(ranked)] = torch.tensor([i in positives for i in ranked], dtype=torch.bool)
    found = torch.tensor([len(wanted) for wanted in references])
    return {metric: float(compute(metric, hits, found).mean())}

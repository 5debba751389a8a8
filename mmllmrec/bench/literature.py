"""The survey's systems under one protocol: every system's settings searched with the same budget, over seeds.

Legend: I items, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmllmrec.bench.answer import COST, NDCG, Answer, Claim, Column, Layout
from mmllmrec.bench.ask import Budget, Question, ask
from mmllmrec.bench.rows import SPACES, STARTS, Row, Setup, setup
from mmllmrec.data import splits
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError
from mmllmrec.data.splits import Split
from mmllmrec.evaluation.protocols import rankings, seen_matrix
from mmllmrec.features.table import FeatureTable

WIDTH = 64  # columns a modality that every system reads
# graph models begin as popularity, and fall before they rise: on Last.fm SimGCL is better than in its first epoch after
# 120 epochs, at its best (0.220 for 0.107 of validation ndcg@20) after 170
FIT = {"epochs": 1000, "batch_size": 2048, "lr": 1e-3, "patience": 20, "min_epochs": 150}
KINDS = ("random_per_user", "cold_items", "given")
BEST = 5  # systems whose features are shuffled at test
RATE: dict[str, Any] = {"fit.lr": (3e-4, 1e-2, "log")}
# what is searched beside the learning rate, the published value first (reg of BPR and its kin is the MMRec family's,
# which searches it); what moves nothing, as most systems' reg, is not here
SEARCHED: dict[str, dict[str, Any]] = {
    "IALS": {"alpha": [40.0, 10.0, 1.0, 100.0], "reg": [0.01, 0.1, 1.0, 10.0]},
    "ImplicitBPR": {"iterations": [100, 300, 1000], "reg": [0.01, 0.03], "lr": [0.01, 0.03]},
    "ItemKNN": {"k": [100, 20, 50, 200], "shrink": [10.0, 0.0, 100.0]},
    "EASE": {"reg": [200.0, 50.0, 500.0, 1000.0]},
    "BPR": {"reg": [1e-2, 1e-1, 1.0]},
    "LightGCN": {"layers": [2, 1, 3]},
    "SimGCL": {"weight": [0.5, 0.1, 0.2], "layers": [2, 3]},
    "LayerGCN": {"prune": [0.1, 0.0, 0.2], "reg": [1e-3, 1e-2, 1e-4]},
    "SelfCF": {"target": ["dropout", "history", "edges"], "layers": [2, 1]},
    "VBPR": {"reg": [1e-2, 1e-1, 1.0]},
    "MMGCN": {"layers": [3, 2]},
    "GRCN": {"layers": [2, 1]},
    "DualGNN": {"reg": [1e-3, 1e-1, 1.0]},
    "LATTICE": {"item_layers": [1, 2], "reg": [1e-4, 1e-2]},
    "MICRO": {"contrast_weight": [0.03, 0.1, 0.01]},
    "SLMRec": {"alignment_weight": [0.1, 0.01, 0.5], "temperature": [0.2, 0.5]},
    "BM3": {"dropout": [0.3, 0.5], "reg": [0.1, 0.01], "layers": [1, 2]},
    "MMSSL": {"contrast_weight": [0.03, 0.1]},
    "FREEDOM": {"prune": [0.8, 0.9], "content_weight": [1e-3, 1e-4, 0.0]},
    "MGCN": {"contrast_weight": [0.01, 0.001, 0.1]},
    "DRAGON": {"reg": [1e-3, 1e-1, 1.0]},
    "LGMRec": {"hyperedges": [4, 64], "global_weight": [0.3, 0.6]},
    "DiffMM": {"contrast_weight": [0.01, 0.1], "reg": [1e-5, 1e-4]},
    "MENTOR": {"fit.lr": (1e-4, 1e-2, "log"), "graph_weight": [1e-3, 1e-4], "temperature": [0.2, 0.4]},
    "SMORE": {"contrast_weight": [0.01, 0.03], "layers": [3, 4]},
    "PGL": {"contrast_weight": [0.05, 0.5], "dropout": [0.2, 0.1]},
    "COHESION": {"layers": [2, 1]},
    "DAMRS": {"preference_weight": [1.0, 0.1], "relation_weight": [1e-3, 1e-2]},
    "AlignRec": {"contrast_weight": [0.01, 0.001], "similarity_weight": [0.1, 0.3]},
    "LLMRec": {"profile_weight": [0.7, 2.8], "pruned": [0.1, 0.3]},
}
LOW = {"MENTOR": 1e-4}  # the published learning rate, a tenth of FIT's; those of MICRO and MMSSL are half of it
CLOSED = ("IALS", "ImplicitBPR", "ItemKNN", "EASE")
SOFTMAXED = ("AlphaRec", "CLCRec")  # whose published loss is a softmax of their own, as they are in the questions
SYSTEMS = (*SEARCHED, *SOFTMAXED)
SOFTMAX = "LightGCN, softmax"  # the reference of the questions, with the budget of all
# where a whole survey would take a day: the oldest and the strongest of each kind
TEN = ("IALS", "EASE", "BPR", "LightGCN", "SimGCL", "VBPR", "MMGCN", "FREEDOM", "BM3", "MGCN")


def survey(
    *,
    data: str | RecDataset = "lastfm-2k",
    path: str | os.PathLike[str] | None = None,
    kind: str = "random_per_user",
    systems: Sequence[str] | None = None,
    seeds: int = 3,
    trials: int = 4,
    minutes: float | None = 12.0,
    folder: str | os.PathLike[str] = "runs/survey",
    tuned: str | os.PathLike[str] = "runs/tuned",
    settings: str | os.PathLike[str] | None = None,
    quick: int | None = None,
) -> Answer:
    """Systems of the literature on one dataset, split by ``kind``, each with its published setting (at ``FIT``'s batch
    size and, but for ``LOW``, its learning rate) and ``trials`` - 1 more (``starts_of``; the same for all), ``minutes``
    of training in all; three seeds; intervals and Holm-corrected verdicts of every system against LightGCN; of the
    ``BEST`` in the searches whose scores read content, the same fitted model with all features dealt to other items.

    Settings are searched on the validation part of seed 0's split; where a split is drawn at random, other seeds test
    on some of its events. ``systems``: all of ``SYSTEMS``, on MovieLens ``TEN`` of them, unless named. They read the
    features the catalogue brings, or training-free descriptors of its content, whitened to ``WIDTH`` columns a modality
    on train items. ``settings``: the card of an earlier survey on this split, whose settings are fitted, on more seeds
    say, without searching again. A survey that was cut off goes on. Raises ``DataError`` for a system or a split that
    is not known here.
    """
    asked = setup(data, path)
    named = tuple(systems) if systems is not None else TEN if asked.data.name.startswith("movielens") else SYSTEMS
    unknown = [s for s in named if s not in SYSTEMS]
    if unknown or not named:
        raise DataError(f"systems={list(named)}: {unknown} are not known here; these are {list(SYSTEMS)}")
    if kind not in KINDS:
        raise DataError(f"kind={kind!r}: one of {KINDS}")

    def make(data: RecDataset, seed: int) -> Split:
        return splits.by_name(kind, data, seed=seed)

    rows = [published_row(name, asked) for name in (SOFTMAX, *named)]
    others = [r.name for r in rows if r.name != "LightGCN"]
    columns = [Column(c, c) for c in ("all", *(("warm", "cold", "cold only") if kind == "cold_items" else ()))]
    recall = [replace(c, metric="recall@20") for c in columns[:1]]
    question = Question(
        "survey",
        f"The survey's systems, {kind}:",
        rows,
        Layout(
            {
                NDCG: [*columns, Column("features shuffled", "features shuffled")],
                "recall@20": recall,
                "cost": [
                    Column(what, COST, what, digits=0)
                    for what in ("trials", "trained parameters", "seconds", "peak MiB")
                ],
            }
        ),
        make,
        claims=[Claim(name, "LightGCN", "all") for name in others] if "LightGCN" in named else [],
        first=rows[-1].name,
        more=shuffled_best,
        search=lambda data: make(data, 0),
        options={"split": kind, "system": tuple(systems or ())},
        searches="survey",
        new_items=kind == "cold_items",
        shows_unified=False,
    )
    budget = Budget(trials, minutes, Path(tuned))
    return ask(question, asked, seeds=seeds, budget=budget, folder=folder, settings=settings, quick=quick)


def published_row(name: str, asked: Setup) -> Row:
    """A system under its published loss, its settings searched around the published ones."""
    build = builder(name, asked)
    if name in (SOFTMAX, *SOFTMAXED):
        base = name.partition(", ")[0]
        space, start = SPACES[base], STARTS.get(base, {})
        settings = {**FIT, "weight_decay": 1.0}
    else:
        found = SEARCHED[name]
        start = {option: values[0] for option, values in found.items() if isinstance(values, list)}
        space = found if name in CLOSED else RATE | found
        settings = {} if name in CLOSED else FIT
    starts = (start,) if name in CLOSED else starts_of(space, start, LOW.get(name, FIT["lr"]))
    return Row(name, build, settings, name, space=dict(space), starts=starts)


def fit_of(name: str) -> dict[str, Any]:
    """The keywords of ``fit`` of a system's published setting here."""
    return {**FIT, "lr": LOW.get(name, FIT["lr"])}


def starts_of(space: Mapping[str, Any], published: Mapping[str, Any], rate: float) -> tuple[dict[str, Any], ...]:
    """The first four settings of a search: as published; at three times the learning rate; and both again with the
    options' next values, and their last ones.

    Four points say little where they are drawn at random; these are the same for every system.
    """
    others = {o: [v for v in values if v != published[o]] for o, values in space.items() if isinstance(values, list)}
    second, last = ({o: values[n] for o, values in others.items()} for n in (0, -1))
    slow, fast = {"fit.lr": rate}, {"fit.lr": 3 * rate}
    return tuple({**published, **one} for one in (slow, fast, second | slow, last | fast))


def builder(name: str, asked: Setup, **fixed: Any) -> Callable[..., Any]:
    """What makes a system for a split, of the survey's features where it reads content; ``fixed`` options stand."""

    def build(split: Split, made: Mapping[str, Any], **options: Any) -> Any:
        from mmllmrec import models

        base, _, loss = name.partition(", ")
        cls: Any = models.classes()[base]
        options |= {"loss": loss} if loss else {}
        content = {"features": features(asked, split)} if hasattr(cls, "with_catalog") else {}
        return cls(split.train, **content, **options, **fixed)

    return build


def features(asked: Setup, split: Split) -> FeatureTable:
    """What every system reads of a split's items: (I, ``WIDTH``) a modality, whitened on its train items."""
    key = split.hash, "survey"
    if key not in asked.tables:
        asked.tables.clear()
        table = FeatureTable.from_catalog(split.catalog, fit_on=split.warm_items)
        asked.tables[key] = table.whiten(split.warm_items, WIDTH)
    return asked.tables[key]


def shuffled_best(split: Split, runs: Mapping[str, Any], seed: int) -> dict[str, list[float]]:
    """ndcg@20 of the first ``BEST`` runs whose scores read content (``ask`` hands them over as their searches ranked
    them, for all seeds alike), with every modality's features dealt to other items: rows ``features shuffled``. Opens
    the test part once."""
    catalog = split.catalog
    for modality in catalog.modalities:
        catalog = catalog.shuffled(modality, seed=seed)
    found: dict[str, list[float]] = {}
    seen, target = seen_matrix(split, on="test", mask="train+valid"), None
    some = np.flatnonzero(split.train.user_counts)[:64]
    for name, run in runs.items():
        model = run.model
        if len(found) == BEST or not (model.modalities and hasattr(model, "with_catalog")):
            continue
        other = model.with_catalog(catalog)
        if bool((other.score(some) == model.score(some)).all()):
            continue  # content is read in training alone: there is nothing to take from its scores
        target = target if target is not None else split.open_test()
        lists = rankings(other, split, target, seen=seen, k=20, seed=seed)
        found[f"{name} | features shuffled | {NDCG}"] = [float(np.mean(lists["all"].per_user(NDCG)))]
    return found

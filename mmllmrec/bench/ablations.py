"""What each system's own idea is worth: the same system, its published setting, with that term switched off."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mmllmrec.bench.answer import NDCG, Claim, judge, plain
from mmllmrec.bench.literature import builder, fit_of
from mmllmrec.bench.rows import setup
from mmllmrec.bench.run import Entry, Summary, command_of, over_seeds
from mmllmrec.data import splits
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError
from mmllmrec.runcard import RunCard, write_atomically

# a system's ideas and the options without each; where one is a loss, its weight at zero
OFF: dict[str, dict[str, dict[str, Any]]] = {
    "LightGCN": {"no graph": {"layers": 0}},
    "SimGCL": {"no contrast": {"weight": 0.0}},
    "LayerGCN": {"no pruning": {"prune": 0.0}},
    "SelfCF": {"no perturbed target": {"dropout": 0.0}},
    "MMGCN": {"IDs and preferences that do not train, as published": {"train_ids": False}},
    "GRCN": {"no routing": {"routing": 0}},
    "DualGNN": {"no companions": {"companions": 0}},
    "LATTICE": {"no item graph": {"item_layers": 0}, "a frozen item graph": {"keep": 1.0}},
    "MICRO": {"no contrast": {"contrast_weight": 0.0}},
    "SLMRec": {"no alignment": {"alignment_weight": 0.0}},
    "BM3": {"no content loss": {"content_weight": 0.0}},
    "MMSSL": {"no contrast": {"contrast_weight": 0.0}, "no adversary": {"adversarial_weight": 0.0}},
    "FREEDOM": {
        "no item graph": {"item_layers": 0},
        "no pruning": {"prune": 0.0},
        "no content loss": {"content_weight": 0.0},
    },
    "MGCN": {"no contrast": {"contrast_weight": 0.0}},
    "DRAGON": {"no item graph": {"item_layers": 0}, "no companions": {"companions": 0}},
    "LGMRec": {
        "no hyperedges": {"global_weight": 0.0, "contrast_weight": 0.0},
        "no contrast": {"contrast_weight": 0.0},
    },
    "DiffMM": {
        "no written graphs": {"graph_weight": 0.0, "contrast_weight": 0.0},
        "no contrast": {"contrast_weight": 0.0},
    },
    "MENTOR": {
        "a mask that does not train, as published": {"train_mask": False},
        "no graph contrast": {"graph_weight": 0.0},
        "no alignment": {"align_weight": 0.0},
    },
    "SMORE": {"no contrast": {"contrast_weight": 0.0}},
    "PGL": {"the whole graph": {"prune": 0.0}, "no contrast": {"contrast_weight": 0.0}},
    "COHESION": {"no item graph": {"item_layers": 0}, "no companions": {"companions": 0}},
    "DAMRS": {"no preference": {"preference_weight": 0.0}, "no relation": {"relation_weight": 0.0}},
    "AlignRec": {
        "no contrast": {"contrast_weight": 0.0},
        "no similarity": {"similarity_weight": 0.0},
        "no user-item term": {"user_item_weight": 0.0},
    },
    "LLMRec": {
        "no profiles": {"profile_weight": 0.0},
        "no content path": {"content_weight": 0.0},
        "no mask": {"mask_weight": 0.0},
    },
}


def ablations(
    *,
    data: str | RecDataset = "lastfm-2k",
    path: str | os.PathLike[str] | None = None,
    kind: str = "random_per_user",
    systems: Sequence[str] = tuple(OFF),
    seeds: int = 3,
    folder: str | os.PathLike[str] = "runs/ablations",
    quick: int | None = None,
) -> tuple[Summary, pd.DataFrame]:
    """Each of ``systems`` at its published setting, and without each of its ideas (``OFF``), a fit a seed; what the
    survey's systems read. The frame has a row a (system, idea), on all test items: ``changes``; ``folder`` gets its
    ``plot`` as ``changes.png``. A bench that was cut off goes on. Raises ``DataError`` for a system that has nothing to
    switch off here, and for a split that is not known.
    """
    unknown = [s for s in systems if s not in OFF]
    if unknown or not systems:
        raise DataError(f"systems={list(systems)}: {unknown} have nothing to switch off here; these have {list(OFF)}")
    if kind not in splits.SPLITS:
        raise DataError(f"kind={kind!r}: one of {tuple(splits.SPLITS)}")
    asked = setup(data, path)
    entries = []
    for name in systems:
        variants = {name: {}, **{f"{name}, {idea}": options for idea, options in OFF[name].items()}}
        entries += [
            Entry(title, builder(name, asked, **options), fit_of(name), about=[options, asked.data.catalog.hash])
            for title, options in variants.items()
        ]
    summary = over_seeds(
        "ablations",
        lambda seed: splits.by_name(kind, asked.data, seed=seed),
        entries,
        seeds=seeds,
        folder=Path(folder),
        quick=quick,
        command=command_of(
            "ablations",
            **asked.told,
            split=kind,
            system=() if tuple(systems) == tuple(OFF) else tuple(systems),
            seeds=seeds,
        ),
    )
    found = changes(summary, systems)
    card = RunCard.load(summary.path)
    card.settings["changes"] = plain(found.to_dict("records"))
    card.save_with(f"{summary}\n\n{found.to_string(index=False)}", summary.path.parent)
    write_atomically(summary.path.parent / "changes.png", lambda beside: plot(found).savefig(beside, dpi=110))
    return summary, found


def changes(summary: Summary, systems: Sequence[str]) -> pd.DataFrame:
    """What leaving each idea out changes: ndcg@20 with and without, the relative change with its interval over users
    and its Holm-corrected p (``answer.judge``), and in how many seeds it has that sign."""
    folder, by_seed = summary.path.parent, RunCard.load(summary.path).settings["by seed"]
    cards = [RunCard.load(folder / f"seed{seed}" / "report" / "card.json") for seed in by_seed]
    ideas = [(name, idea) for name in systems for idea in OFF[name]]
    verdicts = judge([Claim(f"{name}, {idea}", name, "all") for name, idea in ideas], summary.frame, cards, folder)
    lines = []
    for (name, idea), found in zip(ideas, verdicts.to_dict("records"), strict=True):
        pairs = [(run[f"{name} | all | {NDCG}"], run[f"{name}, {idea} | all | {NDCG}"]) for run in by_seed.values()]
        whole, without = (sum(x) / len(pairs) for x in zip(*pairs, strict=True))
        same = sum((b - a) * (without - whole) > 0 for a, b in pairs)
        spread = [found[k] for k in ("relative", "relative_low", "relative_high", "p (Holm)")]
        lines.append((name, idea, whole, without, *spread, f"{same} of {len(pairs)}"))
    columns = ["system", "idea", "with", "without", "change", "low", "high", "p (Holm)", "seeds of that sign"]
    return pd.DataFrame(lines, columns=columns)


def plot(found: pd.DataFrame) -> Any:
    """``changes``, the idea that is missed most on top: a dot and its interval, filled where p (Holm) is below 0.05;
    what is far outside the others' range stands at its edge, as a number. Returns the figure."""
    from matplotlib.figure import Figure

    ordered = found.sort_values("change", ascending=False)
    figure = Figure(figsize=(7.5, 0.24 * len(ordered) + 1.1), layout="constrained")
    axis = figure.add_subplot()
    edge = 150 * ordered["change"].abs().quantile(0.9) + 5
    for place, one in enumerate(ordered.to_dict("records")):
        change, low, high = (100 * one[k] for k in ("change", "low", "high"))
        colour = "#2a6f97" if change < 0 else "#b5651d"
        if abs(change) > edge:
            side, across = ("right", 1.0) if change > 0 else ("left", 0.0)
            told = {"ha": side, "va": "center", "fontsize": 9, "color": colour}
            axis.text(across, place, f"{change:+.0f}", told, transform=axis.get_yaxis_transform())
            continue
        axis.plot([max(low, -edge), min(high, edge)], [place, place], color=colour, linewidth=1.2)
        fill = colour if one["p (Holm)"] < 0.05 else "w"
        axis.plot(change, place, "o", markersize=5, color=colour, markerfacecolor=fill)
    axis.set_yticks(range(len(ordered)), [f"{s}: {i}" for s, i in zip(ordered["system"], ordered["idea"], strict=True)])
    axis.tick_params(axis="y", labelsize=8, length=0)
    axis.axvline(0, color="#333", linewidth=0.8)
    axis.set_ylim(-0.8, len(ordered) - 0.2)
    axis.set_xlabel(f"change of {NDCG} without it, %")
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure

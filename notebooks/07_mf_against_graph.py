# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Matrix factorisation against graphs
#
# **Question.** The survey's second experiment: VBPR, a factor model, against MMGCN, a graph network a modality, on the
# same features. Do graphs help, whom, and is it the graph of users and items, or the one of alike items?

# %% tags=["parameters"]
import os

SEED = 0
SMOKE = bool(os.environ.get("MMLLMREC_SMOKE"))  # the tests run this notebook in seconds
WORLD = {"n_items": 150, "n_users": 120, "n_events": 2400} if SMOKE else {}
FIT = {"epochs": 1 if SMOKE else 150, "lr": 5e-3, "patience": 15}

# %%
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import mmllmrec as mm
from mmllmrec.bench.run import Named
from mmllmrec.evaluation.protocols import rankings, seen_matrix
from mmllmrec.features.table import FeatureTable

warnings.filterwarnings("ignore")
mm.seed_everything(SEED)

# %% [markdown]
# ## Six systems on the same features and the same loss
# Training-free descriptors of pictures, words, sound and scent, whitened to 32 columns each. All six are trained with
# BPR, one negative a positive, so that what differs is mostly the encoder: none (`BPR`), content beside the factors
# (`VBPR`), a smoothing of IDs over users and items (`LightGCN`), a network a modality over the same graph (`MMGCN`),
# and a frozen graph of *alike items* beside it (`FREEDOM`, `MGCN`; each has a small term of its own besides, a BPR of
# content alone and a contrast).

# %%
data = mm.load_dataset("atelier", **WORLD)
split = mm.splits.cold_items(data, fraction=0.2, seed=SEED)
warm = split.warm_items
features = FeatureTable.from_catalog(data.catalog, fit_on=warm).whiten(warm, 32)
m = mm.models
systems = {
    "BPR": lambda: m.BPR(split.train, reg=1e-2),
    "VBPR": lambda: m.VBPR(split.train, features=features, reg=1e-2),
    "LightGCN": lambda: m.LightGCN(split.train, layers=2),
    "MMGCN": lambda: m.MMGCN(split.train, features=features, layers=2),
    "FREEDOM": lambda: m.FREEDOM(split.train, features=features),
    "MGCN": lambda: m.MGCN(split.train, features=features),
}
runs = {}
for name, build in systems.items():
    mm.seed_everything(SEED)
    runs[name] = mm.fit(build(), split, seed=SEED, progress=False, **FIT)
named = [Named(name, run) for name, run in runs.items()]
report = mm.evaluate(named[0], split, against=named[1:], on="valid")
report

# %% [markdown]
# ## How fast they learn
# An epoch of a graph costs more than one of factors, and is worth more: the axis that matters to whoever waits is
# seconds.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for name, run in runs.items():
    history = run.history
    axes[0].plot(history["epoch"], history["ndcg@20"], label=name)
    axes[1].plot(history["seconds"], history["ndcg@20"], label=name)
for axis, label in zip(axes, ("epoch", "seconds of training"), strict=True):
    axis.set_xlabel(label)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("validation ndcg@20, all items")
axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()

# %% [markdown]
# ## Whom they help
# Users by how many events they have. A graph lends a user what users alike have taken: is it worth most to whom has
# least?

# %%
seen = seen_matrix(split, on="valid", mask="train")
counts = split.train.user_counts
edges = np.quantile(counts, [0, 0.25, 0.5, 0.75, 1.0])
groups = pd.cut(counts, np.unique(edges), include_lowest=True)
lines = {}
for one in named:
    lists = rankings(one.model, split, split.valid, seen=seen, k=20, seed=SEED)["warm"]
    values = pd.Series(lists.per_user("ndcg@20"), index=lists.users)
    lines[one.name] = values.groupby(groups[values.index], observed=True).mean()
by_events = pd.DataFrame(lines)
by_events.index = [f"{int(i.left) + 1} to {int(i.right)}" for i in by_events.index]
axis = by_events.T.plot.bar(figsize=(9, 3.4), rot=0, width=0.8, colormap="viridis")
axis.set_ylabel("validation ndcg@20, warm items")
axis.legend(title="training events of the user", frameon=False, fontsize=8)
axis.spines[["top", "right"]].set_visible(False)
plt.tight_layout()

# %% [markdown]
# **What it means.** On items that training knows, smoothing over the graph of users and items is worth a quarter, to
# users with few events and with many alike, and costs no parameters; a frozen graph of alike items beside it adds a
# little. VBPR pays with known items for what it gains on new ones. On new items the graph of users and items is worth
# nothing: they have no edge. A graph of *alike items* lends them their neighbours' IDs, which orders them among
# themselves (`cold only`) but leaves them below every known item (`cold`), and VBPR, whose users have a taste for
# content itself, orders them better. MMGCN, which sends content itself over the graph, is below `BPR` on known
# items, as VBPR is; among new ones it is ahead of `BPR` and `LightGCN`. There `ContentKNN`, which trains nothing, is
# level with `FREEDOM` (0.107 and 0.104).

# %%
if not SMOKE:
    value = {(n, row): report.mean(n, row, "ndcg@20") for n in report.names for row in ("warm", "cold only")}
    assert value["LightGCN", "warm"] > value["BPR", "warm"]
    assert value["VBPR", "cold only"] > value["FREEDOM", "cold only"] > 2 * value["LightGCN", "cold only"]

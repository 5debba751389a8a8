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
# # Losses: what a recommender is asked for is what it does
#
# **Question.** Pointwise, pairwise, softmax; with and without self-supervision. The survey's last chapter is a list of
# losses; on one encoder, one set of features and one budget, which of them matters, and for what?

# %% tags=["parameters"]
import os

SEED = 0
SMOKE = bool(os.environ.get("MMLLMREC_SMOKE"))  # the tests run this notebook in seconds
WORLD = {"n_items": 150, "n_users": 120, "n_events": 2400} if SMOKE else {}
FIT = {"epochs": 1 if SMOKE else 80, "patience": 10}

# %%
import warnings

import matplotlib.pyplot as plt
import pandas as pd

import mmllmrec as mm
from mmllmrec.bench.run import Named
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.composed import EXTRAS, LOSSES, Composed, Encoder, Fusion

warnings.filterwarnings("ignore")
mm.seed_everything(SEED)

# %% [markdown]
# ## Eight ways to ask
# Each with two learning rates, the better one by validation: a loss whose gradient is ten times smaller must not look
# ten times worse. Pairwise and pointwise losses see four negatives a positive.

# %%
data = mm.load_dataset("atelier", **WORLD)
split = mm.splits.cold_items(data, fraction=0.2, seed=SEED)
features = FeatureTable.from_catalog(data.catalog, fit_on=split.warm_items).whiten(split.warm_items, 32)


def run(loss, extras=None):
    found = []
    for lr in (2e-3,) if SMOKE else (2e-3, 1e-2):
        mm.seed_everything(SEED)
        model = Composed(
            split.train,
            features=features,
            encoder=Encoder("lightgcn", layers=1),
            fusion=Fusion("early", "sum"),
            loss=loss,
            negatives=4,
            extras=extras,
        )
        found.append(mm.fit(model, split, seed=SEED, progress=False, lr=lr, weight_decay=0.1, **FIT))
    return max(found, key=lambda r: r.best_score)


by_loss = [Named(loss, run(loss)) for loss in LOSSES]
report = mm.evaluate(by_loss[0], split, against=by_loss[1:], on="valid")
report

# %% [markdown]
# ## Not only how good, but of what
# Two systems of one score can show different shops. Coverage: which share of the catalogue is in anyone's first twenty.
# Novelty: how unusual what is shown is.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
beyond = report.beyond()
for axis, metric in zip(axes, ("coverage", "novelty"), strict=True):
    for one in by_loss:
        x, y = beyond.loc[one.name, metric], report.mean(one.name, "all", "ndcg@20")
        axis.scatter(x, y, s=40)
        axis.annotate(one.name, (x, y), fontsize=8, xytext=(4, 4), textcoords="offset points")
    axis.set_xlabel(metric)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("ndcg@20, all items")
figure.tight_layout()

# %% [markdown]
# ## Self-supervision beside it
# The same softmax with one further term at a time, weight 0.1, and the same two learning rates: feature-based ones
# compare views of content, structure-based ones views of the graph.

# %%
pd.Series(EXTRAS, name="what it compares").to_frame()

# %%
names = ["modalities", "noise"] if SMOKE else list(EXTRAS)
plain = next(one for one in by_loss if one.name == "softmax")
with_extra = [Named(f"+ {name}", run("softmax", {name: 0.1})) for name in names]
second = mm.evaluate(plain, split, against=with_extra, on="valid")
gains = pd.DataFrame(
    {
        row: [second.mean(o.name, row, "ndcg@20") / second.mean("softmax", row, "ndcg@20") - 1 for o in with_extra]
        for row in ("warm", "cold only")
    },
    index=names,
)
axis = (100 * gains).plot.bar(figsize=(8, 3.2), rot=0, color=["#a9bcd0", "#2a6f97"], width=0.75)
axis.axhline(0, color="black", linewidth=0.8)
axis.set_ylabel("% of the softmax alone")
axis.spines[["top", "right"]].set_visible(False)
plt.tight_layout()

# %% [markdown]
# **What it means.** The sampled softmax, a cosine over a learned temperature with the popularity of its candidates
# taken out, is ahead on all items. The full softmax, which ranks against all of them without a temperature or a
# correction, is level with the last there; which of these matters is not told apart here. Squared error is as good on
# known items, and shows the most popular shop; alignment and uniformity ask for evenly spread vectors, and give the
# most novel one, best of all on new items and worst on known ones. Pairwise losses lie between. Beside this softmax,
# which contrasts already, none of the self-supervised terms helps on known items, and those that compare views of the
# graph cost most; `modalities` (views of content) and `neighbours` (a node and its neighbourhood) gain under 2% on new
# items and lose 3 and 15% on known ones. A difference of that size in a paper is worth a second seed.

# %%
if not SMOKE:
    score = {one.name: report.mean(one.name, "all", "ndcg@20") for one in by_loss}
    cold = {one.name: report.mean(one.name, "cold only", "ndcg@20") for one in by_loss}
    assert max(score, key=score.get) == "softmax" and max(cold, key=cold.get) == "alignment"
    assert gains["warm"].max() < 0.02

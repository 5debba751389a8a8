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
# # Fusion: what each says, and what only both say
#
# **Question.** *Late* fusion scores each modality by itself and adds up: what one of them says cannot drown. *Early*
# fusion lets one network read them together: it can hear combinations. The literature has each losing what the other
# keeps. Is that so, and can one model have both?

# %% tags=["parameters"]
import os

SEED = 0
SMOKE = bool(os.environ.get("MMLLMREC_SMOKE"))  # the tests run this notebook in seconds
WORLD = {"n_items": 150, "n_users": 120, "n_events": 2400} if SMOKE else {}
SHORT = {"epochs": 1} if SMOKE else {}  # over each model's own settings

# %%
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import mmllmrec as mm
from mmllmrec.bench.measures import RECOVERED
from mmllmrec.bench.run import Named
from mmllmrec.data.atelier.recovery import recovery
from mmllmrec.evaluation.protocols import rankings, seen_matrix
from mmllmrec.features.table import FeatureTable
from mmllmrec.shipped import shipped

warnings.filterwarnings("ignore")
mm.seed_everything(SEED)

# %% [markdown]
# ## Why a sum cannot say it
# One taste in this world is for a *combination*: some users want handmade things on a round backdrop and machine made
# ones on a square one. The backdrop is only in the picture, the maker only in the words. Take the user who cares most,
# and fit the best sum there is, a number for the backdrop plus a number for the maker:

# %%
data = mm.load_dataset("atelier", **WORLD)
split = mm.splits.cold_items(data, fraction=0.2, seed=SEED)
factors, v = data.factors(), data.vocabulary
utility = data.terms["interaction"](np.arange(data.interactions.n_users))
user = int(np.abs(utility[:, 0]).argmax())
square = pd.Series(utility[user]).groupby([factors.backdrop.values, factors.maker.values]).mean().unstack().to_numpy()
best = square.mean(axis=1, keepdims=True) + square.mean(axis=0, keepdims=True) - square.mean()
titles = ["the true taste", "the best sum of\npicture and words", "what is left over"]
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
top = np.abs(square).max()
for axis, table, title in zip(axes, (square, best, square - best), titles, strict=True):
    axis.imshow(table, cmap="RdBu", vmin=-1.3 * top, vmax=1.3 * top)
    for (y, x), value in np.ndenumerate(table):
        axis.text(x, y, f"{value + 0.0:+.2f}", ha="center", va="center", fontsize=11)
    axis.set_xticks([0, 1], ["by hand", "by machine"])
    axis.set_yticks([0, 1], v.backdrops)
    axis.set_title(title, fontsize=10)
axes[0].set_ylabel("backdrop (picture)")
axes[0].set_xlabel("maker (words)")
figure.tight_layout()

# %% [markdown]
# The sum says the same of all four: for each backdrop the two makers cancel, and the other way round. No late sum of a
# score for the picture and one for the words can hold this taste, however good each of them is. An item's *ID* can,
# once people have taken it; for a new item only something that reads both at once will do.
#
# ## Three ways to fuse, and a ceiling
# The same towers, IDs, loss and events; only the paths differ (`trainer="cached"`). *Late only* is the mean of one
# vector a modality. The **factor-fed twin** has the same head and reads the true factors and their cross in place of
# pixels and words: what it does not recover, these events do not tell.

# %%
variants = {
    "early only": {"paths": ("early",)},
    "late only": {"paths": data.catalog.modalities, "fusion": "mean"},
    "early + late": {},
}
runs = {}
for name, options in variants.items():
    mm.seed_everything(SEED)
    content = {"data": split.train, "catalog": data.catalog, "trainer": "cached"}
    model = mm.models.Unified.from_preset("nano", **content, **options)
    runs[name] = mm.fit(model, split, seed=SEED, progress=False, **{**model.fit_defaults, **SHORT})
true = data.factor_features(cross=True)
table = FeatureTable({"factors": true}, np.ones((len(true), 1), dtype=bool))
ceiling = mm.models.TwoStage(split.train, features=table.standardise(np.ones(len(true), dtype=bool)))
twin = mm.fit(ceiling, split, seed=SEED, progress=False, **{**ceiling.fit_defaults, **SHORT})
early, late, both = (Named(name, run) for name, run in runs.items())
report = mm.evaluate(both, split, against=[early, late, Named("factor-fed twin", twin)], on="valid")
report

# %%
figure = report.plot()

# %% [markdown]
# ## Which tastes did each find?
# Recovery: squared correlation, on new items, between a model's scores and each true taste, all other factors averaged
# out; here as a share of what the twin recovers.

# %%
new = ~split.warm_items
by_factor = pd.DataFrame(
    {name: recovery(run.model, data, items=new)["recovery"] for name, run in {**runs, "factor-fed twin": twin}.items()}
)
groups = {name: RECOVERED[name] for name in ("image-only", "text-only")} | {
    "shared": ("kind",),
    "XOR": ("interaction",),
}
sums = pd.DataFrame({group: by_factor.loc[list(some)].sum() for group, some in groups.items()}).T
shares = sums[list(variants)].div(sums["factor-fed twin"], axis=0)
colours = ["#bc6c25", "#8fa9c4", "#2a6f97"]
figure, axis = plt.subplots(figsize=(8, 3.2))
shares.plot.bar(ax=axis, color=colours, width=0.8, rot=0)
axis.axhline(1, color="#333", linestyle="--", linewidth=1)
axis.set_ylabel("recovery on cold items,\nshare of the factor-fed twin's")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
figure.tight_layout()
shares.round(2)

# %%
by_factor.T.round(3)

# %% [markdown]
# ## The four cells, as the models see them
# What a model thinks of the four cells, less their main effects, against the truth: one dot a user. A model that has
# found the combination follows the diagonal; for one that cannot hear it the dots are a cloud.


# %%
def contrast(scores):
    """The exclusive or in some users' scores of new items: round and by hand, plus square and by machine, less the
    others: (U, I) -> (U,)."""
    cell = [(factors.backdrop == b) & (factors.maker == m) & new for b, m in ((0, 0), (1, 1), (0, 1), (1, 0))]
    means = [scores[:, c.to_numpy()].mean(axis=1) for c in cell]
    return means[0] + means[1] - means[2] - means[3]


truth = contrast(utility)
figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), sharex=True)
for axis, (name, run), colour in zip(axes, runs.items(), colours, strict=True):
    theirs = contrast(run.model.score(np.arange(len(utility))).numpy())
    axis.scatter(truth, theirs / theirs.std(), s=5, alpha=0.4, color=colour, linewidth=0)
    axis.set_title(f"{name}: correlation {np.corrcoef(truth, theirs)[0, 1]:.2f}", fontsize=10)
    axis.set_xlabel("true contrast of the four cells")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("the model's, in its own\nstandard deviations")
figure.tight_layout()

# %% [markdown]
# ## Knock-outs
# The fitted models with one modality gone at scoring time: what is left of ndcg@20 on new items? A late path of its own
# is also what an item falls back on when the other half of it is missing.

# %%
seen = seen_matrix(split, on="valid", mask="train")
gone = {"nothing gone": split.catalog} | {f"no {m}": split.catalog.without(m) for m in ("image", "text")}
left = pd.DataFrame(
    {
        name: {
            what: rankings(run.model.with_catalog(catalog), split, split.valid, seen=seen, k=20, seed=SEED)["cold"]
            .per_user("ndcg@20")
            .mean()
            for what, catalog in gone.items()
        }
        for name, run in runs.items()
    }
)
figure, axis = plt.subplots(figsize=(7, 2.8))
left.plot.bar(ax=axis, color=colours, width=0.8, rot=0)
axis.set_ylabel("ndcg@20, cold items")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
figure.tight_layout()
left.T.round(4)

# %% [markdown]
# ## Over three seeds
# The measurement, on the test part, with further fusions (gated, attentive) and noised and shuffled content, is
# `mmllmrec bench q4`:

# %%
for folder in ("notebooks/cards/q4", "notebooks/cards/q4-atelier-b", "notebooks/cards/q4-lastfm"):
    print((shipped(folder) / "table.txt").read_text(encoding="utf-8"), end="\n\n")

# %% [markdown]
# **What it means.** Late fusion finds what each modality says and, but for what leaks through its normalisation, is
# blind to what only their combination says: that is arithmetic, and no longer training mends it. Early fusion can hear
# the combination. With both, side by side and through one map, the model keeps the late paths' single tastes and has a
# place for the combination; the bars say how much of either it reaches.
#
# On Last.fm, the last table, both paths together are ahead of either alone as well, by 4%; how they are put together
# matters little there.

# %%
assert np.ptp(best) < 1e-3 * np.ptp(square), "a sum of a picture's and a text's score holds none of it"
if not SMOKE:
    assert shares.loc["XOR", "late only"] < 0.5 * shares.loc["XOR", "early + late"], (
        "late alone misses the exclusive or"
    )
    for group in ("image-only", "text-only"):
        assert shares.loc[group, "early + late"] > 0.8 * shares.loc[group, "late only"], "both keep what is specific"

# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Data and protocols: what is decided before any model is trained
#
# **Question.** How much of a published number comes from the model, and how much from the split, the candidates and the
# masks? We look at the two kinds of data this library works with, then change one thing of the protocol at a time while
# the systems stay as they are.

# %% tags=["parameters"]
import os

SEED = 0
SMOKE = bool(os.environ.get("MMLLMREC_SMOKE"))  # the tests run this notebook in seconds
WORLD = {"n_items": 150, "n_users": 120, "n_events": 2400} if SMOKE else {}

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import mmllmrec as mm
from mmllmrec.evaluation.curves import k_shot
from mmllmrec.evaluation.floors import ContentKNN, Popularity, Random
from mmllmrec.evaluation.ranking import rank

mm.seed_everything(SEED)

# %% [markdown]
# ## A world whose truth is known
# Atelier is a planted shop. What a user likes is a sum of tastes for *factors* of the items, and each factor can be
# perceived in one place only, in two, or nowhere:

# %%
data = mm.load_dataset("atelier", **WORLD)
where = {
    "hue": "picture", "pattern": "picture", "backdrop": "picture", "material": "words", "occasion": "words",
    "maker": "words", "kind": "picture and words", "chime": "sound", "scent": "sensor",
}  # fmt: skip
factors = data.factors()
pd.DataFrame({"seen in": where, "levels": factors.nunique()}).loc[list(where)]

# %%
v = data.vocabulary
hues = list(v.hues)
figure, axes = plt.subplots(2, 6, figsize=(12, 5.2))
for item, axis in enumerate(axes.flat):
    picture, row = data.catalog.image(item), factors.iloc[item]
    if picture is None:
        axis.text(0.5, 0.5, "no picture", ha="center", va="center", color="#888")
    else:
        axis.imshow(picture)
    seen = f"{hues[row.hue]}, {v.patterns[row.pattern]}, {v.backdrops[row.backdrop]}"
    said = data.catalog.titles[item]
    axis.set_title(said, fontsize=9)
    axis.set_xlabel(seen, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
figure.suptitle("above: what the words say of it    below: what only the picture shows", fontsize=10)
figure.tight_layout()

# %% [markdown]
# ## One taste needs picture *and* words
# The term `interaction` is an exclusive or: a user who likes it wants handmade things on a round backdrop and machine
# made ones on a square one (or the reverse). Averaged over either side nothing is left, so a sum of a score for the
# picture and a score for the words cannot hold it, however good each of them is.

# %%
term = data.terms["interaction"](np.arange(data.interactions.n_users))
user = int(np.abs(term[:, 0]).argmax())
cells = pd.DataFrame({"utility": term[user], "backdrop": factors.backdrop.values, "maker": factors.maker.values})
cells = cells.replace({"backdrop": dict(enumerate(v.backdrops)), "maker": {0: "by hand", 1: "by machine"}})
square = cells.pivot_table("utility", "backdrop", "maker", margins=True, margins_name="mean")
square.round(2)

# %% [markdown]
# ## The ceiling, and the ceiling of a model that cannot see or read
# `oracle()` scores with the true utilities. `oracle(without=...)` does so with one sense closed: the best that any
# model without it can reach. These numbers stand beside every result on Atelier.

# %%
split = mm.splits.random_per_user(data, seed=SEED)
senses = [(), ("image",), ("text",), ("audio",), ("sensor",), ("image", "text")]
ceilings = {}
for gone in senses:
    name = "without " + " and ".join(gone) if gone else "oracle"
    ceilings[name] = rank(data.oracle(without=gone), split.valid, seen=split.train.csr, k=20).per_user("ndcg@20").mean()
figure, axis = plt.subplots(figsize=(6, 2.4))
axis.barh(list(ceilings), list(ceilings.values()), color=["#2a6f97", *["#a9bcd0"] * 5])
axis.invert_yaxis()
axis.set_xlabel("ndcg@20 on validation")
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Five ways to divide the same events
# A split is a partition of the events. What it holds out decides what is measured: taste for known things
# (`random_per_user`, `leave_last`), the future (`temporal`), or what nobody has taken yet (`cold_items`, `cold_users`).

# %%
kinds = {
    "random_per_user": split,
    "leave_last": mm.splits.leave_last(data, seed=SEED),
    "temporal": mm.splits.temporal(data),
    "cold_items": mm.splits.cold_items(data, seed=SEED),
    "cold_users": mm.splits.cold_users(data, seed=SEED),
}
columns = ["train", "valid", "test", "cold_items", "cold_users"]
pd.DataFrame({name: {c: s.describe()[c] for c in columns} for name, s in kinds.items()}).T

# %% [markdown]
# Only the temporal split keeps the future out of training. The others learn from events that come *after* those they
# are asked about, which no deployed system can do:

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 2.4), sharey=True)
day = 24 * 3600
for axis, name in zip(axes, ("random_per_user", "leave_last", "temporal"), strict=True):
    s = kinds[name]
    parts = [s.train.times / day, s.valid.times / day]
    axis.hist(parts, bins=np.arange(0, 366, 12), stacked=True, color=["#a9bcd0", "#2a6f97"], label=["train", "valid"])
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("day of the year")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("events")
axes[0].legend(framealpha=0.9, loc="lower left")
figure.tight_layout()

# %% [markdown]
# ## The same systems under each split
# Nothing is tuned here: popularity counts, neighbours by content, neighbours by who took what.

# %%
rows = {}
for name, s in kinds.items():
    systems = {
        "Random": Random(s.train, seed=SEED),
        "Popularity": Popularity(s.train),
        "ContentKNN": ContentKNN(s.train, catalog=data.catalog),
        "ItemKNN": mm.models.ItemKNN(s.train),
        "Oracle": data.oracle(),
    }
    rows[name] = {
        k: rank(system, s.valid, seen=s.train.csr, k=20, seed=SEED).per_user("ndcg@20").mean()
        for k, system in systems.items()
    }
by_split = pd.DataFrame(rows).T
by_split.style.format("{:.4f}").background_gradient(axis=1, cmap="Blues")

# %% [markdown]
# A number without its split says nothing: the rows are not comparable, not even the oracle's. The row `cold_users` is
# mostly of known users; for the new ones alone, see k = 0 below, where `ItemKNN` has 0.018.
#
# ## A handful of events
# How much is the first event of a new user worth? Four events of each cold user may be revealed, the others are to be
# found, the same ones at every point; dashed lines are systems that take no history.

# %%
new = kinds["cold_users"]
systems = [mm.models.ItemKNN(new.train), ContentKNN(new.train, catalog=data.catalog), Popularity(new.train)]
curve = k_shot(systems, new, of="users", ks=(0, 1, 2, 4), seed=SEED)
curve.plot()
curve

# %% [markdown]
# ## Why every item is ranked
# Much of the literature ranks a positive among 100 sampled items. That is another metric, and it need not put systems
# in the same order ([Krichene and Rendle 2020](https://dl.acm.org/doi/10.1145/3394486.3403226)). Here are three
# scorers, each good at something else: one puts a few of a user's items at the very top and the others anywhere, one
# puts all of them fairly high and none at the top.

# %%
rng = np.random.default_rng(SEED)
valid, n_items = split.valid, data.interactions.n_items
dense = valid.csr.toarray() > 0
truth = data.utilities(np.arange(data.interactions.n_users))


class Fixed:
    def __init__(self, name, scores):
        self.name, self.scores = name, scores.astype(np.float32)

    def score(self, users):
        import torch

        return torch.from_numpy(self.scores[users])


noise = rng.random(dense.shape)
sharp = np.where(dense & (rng.random(dense.shape) < 0.25), 2.0, noise)  # one positive in four first
broad = np.where(dense, 0.89 + 0.08 * rng.random(dense.shape), noise)  # all in the upper tenth, none at the top
scorers = [Fixed("sharp", sharp), Fixed("broad", broad), Fixed("oracle", truth)]


def sampled(scorer, *, candidates=100, k=20):
    """NDCG@k of one positive among sampled items, the protocol that this library does not offer."""
    values = []
    for u, i in zip(valid.users, valid.items, strict=True):
        others = rng.choice(n_items, candidates, replace=False)
        place = (scorer.scores[u, others] > scorer.scores[u, i]).sum()
        values.append(1 / np.log2(place + 2) if place < k else 0.0)
    return float(np.mean(values))


full = {s.name: rank(s, valid, seen=split.train.csr, k=20).per_user("ndcg@20").mean() for s in scorers}
few = {s.name: sampled(s) for s in scorers}
both = pd.DataFrame({"ranked among all items": full, "ranked among 100 sampled": few})
both.round(3)

# %%
figure, axis = plt.subplots(figsize=(5, 2.8))
for name, row in both.iterrows():
    axis.plot([0, 1], row, marker="o", label=name)
axis.set_xticks([0, 1], both.columns)
axis.set_ylabel("ndcg@20")
axis.set_ylim(bottom=0)
axis.set_xlim(-0.2, 1.2)
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# The order of `sharp` and `broad` turns over. A shelf has twenty places, and what a shop would show is the left column.
#
# ## Two leaks, in numbers
# **Choosing on what is reported.** Two hundred scorers that know nothing, each with another seed. The best of them on
# validation is no better than chance on fresh events; reported on the part it was chosen on, it looks like progress.
# This is what happens when epochs or hyper-parameters are picked on test, and why `split.test` is sealed here.

# %%
few_users = data.interactions.select(data.interactions.users < (60 if not SMOKE else 30))
small = mm.RecDataset("few users", few_users, data.catalog)
part = mm.splits.random_per_user(small, seed=SEED)
scores = {"chosen on": [], "fresh": []}
halves = rng.random(len(part.valid)) < 0.5
for s in range(200):
    one = Random(part.train, seed=s)
    for key, half in (("chosen on", halves), ("fresh", ~halves)):
        ranking = rank(one, part.valid.select(half), seen=part.train.csr, k=20)
        scores[key].append(ranking.per_user("ndcg@20").mean())
best = int(np.argmax(scores["chosen on"]))
leak = {
    "mean of the 200": np.mean(scores["chosen on"]),
    "the best, where it was chosen": scores["chosen on"][best],
    "the best, on fresh events": scores["fresh"][best],
}
pd.Series(leak).round(4).to_frame("ndcg@20")

# %%
try:
    split.test
except mm.splits.SealedError as error:
    print("SealedError:", error)

# %% [markdown]
# **Counting what is to be predicted.** Popularity from all events, held-out ones included, against popularity from
# training events. The same happens when a graph or a feature scaler is built from all splits.

# %%
cold = kinds["cold_items"]
honest = rank(Popularity(cold.train), cold.valid, seen=cold.train.csr, k=20, seed=SEED)
leaky = rank(Popularity(data.interactions), cold.valid, seen=cold.train.csr, k=20, seed=SEED)
counted = {"training events": honest.per_user("ndcg@20").mean(), "all events": leaky.per_user("ndcg@20").mean()}
pd.Series(counted).round(4).to_frame("Popularity, ndcg@20")

# %% [markdown]
# ## Real posters
# MovieLens (ml-latest-small) with posters and plots, when the folder is there (`MMLLMREC_DATA`). Nothing is filled in:
# a film without a poster or a plot has none. Look at one with `movies.catalog.image(0)`; posters are for research use
# and are not kept in this notebook.

# %%
try:
    movies = mm.load_dataset("movielens-small", bad_rows="drop")
except mm.DataError as error:
    movies = None
    print(error)
if movies is not None:
    x, c = movies.interactions, movies.catalog
    facts = {
        "users": f"{x.n_users:,}",
        "films": f"{x.n_items:,}",
        "events": f"{len(x):,}",
        "films with a poster": f"{c.present('image').mean():.1%}",
        "films with a plot": f"{movies.about['plots'] / x.n_items:.1%}",
        "garbled rows left out": movies.about["dropped_rows"],
    }
    print(pd.Series(facts).to_string())

# %%
figure, axis = plt.subplots(figsize=(5, 2.8))
for d in filter(None, (data, movies)):
    counts = np.sort(d.interactions.item_counts)[::-1]
    axis.plot(np.arange(1, len(counts) + 1) / len(counts), counts / counts.sum() * len(counts), label=d.name)
axis.set_yscale("log")
axis.set_xlabel("items, most popular first (share of the catalogue)")
axis.set_ylabel("events, average item = 1")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# **What it means.** Fix the split, rank everything, choose on validation, open the test part once, and say all of this
# beside the number. `mm.evaluate` does these by default; its report carries the split's hash, the masks, and how often
# the test part was opened.

# %%
assert abs(square.loc["mean"]).max() < 0.3 * square.iloc[:2, :2].abs().max().max(), "the interaction has no main effect"
assert leak["the best, where it was chosen"] > 1.1 * leak["mean of the 200"], "choosing on what is reported inflates it"
if not SMOKE:
    assert full["sharp"] > full["broad"] and few["sharp"] < few["broad"], "sampling candidates turns the order over"
    means = curve.frame.set_index(["system", "k"])["mean"]
    assert means["ItemKNN", 4] > 2 * means["ItemKNN", 0], "a few events must help"
    assert ceilings["without image"] < 0.75 * ceilings["oracle"], "the picture must matter"
    assert counted["all events"] > 1.2 * counted["training events"], "popularity must not count held-out events"

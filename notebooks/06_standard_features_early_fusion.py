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
# # Standard features, fused early
#
# **Question.** The survey's first experiment: take what standard extractors say of every item, fuse it *before* the
# encoder, and train a plain recommender on top. What is that worth over IDs, which modality brings it, and does it come
# from content or from more parameters?

# %% tags=["parameters"]
import os

SEED = 0
SMOKE = bool(os.environ.get("MMLLMREC_SMOKE"))  # the tests run this notebook in seconds
WORLD = {"n_items": 150, "n_users": 120, "n_events": 2400} if SMOKE else {}
FIT = {"epochs": 1 if SMOKE else 60, "lr": 5e-3, "patience": 10}

# %%
import warnings

import matplotlib.pyplot as plt
import pandas as pd

import mmllmrec as mm
from mmllmrec.bench.run import Named
from mmllmrec.features.image import image_extractor
from mmllmrec.features.table import FeatureTable
from mmllmrec.features.text import text_extractor
from mmllmrec.models.composed import Composed, Encoder, Fusion

warnings.filterwarnings("ignore")
mm.seed_everything(SEED)

# %% [markdown]
# ## Features first
# A frozen CLIP tower looks at every picture and a frozen language model reads every description: one vector each,
# computed once, whitened to 64 columns on the items that training knows. Any `transformers` or `open_clip` name goes
# where `"nano"` stands (`"microsoft/resnet-50"`, `"google-bert/bert-base-uncased"`), which is what ships.

# %%
data = mm.load_dataset("atelier", **WORLD)
split = mm.splits.cold_items(data, fraction=0.2, seed=SEED)
raw = FeatureTable.extracted(data.catalog, [image_extractor("nano"), text_extractor("nano")])
features = raw.whiten(split.warm_items, 64)
about = pd.DataFrame({"raw columns": raw.widths, "kept": features.widths}, dtype=int)
about.assign(**{"items that have it": features.presence.mean(axis=0)})

# %% [markdown]
# ## The same recommender, with more or less to read
# Matrix factorisation whose items are a sum, taken *before* the encoder, of their ID and of a linear map of each
# modality. `Composed` puts encoder, fusion and loss together; everything but what is read stays the same. A new item's
# ID is absent: it is what its content says.


# %%
def run(name, modalities=("image", "text"), ids=True, table=features, method="sum"):
    mm.seed_everything(SEED)
    model = Composed(
        split.train,
        features=table.only(modalities),
        encoder=Encoder("mf"),
        fusion=Fusion("early", method),
        loss="softmax",
        ids=ids,
    )
    return Named(name, mm.fit(model, split, seed=SEED, progress=False, weight_decay=0.3, **FIT))


mm.seed_everything(SEED)
plain = mm.models.BPR(split.train, loss="softmax")  # matrix factorisation
id_only = Named("IDs only", mm.fit(plain, split, seed=SEED, progress=False, weight_decay=0.3, **FIT))
both = run("IDs + image + text")
rows = [id_only, run("IDs + image", ("image",)), run("IDs + text", ("text",)), run("image + text, no IDs", ids=False)]
report = mm.evaluate(both, split, against=rows, on="valid", controls=["shuffled image", "shuffled text"])
report

# %%
figure = report.plot()

# %% [markdown]
# ## How to add up
# `sum` and `mean` treat all parts alike; `concat` learns a map of all of them; `gate` and `attentive` weigh them an
# item at a time; `experts` sends an item to the maps that suit it; the `heuristic` trusts an ID the more, the more
# events it has.

# %%
methods = ["sum", "mean", "max", "concat", "gate", "attentive", "experts", "heuristic"]
fused = [both if m == "sum" else run(m, method=m) for m in (methods[:3] if SMOKE else methods)]
compared = mm.evaluate(fused[0], split, against=fused[1:], on="valid")
scores = pd.DataFrame(
    {row: [compared.mean(r.name, row, "ndcg@20") for r in fused] for row in ("warm", "cold only")},
    index=["sum", *(r.name for r in fused[1:])],
)
axis = scores.plot.barh(figsize=(7, 3.6), color=["#a9bcd0", "#2a6f97"], width=0.75)
axis.invert_yaxis()
axis.set_xlabel("validation ndcg@20")
axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
axis.spines[["top", "right"]].set_visible(False)
plt.tight_layout()

# %% [markdown]
# **What it means.** On items that training knows, IDs alone are ahead: content in the same sum has to share their
# vector. On new ones IDs say nothing, and the frozen features all that this recommender will ever know; a picture dealt
# to another item costs it two thirds, so it is content and not capacity. Among new items both modalities together are
# ahead of words alone and level with pictures alone. How they are added up matters as much as that they are. Weights
# that are learned an item at a time (gate, attentive) and the maximum fall behind a plain sum, and a rule without a
# parameter, which trusts an ID the more, the more events it has, is ahead of them all. What no sum can hold is the
# subject of `05_fusion`.

# %%
if not SMOKE:
    cold = {name: report.mean(name, "cold only", "ndcg@20") for name in report.names}
    assert cold["IDs + image + text"] > max(cold["IDs + image"], cold["IDs + text"]) > 2 * cold["IDs only"]
    assert cold["IDs + image + text, shuffled image"] < cold["IDs + image + text"]

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
# # Your own data, modality, encoder and system
#
# **Question.** What does it take to bring something of one's own? Four things, a cell each: a folder of data, a
# modality that is neither picture nor text, an encoder, and a system. Each then has everything: the same splits,
# losses, trainer, evaluator, controls and run cards as the rest.

# %% tags=["parameters"]
import os

SEED = 0
SMOKE = bool(os.environ.get("MMLLMREC_SMOKE"))  # the tests run this notebook in seconds
FIT = {"epochs": 1 if SMOKE else 60, "lr": 5e-3, "patience": 10}

# %%
import csv
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import mmllmrec as mm

warnings.filterwarnings("ignore")
mm.seed_everything(SEED)

# %% [markdown]
# ## A folder
# `interactions.csv` (user, item, time), `items.csv` (item, title, text), pictures in `images/` named by item, and a
# `features/NAME.npy` a modality that you have computed. Here: a bakery with 120 breads, whose crusts were measured.

# %%
rng = np.random.default_rng(SEED)
shop = Path(tempfile.mkdtemp()) / "bakery"
(shop / "features").mkdir(parents=True)
grain, crust = rng.integers(0, 4, 120), rng.normal(size=(120, 3))
likes_grain, likes_crust = rng.normal(size=(200, 4)), rng.normal(size=(200, 3))
taste = 1.5 * likes_grain[:, grain] + likes_crust @ crust.T + rng.gumbel(size=(200, 120))
names = ["rye", "wheat", "spelt", "oat"]
with (shop / "items.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["item_id", "title", "text"])
    writer.writerows([f"b{i}", f"bread {i}", f"a loaf of {names[g]}"] for i, g in enumerate(grain))
with (shop / "interactions.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["user_id", "item_id", "timestamp"])
    for user, row in enumerate(taste):
        writer.writerows([f"u{user}", f"b{i}", int(rng.integers(1e6))] for i in np.argsort(-row)[:15])
np.save(shop / "features" / "crust.npy", crust.astype(np.float32))

data = mm.load_dataset("folder", shop)
split = mm.splits.cold_items(data, fraction=0.2, seed=SEED)
data.catalog

# %% [markdown]
# ## A modality
# `crust` is one already: every model of the library reads it beside the words, and the controls know it. What it is
# worth is one line: the same fitted model, with the crusts dealt to other breads.

# %%
vbpr = mm.fit(
    mm.models.VBPR(split.train, catalog=data.catalog, loss="softmax"), split, seed=SEED, progress=False, **FIT
)
mm.evaluate(vbpr, split, on="valid", controls=["shuffled crust", "shuffled text"])

# %% [markdown]
# ## An encoder
# A module from what users and items are to what they become, (U, D), (I, D) -> (U, D), (I, D), for the system below.
# This one lets each user look at the items through a gate.


# %%
class Gated(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gate = nn.Linear(dim, dim)

    def forward(self, users, items):
        return users * torch.sigmoid(self.gate(users)), items


# %% [markdown]
# ## A system
# A subclass that says what its vectors are, and which terms it has beside the ranking loss. `MultimodalModel` does the
# rest: BPR or the softmax, cold items by content, k-shot curves, saving. Here: the encoder above, content through one
# map, and a term that draws an item's ID to its content.

# %%
from mmllmrec import losses
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import MultimodalModel


class Bakery(MultimodalModel):
    """score(u, i) = gate(p_u) . (q_i + W x_i), and ``weight`` times InfoNCE of q_i and W x_i."""

    def __init__(
        self, train, *, catalog=None, features=None, dim=32, layers=0, weight=0.05, feature_dim=16, loss="bpr"
    ):
        super().__init__(train, **arguments(locals()))
        self.weight, self.encoder = weight, Gated(dim)
        self.maps = self.linear_each(dim, bias=False)

    def encode(self):
        users, ids = self.ids()
        content = torch.stack(self.through(self.maps)).sum(dim=0)
        users, items = self.encoder(users, ids + content)
        return Encoded(users, items, {"ids": ids, "content": content})

    def auxiliary(self, batch, encoded):
        items = batch.items.unique()
        return {"tie": self.weight * losses.info_nce(encoded.parts["ids"][items], encoded.parts["content"][items])}


ours = mm.fit(Bakery(split.train, catalog=data.catalog, loss="softmax"), split, seed=SEED, progress=False, **FIT)
rival = mm.fit(mm.models.LightGCN(split.train, loss="softmax"), split, seed=SEED, progress=False, **FIT)
report = mm.evaluate(ours, split, against=[vbpr, rival], on="valid", controls=["shuffled crust"])
report

# %%
figure = report.plot()

# %% [markdown]
# ## And on, in PyG
# The training events as a `torch_geometric` graph, users and items numbered as everywhere here:
# `split.train.to_pyg(features=...)` (`pip install torch_geometric`).
#
# **What it means.** Nothing above is registered, configured or copied: a folder is a folder, a modality is a file, an
# encoder is a module, a system is a class of twenty lines. What is bought with it is the evaluator: the last table
# says with intervals, per warm and cold item, and with a control, whether it was worth it.

# %%
if not SMOKE:
    cold = {name: report.mean(name, "cold only", "ndcg@20") for name in report.names}
    own = ours.model.name
    assert cold[own] > 1.5 * cold["LightGCN (softmax)"]
    assert cold[f"{own}, shuffled crust"] < cold[own]

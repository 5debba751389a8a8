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
# # More senses: sound, scent, and sensors of your own
#
# **Question.** Recommenders look and read. Things also ring, smell, weigh, move. Can further senses come in through the
# same door as pictures and words, do they help, and what happens to an item that lacks one?

# %% tags=["parameters"]
import os

SEED = 0
SMOKE = bool(os.environ.get("MMLLMREC_SMOKE"))  # the tests run this notebook in seconds
WORLD = {"n_items": 120, "n_users": 80, "n_events": 1200} if SMOKE else {}
SHORT = {"epochs": 1} if SMOKE else {}  # over each model's own settings

# %%
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Audio

import mmllmrec as mm
from mmllmrec.bench.run import Named
from mmllmrec.data.atelier.recovery import recovery
from mmllmrec.data.atelier.sense import RATE
from mmllmrec.evaluation.curves import missing_content
from mmllmrec.features.audio import LogMel
from mmllmrec.features.sensor import Channel, SensorEncoder
from mmllmrec.shipped import shipped

warnings.filterwarnings("ignore")
mm.seed_everything(SEED)

# %% [markdown]
# ## What an item sounds like
# Each item of the shop has a one-second chime of one of four pitches; how hard it is struck means nothing. A model gets
# the wave; its ear turns it into a **log-mel** picture: time to the right, pitch upwards, on a scale like a listener's.

# %%
data = mm.load_dataset("atelier", **WORLD)
split = mm.splits.cold_items(data, fraction=0.2, seed=SEED)
factors, catalog = data.factors(), data.catalog
waves = torch.from_numpy(catalog.signal("audio"))
heard = catalog.present("audio")
ear = LogMel(RATE).fit(waves[torch.from_numpy(heard & split.warm_items)])
examples = [int(np.flatnonzero(heard & (factors.chime == n))[0]) for n in range(4)]
figure, axes = plt.subplots(2, 4, figsize=(12, 4), sharey="row")
for n, (item, (above, below)) in enumerate(zip(examples, axes.T, strict=True)):
    above.plot(np.arange(waves.shape[1]) / RATE, waves[item], linewidth=0.4, color="#2a6f97")
    above.set_title(f"chime {n}: {catalog.titles[item]}", fontsize=9)
    mel = ear.raw(waves[item : item + 1])[0].T
    below.imshow(mel, origin="lower", aspect="auto", extent=(0, 1, 0, ear.mels), cmap="magma")
    below.set_xlabel("seconds")
axes[0, 0].set_ylabel("wave")
axes[1, 0].set_ylabel("mel band")
for axis in axes[0]:
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()

# %%
Audio(waves[examples[0]].numpy(), rate=RATE)

# %% [markdown]
# ## What it smells like
# A 16-channel electronic nose. Each scent has a signature over the channels; how strong it is varies and means nothing.

# %%
nose = catalog.signal("sensor")
smelled = catalog.present("sensor")
by_scent = [np.flatnonzero(smelled & (factors.scent == n))[:8] for n in range(4)]
figure, axis = plt.subplots(figsize=(8, 3.4))
shown = axis.imshow(nose[np.concatenate(by_scent)], aspect="auto", cmap="viridis", vmin=0, vmax=1)
edges = np.cumsum([len(s) for s in by_scent])
axis.set_yticks(edges - [len(s) / 2 + 0.5 for s in by_scent], [f"scent {n}" for n in range(4)])
for edge in edges[:-1]:
    axis.axhline(edge - 0.5, color="white", linewidth=2)
axis.set_xlabel("channel")
figure.colorbar(shown, label="reading")
figure.tight_layout()

# %% [markdown]
# ## A sensor of your own
# `SensorEncoder` takes any readings whose channels have names and units: here what a handle records while somebody
# tries a tool. One token a channel, so a channel that is missing (NaN) is *left out*, never filled in.

# %%
rng = np.random.default_rng(SEED)
channels = [Channel("acceleration", "m/s2"), Channel("rotation", "deg/s"), Channel("grip", "N"), Channel("warmth", "K")]
readings = rng.normal([9.8, 40.0, 25.0, 300.0], [2.0, 15.0, 8.0, 5.0], size=(64, 4)).astype(np.float32)
readings[0, 1] = np.nan  # the first tool was tried on a bench that does not turn
feel = SensorEncoder.fit(readings, channels, dim=16)
with torch.no_grad():
    pooled, tokens = feel(torch.from_numpy(readings))
lengths = tokens[:3].norm(dim=2).numpy()
pd.DataFrame(lengths, columns=[f"{c.name}, {c.unit}" for c in feel.channels]).rename_axis("item").round(3)

# %% [markdown]
# The token of the missing channel is exactly zero, and so is its weight in every other one. Another laboratory's device
# has its columns in another order and lacks some: `align` brings them here by name. One that measures in another unit
# is refused, which is better than a silent factor of six.

# %%
elsewhere = torch.tensor([[310.0, 12.0]])
print(feel.align(elsewhere, [Channel("warmth", "K"), Channel("acceleration", "m/s2")]))
try:
    feel.align(elsewhere, [Channel("warmth", "K"), Channel("rotation", "rev/min")])
except mm.DataError as error:
    refused = str(error)
    print("DataError:", refused)

# %% [markdown]
# ## Two senses, or four
# The same unified model, once with pictures and words, once with all that the catalogue has (`trainer="cached"`: LoRA
# on the upper layers alone). The ceiling of the first is an oracle that knows every taste and cannot hear or smell.

# %%
runs = {}
for name, modalities in (("Unified: image + text", ("image", "text")), ("Unified: all four", None)):
    mm.seed_everything(SEED)
    content = {"data": split.train, "catalog": catalog, "modalities": modalities}
    model = mm.models.Unified.from_preset("nano", **content, trainer="cached")
    runs[name] = mm.fit(model, split, seed=SEED, progress=False, **{**model.fit_defaults, **SHORT})
two, four = (Named(name, run) for name, run in runs.items())
deaf = data.oracle(without=("audio", "sensor"))
knocked = [f"without {m}" for m in catalog.modalities]
ceilings = [data.oracle(without=m) for m in catalog.modalities]
report = mm.evaluate(four, split, against=[two, deaf, *ceilings], on="valid", controls=knocked)
report

# %%
rows = ["all", "warm", "cold"]
bars = {"image + text": two.name, "all four senses": four.name, "oracle, image + text": deaf.name, "oracle": "Oracle"}
bars = pd.DataFrame({label: {row: report.mean(name, row) for row in rows} for label, name in bars.items()})
figure, axis = plt.subplots(figsize=(7, 3))
bars.plot.bar(ax=axis, color=["#a9bcd0", "#2a6f97", "#dddddd", "#bbbbbb"], width=0.8, rot=0)
axis.set_ylabel("ndcg@20, validation")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.25))
figure.tight_layout()
report.compare(four.name).loc[[two.name]].round(4)

# %% [markdown]
# ## Which tastes did it find?
# Squared correlation, on new items, between the scores and each true taste. A model without ears can have no share of
# the taste for chimes; a small number there is chance.

# %%
new = ~split.warm_items
found = pd.DataFrame({name: recovery(run.model, data, items=new)["recovery"] for name, run in runs.items()})
figure, axis = plt.subplots(figsize=(8, 2.8))
found.plot.bar(ax=axis, color=["#a9bcd0", "#2a6f97"], width=0.75, rot=0)
axis.set_ylabel("recovery, cold items")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
figure.tight_layout()
found.T.round(3)

# %% [markdown]
# ## What a sense is worth: knock-outs
# The fitted model with one sense taken away at scoring time, beside what the oracle loses by the same. A sense whose
# loss costs nothing was not used, whatever a table of weights may say.

# %%
kept = {
    "the model": [report.mean(f"{four.name}, without {m}") / report.mean(four.name) for m in catalog.modalities],
    "the oracle": [report.mean(o.name) / report.mean("Oracle") for o in ceilings],
}
loss = 1 - pd.DataFrame(kept, index=list(catalog.modalities))
figure, axis = plt.subplots(figsize=(6, 2.8))
loss.plot.bar(ax=axis, color=["#2a6f97", "#bbbbbb"], width=0.7, rot=0)
axis.set_ylabel("share of ndcg@20 lost\nwithout it")
axis.axhline(0, color="#333", linewidth=0.8)
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
figure.tight_layout()
loss.T.round(3)

# %% [markdown]
# ## When a sense goes missing
# Catalogues have holes. A growing share of the items loses one modality each, at random; then every item loses a
# growing share of its nose's channels. Nothing is trained again, and nothing is filled in.

# %%
shares = (0.0, 0.6) if SMOKE else (0.0, 0.2, 0.4, 0.6, 0.8)
lost = missing_content([four, two], split, shares=shares, seed=SEED)
figure = lost.plot()
lost

# %%
holes = missing_content([four], split, of="channels", shares=shares, seed=SEED)
figure = holes.plot()
holes

# %% [markdown]
# ## Over three seeds
# The measurement, on the test part, with each sense by itself and the two-stage twins beside, is `mmllmrec bench q3`:

# %%
for folder in ("notebooks/cards/q3", "notebooks/cards/q3-lastfm"):
    print((shipped(folder) / "table.txt").read_text(encoding="utf-8"), end="\n\n")

# %% [markdown]
# **What it means.** A chime or a scent enters as one more soft token and one more late path, and an encoder of some
# 70,000 numbers, trained from nothing on the same events, finds the taste for it. What it can add is bounded by what
# people care for: a few hundredths of their utility here. An item that lacks a sense is scored by the others, and the
# curve bends rather than breaks.
#
# On Last.fm, the last table, what an encoder of sound says of an artist adds nothing to the words that listeners found
# for the music, and new artists are ranked a little worse with it.

# %%
assert lengths[0, 1] == 0.0 and (lengths[1:] > 0).all(), "a missing channel is left out"
assert "rev/min" in refused, "another unit is refused"
if not SMOKE:
    for sense in ("chime", "scent"):
        ours, theirs = found.loc[sense, four.name], found.loc[sense, two.name]
        assert ours > 0.1 and ours > 3 * theirs, f"the taste for a {sense} must be found by what perceives it alone"
    assert report.mean(four.name) > report.mean(two.name), "further senses must help"
    curve = lost.frame.set_index(["system", "missing"])["mean"]
    assert curve[four.name, 0.4] > 0.5 * curve[four.name, 0.0], "a curve that bends and does not break"

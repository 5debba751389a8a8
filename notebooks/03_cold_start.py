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
# # Cold start: a new item, a new user, and what their first events are worth
#
# **Question.** An item that nobody has taken has no ID vector, and a user who has taken nothing has none either. What
# can a model say of them from content alone, and how much better does it get with one, two, four events, without being
# trained again?

# %% tags=["parameters"]
import os

SEED = 0
SMOKE = bool(os.environ.get("MMLLMREC_SMOKE"))  # the tests run this notebook in seconds
WORLD = {"n_items": 150, "n_users": 150, "n_events": 3600} if SMOKE else {}
SHORT = {"epochs": 1} if SMOKE else {}  # over each model's own settings

# %%
import time
import warnings

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import mmllmrec as mm
from mmllmrec.bench.run import SOFTMAX, Named
from mmllmrec.data.atelier.draw import draw, encode
from mmllmrec.data.interactions import IdMap
from mmllmrec.evaluation.curves import k_shot
from mmllmrec.evaluation.floors import ContentKNN
from mmllmrec.shipped import shipped

warnings.filterwarnings("ignore")
mm.seed_everything(SEED)

# %% [markdown]
# ## New on both sides
# One item in five and one user in ten are held out whole. A model that was fitted once serves both questions: a cold
# user's curve is about items that training knows, a cold item's about users that it knows.

# %%
data = mm.load_dataset("atelier", **WORLD)
split = mm.splits.cold_both(data, fraction=0.2, users=0.1, seed=SEED)
split

# %% [markdown]
# ## Five answers to the same question
# All but the neighbours have the same loss, an in-batch softmax.
#
# | system | a new item | a new user |
# |---|---|---|
# | LightGCN | no vector; takers' mean once it has some | the mean of the items taken |
# | ContentKNN | descriptors, nothing trained | what looks and reads like the items taken |
# | DropoutNet | a network that was trained to do without the item's latent | the same for the user's |
# | TwoStage | heads over features of the frozen towers | a history tower over the items' content |
# | Unified | the backbone, LoRA on its last layers (`trainer="cached"`) | the same history tower |
#
# In the last two a cold item is *an item whose ID is absent*, and nothing else: no special case.

# %%
knows = {**SOFTMAX, "patience": 10, **SHORT}
lightgcn = mm.fit(mm.models.LightGCN(split.train, loss="softmax"), split, seed=SEED, progress=False, **knows)
second = mm.models.DropoutNet.pretrained(lightgcn, catalog=split.catalog, loss="softmax")
dropoutnet = mm.fit(second, split, seed=SEED, progress=False, **knows)


def unified(**options):
    mm.seed_everything(SEED)
    content = {"data": split.train, "catalog": split.catalog, "trainer": "cached"}
    return mm.models.Unified.from_preset("nano", **content, **options)


model = unified()
twin = model.twin()
two_stage = mm.fit(twin, split, seed=SEED, progress=False, **{**twin.fit_defaults, **SHORT})
run = mm.fit(model, split, seed=SEED, progress=False, **{**model.fit_defaults, **SHORT})
neighbours = ContentKNN(split.train, catalog=split.catalog)

# %%
report = mm.evaluate(run, split, against=[two_stage, dropoutnet, lightgcn], on="valid")
report

# %% [markdown]
# ## A new item, made now
# Choose its factors, draw it, write two lines about it. The shop has no such row: its ID, its sound and its scent are
# absent. `add_items` reads it and trains nothing. (With `store=` a folder, what the frozen layers say of the items that
# are there already is read back, and the new one alone passes through them.)

# %%
v = data.vocabulary
wanted = {"hue": "violet", "pattern": "dotted", "backdrop": "round", "kind": "lamp"}  # what the picture shows
said = {"material": "brass", "occasion": "birthdays", "maker": 0, "kind": "lamp"}  # what the words say
levels = {"hue": list(v.hues), "pattern": v.patterns, "backdrop": v.backdrops, "kind": v.kinds}
levels |= {"material": v.materials, "occasion": v.occasions}
level = {f: levels[f].index(x) if f in levels else x for f, x in (wanted | said).items()}
picture = draw(v, level, np.random.default_rng(SEED))
text = f"A {said['kind']} in {said['material']}, made by hand. For {said['occasion']}."
columns = {"item_id": ["new"], "title": [f"Plucky {said['material']} {said['kind']}"], "text": [text]}
columns["image"] = [{"bytes": encode(picture), "path": None}]
schema = {c: split.catalog.dataset.features[c] for c in columns}
rows = datasets.Dataset.from_dict(columns, features=datasets.Features(schema))
began = time.perf_counter()
grown = run.model.add_items(mm.Catalog(rows, IdMap(["new"], what="item id")))
print(f"read in {time.perf_counter() - began:.1f} s;", grown.catalog)

# %% [markdown]
# **Its neighbours**, by cosine of content:

# %%
with grown.evaluating():
    content = grown.all_content().numpy()
nearest = np.argsort(-content[:-1] @ content[-1])
nearest = nearest[grown.catalog.present("image")[nearest]][:6]
figure, axes = plt.subplots(1, 7, figsize=(13, 2.4))
for axis, item in zip(axes, [len(content) - 1, *nearest], strict=True):
    axis.imshow(grown.catalog.image(int(item)))
    new = item == len(content) - 1
    axis.set_title(grown.catalog.titles[item], fontsize=9, color="#b23a48" if new else "black")
    axis.set_xlabel("new" if new else f"cosine {content[item] @ content[-1]:.2f}", fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
figure.tight_layout()

# %% [markdown]
# **Who gets it?** In this world we can ask each user how much they would like it: the sum of their tastes for its
# factors. Nobody has taken it, so all the model has is what it looks like and what is said of it.

# %%
level["interaction"] = level["backdrop"] ^ level["maker"]
truth = sum(term.tastes[:, level[name]] for name, term in data.terms.items() if name in level)
known = ~split.cold_users
users = np.arange(data.interactions.n_users)
scores = grown.score(users).numpy()
liking = scores[:, -1] - scores.mean(axis=1)  # over the shop's mean, for each user
right = float(np.corrcoef(liking[known], truth[known])[0, 1])
figure, axis = plt.subplots(figsize=(5, 3))
axis.scatter(truth[known], liking[known], s=8, alpha=0.5, color="#2a6f97", linewidth=0)
axis.set_xlabel("the user's true taste for the new item")
axis.set_ylabel("score, over the user's mean")
axis.set_title(f"a dot a user, correlation {right:.2f}", fontsize=10)
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()

# %%
place = (scores > scores[:, -1:]).sum(axis=1) + 1
order = np.argsort(np.where(known, place, scores.shape[1]), kind="stable")[:5]
first = {"place of the new item": place[order], "true taste (mean 0)": truth[order].round(2)}
pd.DataFrame(first, index=[data.interactions.user_ids[u] for u in order])

# %% [markdown]
# ## A new user
# Somebody whom the shop has never seen has put three things into the basket. A list of items is all `recommend` needs.

# %%
factors = data.factors()
alike = factors[(factors.hue == level["hue"]) & data.catalog.present("image") & split.warm_items]
basket = list(alike.index[:3])
mm.recommend(run, users=["first visit"], history=basket, k=6, catalog=data.catalog)

# %% [markdown]
# The basket, and what the model made of another one: only the history differs.

# %%
other = factors[(factors.kind == level["kind"]) & data.catalog.present("text") & split.warm_items].index[:3]
for name, taken in (("violet things", basket), ("lamps", list(other))):
    print(f"{name}: {', '.join(data.catalog.titles[i] for i in data.interactions.item_ids.index(taken))}")
    found = mm.recommend(run, users=[name], history=taken, k=50 if not SMOKE else 10).frame
    chosen = factors.loc[found["item_id"]]
    share, chance = ((f.hue == level["hue"]).mean() for f in (chosen, factors))
    lamps, lamps_chance = ((f.kind == level["kind"]).mean() for f in (chosen, factors))
    print(f"   violet: {share:.0%} (chance {chance:.0%}), lamps: {lamps:.0%} (chance {lamps_chance:.0%})")

# %% [markdown]
# ## k-shot: what the first events are worth
# The same events are to be found at every k; what is revealed is a history, and nothing is trained again. At k = 0 a
# cold user is nobody in particular, and an item's popularity is all there is to go by.

# %%
systems = [run, two_stage, dropoutnet, lightgcn, neighbours]
by_user = k_shot(systems, split, of="users", ks=(0, 1, 3, 5), seed=SEED)
figure = by_user.plot()
by_user

# %%
by_item = k_shot(systems, split, of="items", ks=(0, 1, 2, 4), seed=SEED)
figure = by_item.plot()
by_item

# %% [markdown]
# ## What ID dropout is for
# In training one item in ten is met as if it were new: its ID and its bias are absent, and content has to stand alone.
# Without it the model never meets an absent ID before it counts. Two places to look: `cold only` ranks new items among
# themselves and says whether content was learned; `cold` ranks them among all and needs the absent bias, which nothing
# but dropout trains, to be of the right size too.

# %%
never = unified(id_dropout=0.0)
without = mm.fit(never, split, seed=SEED, progress=False, **{**never.fit_defaults, **SHORT})
dropped = mm.evaluate(run, split, against=[Named("Unified without ID dropout", without)], on="valid", floors=False)
labels = {"Unified": "ID dropout 0.1", "Unified without ID dropout": "none"}
bars = pd.DataFrame({label: {r: dropped.mean(n, r) for r in dropped.rows} for n, label in labels.items()})
figure, axis = plt.subplots(figsize=(6, 2.8))
bars.plot.bar(ax=axis, color=["#2a6f97", "#a9bcd0"], width=0.7, rot=0)
axis.set_ylabel("ndcg@20, validation")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
figure.tight_layout()
dropped.compare("Unified", row="cold").round(4)

# %% [markdown]
# ## Over three seeds
# The measurement, on the test part and with settings searched on validation, is `mmllmrec bench q2`:

# %%
for folder in ("notebooks/cards/q2", "notebooks/cards/q2-lastfm", "notebooks/cards/q2-movielens"):
    print((shipped(folder) / "table.txt").read_text(encoding="utf-8"), end="\n\n")

# %% [markdown]
# **What it means.** A new item is not empty-handed: how it looks and reads tells which users will like it before anyone
# has taken it, and an ID model can only wait. A new user is the other way round: without an event there is nothing to
# go by, and the first few say a good deal. Both come out of one fitted model, for the price of a forward pass.
#
# A new item's first takers move it from where content put it to where both together say, and nothing is trained again.
# One limit is in the last figure. Without ID dropout `cold only` and `warm` are as good or better: what dropout buys
# here is the right height of new items among old ones, not better content.

# %%
if not SMOKE:
    users_at, items_at = (c.frame.set_index(["system", "k"])["mean"] for c in (by_user, by_item))
    assert items_at["Unified", 0] > 2 * items_at["LightGCN (softmax)", 0], (
        "content must place an item that nobody has taken"
    )
    assert users_at["Unified", 5] > users_at["Unified", 0], "five events must help"
    assert right > 0.3, "the new item must go to those who like it"

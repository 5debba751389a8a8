"""The cold-start rivals against naive forms of their formulas, and on a checkerboard whose answer is known."""

import datasets
import numpy as np
import pytest
import torch

from mmllmrec import models
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.data.sampling import Batch, epoch
from mmllmrec.evaluation.report import evaluate
from mmllmrec.features.table import FeatureTable
from mmllmrec.seed import seed_everything
from mmllmrec.training.fit import fit
from tests.planted import groups
from tests.test_baselines import checkerboard

U, N, L = 7, 11, 4
KINDS = ("AlphaRec", "LightGCNContent", "CLCRec", "DropoutNet", "ALDI", "VBPR")


@pytest.fixture
def train():
    cells = np.random.default_rng(0).choice((U - 1) * (N - 1), size=31, replace=False)
    ids = IdMap(range(U), what="user id"), IdMap(range(N), what="item id")
    return Interactions(cells // (N - 1), cells % (N - 1), None, *ids)


def table():
    """Two modalities; item 5 has no picture, item 6 nothing at all; the last item has content and no event."""
    rng = np.random.default_rng(1)
    presence = np.ones((N, 2), bool)
    presence[5, 0] = presence[6] = False
    return FeatureTable({"image": rng.normal(size=(N, 6)), "text": rng.normal(size=(N, 5))}, presence)


def stage():
    rng = torch.Generator().manual_seed(3)
    return torch.randn(U, L, generator=rng), torch.randn(N, L, generator=rng)


def build(kind, train, **options):
    torch.manual_seed(0)
    options = {"features": table(), "dim": 5} | options
    if kind in ("DropoutNet", "ALDI"):
        options = {"latents": stage()} | options
    return getattr(models, kind)(train, **options)


def numbers(x):
    return x.detach().double().numpy()


def mlp(tower, x):
    first, _, second = tower
    h = x @ numbers(first.weight).T
    return np.where(h > 0, h, 0.01 * h) @ numbers(second.weight).T


def described():
    t = table()
    return np.concatenate([t.tables["image"], t.tables["text"], t.presence], axis=1).astype(float)


def smoothed(train, users, items, layers=2):
    """LightGCN's mean of layers, dense."""
    a = np.zeros((U + N, U + N))
    a[:U, U:] = train.csr.toarray()
    a += a.T
    d = np.maximum(a.sum(1), 1) ** -0.5
    layer = np.concatenate([users, items])
    total = layer.copy()
    for _ in range(layers):
        layer = (d[:, None] * a * d) @ layer
        total += layer
    return np.split(total / (layers + 1), [U])


def cosines(p, q):
    def unit(x):
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    return unit(p) @ unit(q).T


def bce(logit, target):
    target = 1 / (1 + np.exp(-target))
    return target * np.log1p(np.exp(-logit)) + (1 - target) * np.log1p(np.exp(logit))


def a_batch(train, negatives=0, size=13):
    return next(epoch(train, batch_size=size, negatives=negatives, rng=np.random.default_rng(0)))


# -- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["softmax", "bpr"])
def test_alpharec_is_content_smoothed_over_the_graph(train, loss):
    model = build("AlphaRec", train, loss=loss)
    x, r = described(), train.csr.toarray()
    tastes = np.stack([x[r[u] > 0].mean(0) if r[u].any() else 0 * x[0] for u in range(U)])
    users, items = smoothed(train, mlp(model.tower, tastes), mlp(model.tower, x))
    expected = 10 * cosines(users, items) if loss == "softmax" else users @ items.T
    np.testing.assert_allclose(model.score(np.arange(U)).numpy(), expected, atol=1e-5)
    assert (expected[: U - 1, N - 1] != 0).all() and train.item_counts[N - 1] == 0


def test_alpharec_meets_a_new_user_through_its_history(train):
    model = build("AlphaRec", train)
    more = Interactions(np.array([U - 1, U - 1]), np.array([1, N - 1]), None, train.user_ids, train.item_ids)
    history = train.union(more)
    other, twin = model.with_history(history), build("AlphaRec", history)
    torch.testing.assert_close(other.score(np.arange(U)), twin.score(np.arange(U)))  # nothing in it belongs to a user
    assert (model.score(np.array([U - 1])) == 0).all() and (other.score(np.array([U - 1])) != 0).any()
    assert not hasattr(other, "users")


def test_lightgcn_content_is_id_and_features_before_the_graph(train):
    model = build("LightGCNContent", train)
    content = described()[:, :11]
    ids = numbers(model.items.weight) * (train.item_counts > 0)[:, None]
    own = numbers(model.users.weight) * (train.user_counts > 0)[:, None]
    users, items = smoothed(train, own, ids + content @ numbers(model.project.weight).T)
    np.testing.assert_allclose(model.score(np.arange(U)).numpy(), users @ items.T, atol=1e-5)
    sum(model.loss(a_batch(train, 1)).values()).backward()
    model.zero_grad()
    model.reg = 0.0
    model.loss(a_batch(train, 1))["bpr"].backward()
    assert (model.items.weight.grad[N - 1] == 0).all() and (model.items.weight.grad[0] != 0).any()


def test_id_dropout_takes_ids_away_in_training_alone(train):
    model = build("LightGCNContent", train, id_dropout=0.5)
    content = model.project(model.frozen)
    gone = torch.stack([(model.own()[1] == content).all(dim=1) for _ in range(200)]).float().mean(0)
    assert gone[N - 1] == 1 and ((gone[: N - 1] > 0.3) & (gone[: N - 1] < 0.7)).all()
    model.eval()
    assert not (model.own()[1] == content).all(dim=1)[: N - 1].any()


@pytest.mark.parametrize("replace", [0.0, 1.0])
def test_clcrec_is_its_two_terms(train, replace):
    model = build("CLCRec", train, weight=0.3, replace=replace, temperature=0.2)
    batch = a_batch(train)
    pool = sorted(set(batch.items.tolist()))
    x = described()
    z, f, users = numbers(model.items.weight), mlp(model.tower, x), numbers(model.users.weight)
    anchors = [i for i in pool if x[i].any()]
    assert 6 in pool and 6 not in anchors  # an item that shows nothing cannot say which content is its own
    logits = {i: cosines(z[[i]], f[anchors])[0] / 0.2 for i in anchors}
    content = np.mean([np.log(np.exp(row).sum()) - row[anchors.index(i)] for i, row in logits.items()])
    terms = model.loss(batch)
    assert terms["content"].item() == pytest.approx(0.3 * content, abs=1e-5)
    v = np.where(x.any(axis=1)[:, None], f, z) if replace else z  # and nothing to be met in place of its ID
    values = []
    for u, i in zip(batch.users.tolist(), batch.items.tolist(), strict=True):
        logit = {}
        for j in pool:
            if j == i or train.csr[u, j] == 0:
                chance = 1 - (1 - train.item_counts[j] / len(train)) ** len(batch)
                logit[j] = 10 * cosines(users[[u]], v[[j]])[0, 0] - np.log(chance)
        values.append(np.log(np.exp(list(logit.values())).sum()) - logit[i])
    assert terms["softmax"].item() == pytest.approx(0.7 * np.mean(values), abs=1e-5)


def test_clcrec_scores_a_warm_item_by_its_id_and_a_cold_one_by_its_content(train):
    model = build("CLCRec", train)
    q = np.where(train.item_counts[:, None] > 0, numbers(model.items.weight), mlp(model.tower, described()))
    expected = 10 * cosines(numbers(model.users.weight), q)
    np.testing.assert_allclose(model.score(np.arange(U - 1)).numpy(), expected[: U - 1], atol=1e-5)
    with pytest.raises(DataError, match=r"replace=1\.5"):
        build("CLCRec", train, replace=1.5)
    with pytest.raises(DataError, match="loss='bpr'"):
        build("CLCRec", train, loss="bpr")


def masked(train):
    """The first stage's latents, what it never trained at zero."""
    users, items = (numbers(x) for x in stage())
    return users * (train.user_counts > 0)[:, None], items * (train.item_counts > 0)[:, None]


def test_dropoutnet_reconstructs_the_first_stage(train):
    model = build("DropoutNet", train, dropout=0.0)
    users, items = masked(train)
    a, b = (np.sqrt((x[(x != 0).any(1)] ** 2).mean()) for x in (users, items))
    p = mlp(model.user_tower, users / a)
    q = mlp(model.item_tower, np.concatenate([items / b, described()], axis=1))
    np.testing.assert_allclose(model.score(np.arange(U)).numpy(), p @ q.T, atol=1e-5)
    batch = a_batch(train, negatives=2)
    error = (p @ q.T - users @ items.T / (a * b * np.sqrt(L))) ** 2
    u, i, j = (numbers(x).astype(int) for x in (batch.users, batch.items, batch.negatives))
    expected = (error[u, i].mean() + error[u[:, None], j].mean()) / 2
    assert model.loss(batch)["reconstruction"].item() == pytest.approx(expected, abs=1e-5)


def test_dropoutnet_loses_latents_in_training_alone(train):
    model = build("DropoutNet", train, dropout=0.5)
    item, user = torch.tensor([0]), torch.tensor([0])
    with torch.no_grad():
        seen = [tuple(torch.cat(model.vectors(user, item)).flatten().tolist()) for _ in range(60)]
        model.eval()
        assert len({tuple(torch.cat(model.vectors(user, item)).flatten().tolist()) for _ in range(9)}) == 1
        assert len(set(seen)) == 4  # user as it is or transformed, item with its latent or without
        kept = tuple(torch.cat(model.vectors(user, item)).flatten().tolist())
        assert kept in set(seen)
        model.latent_items[0] = 0
        blind = model.vectors(user, item)[1]
    assert tuple(blind.flatten().tolist()) in {s[5:] for s in seen}


@pytest.mark.parametrize("kind", ["DropoutNet", "ALDI"])
def test_a_new_user_has_the_mean_latent_of_its_items(train, kind):
    model = build(kind, train)
    more = Interactions(np.array([U - 1, U - 1]), np.array([1, 4]), None, train.user_ids, train.item_ids)
    before = model.score(np.arange(U))
    other = model.with_history(train.union(more))
    mean = model.latent_items[[1, 4]].mean(0) * model.user_unit / model.item_unit
    torch.testing.assert_close(other.latent_users[U - 1], mean)
    assert torch.equal(other.latent_users[: U - 1], model.latent_users[: U - 1])
    assert (before[U - 1] == 0).all() and (other.score(np.array([U - 1])) != 0).any()
    assert torch.equal(model.score(np.arange(U)), before)


def test_aldi_scores_like_its_teacher_and_its_student(train):
    model = build("ALDI", train)
    users, items = masked(train)
    student = mlp(model.user_tower, users / model.user_unit) @ mlp(model.item_tower, described()).T
    expected = np.where(train.item_counts > 0, users @ items.T, student)
    np.testing.assert_allclose(model.score(np.arange(U)).numpy(), expected, atol=1e-5)


def test_aldi_is_its_four_terms(train):
    model = build("ALDI", train, rating=0.2, ranking=0.7, identification=0.3, cap=1.5)
    batch = a_batch(train, negatives=1)
    u, i, j = batch.users.numpy(), batch.items.numpy(), batch.negatives.numpy()[:, 0]
    teacher = masked(train)
    student = mlp(model.user_tower, teacher[0] / model.user_unit), mlp(model.item_tower, described())
    count = np.array([sum(1 / train.user_counts[v] for v in train.users[train.items == k]) for k in range(N)])
    w = np.tanh(np.minimum(1.5 * count / count.mean(), 1.5))[i]
    gaps, distinct, scores = [], [], []
    for p, q in (student, teacher):
        s = p @ q.T
        scores.append((s[u, i], s[u, j]))
        gaps.append(s[u, i] - s[u, j])
        distinct.append((q[i] * q[i]).sum(1) - np.mean([[a @ b for b in q[j]] for a in q[i]], axis=1))
    terms = model.loss(batch)
    expected = {
        "bpr": np.log1p(np.exp(-gaps[0])).mean(),
        "rating": 0.2 * sum(np.abs(a - b).mean() for a, b in zip(*scores, strict=True)),
        "ranking": 0.7 * (w * bce(*gaps)).mean(),
        "identification": 0.3 * (w * bce(*distinct)).mean(),
    }
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["DropoutNet", "ALDI"])
def test_a_second_stage_says_what_it_stands_on(train, kind):
    with pytest.raises(DataError, match=f"{kind}.pretrained"):
        build(kind, train, latents=None)
    with pytest.raises(DataError, match="latents are"):
        build(kind, train, latents=(stage()[0], stage()[1][:-1]))
    with pytest.raises(DataError, match="no embeddings"):
        getattr(models, kind).pretrained(models.EASE(train), features=table())
    first = models.BPR(train, dim=3)
    model = getattr(models, kind).pretrained(first, features=table())
    assert torch.equal(model.latent_users[: U - 1], first.users.weight.detach()[: U - 1])
    assert (model.latent_items[N - 1] == 0).all()  # a random start is no latent
    other = build(kind, train)
    assert other.provenance()["latents"] != model.provenance()["latents"]


# -- what they share -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_another_catalogue_is_read_through_the_same_maps(train, kind):
    rng = np.random.default_rng(0)
    features = {"image": rng.normal(size=(N, 6)) + 2, "text": rng.normal(size=(N, 5))}
    catalog = Catalog(datasets.Dataset.from_dict({"item_id": train.item_ids.ids}), train.item_ids, features=features)
    model = build(kind, train, catalog=catalog, features=None, feature_dim=3)
    users = np.arange(U)
    before = model.score(users)
    torch.testing.assert_close(model.with_catalog(catalog).score(users), before)
    blind = model.with_catalog(catalog.without("image")).score(users)[: U - 1, N - 1]
    assert not torch.allclose(blind, before[: U - 1, N - 1]) and (blind != 0).all()
    nothing = model.with_catalog(catalog.without("image").without("text")).score(users)[:, N - 1]
    assert (nothing == 0).all() and torch.equal(model.score(users), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cold_item_is_ranked_by_its_content(kind):
    x, own, _ = checkerboard()
    train = x.select(x.items < 20)  # the last two items, one of each group, lose all their events
    seed_everything(0)
    sides = np.stack([np.arange(22) % 2, np.arange(22) % 2 == 0], 1)
    options = {"features": FeatureTable({"image": sides}, np.ones((22, 1), bool)), "dim": 4}
    if kind in ("DropoutNet", "ALDI"):  # a first stage that knows the groups: both sides' vectors point apart
        first = torch.eye(2)[torch.arange(34) % 2], torch.eye(2)[torch.arange(22) % 2]
        options["latents"] = tuple(3 * t for t in first)
    model = getattr(models, kind)(train, **options)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    rng = np.random.default_rng(0)
    for _ in range(20):
        for batch in epoch(train, batch_size=64, negatives=model.negatives, rng=rng):
            optimiser.zero_grad()
            sum(model.loss(batch).values()).backward()
            optimiser.step()
    scores = model.score(np.arange(34)).numpy()[:, 20:]
    assert (scores.argmax(1) == own[:, 20:].argmax(1)).all()


def test_models_with_either_loss_go_through_fit_in_events_and_in_blocks_of_items():
    split = groups()
    seed_everything(0)
    options = {"epochs": 12, "lr": 0.05, "progress": False}
    first = fit(models.LightGCN(split.train, dim=8), split, batch_size=64, **options)
    events = fit(models.LightGCN(split.train, dim=8, loss="softmax"), split, batch_size=64, **options)
    blocks = fit(models.BPR(split.train, dim=8, loss="softmax"), split, item_batch=32, **options)
    rng = np.random.default_rng(0)
    rows = np.eye(3)[np.arange(split.train.n_items) % 3] + 0.1 * rng.normal(size=(split.train.n_items, 3))
    features = FeatureTable({"image": rows}, np.ones((len(rows), 1), bool))
    second = models.ALDI.pretrained(first, features=features, dim=8)
    runs = [first, events, blocks, fit(second, split, batch_size=64, **options)]
    assert min(run.best_score for run in runs) > 0.27  # the best there is, 0.36, is the kind's items in any order
    for run in runs[1:3]:
        assert run.history["softmax"].iloc[0] > run.history["softmax"].iloc[-1]
    report = evaluate(runs[0], split, against=runs[1:], floors=False)
    assert report.names == ["LightGCN", "LightGCN (softmax)", "BPR (softmax)", "ALDI"]
    assert list(report.table()["loss"]) == ["bpr", "softmax", "softmax", "bpr"]
    with pytest.raises(DataError, match="item_batch"):
        fit(models.BPR(split.train), split, item_batch=32, progress=False)


def test_a_batch_is_only_what_it_says(train):
    """One event whose item shows nothing: CLCRec has no anchor, and its terms stay finite."""
    model = build("CLCRec", train)
    u = int(train.users[train.items == 6][0])
    terms = model.loss(Batch(torch.tensor([u]), torch.tensor([6])))
    assert terms["content"].item() == 0 and all(torch.isfinite(t) for t in terms.values())
    sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

"""Baselines against naive forms of their papers' formulas, and on a checkerboard whose answer is known."""

import datasets
import numpy as np
import pytest
import torch

from mmllmrec import models
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.data.sampling import epoch
from mmllmrec.features.table import FeatureTable

U, N = 7, 11


@pytest.fixture
def train():
    cells = np.random.default_rng(0).choice((U - 1) * (N - 1), size=31, replace=False)
    ids = IdMap(range(U), what="user id"), IdMap(range(N), what="item id")
    return Interactions(cells // (N - 1), cells % (N - 1), None, *ids)


@pytest.mark.parametrize("k", [3, 50])
def test_itemknn_is_its_formula(train, k):
    x = train.csr.toarray()
    counts, s = x.sum(0), np.zeros((N, N))
    for i in range(N):
        for j in range(N):
            if i != j:
                s[i, j] = (x[:, i] * x[:, j]).sum() / (np.sqrt(counts[i] * counts[j]) + 2.0)
    naive = np.zeros((U, N))
    for i in range(N):
        for j in sorted(range(N), key=lambda j: (-np.float32(s[i, j]), j))[:k]:
            naive[:, i] += x[:, j] * s[i, j]
    model = models.ItemKNN(train, k=k, shrink=2.0)
    np.testing.assert_allclose(model.score(np.arange(U)).numpy(), naive, atol=1e-6)
    assert np.diff(model.similarity.indptr).max() <= k


def test_ease_is_its_formula_and_its_optimum(train):
    x = train.csr.toarray().astype(float)
    p = np.linalg.inv(x.T @ x + 3.0 * np.eye(N))
    b = np.zeros((N, N))
    for i in range(N):
        for j in range(N):
            if i != j:
                b[i, j] = -p[i, j] / p[j, j]
    model = models.EASE(train, reg=3.0)
    np.testing.assert_allclose(model.score(np.arange(U)).numpy(), x @ b, atol=1e-5)
    # without a formula: each column is a ridge regression on the other items
    for j in range(N):
        others = [i for i in range(N) if i != j]
        ridge = np.linalg.solve(x[:, others].T @ x[:, others] + 3.0 * np.eye(N - 1), x[:, others].T @ x[:, j])
        np.testing.assert_allclose(model.weight[others, j], ridge, atol=1e-5)


@pytest.mark.parametrize("kind", ["ItemKNN", "EASE"])
def test_with_history_scores_other_events_with_the_same_fit(train, kind):
    model = getattr(models, kind)(train)
    history = Interactions(np.array([U - 1, U - 1]), np.array([0, 1]), None, train.user_ids, train.item_ids)
    other = model.with_history(history)
    cold = np.array([U - 1])
    assert (model.score(cold) == 0).all() and (other.score(cold) != 0).any()
    weight = model.weight if kind == "EASE" else model.similarity.T.toarray()
    np.testing.assert_allclose(other.score(cold).numpy()[0], weight[0] + weight[1], atol=1e-6)
    assert (other.score(np.array([0])) == 0).all() and (model.score(np.array([0])) != 0).any()
    with pytest.raises(DataError, match="ids"):
        model.with_history(Interactions(np.array([0]), np.array([0]), None, IdMap(["z"]), train.item_ids))


def test_lightgcn_scores_are_those_of_the_dense_formula(train):
    torch.manual_seed(0)
    model = models.LightGCN(train, dim=5, layers=3)
    a = np.zeros((U + N, U + N))
    a[:U, U:] = train.csr.toarray()
    a += a.T
    d = np.maximum(a.sum(1), 1) ** -0.5
    a = d[:, None] * a * d
    layer = torch.cat([model.users.weight, model.items.weight]).detach().double().numpy()
    total = layer
    for _ in range(3):
        layer = a @ layer
        total = total + layer
    total = total / 4
    np.testing.assert_allclose(model.score(np.arange(U)).numpy(), total[:U] @ total[U:].T, atol=1e-6)


def test_vbpr_is_its_formula_with_the_id_of_a_cold_item_absent(train):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    presence = np.ones((N, 2), bool)
    presence[3, 0] = presence[5, 1] = presence[6] = False
    table = FeatureTable({"image": rng.normal(size=(N, 3)), "text": rng.normal(size=(N, 2))}, presence)
    model = models.VBPR(train, features=table, dim=4, bias=True)
    torch.nn.init.normal_(model.item_bias)
    users, items, e = (p.weight.detach().numpy() for p in (model.users, model.items, model.project))
    beta, taste = model.item_bias.detach().numpy(), model.biases.weight.detach().numpy()[0]
    scores = model.score(np.arange(U)).numpy()
    for u in range(U):
        for i in range(N):
            f = np.concatenate([t[i] if presence[i, c] else 0 * t[i] for c, t in enumerate(table.tables.values())])
            known = train.item_counts[i] > 0
            expected = users[u, 4:] @ (e @ f) + taste @ f + known * (users[u, :4] @ items[i] + beta[i])
            assert scores[u, i] == pytest.approx(expected, abs=1e-5)
    assert train.item_counts[N - 1] == 0


def test_vbpr_reads_another_catalogue_through_the_same_maps(train):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    features = {"image": rng.normal(size=(N, 6)) + 2, "text": rng.normal(size=(N, 5))}
    catalog = Catalog(datasets.Dataset.from_dict({"item_id": train.item_ids.ids}), train.item_ids, features=features)
    model = models.VBPR(train, catalog=catalog, dim=4, feature_dim=3)
    before, users = model.score(np.arange(U)), np.arange(U)
    torch.testing.assert_close(model.with_catalog(catalog).score(users), before)
    blind = model.with_catalog(catalog.without("image")).with_catalog(catalog.without("image").without("text"))
    ids_only = model.users.weight[:, :4] @ (model.items.weight * (torch.tensor(train.item_counts) > 0)[:, None]).T
    torch.testing.assert_close(blind.score(users), ids_only.detach())
    shuffled = model.with_catalog(catalog.shuffled("image", seed=1))
    assert sorted(shuffled.frozen[:, 0].tolist()) == pytest.approx(sorted(model.frozen[:, 0].tolist()), abs=1e-5)
    assert not torch.allclose(shuffled.score(users), before)
    assert torch.equal(model.score(users), before)  # the model itself is as it was


def test_vbpr_without_content_is_refused(train):
    with pytest.raises(DataError, match="catalog= or features="):
        models.VBPR(train)


# -- the checkerboard: two groups of users and of items, each user takes most of its own group's items ---------------


def checkerboard(users=34, items=22, seed=0):
    rng = np.random.default_rng(seed)
    own = np.arange(users)[:, None] % 2 == np.arange(items) % 2
    taken = own & (rng.random((users, items)) < 0.6)
    u, i = np.nonzero(taken)
    x = Interactions(u, i, None, IdMap(range(users), what="user id"), IdMap(range(items), what="item id"))
    return x, own, taken


@pytest.mark.parametrize("kind", ["BPR", "LightGCN", "VBPR", "ItemKNN", "EASE"])
def test_unseen_items_of_the_own_group_come_first(kind):
    x, own, taken = checkerboard()
    torch.manual_seed(0)
    group = np.random.default_rng(1).normal(size=(x.n_items, 3)) * 0.1 + (np.arange(x.n_items) % 2)[:, None]
    options = {"dim": 2} if kind in ("BPR", "LightGCN", "VBPR") else {}
    if kind == "VBPR":
        options["features"] = FeatureTable({"image": group}, np.ones((x.n_items, 1), bool))
    model = getattr(models, kind)(x, **options)
    if model.trainable:
        optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
        rng = np.random.default_rng(0)
        for _ in range(20):
            for batch in epoch(x, batch_size=64, negatives=1, rng=rng):
                optimiser.zero_grad()
                sum(model.loss(batch).values()).backward()
                optimiser.step()
    scores = model.score(np.arange(x.n_users)).numpy()
    wins = []
    for u in range(x.n_users):
        mine, others = scores[u][own[u] & ~taken[u]], scores[u][~own[u]]
        wins.extend((mine[:, None] > others).ravel())
    assert np.mean(wins) > 0.99 and len(wins) > 500


def test_vbpr_ranks_a_cold_item_by_its_content():
    x, own, _ = checkerboard()
    keep = x.items < 20  # the last two items, one of each group, lose all their events
    train = x.select(keep)
    torch.manual_seed(0)
    features = FeatureTable({"image": np.stack([np.arange(22) % 2, np.arange(22) % 2 == 0], 1)}, np.ones((22, 1), bool))
    model = models.VBPR(train, features=features, dim=4)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    rng = np.random.default_rng(0)
    for _ in range(20):
        for batch in epoch(train, batch_size=64, negatives=1, rng=rng):
            optimiser.zero_grad()
            sum(model.loss(batch).values()).backward()
            optimiser.step()
    scores = model.score(np.arange(x.n_users)).numpy()[:, 20:]
    assert (scores.argmax(1) == own[:, 20:].argmax(1)).all()

"""Vector models under either loss: the softmax against a naive loop, absent IDs, users seen through other events."""

import numpy as np
import pytest
import torch

from mmllmrec import models
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.features.table import FeatureTable

U, N = 7, 11


@pytest.fixture
def train():
    cells = np.random.default_rng(0).choice((U - 1) * (N - 1), size=31, replace=False)
    ids = IdMap(range(U), what="user id"), IdMap(range(N), what="item id")
    return Interactions(cells // (N - 1), cells % (N - 1), None, *ids)


def features(twins=True):
    """Two modalities; items 3 and 4 show the same thing, item 5 has no picture, item 6 nothing at all."""
    rng = np.random.default_rng(1)
    tables, presence = {"image": rng.normal(size=(N, 6)), "text": rng.normal(size=(N, 5))}, np.ones((N, 2), bool)
    if twins:
        for t in tables.values():
            t[4] = t[3]
    presence[5, 0] = presence[6] = False
    return FeatureTable(tables, presence)


def build(kind, train, **options):
    torch.manual_seed(0)
    extra = {} if kind in ("BPR", "LightGCN") else {"features": features()}
    return getattr(models, kind)(train, dim=5, **extra, **options)


def naive(model, train, batch, same=None, present=None):
    """Each positive against the batch's distinct items, by the formula: cosine over temperature less log q."""
    users, items = (x.detach().double().numpy() for x in model.vectors(slice(None), slice(None)))
    scale = 10.0  # the start
    pool, n, total = sorted(set(batch.items.tolist())), len(batch.items), len(train)
    terms = []
    for u, i in zip(batch.users.tolist(), batch.items.tolist(), strict=True):
        if present is not None and not present[i]:
            continue
        logits = {}
        for j in pool:
            other = train.csr[u, j] > 0 or (same is not None and same[i] == same[j])
            if (j != i and other) or (present is not None and not present[j]):
                continue
            share = train.item_counts[j] / total
            cosine = users[u] @ items[j] / np.linalg.norm(users[u]) / np.linalg.norm(items[j])
            logits[j] = scale * cosine - np.log(1 - (1 - share) ** n)
        terms.append(np.log(sum(np.exp(v) for v in logits.values())) - logits[i])
    return np.mean(terms)


@pytest.mark.parametrize("kind", ["BPR", "LightGCN", "VBPR"])
def test_the_softmax_is_its_formula(train, kind):
    model = build(kind, train, loss="softmax")
    assert (model.loss_name, model.negatives) == ("softmax", 0)
    part = np.random.default_rng(2).permutation(len(train))[:13]
    batch = Batch(torch.tensor(train.users[part]), torch.tensor(train.items[part]))
    same = None if kind != "VBPR" else [3 if i == 4 else i for i in range(N)]
    assert model.loss(batch)["softmax"].item() == pytest.approx(naive(model, train, batch, same), abs=1e-5)
    assert model.log_candidates(batch) == pytest.approx(np.log(len(set(batch.items.tolist()))))


@pytest.mark.parametrize("kind", ["LightGCN", "VBPR"])
def test_an_item_that_is_not_there_is_neither_positive_nor_candidate(train, kind):
    model = build(kind, train, loss="softmax")
    part = np.random.default_rng(2).permutation(len(train))[:19]
    batch = Batch(torch.tensor(train.users[part]), torch.tensor(train.items[part]))
    present = torch.arange(N) % 3 > 0
    same = None if kind != "VBPR" else [3 if i == 4 else i for i in range(N)]
    loss = model.ranked(batch, model.vectors, present=present)
    assert loss.item() == pytest.approx(naive(model, train, batch, same, present), abs=1e-5)
    assert model.ranked(batch, model.vectors, present=torch.zeros(N, dtype=torch.bool)) == 0


def test_scores_are_cosines_over_the_temperature_which_is_bounded(train):
    model = build("BPR", train, loss="softmax")
    with torch.no_grad():
        model.log_scale.fill_(np.log(20.0))
    p, q = model.users.weight.detach().numpy(), model.items.weight.detach().numpy()
    cosines = (p @ q.T) / np.linalg.norm(p, axis=1)[:, None] / np.linalg.norm(q, axis=1)
    scores = model.score(np.arange(U)).numpy()
    np.testing.assert_allclose(scores[: U - 1, : N - 1], 20 * cosines[: U - 1, : N - 1], atol=1e-4)
    with torch.no_grad():
        model.log_scale.fill_(50.0)
    assert model.score(np.arange(U)).abs().max() < 100


@pytest.mark.parametrize(("kind", "cold_item_is_zero"), [("BPR", True), ("LightGCN", True), ("VBPR", False)])
def test_an_absent_id_is_a_zero_vector(train, kind, cold_item_is_zero):
    scores = build(kind, train, loss="softmax").score(np.arange(U)).numpy()
    assert (scores[U - 1] == 0).all() and (scores[: U - 1, : N - 1] != 0).all(axis=1).sum() >= U - 2
    assert (scores[:, N - 1] == 0).all() == cold_item_is_zero


def test_another_loss_is_refused(train):
    with pytest.raises(DataError, match="loss='hinge'"):
        models.BPR(train, loss="hinge")
    with pytest.raises(DataError, match="bias=True"):
        build("VBPR", train, loss="softmax", bias=True)


# -- other events ----------------------------------------------------------------------------------------------------


def revealed(train, *items):
    """Training events and some of the last user, who has none there."""
    more = Interactions(np.full(len(items), U - 1), np.array(items), None, train.user_ids, train.item_ids)
    return train.union(more)


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
@pytest.mark.parametrize("kind", ["BPR", "VBPR"])
def test_a_user_with_other_events_is_the_mean_of_its_items(train, kind, loss):
    model = build(kind, train, loss=loss)
    before = model.score(np.arange(U))
    other = model.with_history(revealed(train, 2, 7))
    _, items = model.embed()
    mean = (items[2] + items[7]) / 2
    expected = mean if loss == "bpr" else 10 * mean / mean.norm()
    torch.testing.assert_close(other.score(np.arange(U))[U - 1], items @ expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(other.score(np.arange(U))[: U - 1], before[: U - 1])  # nobody else's events changed
    assert torch.equal(model.score(np.arange(U)), before)  # the model itself is as it was
    none = model.with_history(train.select(train.users != 0))
    assert (none.score(np.array([0])) == 0).all()
    assert torch.equal(model.with_history(train).score(np.arange(U)), before)


def test_biases_stay_with_a_folded_user(train):
    model = build("VBPR", train, bias=True)
    torch.nn.init.normal_(model.item_bias)
    users, items = model.with_history(revealed(train, 2)).embed()
    assert users[U - 1, -1] == 1 and torch.equal(users[U - 1, :-1], items[2, :-1])


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
def test_lightgcn_scores_other_events_on_their_graph(train, loss):
    model = build("LightGCN", train, loss=loss)
    history = revealed(train, 2, 7)
    other = model.with_history(history)
    twin = models.LightGCN(history, dim=5, loss=loss)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():  # what training never moved is absent
        twin.users.weight[U - 1] = twin.items.weight[N - 1] = 0
    torch.testing.assert_close(other.score(np.arange(U)), twin.score(np.arange(U)))
    assert (other.score(np.array([U - 1]))[0, : N - 1] != 0).all() and (other.score(np.arange(U))[:, N - 1] == 0).all()
    with pytest.raises(DataError, match=r"LightGCN\.with_history"):
        model.with_history(Interactions(np.array([0]), np.array([0]), None, IdMap(["z"]), train.item_ids))

"""Any encoder x fusion x loss: every part trains in every sensible company, and what has no meaning is refused."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mmllmrec as mm
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import epoch
from mmllmrec.encoders.views import keep_edges, keep_nodes
from mmllmrec.features.table import FeatureTable
from mmllmrec.fusion import FUSIONS
from mmllmrec.models import composed
from mmllmrec.models.base import Recommender
from mmllmrec.models.composed import ENCODERS, EXTRAS, LOSSES, TIMINGS, USED_BY, Composed, Encoder, Fusion
from tests.planted import few

U, N, D = 7, 11, 5


@pytest.fixture(scope="module")
def shop():
    data = mm.load_dataset("atelier", scale=0.06)
    split = mm.splits.cold_items(data, fraction=0.2, seed=0)
    return split, FeatureTable.from_catalog(split.catalog, fit_on=split.warm_items).whiten(split.warm_items, 5)


def built(shop, **options):
    split, features = shop
    torch.manual_seed(0)
    return Composed(split.train, features=features, dim=6, **options)


def small(kind):
    return Encoder(kind, neighbours=3) if "neighbours" in Encoder(kind).options else Encoder(kind)


def gradients(model, shop):
    """Every term finite, and every parameter reached by one of them."""
    model.begin_epoch(np.random.default_rng(0))
    batch = next(epoch(shop[0].train, batch_size=64, negatives=model.negatives, rng=np.random.default_rng(0)))
    terms = model.loss(batch)
    assert all(t.shape == () and torch.isfinite(t) for t in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    users, items = model.embed()
    assert torch.isfinite(users).all() and torch.isfinite(items).all()
    return set(terms), silent


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("method", list(FUSIONS))
@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_meets_every_fusion(shop, kind, timing, method):
    model = built(shop, encoder=small(kind), fusion=Fusion(timing, method))
    terms, silent = gradients(model, shop)
    # what is equal for a positive and its negative, such as a bias, has no gradient under BPR
    # an expert that no item of the batch chose has none either
    assert terms == {"bpr", "reg"} and not {n for n in silent if "bias" not in n and "experts" not in n}
    cold = torch.from_numpy(~shop[0].warm_items)
    assert (model.embed()[1][cold].abs().sum(1) > 0).float().mean() > 0.9, "cold items stand on their content"


@pytest.mark.parametrize("kind", ["residual", "hypergraph"])
def test_an_absent_channel_stays_absent_in_late_fusion(shop, kind):
    model = built(shop, encoder=small(kind), fusion=Fusion("late", "mean")).eval()
    present = model.encode().parts["present"]
    cold = torch.from_numpy(~shop[0].warm_items)
    assert torch.equal(present[cold], model.channels()[1][cold]) and not present[cold].all()
    users = model.encode().users[~model.known]
    assert (users == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("timing", TIMINGS)
def test_every_loss_trains(shop, loss, timing):
    model = built(shop, loss=loss, fusion=Fusion(timing, "gate"), negatives=3)
    terms, silent = gradients(model, shop)
    assert loss in terms and not {n for n in silent if "bias" not in n}


@pytest.mark.parametrize("name", list(EXTRAS))
def test_every_extra_has_a_gradient_and_is_weighed(shop, name):
    model = built(shop, extras={name: 0.5})
    terms, _ = gradients(model, shop)
    assert name in terms
    torch.manual_seed(1)
    batch = next(epoch(shop[0].train, batch_size=64, negatives=1, rng=np.random.default_rng(0)))
    value = model.loss(batch)[name]
    model.extras[name] = 1.0
    torch.manual_seed(1)
    torch.testing.assert_close(model.loss(batch)[name], 2 * value)


def test_a_composed_model_is_saved_with_its_parts(shop, tmp_path):
    split, _ = shop
    model = built(shop, encoder=Encoder("item graph", neighbours=3), fusion=Fusion("late", "attentive"), loss="softmax")
    folder = model.save_pretrained(tmp_path / "model")
    loaded = Recommender.from_pretrained(folder, catalog=split.catalog)
    assert loaded.name == "item graph, late attentive, softmax"
    assert torch.equal(loaded.score(np.arange(5)), model.score(np.arange(5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": Encoder("gnn")}, "encoder kind 'gnn'"),
        ({"fusion": Fusion("later")}, "timing 'later'"),
        ({"fusion": Fusion("early", "vote")}, "method 'vote'"),
        ({"loss": "l2"}, "loss='l2'"),
        ({"extras": {"rotation": 1.0}}, "extras 'rotation'"),
        ({"fusion": Fusion("early", "heuristic"), "ids": False}, "ids=False"),
        ({"loss": "adaptive hinge"}, "give 2 or more"),
        ({"encoder": Encoder("mf"), "extras": {"edges": 0.1}}, "has none to drop from"),
        ({"extras": {"edges": 0.1, "nodes": 0.1}}, "choose one"),
        ({"encoder": Encoder("mf", layers=3)}, "layers=3: the encoder 'mf' has no use for it"),
        ({"loss": "full softmax", "temperature": 0.1}, "temperature=0.1: it is of the extras"),
        ({"extras": {"noise": 0.1}, "dropout": 0.5}, "dropout=0.5: it is of the extras"),
        *(
            ({"encoder": Encoder(kind, neighbours=3)}, f"neighbours=3: the encoder '{kind}' has no use for it")
            for kind in ("mf", "lightgcn", "residual", "spectral")
        ),
    ],
)
def test_what_has_no_meaning_is_refused(shop, options, message):
    with pytest.raises(DataError, match=message):
        built(shop, **options)


def test_late_fusion_of_one_channel_is_refused(shop):
    split, features = shop
    with pytest.raises(DataError, match="nothing to fuse"):
        Composed(split.train, features=features.only(["image"]), ids=False, fusion=Fusion("late"))
    with pytest.raises(DataError, match="two modalities"):
        Composed(split.train, features=features.only(["image"]), extras={"modalities": 0.1})


# -- formulas, against dense matrices and plain loops ------------------------------------------------------------------


@pytest.fixture(scope="module")
def train() -> Interactions:
    """The last user and the last item have no event."""
    return few(U, N)


@pytest.fixture(scope="module")
def features() -> FeatureTable:
    """Item 2 shows nothing, items 3 and 4 lack something."""
    rng = np.random.default_rng(1)
    presence = np.ones((N, 3), dtype=bool)
    presence[2], presence[3, 1], presence[4, :2] = False, False, False
    widths = {"image": 13, "text": 17, "audio": 3}
    return FeatureTable({m: rng.normal(size=(N, width)) for m, width in widths.items()}, presence)


def made(train, features, **options):
    torch.manual_seed(0)
    return Composed(train, features=features, dim=D, **options)


def batch_of(train, negatives=1):
    return next(epoch(train, batch_size=13, negatives=negatives, rng=np.random.default_rng(0)))


def same(value, naive, module):
    """Equal, and so are the gradients of all parameters."""
    torch.testing.assert_close(value, naive)
    weights, squares = list(module.parameters()), (value.square().sum(), naive.square().sum())
    first, second = (torch.autograd.grad(x, weights, retain_graph=True, allow_unused=True) for x in squares)
    assert any(g is not None and g.abs().sum() > 0 for g in first)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(*(torch.zeros(()) if g is None else g for g in (a, b)))


def dense(train, keep=slice(None)):
    """A of the events (U + N, U + N), as D^-1/2 A D^-1/2 and as D^-1 A."""
    a = torch.zeros(U + N, U + N)
    for u, i in zip(train.users[keep], train.items[keep], strict=True):
        a[u, U + i] = a[U + i, u] = 1.0
    degree = a.sum(1).clamp(min=1)
    return a / (degree[:, None] * degree[None]).sqrt(), a / degree[:, None]


def light(a, users, items, layers=2):
    """The mean of x, A x, ..., cut into users and items."""
    x = [torch.cat([users, items])]
    for _ in range(layers):
        x.append(a @ x[-1])
    return torch.stack(x).mean(0).split([U, N])


def nodes():
    """Users and items before an encoder; the user without events and an item are zero."""
    torch.manual_seed(1)
    users, items = torch.randn(U, D), torch.randn(N, D)
    users[U - 1], items[2] = 0.0, 0.0
    return users, items


def test_the_residual_encoder_is_its_formula(train):
    module, (users, items), (_, means) = composed.Residual(train, D, 2), nodes(), dense(train)
    start = x = torch.cat([users, items])
    for w, v in zip(module.neighbour, module.own, strict=True):
        x = F.leaky_relu(means @ (x @ w.weight.T)) + F.leaky_relu(x @ v.weight.T + v.bias) + start
    x = torch.stack([x[n] if means[n].any() or start[n].any() else torch.zeros(D) for n in range(U + N)])
    same(torch.cat(module(users, items)), x, module)
    assert (x[U - 1] == 0).all() and (x[U + 2] != 0).all() and (x[U + N - 1] != 0).all()


def test_the_routed_encoder_weighs_events_by_what_routing_makes_of_them(train):
    module, (users, items), taken = composed.Routed(train, 2), nodes(), train.csr.toarray() > 0
    users, items = users.requires_grad_(), items.requires_grad_()
    p, f = F.normalize(users), F.normalize(items)

    def affinity(u, near):  # of a user's items
        return torch.softmax(f[near] @ p[u], 0)

    for _ in range(3):
        drawn = [p[u] + affinity(u, taken[u]) @ f[taken[u]] for u in range(U)]
        p = F.normalize(torch.stack(drawn))
    a = torch.zeros(U + N, U + N)
    for u in range(U):
        a[u, U + np.flatnonzero(taken[u])] = affinity(u, taken[u])
    for i in range(N):
        near = np.flatnonzero(taken[:, i])
        a[U + i, near] = torch.softmax(p[near] @ f[i], 0)
    x = torch.cat([users, items])
    expected, value = x + a @ x + a @ a @ x, torch.cat(module(users, items))
    torch.testing.assert_close(value, expected)
    mine, theirs = (torch.autograd.grad(y.square().sum(), [users, items]) for y in (value, expected))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_hypergraph_encoder_is_its_formula(train):
    module, (users, items) = composed.Hypergraph(train, D, 3, 2), nodes()
    out_users, out_items = light(dense(train)[0], users, items)
    edges = torch.zeros(3, D)
    for x, out in zip(items, out_items, strict=True):
        if x.any():
            edges = edges + torch.softmax(module.member.weight @ x, dim=0)[:, None] * out / N
    expected = []
    for x, out in zip(torch.cat([users, items]), torch.cat([out_users, out_items]), strict=True):
        met = torch.softmax(module.member.weight @ x, dim=0) @ edges
        expected.append(out + met / met.norm() if x.any() else out)
    same(torch.cat(module(users, items)), torch.stack(expected), module)


def test_the_spectral_encoder_is_a_circular_convolution_and_light_gcn(train):
    module, (users, items) = composed.Filtered(train, D, 2), nodes()
    kernel = torch.fft.irfft(torch.view_as_complex(module.filter.kernel), n=D)
    turned = [sum(items[:, e] * kernel[(d - e) % D] for e in range(D)) for d in range(D)]
    same(torch.cat(module(users, items)), torch.cat(light(dense(train)[0], users, torch.stack(turned, 1))), module)


def test_companions_stand_beside_users(train, features):
    module, (users, items) = made(train, features, encoder=Encoder("user graph", neighbours=2)).encoders[0], nodes()
    out_users, out_items = light(dense(train)[0], users, items)
    taken = torch.from_numpy(train.csr.toarray() > 0).float()
    expected = []
    for u in range(U):
        common = [(-float(taken[u] @ taken[v]), v) for v in range(U) if v != u and taken[u] @ taken[v] > 0]
        near = sorted(common)[:2]
        total = sum(math.exp(-c) for c, _ in near)
        expected.append(out_users[u] + sum(math.exp(-c) / total * out_users[v] for c, v in near))
    torch.testing.assert_close(torch.cat(module(users, items)), torch.cat([torch.stack(expected), out_items]))


def alike(features, k):
    """Each item's k nearest in each modality, itself included: D^-1/2 A D^-1/2, the mean over what the item has."""
    graphs = []
    for column, table in enumerate(torch.from_numpy(t.copy()) for t in features.tables.values()):
        here, a = np.flatnonzero(features.presence[:, column]).tolist(), torch.zeros(N, N)
        for i in here:
            for j in sorted(here, key=lambda j: -float(F.cosine_similarity(table[i], table[j], dim=0)))[:k]:
                a[i, j] = 1.0
        degree = a.sum(1).clamp(min=1)
        graphs.append(a / (degree[:, None] * degree[None]).sqrt())
    has = torch.from_numpy(features.presence.copy()).sum(1).clamp(min=1)
    return sum(graphs) / has[:, None]


@pytest.mark.parametrize("timing", TIMINGS)
def test_alike_items_stand_beside_light_gcn(train, features, timing):
    model = made(train, features, encoder=Encoder("item graph", neighbours=3), fusion=Fusion(timing, "sum"))
    near, (a, _), (rows, present) = alike(features, 3), dense(train), model.channels()
    rows, users = rows * present[..., None], [table * model.known[:, None] for table in model.tables_of_users]
    starts = rows.unbind(1) if timing == "late" else [rows.sum(1)]
    each = [light(a, own, items) for own, items in zip(users, starts, strict=True)]
    out = sum(i for _, i in each) + near @ sum(starts)
    same(torch.cat(model()), torch.cat([sum(u for u, _ in each) / len(each), out]), model)


@pytest.mark.parametrize("timing", TIMINGS)
def test_learned_graphs_are_mixed_by_weights_over_what_an_item_has(train, features, timing):
    model = made(train, features, encoder=Encoder("learned item graph", neighbours=3), fusion=Fusion(timing, "sum"))
    model.mixture.data = torch.tensor([0.5, -1.0, 2.0])
    (a, _), (rows, present) = dense(train), model.channels()
    rows, users = rows * present[..., None], [table * model.known[:, None] for table in model.tables_of_users]
    starts = rows.unbind(1) if timing == "late" else [rows.sum(1)]
    each = [light(a, own, items) for own, items in zip(users, starts, strict=True)]
    here = torch.from_numpy(features.presence.copy())
    odds = model.mixture.exp() * here
    shares = odds / odds.sum(1, keepdim=True).clamp(min=1e-12)
    views = model.learned(model, [sum(starts)] * 3)
    near = sum(shares[:, m, None] * view for m, view in enumerate(views))
    out = sum(i for _, i in each) + near
    same(torch.cat(model()), torch.cat([sum(u for u, _ in each) / len(each), out]), model)
    assert (near[2] == 0).all() and (near[4] != 0).any()


def test_a_learned_graph_is_chosen_once_an_epoch(train, features):
    model = made(train, features, encoder=Encoder("learned item graph", neighbours=3))
    before = model.learned.near0.clone()
    for layer in model.learned.maps:
        torch.nn.init.normal_(layer.weight)
    model.begin_epoch(np.random.default_rng(0), resumed=True)
    assert torch.equal(model.learned.near0, before)
    model.begin_epoch(np.random.default_rng(0))
    assert not torch.equal(model.learned.near0, before) and not any("near" in k for k in model.weights())


@pytest.mark.parametrize("timing", TIMINGS)
def test_the_graph_of_alike_items_is_of_the_features_at_hand(shop, timing):
    model = built(shop, encoder=Encoder("item graph", neighbours=3), fusion=Fusion(timing))
    before = model.item_graph.sparse()
    catalog = shop[0].catalog
    for other in (catalog.shuffled("image", seed=1), catalog.without("image"), catalog.randomised("text", seed=1)):
        read = model.with_catalog(other)
        fresh = built((shop[0], read.features), encoder=Encoder("item graph", neighbours=3), fusion=Fusion(timing))
        assert (read.item_graph.sparse() != fresh.item_graph.sparse()).nnz == 0
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh.score(np.arange(5)), read.score(np.arange(5)))
        assert (read.item_graph.sparse() != before).nnz and (model.item_graph.sparse() != before).nnz == 0


@pytest.mark.parametrize("method", list(FUSIONS))
def test_matrix_factorisation_is_the_same_early_and_late(train, features, method):
    late, early = (made(train, features, encoder=Encoder("mf"), fusion=Fusion(t, method)) for t in ("late", "early"))
    state = {k: v for k, v in late.state_dict().items() if "tables_of_users" not in k}
    mean = torch.stack(list(late.tables_of_users)).mean(0)
    early.load_state_dict(state | {"tables_of_users.0": mean})
    torch.testing.assert_close(early.score(np.arange(U)), late.score(np.arange(U)))


def nce(a, b, temperature=0.2):
    """InfoNCE of rows, both ways."""
    total = 0.0
    for one, other in ((a, b), (b, a)):
        for n in range(len(one)):
            each = [F.cosine_similarity(one[n], other[m], dim=0) / temperature for m in range(len(one))]
            total = total + (torch.logsumexp(torch.stack(each), 0) - each[n]) / (2 * len(one))
    return total


def pair(batch, one, other):
    """InfoNCE of a batch's distinct users and of its distinct items, added up."""
    both = zip((batch.users, batch.items), one, other, strict=True)
    return sum(nce(a[which.unique()], b[which.unique()]) for which, a, b in both)


def apart(a, b):
    """The mean of 1 - cos, b as it is."""
    return sum(1 - F.cosine_similarity(x, y.detach(), dim=0) for x, y in zip(a, b, strict=True)) / len(a)


def modalities(model, batch, encoded):
    rows, present = model.channels()
    total = 0.0
    for a, b in ((1, 2), (1, 3), (2, 3)):
        both = [i for i in batch.items.unique() if present[i, a] and present[i, b]]
        total = total + nce(rows[both, a], rows[both, b])
    return total


def masking(model, batch, encoded):
    rows = encoded.items[batch.items.unique()]
    return apart(F.dropout(rows, 0.3) @ model.predictor.weight.T + model.predictor.bias, rows)


def bootstrap(model, batch, encoded):
    u, i = encoded.users[batch.users], encoded.items[batch.items]
    of_users, of_items = F.dropout(u, 0.3), F.dropout(i, 0.3)
    told_u, told_i = (x @ model.predictor.weight.T + model.predictor.bias for x in (u, i))
    return (apart(told_u, of_items) + apart(told_i, of_users)) / 2


def views(model, batch, encoded, keep):
    rng = np.random.default_rng(5)
    kept = [keep(model.train_data, 0.7, rng=rng) for _ in range(2)]
    rows, present = model.channels()
    users, items = model.tables_of_users[0] * model.known[:, None], (rows * present[..., None]).sum(1)
    return pair(batch, *(light(dense(model.train_data, k)[0], users, items) for k in kept))


def noise(model, batch, encoded):
    def moved(x):
        u = torch.rand_like(x)
        return x + 0.1 * torch.sign(x) * u / u.norm(dim=1, keepdim=True)

    one, other = ((moved(encoded.users), moved(encoded.items)) for _ in range(2))
    return pair(batch, one, other)


def neighbours(model, batch, encoded):
    ends = encoded.users, encoded.items
    return pair(batch, ends, (dense(model.train_data)[0] @ torch.cat(ends)).split([U, N]))


NAIVE = {
    "modalities": modalities,
    "masking": masking,
    "bootstrap": bootstrap,
    "edges": lambda *of: views(*of, keep_edges),
    "nodes": lambda *of: views(*of, keep_nodes),
    "noise": noise,
    "neighbours": neighbours,
}


@pytest.mark.parametrize("name", list(EXTRAS))
def test_every_extra_is_its_formula(train, features, name):
    options = {"dropout": 0.3} if name in USED_BY["dropout"] else {}
    model, batch = made(train, features, extras={name: 1.0}, **options), batch_of(train)
    model.begin_epoch(np.random.default_rng(5))
    encoded = model.encode()
    found = []
    for term in (lambda *of: model.auxiliary(*of[1:])[name], NAIVE[name]):
        torch.manual_seed(3)  # the same dropout and the same noise
        found.append(term(model, batch, encoded))
    same(*found, model)


def ranked(name, model, batch):
    """A loss of vectors, pair by pair."""
    users, items = model()
    u, i, j = users[batch.users], items[batch.items], items[batch.negatives] if batch.negatives is not None else None
    size = len(u)
    if name == "full softmax":
        total = 0.0
        for b, (user, item) in enumerate(zip(batch.users.tolist(), batch.items.tolist(), strict=True)):
            others = [k for k in range(N) if k == item or not model.train_data.csr[user, k]]
            total = total + torch.logsumexp(items[others] @ u[b], 0) - u[b] @ i[b]
        return total / size
    if name == "alignment":
        u, i = (torch.stack([row / row.norm() for row in x]) for x in (u, i))
        total = sum((a - b).square().sum() for a, b in zip(u, i, strict=True)) / size
        for x in (u, i):
            pairs = [torch.exp(-2 * (x[a] - x[b]).square().sum()) for a in range(size) for b in range(a)]
            total = total + torch.log(sum(pairs) / len(pairs)) / 2
        return total
    total = 0.0
    for b in range(size):
        positive, negative = u[b] @ i[b], torch.stack([u[b] @ other for other in j[b]])
        total = total + {
            "bpr": lambda p, n: -torch.log(torch.sigmoid(p - n)).mean(),
            "bce": lambda p, n: -(torch.log(torch.sigmoid(p)) + torch.log(1 - torch.sigmoid(n)).sum()) / (1 + len(n)),
            "mse": lambda p, n: ((1 - p) ** 2 + (n**2).sum()) / (1 + len(n)),
            "hinge": lambda p, n: (1 - p + n).clamp(min=0).mean(),
            "adaptive hinge": lambda p, n: (1 - p + n.max()).clamp(min=0),
        }[name](positive, negative)
    return total / size


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "softmax"])
def test_every_loss_is_its_formula(train, features, name):
    model = made(train, features, loss=name, negatives=3, reg=0.1)
    for table in (model.item_ids, *model.tables_of_users):
        torch.nn.init.normal_(table)  # far from equal scores, where signs hardly show
    batch = batch_of(train, model.negatives)
    terms = model.loss(batch)
    same(terms.pop(name), ranked(name, model, batch), model)
    if model.negatives:
        u, i, j = model.vectors(batch.users, batch.items, batch.negatives)
        same(terms.pop("reg"), 0.1 * sum(x.square().sum().sqrt() for x in (u, i, j)) / len(u), model)
    assert not terms
    if name == "full softmax":
        assert model.log_candidates(batch) == pytest.approx(math.log(N))

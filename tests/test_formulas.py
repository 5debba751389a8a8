"""Encoders and terms of the literature's systems, written again from their docstrings: dense matrices and plain loops.

Values, and the gradients of all parameters, which are drawn anew: none stands at the zero or the one it starts at.

Legend: U users, V items, N = U + V nodes, M modalities, D width.
"""

from copy import deepcopy
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmllmrec import models
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import epoch
from mmllmrec.encoders.graph import normalised_adjacency
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.pgl import principal
from tests.planted import few

U, V, D = 7, 11, 5
N = U + V
WIDE = {"dtype": torch.float64}


@pytest.fixture(scope="module")
def train() -> Interactions:
    """Seven users and eleven items; the last user and the last two items have no event."""
    return few(U, V, new=2)


@pytest.fixture(scope="module")
def features() -> FeatureTable:
    """Two modalities; item 2 has none, item 3 the first alone; of the two new ones the first has the second alone."""
    rng = np.random.default_rng(1)
    present = np.ones((V, 2), dtype=bool)
    present[[2, V - 1]], present[3, 1], present[V - 2, 0] = False, False, False
    return FeatureTable({"image": rng.normal(size=(V, 4)), "text": rng.normal(size=(V, 6))}, present)


@pytest.fixture(scope="module")
def batch(train):
    found = next(epoch(train, batch_size=13, negatives=1, rng=np.random.default_rng(0)))
    assert {2, 3} <= set(found.items.tolist()) and len(found.items.unique()) < 13
    return found


def drawn(kind, train, **options):
    """A model whose parameters, all of them, are normal."""
    torch.manual_seed(0)
    model = kind(train, dim=D, **options).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


def agree(model, ours, naive, *, near=1e-5):
    """The same values, and the same gradients of all parameters, to ``near`` of the largest entry."""
    own, options = list(model.parameters()), {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    grads = [torch.autograd.grad(x.square().sum(), own, **options) for x in (ours, naive)]
    assert any(wanted.any() for wanted in grads[1])
    for found, wanted in [(ours.detach(), naive.detach()), *zip(*grads, strict=True)]:
        torch.testing.assert_close(found, wanted, rtol=near, atol=near * float(wanted.abs().max()) + 1e-9)


def agree_all(model, encoded, users, items):
    agree(model, torch.cat([encoded.users, encoded.items]), torch.cat([users, items]))


def taken(train):
    return torch.tensor(train.csr.toarray() > 0)


def normalised(a):
    """D^-1/2 A D^-1/2 with D the sums of rows; a row without any stays empty."""
    half = torch.stack([row.sum() ** -0.5 if row.sum() > 0 else row.sum() for row in a])
    return half[:, None] * a * half


def adjacency(r):
    """The normalised graph of users and items, N x N, of who took what, U x V."""
    a = torch.zeros(N, N, **WIDE)
    for u, i in r.nonzero().tolist():
        a[u, U + i] = a[U + i, u] = 1.0
    return normalised(a)


def light(r, x, layers):
    """LightGCN: the mean of x, A x, A A x, ..."""
    a, total = adjacency(r), x
    for _ in range(layers):
        x = a @ x
        total = total + x
    return total / (layers + 1)


def ids(model, r):
    """Embeddings of all nodes, zero without an event."""
    return torch.cat([model.users.weight * r.any(1)[:, None], model.items.weight * r.any(0)[:, None]])


def unit(x):
    return F.normalize(x, dim=1)


def contents(features):
    """The rows (V, F_m) of each modality, and which items have it (V,)."""
    here = torch.tensor(features.presence)
    return [(torch.tensor(table).double(), here[:, m]) for m, table in enumerate(features.tables.values())]


def tables(model, features):
    """``contents``, or in place of the features the tables that a model trains."""
    each = contents(features)
    own = getattr(model, "tables", [x for x, _ in each])
    return [(x, here) for x, (_, here) in zip(own, each, strict=True)]


def through(layer, x, here):
    """W x + b, and nothing where there is no x."""
    return torch.stack([layer(row) if there else torch.zeros(D, **WIDE) for row, there in zip(x, here, strict=True)])


def bent(layers, x):
    """W_2 act(W_1 x)."""
    return layers[2](F.leaky_relu(layers[0](x)))


def likeness(x):
    return unit(x) @ unit(x).T


def nearest(cosine, here, k, *, weighted=True):
    """A normalised graph of each item's k nearest of those here, itself too; edges are cosines from 0 up, or 1."""
    near = torch.zeros(V, V, **WIDE)
    for i in here.nonzero()[:, 0].tolist():
        near[i, sorted(here.nonzero()[:, 0].tolist(), key=lambda j: -float(cosine[i, j].detach()))[:k]] = 1.0
    return normalised(near * cosine.clamp(min=0) if weighted else near)


def alike(features, k, shares):
    """The frozen graph of alike items: a row is the mean of an item's rows in the graphs of what it has."""
    graphs = [nearest(likeness(x), here, k, weighted=False) for x, here in contents(features)]
    s = torch.zeros(V, V, **WIDE)
    for i, has in enumerate(features.presence):
        for m in has.nonzero()[0]:
            s[i] += shares[m] / sum(shares[n] for n in has.nonzero()[0]) * graphs[m][i]
    return s


def companions(r, k):
    """Each user's k others who took most of the same, the first of equals, by the softmax of how much."""
    c = torch.zeros(U, U, **WIDE)
    for u in range(U):
        common = {v: float((r[u] & r[v]).sum()) for v in range(U) if v != u and (r[u] & r[v]).any()}
        best = sorted(common, key=lambda v: (-common[v], v))[:k]
        c[u, best] = torch.softmax(torch.tensor([common[v] for v in best], **WIDE), 0)
    return c


def info_nce(one, other, temperature, *, within=False):
    """Each row of ``one`` is to find its own among those of ``other``, and among the others of ``one`` where told."""
    one, other, costs = unit(one), unit(other), []
    for n, row in enumerate(one):
        against = [row @ x / temperature for x in other]
        against += [row @ x / temperature for m, x in enumerate(one) if within and m != n]
        costs.append(torch.logsumexp(torch.stack(against), 0) - row @ other[n] / temperature)
    return torch.stack(costs).mean()


def apart(x, y):
    return 1 - F.cosine_similarity(x, y, dim=0)


def distinct(indices, here=None):
    return [n for n in sorted(set(indices.tolist())) if here is None or here[n]]


def test_micro_fuses_learned_graphs_by_attention_and_draws_each_to_what_is_fused(train, features, batch):
    options = {"neighbours": 3, "keep": 0.3, "item_layers": 2, "contrast_weight": 0.7, "temperature": 0.4}
    model = drawn(models.MICRO, train, features=features, **options).eval()
    r, views, fused = taken(train), [], []
    start = ids(model, r)
    for (x, here), layer in zip(contents(features), model.learned.maps, strict=True):
        a = 0.3 * nearest(likeness(x), here, 3) + 0.7 * nearest(likeness(layer(x)), here, 3)
        views.append(a @ a @ start[U:])
    inner, _, query = model.attention
    for i, has in enumerate(features.presence):
        own = torch.stack([view[i] for view in views])[has.nonzero()[0]]
        w = [query.weight[0] @ torch.tanh(inner.weight @ h + inner.bias) for h in own]
        fused.append(torch.softmax(torch.stack(w), 0) @ own if w else torch.zeros(D, **WIDE))
    h, graph, encoded = torch.stack(fused), light(r, start, 2), model.encode()
    agree_all(model, encoded, graph[:U], graph[U:] + unit(h))
    total = 0.0
    for (_, here), view in zip(contents(features), views, strict=True):
        some = distinct(batch.items, here)
        total = total + info_nce(view[some], h[some], 0.4, within=True)
    agree(model, model.auxiliary(batch, encoded)["contrast"], 0.7 * total)


def test_dragon_joins_modalities_and_adds_alike_users_and_items(train, features):
    options = {"hidden": 7, "neighbours": 3, "shares": (0.25, 0.75), "companions": 2, "item_layers": 2}
    model = drawn(models.DRAGON, train, features=features, **options)
    r, s, found = taken(train), alike(features, 3, (0.25, 0.75)), []
    for (x, here), encoder in zip(contents(features), model.encoders, strict=True):
        users, items = unit(encoder.preference) * r.any(1)[:, None], unit(bent(encoder.map, x)) * here[:, None]
        found.append(3 * light(r, torch.cat([users, items]), 2))  # a sum over layers, where LightGCN has the mean
    users = torch.stack([torch.cat([model.personal[u, m] * x[u] for m, x in enumerate(found)]) for u in range(U)])
    items = torch.cat([x[U:] for x in found], dim=1)
    agree_all(model, model.encode(), users + companions(r, 2) @ users, items + s @ s @ items)


def test_pgl_trains_on_the_sampled_events_and_scores_with_all(train, features, batch):
    options = {"neighbours": 3, "shares": (0.25, 0.75), "prune": 0.5, "dropout": 0.3, "contrast_weight": 0.7}
    model = drawn(models.PGL, train, features=features, temperature=0.4, **options)
    model.begin_epoch(np.random.default_rng(0))
    sample = torch.tensor(model.sampled.sparse().toarray()[:U, U:] > 0)
    assert sample.sum() == round(0.5 * len(train)) and not (sample & ~taken(train)).any()
    users = torch.cat(list(model.preferences), dim=1) * taken(train).any(1)[:, None]
    each = zip(contents(features), model.maps, strict=True)
    items = torch.cat([unit(through(layer, x, here)) for (x, here), layer in each], dim=1)
    for training, r in ((True, sample), (False, taken(train))):
        graph = light(r, torch.cat([users, items]), 2)
        out = graph[:U], graph[U:] + alike(features, 3, (0.25, 0.75)) @ items
        agree_all(model, model.train(training).encode(), *out)
    torch.manual_seed(1)
    found = model.auxiliary(batch, model.encode())["contrast"]
    torch.manual_seed(1)
    rows = out[0][distinct(batch.users)], out[1][distinct(batch.items)]
    naive = [info_nce(F.dropout(x, 0.3), F.dropout(x, 0.3), 0.4) for x in rows]
    agree(model, found, 0.7 * (naive[0] + naive[1]) / 2)  # the mean of both, as published


def test_cohesion_refines_content_by_ids_before_the_graph(train, features):
    options = {"hidden": 7, "neighbours": 3, "shares": (0.25, 0.75), "companions": 2, "item_layers": 2}
    model = drawn(models.COHESION, train, features=features, **options)
    r, s, found = taken(train), alike(features, 3, (0.25, 0.75)), []
    warm, e = r.any(0), model.items.weight * r.any(0)[:, None]
    for (x, here), layers, users in zip([(e, warm), *contents(features)], model.maps, model.preferences, strict=True):
        f = bent(layers, x) * here[:, None]
        rows = [((e[i] ** 2 + f[i] ** 2) / 2) ** 0.5 if here[i] or warm[i] else 0 * e[i] for i in range(V)]
        layer = total = start = unit(torch.cat([users * r.any(1)[:, None], torch.stack(rows)]))
        for _ in range(2):
            passed = adjacency(r) @ layer
            layer = torch.stack([F.cosine_similarity(passed[n], start[n], dim=0) * passed[n] for n in range(N)])
            total = total + layer
        found.append(total)
    nodes = torch.cat(found, dim=1)
    users, items = nodes[:U], nodes[U:]
    agree_all(model, model.encode(), users + companions(r, 2) @ users, items + s @ s @ items)


def test_cohesion_weighs_channels_by_how_little_they_tell(train, features, batch):
    model = drawn(models.COHESION, train, features=features, hidden=7, neighbours=3, reg=0.3)
    encoded, terms, costs = model.encode(), model.loss(batch), []
    for u, i, j in zip(batch.users, batch.items, batch.negatives[:, 0], strict=True):
        p, q, n = encoded.users[u].view(3, D), encoded.items[i].view(3, D), encoded.items[j].view(3, D)
        gaps = torch.stack([p[m] @ q[m] - p[m] @ n[m] for m in range(3)])
        a = 1 - torch.softmax(gaps.detach(), 0)
        costs.append(-F.logsigmoid(a @ gaps))
    agree(model, terms["bpr"], torch.stack(costs).mean())
    agree(model, terms["reg"], 0.3 * sum((table[batch.users] ** 2).mean() for table in model.preferences))


def waves(sign):
    """exp(sign 2 pi i k n / D) of each frequency k and place n: (D // 2 + 1, D)."""
    return torch.exp(sign * 2j * torch.pi / D * torch.outer(torch.arange(D // 2 + 1, **WIDE), torch.arange(D, **WIDE)))


def spectrum(x):
    return x.to(torch.complex128) @ waves(-1).T / D**0.5


def signal(spectrum):
    """The real rows of a spectrum (V, D // 2 + 1): D is odd, so all waves but the constant are there twice."""
    return (torch.cat([spectrum, spectrum[:, 1:]], 1) @ torch.cat([waves(1), waves(1)[1:]])).real / D**0.5


def test_smore_filters_and_fuses_spectra_before_the_graphs(train, features):
    model = drawn(models.SMORE, train, features=features, neighbours=3)
    r, each = taken(train), contents(features)
    start, behaviour = ids(model, r), light(r, ids(model, r), 3)
    spectra = [spectrum(through(layer, x, here)) for (x, here), layer in zip(each, model.maps, strict=True)]
    product = torch.ones_like(spectra[0])
    for (_, here), y in zip(each, spectra, strict=True):
        product = torch.stack([row * y[i] if here[i] else row for i, row in enumerate(product)])
    graphs = [nearest(likeness(x), here, 3) for x, here in each]
    graphs.append(torch.maximum(*graphs))
    views = []
    for y, shape, gate, graph in zip([*spectra, product], model.filters, model.gates, graphs, strict=True):
        kernel = torch.complex(*shape.kernel.T)
        items = graph @ (start[U:] * torch.sigmoid(gate(signal(y * kernel))))
        views.append(torch.cat([adjacency(r)[:U, U:] @ items, items]))
    weights = [torch.softmax(q[2](torch.tanh(q[0](views[-1]))), dim=1) for q in model.queries]
    views = [weights[0] * views[0], weights[1] * views[1], views[2]]
    heeded = [torch.sigmoid(p(behaviour)) * view for p, view in zip(model.preferences, views, strict=True)]
    out = behaviour + sum(heeded) / 3
    agree_all(model, model.encode(), out[:U], out[U:])


def test_slmrec_maps_its_channels_and_aligns_them_step_by_step(train, features, batch):
    model = drawn(models.SLMRec, train, features=features, layers=2, alignment_weight=0.7, temperature=0.4)
    r, each = taken(train), contents(features)
    start = ids(model, r)
    told = [through(layer, x, here) for (x, here), layer in zip(each, model.maps, strict=True)]
    channels = [light(r, torch.cat([start[:U], items]), 2) for items in (start[U:], *told)]
    users = model.join_users(torch.cat([c[:U] for c in channels], dim=1)) * r.any(1)[:, None]
    some = torch.tensor(features.presence).any(1) | r.any(0)
    items = model.join_items(torch.cat([c[U:] for c in channels], dim=1)) * some[:, None]
    agree_all(model, model.encode(), users, items)
    x, total = channels[0][U:], 0.0
    for m, (_, here) in enumerate(each):
        x, y, some = model.spaces[m](x), model.into[m](channels[m + 1][U:]), distinct(batch.items, here)
        rows = [torch.logsumexp(x[i] @ y[some].T / 0.4, 0) - x[i] @ y[i] / 0.4 for i in some]
        total = total + torch.stack(rows).mean()
    agree(model, model.loss(batch)["alignment"], 0.7 * total)


def over_neighbours(r, x):
    """a(s -> d): the softmax over d's neighbours s of x_s . x_d, in row d."""
    a = torch.zeros(N, N, **WIDE)
    for d in range(N):
        near = adjacency(r)[d].nonzero()[:, 0]
        a[d, near] = torch.softmax(x[near] @ x[d], 0)
    return a


@pytest.mark.parametrize("cut", [True, False])
def test_grcn_weighs_edges_by_affinity_and_confidence(cut, train, features):
    model = drawn(models.GRCN, train, features=features, layers=2, routing=2, prune_edges=cut)
    r, affinities, parts = taken(train), [], []
    for (x, here), layer, preference in zip(contents(features), model.maps, model.preferences, strict=True):
        f, p = unit(F.leaky_relu(layer(x))) * here[:, None], unit(preference) * r.any(1)[:, None]
        for _ in range(2):
            weights = [torch.softmax(f[r[u]] @ p[u], 0) for u in range(U)]
            p = unit(torch.stack([p[u] + weights[u] @ f[r[u]] for u in range(U)]))
        x = torch.cat([p, f])
        affinities.append(over_neighbours(r, x))
        parts.append(x + affinities[-1] @ x)
    refined = torch.zeros(N, N, **WIDE)
    for d, s in adjacency(r).nonzero().tolist():
        weight = torch.stack([a[d, s] * model.confidence[s, m] for m, a in enumerate(affinities)]).max()
        refined[d, s] = weight.clamp(min=0) if cut else weight
    assert (refined < 0).any() != cut
    own = unit(ids(model, r))
    out = torch.cat([own + refined @ own + refined @ refined @ own, *parts], dim=1)
    agree_all(model, model.encode(), out[:U], out[U:])


def test_alignrec_gates_ids_by_content_and_aligns_at_three_levels(train, features, batch):
    sizes = {"contrast_weight": 0.7, "similarity_weight": 0.2, "user_item_weight": 0.3, "temperature": 0.4}
    model = drawn(models.AlignRec, train, features=features, neighbours=3, **sizes)
    r, each = taken(train), contents(features)
    cosine = sum(likeness(x) for x, _ in each) / sum(here[:, None] & here for _, here in each).clamp(min=1)
    graph = nearest(cosine, torch.tensor(features.presence).any(1), 3)
    x, start, behaviour = torch.cat([unit(x) for x, _ in each], 1), ids(model, r), light(r, ids(model, r), 2)
    items = graph @ (start[U:] * torch.sigmoid(model.gate(model.map(x))))
    side = torch.cat([adjacency(r)[:U, U:] @ items, items])
    users, items = (behaviour + side)[:U], (behaviour + side)[U:]
    encoded = model.encode()
    agree_all(model, encoded, users, items)
    terms, some = model.auxiliary(batch, encoded), distinct(batch.items)
    nodes = [distinct(batch.users), [U + i for i in some]]
    agree(model, terms["contrast"], 0.7 * sum(info_nce(side[n], behaviour[n], 0.4) for n in nodes))
    rows = side[nodes[1]]
    off = ((rows @ rows.T - cosine[some][:, some]) ** 2).sum() ** 0.5
    agree(model, terms["similarity"], 0.2 * off / len(some))
    pairs = zip(batch.users, batch.items, strict=True)
    agree(model, terms["user-item"], 0.3 * torch.stack([apart(users[u], items[i]) for u, i in pairs]).mean())


@pytest.mark.parametrize("trained", [False, True])
def test_bm3_s_content_meets_ids_and_itself(train, features, batch, trained):
    options = {"layers": 2, "dropout": 0.3, "content_weight": 0.7, "reg": 0.2, "trained_features": trained}
    model = drawn(models.BM3, train, features=features, **options)
    torch.manual_seed(1)
    terms = model.loss(batch)
    torch.manual_seed(1)
    start = ids(model, taken(train))
    graph = light(taken(train), start, 2)
    users, items, g = graph[:U], graph[U:] + start[U:], model.predictor
    to_users, to_items = (F.dropout(x.detach(), 0.3) for x in (users[batch.users], items[batch.items]))
    pairs = [*enumerate(zip(batch.users, batch.items, strict=True))]
    both = [apart(g(users[u]), to_items[b]) + apart(g(items[i]), to_users[b]) for b, (u, i) in pairs]
    agree(model, terms["bootstrap"], torch.stack(both).mean())
    total = 0.0
    for (x, here), layer in zip(tables(model, features), model.maps, strict=True):
        some = [b for b, i in enumerate(batch.items) if here[i]]
        z = layer(x[batch.items[some]])
        to_z = F.dropout(z.detach(), 0.3)
        each = [apart(g(z[n]), to_items[b]) + apart(g(z[n]), to_z[n]) for n, b in enumerate(some)]
        total = total + torch.stack(each).mean()
    agree(model, terms["content"], 0.7 * total)
    agree(model, terms["reg"], 0.2 * ((users**2).sum() ** 0.5 + (items**2).sum() ** 0.5) / V)


@pytest.mark.parametrize("trained", [False, True])
def test_freedom_ranks_content_alone_for_the_same_users(train, features, batch, trained):
    options = {"neighbours": 3, "layers": 2, "content_weight": 0.7, "trained_features": trained}
    model = drawn(models.FREEDOM, train, features=features, **options).eval()
    start, total = ids(model, taken(train)), 0.0
    users = light(taken(train), start, 2)[:U]
    for (x, here), layer in zip(tables(model, features), model.maps, strict=True):
        told = x @ layer.weight.T
        rows = [*zip(batch.users, batch.items, batch.negatives[:, 0], strict=True)]
        each = [-F.logsigmoid(users[u] @ (told[i] - told[j])) for u, i, j in rows if here[i] and here[j]]
        assert 0 < len(each) < len(rows)
        total = total + torch.stack(each).mean()
    agree(model, model.loss(batch)["content"], 0.7 * total)


def test_diffmm_s_denoisers_tell_rows_from_noise(train, features):
    model = drawn(models.DiffMM, train, features=features, hidden=7, steps=5, noise=0.1, signal_weight=0.3).float()
    torch.manual_seed(8)
    found = model._diffused(23)
    torch.manual_seed(8)
    variances = [0.1 * v for v in np.linspace(1e-4, 0.02, 5)]
    shares = [1e-4, *(1 - (1 - b) / (1 - a) for a, b in pairwise(variances))]
    kept = torch.tensor(np.cumprod([1 - share for share in shares]), dtype=torch.float32)
    snr = kept / (1 - kept)
    count = round(23 / len(train) * U)  # an epoch's batches have all users
    x = taken(train)[torch.randperm(U)[:count]].float()
    step, total = torch.randint(0, 5, (count,)), 0.0
    assert 0 in step and len(step.unique()) > 2
    noisy = torch.stack([kept[t] ** 0.5 * row for t, row in zip(step, x, strict=True)])
    noisy = noisy + torch.stack([(1 - kept[t]) ** 0.5 * row for t, row in zip(step, torch.randn(x.shape), strict=True)])
    q = ids(model, taken(train))[U:].detach()
    for (rows, here), layer, denoiser in zip(contents(features), model.maps, model.denoisers, strict=True):
        angles = torch.tensor([[float(t) / 10000 ** (k / 5) for k in range(5)] for t in step])
        time = denoiser.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        told = denoiser.outer(torch.tanh(denoiser.inner(torch.cat([F.dropout(noisy, 0.5), time], dim=1))))
        weights = [snr[t - 1] - snr[t] if t else torch.tensor(1.0) for t in step]
        costs = [w * ((a - b) ** 2).mean() for w, a, b in zip(weights, x, told, strict=True)]
        read = told @ (F.leaky_relu(rows.float() @ layer.weight.T, 0.2) * here[:, None]).detach()
        total = total + torch.stack(costs).mean() + 0.3 * ((read - x @ q) ** 2).mean()
    agree(model, found, total)


def test_diffmm_adds_up_both_graphs_of_each_modality(train, features):
    options = {"layers": 2, "graph_weight": 0.3, "residual": 0.4, "top": 2, "hidden": 7}
    model = drawn(models.DiffMM, train, features=features, **options)
    r, loops = taken(train), torch.eye(N, **WIDE)
    written = torch.rand(2, U, V).topk(2).indices

    def looped(r):
        return normalised((adjacency(r) > 0) + loops)

    def layered(x):
        return x + looped(r) @ x + looped(r) @ looped(r) @ x

    for m in range(2):
        model.get_buffer(f"written{m}").copy_(written[m])
    model._link()
    start, shares, total, views = ids(model, r), torch.softmax(model.shares, 0), 0.0, []
    for m, ((x, here), layer) in enumerate(zip(contents(features), model.maps, strict=True)):
        own = looped(torch.zeros(U, V).scatter(1, written[m], 1.0) * r.any(1)[:, None])
        y = torch.cat([start[:U], unit(F.leaky_relu(x @ layer.weight.T, 0.2)) * here[:, None]])
        first = looped(r) @ y
        second = looped(r) @ torch.cat([first[:U], start[U:]])
        total = total + shares[m] * (first + second + 0.3 * own @ start)
        views.append(layered(own @ y))
    out, encoded = layered(total) + 0.4 * unit(total), model.encode()
    agree_all(model, encoded, out[:U], out[U:])
    agree(model, torch.stack([*encoded.parts.values()]), torch.stack(views))


def test_selfcf_propagates_its_targets_over_a_graph_with_edges_gone(train, batch):
    model = drawn(models.SelfCF, train, layers=2, target="edges", dropout=0.4)
    torch.manual_seed(1)
    found = model.loss(batch)["bootstrap"]
    torch.manual_seed(1)
    h, a = light(taken(train), ids(model, taken(train)), 2), adjacency(taken(train))
    thinned = torch.zeros_like(a)
    thinned[a != 0] = F.dropout(a[a != 0], 0.4)  # each edge's two ways are drawn apart
    target, p = (thinned @ h).detach(), model.predictor
    pairs = zip(batch.users, batch.items + U, strict=True)
    each = [apart(p(h[u]), target[i]) + apart(p(h[i]), target[u]) for u, i in pairs]
    agree(model, found, torch.stack(each).mean() / 2)


def test_lattice_mixes_learned_graphs_over_what_an_item_has(train, features):
    model = drawn(models.LATTICE, train, features=features, neighbours=3, keep=0.3, layers=3, item_layers=2)
    model.begin_epoch(np.random.default_rng(0))  # who is near is chosen by the maps as drawn
    r, graphs, a = taken(train), [], torch.zeros(V, V, **WIDE)
    for (x, here), layer in zip(contents(features), model.learned.maps, strict=True):
        graphs.append(0.3 * nearest(likeness(x), here, 3) + 0.7 * nearest(likeness(layer(x)), here, 3))
    for i, has in enumerate(features.presence):
        alpha = {m: model.mixture[m].exp() for m in has.nonzero()[0]}
        for m in alpha:
            a[i] += alpha[m] / sum(alpha.values()) * graphs[m][i]
    start = ids(model, r)
    graph = light(r, start, 3)
    for training in (True, False):
        agree_all(model, model.train(training).encode(), graph[:U], graph[U:] + unit(a @ a @ start[U:]))


@pytest.mark.parametrize("written", [True, False])
def test_llmrec_adds_features_and_profiles_that_went_there_and_back(written, train, features):
    rng, sizes = np.random.default_rng(2), {"layers": 3, "content_weight": 0.3, "profile_weight": 0.6}
    given = rng.normal(size=(U, 8)).astype(np.float32) if written else None
    model = drawn(models.LLMRec, train, features=features, profiles=given, **sizes).eval()
    r, each = taken(train), contents(features)
    a = adjacency(r)[:U, U:]
    side = torch.cat([x * here[:, None] for x, here in each], dim=1)
    means = torch.stack([side[row].mean(0) if row.any() else 0 * side[0] for row in r])
    p = torch.tensor(given).double() if written else means  # the template: means of what its items have
    graph = light(r, ids(model, r), 3)
    users, items = graph[:U], graph[U:]
    for (x, here), layer in zip(each, model.maps, strict=True):
        told = x @ layer.weight.T * here[:, None]
        users, items = users + 0.3 * unit(a @ told), items + 0.3 * unit(a.T @ a @ told + told)
    told = p @ model.told.weight.T
    agree_all(model, model.encode(), users + 0.6 * unit(a @ a.T @ told), items + 0.6 * unit(a.T @ told))


def test_llmrec_decodes_the_profiles_that_it_masked(train, features, batch):
    given = np.random.default_rng(2).normal(size=(U, 8)).astype(np.float32)
    model = drawn(models.LLMRec, train, features=features, profiles=given, mask=0.4, mask_weight=0.7)
    p, r = torch.tensor(given).double(), taken(train)
    a, known = adjacency(r)[:U, U:], r.any(1).tolist()
    torch.manual_seed(1)
    found = model.loss(batch)["mask"]
    torch.manual_seed(1)
    masked = [u for u, share in enumerate(torch.rand(U).tolist()) if share < 0.4 and known[u]]
    assert 1 < len(masked) < sum(known)
    mean = p[known].mean(0)  # of users with an event: of others nothing is written
    shown = torch.stack([mean if u in masked else p[u] for u in range(U)])
    back = a @ a.T @ (shown @ model.told.weight.T)
    costs = [(1 - F.cosine_similarity(model.decoder(back[u]), p[u], dim=0)) ** 2 for u in masked]
    agree(model, found, 0.7 * torch.stack(costs).mean())


def test_diffmm_follows_the_posterior_means_down_and_writes_their_top(train, features):
    options = {"hidden": 7, "steps": 4, "noise": 20.0, "top": 3}  # so much noise that every step moves a row
    model = drawn(models.DiffMM, train, features=features, **options).float()
    r, variances, seen = taken(train), [20.0 * v for v in np.linspace(1e-4, 0.02, 4)], []
    for denoiser in model.denoisers:
        denoiser.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.begin_epoch(np.random.default_rng(0))
    assert not seen  # the first epoch writes nothing
    model.begin_epoch(np.random.default_rng(0))
    left = [1.0, 1 - 1e-4]  # the product of alphas: before any step, after the first, ...
    for before, now in pairwise(variances):
        left.append(left[-1] * (1 - now) / (1 - before))
    for m, denoiser in enumerate(model.denoisers):
        x = r.float()
        for t in (4, 3, 2, 1):
            torch.testing.assert_close(seen[4 * m + 4 - t], x, atol=1e-4, rtol=1e-5)  # values near 10, in float32
            alpha, angles = left[t] / left[t - 1], torch.tensor([(t - 1) / 10000 ** (k / 5) for k in range(5)])
            time = denoiser.time(torch.cat([angles.cos(), angles.sin()]))
            told = denoiser.outer(torch.tanh(denoiser.inner(torch.cat([x, time.expand(U, -1)], dim=1)))).detach()
            mean = left[t - 1] ** 0.5 * (1 - alpha) * told + alpha**0.5 * (1 - left[t - 1]) * x
            x = mean / (1 - left[t])
        own, warm = torch.eye(N, **WIDE), r.any(0).nonzero()[:, 0].tolist()
        for u in r.any(1).nonzero()[:, 0].tolist():
            for i in sorted(warm, key=lambda i: -float(x[u, i]))[:3]:
                own[u, U + i] = own[U + i, u] = 1.0
        torch.testing.assert_close(torch.tensor(model.links[m].sparse().toarray()).double(), normalised(own))


def test_simgcl_contrasts_two_passes_with_noise_at_every_layer(train, batch):
    model = drawn(models.SimGCL, train, layers=3, weight=0.7, noise=0.3, temperature=0.4)
    a, start, views = adjacency(taken(train)), torch.cat([model.users.weight, model.items.weight]), []
    torch.manual_seed(1)
    encoded = model.encode()
    torch.manual_seed(1)
    for length in (0.0, 0.3, 0.3):
        x, total = start, 0.0
        for _ in range(3):
            x = a @ x
            if length:
                r = torch.rand(N, D, **WIDE)
                x = x + torch.sign(x) * length * r / r.norm(dim=1, keepdim=True)
            total = total + x
        views.append(total / 3)
    agree_all(model, encoded, views[0][:U], views[0][U:])
    nodes = distinct(batch.users), [U + i for i in distinct(batch.items)]
    naive = sum(info_nce(views[1][some], views[2][some], 0.4) for some in nodes)
    agree(model, model.auxiliary(batch, encoded)["contrast"], 0.7 * naive)


def leading(r, rank):
    """The sum over leading triples. One of users by items, s u v, is two of the whole adjacency: (u, v) and (u, -v)."""
    a = r.double() / (r.sum(1, keepdim=True) * r.sum(0)).clamp(min=1) ** 0.5
    (u, s, v), q, total = torch.linalg.svd(a), rank // 4 // 2, torch.zeros(sum(r.shape), sum(r.shape), **WIDE)
    for j in range(q):
        total[: len(r), len(r) :] += s[j] * s[rank // 2 - q + j] * torch.outer(u[:, j], v[j])
    return total + total.T


def test_the_principal_subgraph_is_its_leading_triples_without_small_entries():
    events = few(12, 11, new=2)
    found, wanted = principal(normalised_adjacency(events), rank=16, block=7), leading(taken(events), 16)
    small = wanted.abs() < 1e-3
    assert (wanted[small].abs() > 1e-9).any() and (wanted < -1e-3).any()
    torch.testing.assert_close(
        torch.tensor(found.toarray()).double(), wanted.masked_fill(small, 0.0), atol=1e-6, rtol=1e-5
    )
    assert found.nnz == (~small).sum()


def test_pgl_trains_on_the_leading_singular_triples_and_scores_with_all(train, features):
    options = {"neighbours": 3, "shares": (0.25, 0.75), "subgraph": "global", "rank": 8}
    model = drawn(models.PGL, train, features=features, **options)
    model.begin_epoch(np.random.default_rng(0))  # nothing is drawn: built once
    users = torch.cat(list(model.preferences), dim=1) * taken(train).any(1)[:, None]
    each = zip(contents(features), model.maps, strict=True)
    items = torch.cat([unit(through(layer, x, here)) for (x, here), layer in each], dim=1)
    start, a = torch.cat([users, items]), leading(taken(train), 8)
    for training, graph in ((True, (start + a @ start + a @ a @ start) / 3), (False, light(taken(train), start, 2))):
        out = graph[:U], graph[U:] + alike(features, 3, (0.25, 0.75)) @ items
        agree_all(model, model.train(training).encode(), *out)


def test_mentor_aligns_moments_of_all_views_and_contrasts_two_noisy_passes(train, features, batch):
    sizes = {"align_weight": 0.7, "graph_weight": 0.2, "noise": 0.3, "temperature": 0.4}
    options = {"hidden": 7, "neighbours": 3, "shares": (0.25, 0.75), "item_layers": 2}
    model = drawn(models.MENTOR, train, features=features, **options, **sizes)
    r, s = taken(train), alike(features, 3, (0.25, 0.75))
    each = [*zip(model.encoders, *zip(*contents(features), strict=True), strict=True)]

    def encoded_by(encoder, x, here, noise=0.0):
        rows = unit(encoder.preference) * r.any(1)[:, None], unit(bent(encoder.map, x)) * here[:, None]
        layer = total = torch.cat(rows)
        for _ in range(2):
            layer = adjacency(r) @ layer
            if noise:
                layer = layer + noise * unit(torch.rand(N, D, **WIDE)) * layer.sign()
            total = total + layer
        return total

    def joined(first, second, heed):
        items = torch.cat([first[U:], second[U:]], 1)
        return torch.cat([torch.cat([heed[:, :1] * first[:U], heed[:, 1:] * second[:U]], 1), items + s @ s @ items])

    torch.manual_seed(1)
    encoded = model.encode()
    terms = model.auxiliary(batch, encoded)
    torch.manual_seed(1)
    noisy = [joined(*(encoded_by(*one, noise=0.3) for one in each), model.personal) for _ in range(2)]
    plain = [encoded_by(*one) for one in each]
    alone = [encoded_by(model.guide, model.item_ids, r.any(0)), *plain]
    views = [joined(*plain, model.personal), *(joined(x, x, torch.ones(U, 2)) for x in alone)]
    agree_all(model, encoded, views[0][:U], views[0][U:])
    moments = [(x.mean(), ((x - x.mean()) ** 2).sum() / (x.numel() - 1)) for x in views]
    apart = [(a - c).abs() + (b - d).abs() for (a, b), (c, d) in combinations(moments, 2)]
    agree(model, terms["align"], 0.7 * sum(apart))
    nodes = distinct(batch.users), [U + i for i in distinct(batch.items)]
    agree(model, terms["graph"], 0.2 * sum(info_nce(noisy[0][n], noisy[1][n], 0.4) for n in nodes))


def agreed_views(features, r, items, k):
    """h_v of all items over the graphs of each modality and of co-consumption, and which items have them: (V,)."""
    each = contents(features)
    cosines = [likeness(x) for x, _ in each]
    graphs, has = [], [*(here for _, here in each), r.any(0)]

    def speak_against(i, j):
        both = [(c, here) for c, (_, here) in zip(cosines, each, strict=True) if here[i] and here[j]]
        return any(c[i, j] < c[here][:, here].mean() for c, here in both)

    for c, (_, here) in zip(cosines, each, strict=True):
        graphs.append(torch.zeros(V, V, **WIDE))
        for i in here.nonzero()[:, 0].tolist():
            some = [j for j in here.nonzero()[:, 0].tolist() if not speak_against(i, j)]
            graphs[-1][i, sorted(some, key=lambda j: -float(c[i, j]))[:k]] = 1.0
    graphs.append(torch.eye(V, **WIDE))
    for i in range(V):
        count = {j: int((r[:, i] & r[:, j]).sum()) for j in range(V) if j != i}
        graphs[-1][i, sorted((j for j in count if count[j] > 1), key=lambda j: (-count[j], j))[:k]] = 1.0
    return [normalised(graph) @ items for graph in graphs], has


def means_over(views, has):
    """The mean over the views that an item has, zero without any."""
    own = [[view[i] for view, here in zip(views, has, strict=True) if here[i]] for i in range(V)]
    return torch.stack([torch.stack(rows).mean(0) if rows else torch.zeros(D, **WIDE) for rows in own])


def test_damrs_weighs_and_turns_pairs_by_what_content_says(train, features, batch):
    model = drawn(models.DAMRS, train, features=features, neighbours=4)
    r = taken(train)
    start, graph = ids(model, r), light(r, ids(model, r), 2)
    views, has = agreed_views(features, r, start[U:], 4)
    items = graph[U:] + means_over(views, has)
    agree_all(model, model.encode(), graph[:U], items)

    def chances(u, i):
        rows = [F.cosine_similarity(graph[u], view[i], dim=0) for view, here in zip(views, has, strict=True) if here[i]]
        return [torch.sigmoid(graph[u].norm() * cosine).detach() for cosine in rows]

    rows = [*zip(batch.users, batch.items, batch.negatives[:, 0], strict=True)]
    expected, costs, turned = torch.stack([c for u, _, j in rows for c in chances(u, j)]).mean(), [], []
    for u, i, j in rows:
        c, gap = torch.stack(chances(u, i)), graph[u] @ (items[i] - items[j])
        turned.append((c.max() - expected).clamp(min=0) if c.mean() < expected else torch.zeros((), **WIDE))
        weight = c.mean() * torch.exp(-2 * (c.var() if len(c) > 1 else torch.zeros(())))
        costs.append(-weight * F.logsigmoid(gap) - turned[-1] * F.logsigmoid(-gap))
    assert 0 < sum(bool(t) for t in turned) < len(rows)
    agree(model, model.loss(batch)["bpr"], torch.stack(costs).mean())


def test_damrs_draws_preferences_together_and_items_to_those_near(train, features, batch):
    sizes = {"preference_weight": 0.7, "relation_weight": 0.2, "temperature": 0.4}
    model = drawn(models.DAMRS, train, features=features, neighbours=2, **sizes)
    batch = batch.part(slice(7))  # so that negatives add items of their own
    r, some = taken(train), distinct(torch.cat([batch.items, batch.negatives[:, 0]]))
    assert len(some) > len(distinct(batch.items))
    graph = light(r, ids(model, r), 2)
    views, has = agreed_views(features, r, ids(model, r)[U:], 2)
    rows, terms = graph[distinct(batch.users)], model.loss(batch)
    told = [torch.sigmoid(rows @ unit(x[some]).T) for x in (graph[U:], means_over(views, has))]
    each = [p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log() for p, q in (told, told[::-1])]
    agree(model, terms["preference"], 0.7 * (each[0] + each[1]).mean())
    there = [[i for i in some if here[i]] for here in has]
    cosines, costs = [likeness(view) for view in views], []
    chance = [torch.softmax(c[:, own], 1).detach() for c, own in zip(cosines, there, strict=True)]
    for c, share, own in zip(cosines, chance, there, strict=True):
        for i in own:
            of = {j: float(share[i, own.index(j)]) for j in own}
            both = {j: [s[i, o.index(j)] for s, o in zip(chance, there, strict=True) if {i, j} <= {*o}] for j in own}
            first = sorted(own, key=lambda j: -of[j] - 3 * float(np.mean(both[j])))[:2]
            second = sorted((j for j in own if j not in first), key=lambda j: -of[j])[:2]
            best, next_best, total = (torch.exp(c[i, near] / 0.4).sum() for near in (first, second, own))
            costs.append(-torch.log(best / total) - torch.log(next_best / (total - best)))
    agree(model, terms["relation"], 0.2 * torch.stack(costs).mean())


def rounds(model, features, r, rate=0.0):
    """U_m = R W_m x_m and V_m = R^T U_m of each modality, ``rate`` of W_m x_m dropped."""
    told = [through(layer, x, here) for (x, here), layer in zip(contents(features), model.maps, strict=True)]
    users = [adjacency(r)[:U, U:] @ F.dropout(x, rate) for x in told]
    return [(x, adjacency(r)[U:, :U] @ x) for x in users]


def chosen(model, features, r, k):
    """The normalised graphs, N x N, of each user's k best of the items with an event that it has not taken."""
    graphs = []
    for users, items in rounds(model, features, r):
        near, scores = torch.zeros(U, V), users @ items.T
        for u in r.any(1).nonzero()[:, 0].tolist():
            others = [i for i in range(V) if r[:, i].any() and not r[u, i]]
            near[u, sorted(others, key=lambda i: -float(scores[u, i].detach()))[:k]] = 1.0
        graphs.append(adjacency(near))
    return graphs


@pytest.mark.parametrize("heads", [1, D])
def test_mmssl_attends_over_written_graphs_before_the_graph_and_adds_content_after(heads, train, features, monkeypatch):
    options = {"heads": heads, "top": 3, "layers": 3, "id_weight": 0.4, "content_weight": 0.7, "dropout": 0.3}
    model = drawn(models.MMSSL, train, features=features, **options)
    written = model.graphs_of  # graphs that are made on the way are float32, and attention takes one type alone
    monkeypatch.setattr(model, "graphs_of", lambda items: written(items).double())
    r, attention = taken(train), model.attention
    model.begin_epoch(np.random.default_rng(0))
    then = chosen(model, features, r, 3)
    for layer in model.maps:  # steps later the epoch's graphs are the same, and outside training they are not
        torch.nn.init.normal_(layer.weight)
    now, start = chosen(model, features, r, 3), ids(model, r)
    assert any((a != b).any() for a, b in zip(then, now, strict=True))
    for training, graphs in ((True, then), (False, now)):
        rows = torch.stack([graph @ start for graph in graphs], 1)  # (N, M, D)
        q, k, v = ((rows @ w.T).unflatten(2, (heads, -1)) for w in attention.in_proj_weight.split(D))
        shares = torch.softmax(torch.einsum("nahd,nbhd->nhab", q, k) / (D // heads) ** 0.5, 3)
        mixed = torch.einsum("nhab,nbhd->nahd", shares, v).flatten(2) @ attention.out_proj.weight.T
        out = light(r, start + 0.4 * unit(mixed.mean(1)), 3)
        torch.manual_seed(1)
        encoded = model.train(training).encode()
        torch.manual_seed(1)
        for told in rounds(model, features, r, 0.3 * training):
            out = out + 0.7 * torch.cat([unit(x) for x in told])
        agree_all(model, encoded, out[:U], out[U:])


def test_the_critic_of_mmssl_sees_what_users_have_not_taken(train, features, batch, monkeypatch):
    model = drawn(models.MMSSL, train, features=features, heads=1, dropout=0.0, adversarial_weight=0.7)
    encoded, seen = model.encode(), []
    monkeypatch.setattr(model, "_critic", lambda fake, real: seen.extend([fake, real]))
    torch.manual_seed(1)
    found = model.auxiliary(batch, encoded)["adversarial"]
    torch.manual_seed(1)
    some, r = distinct(batch.users), taken(train)

    def of_others(users, items):
        rows = [torch.stack([0 * users[u] @ i if r[u, n] else users[u] @ i for n, i in enumerate(items)]) for u in some]
        return unit(torch.stack(rows))

    fake = torch.cat([of_others(*told) for told in rounds(model, features, r)])
    noise = -torch.log(-torch.log(torch.rand(len(some), V)))
    events = torch.softmax(r[some] + 2e-3 * noise, 1)
    torch.testing.assert_close(seen[0], fake.detach(), rtol=1e-5, atol=1e-6)
    real = unit(events + 100 * of_others(encoded.users, encoded.items)).detach()
    torch.testing.assert_close(seen[1], real, rtol=1e-5, atol=1e-8)
    still = deepcopy(model.critic)  # its own parameters get no gradient of this term
    agree(model, found, -0.7 * still(fake).mean())


@pytest.mark.parametrize("training", [True, False])
def test_lgmrec_adds_local_content_and_vectors_of_hyperedges(training, train, features):
    options = {"modal_layers": 2, "hyperedges": 3, "hyper_layers": 2, "dropout": 0.3, "global_weight": 0.4}
    model = drawn(models.LGMRec, train, features=features, layers=3, temperature=0.6, **options).train(training)
    r, local = taken(train), light(taken(train), ids(model, taken(train)), 3)
    items, total = local[U:], torch.zeros(N, D, **WIDE)

    def membership(logits):
        if training:
            logits = logits - torch.log(-torch.log(torch.rand(logits.shape, **WIDE)))
        return F.dropout(torch.softmax(logits / 0.6, 1), 0.3, training)

    torch.manual_seed(1)
    encoded = model.encode()
    torch.manual_seed(1)
    for (x, here), layer, member in zip(contents(features), model.maps, model.members, strict=True):
        y = x @ layer.weight.T * here[:, None]
        means = torch.stack([y[r[u]].mean(0) if r[u].any() else torch.zeros(D, **WIDE) for u in range(U)])
        local = local + unit(adjacency(r) @ adjacency(r) @ torch.cat([means, y]))
        logits = x @ member.weight.T * here[:, None]
        of_items = membership(logits) * here[:, None]
        of_users = membership(torch.stack([logits[r[u]].sum(0) for u in range(U)])) * r.any(1)[:, None]
        edges = of_items.T @ (of_items @ (of_items.T @ items))
        total = total + torch.cat([of_users, of_items]) @ edges
    out = local + 0.4 * unit(total)
    agree_all(model, encoded, out[:U], out[U:])

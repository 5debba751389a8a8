"""The literature's systems: what each one's own idea does, against dense formulas, where a wrong sign would show."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mmllmrec as mm
from mmllmrec import models
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.data.sampling import epoch
from mmllmrec.encoders.graph import Edges, mean_adjacency, normalised_adjacency, normalised_events
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.diffmm import schedule
from mmllmrec.seed import seed_everything
from tests.planted import few

U, N, D = 7, 11, 5


@pytest.fixture(scope="module")
def train() -> Interactions:
    """Seven users and eleven items; the last user and the last item have no event."""
    return few(U, N)


@pytest.fixture(scope="module")
def features() -> FeatureTable:
    """Two modalities; item 2 has none, item 3 the first alone."""
    rng = np.random.default_rng(1)
    present = np.ones((N, 2), dtype=bool)
    present[2], present[3, 1] = False, False
    return FeatureTable({"image": rng.normal(size=(N, 4)), "text": rng.normal(size=(N, 6))}, present)


def batch_of(train, negatives=1, size=13):
    return next(epoch(train, batch_size=size, negatives=negatives, rng=np.random.default_rng(0)))


def dense(matrix) -> torch.Tensor:
    return torch.tensor(matrix.toarray(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SimGCL", {"layers": 0}, "layers=0: 1 or more"),
        ("LGMRec", {"hyper_layers": 0}, "hyper_layers=0: 1 or more"),
        *((name, {"prune": 1.5}, r"prune=1\.5: the share") for name in ("LayerGCN", "FREEDOM", "COHESION", "PGL")),
        ("FREEDOM", {"prune": -0.3}, r"prune=-0\.3: the share"),
    ],
)
def test_values_without_meaning_are_refused_at_once(train, features, name, options, message):
    kind = getattr(models, name)
    content = {"features": features} if hasattr(kind, "with_catalog") else {}
    with pytest.raises(DataError, match=message):
        kind(train, **content, **options)


def test_computed_edges_are_their_dense_formulas(train):
    edges = Edges(train)
    r = torch.zeros(U, N)
    r[edges.users, edges.items] = 1
    assert torch.equal(r > 0, dense(train.csr) > 0) and (edges.users.diff() >= 0).all()
    logits = torch.randn(len(train), dtype=torch.float64, requires_grad=True)
    users, items = torch.randn(U, D).double().requires_grad_(), torch.randn(N, D).double().requires_grad_()
    table = torch.full((U, N), -torch.inf, dtype=torch.float64).index_put((edges.users, edges.items), logits)
    over_items = torch.softmax(table[:-1], dim=1)[edges.users, edges.items]
    over_users = torch.softmax(table[:, :-1], dim=0)[edges.users, edges.items]
    ours = edges.softmax(logits)
    torch.testing.assert_close(ours[0], over_items)
    torch.testing.assert_close(ours[1], over_users)
    dots, naive = edges.dots(users, items), (users @ items.T)[edges.users, edges.items]
    torch.testing.assert_close(dots, naive)
    torch.testing.assert_close(*(torch.autograd.grad((x**3).sum(), (users, items)) for x in (dots, naive)))
    weight = torch.zeros(U, N, dtype=torch.float64).index_put((edges.users, edges.items), ours[0])
    for mine, naive in (
        (edges.to_users(ours[0], items), weight @ items),
        (edges.to_items(ours[0], users), weight.T @ users),
    ):
        torch.testing.assert_close(mine, naive)
        wanted = [x for x in (logits, users, items) if x is logits or mine.shape[0] == (U if x is items else N)]
        grads = [torch.autograd.grad((y**3).sum(), wanted, retain_graph=True) for y in (mine, naive)]
        torch.testing.assert_close(*grads)


def test_means_and_normalised_events(train):
    r = (dense(train.csr) > 0).float()
    of_user, of_item = r.sum(1, keepdim=True).clamp(min=1), r.sum(0, keepdim=True).clamp(min=1)
    torch.testing.assert_close(dense(normalised_events(train, mean=True)), r / of_user)
    torch.testing.assert_close(dense(normalised_events(train)), r / (of_user * of_item).sqrt())
    a = torch.cat([torch.cat([torch.zeros(U, U), r], 1), torch.cat([r.T, torch.zeros(N, N)], 1)])
    torch.testing.assert_close(dense(mean_adjacency(train)), a / a.sum(1, keepdim=True).clamp(min=1))


def test_layergcn_weighs_layers_by_their_likeness_to_the_start(train):
    torch.manual_seed(0)
    model = models.LayerGCN(train, dim=D, layers=3, prune=0.5).eval()
    a = dense(normalised_adjacency(train))
    x = own = torch.cat([model.users.weight, model.items.weight])
    total = torch.zeros_like(own)
    for _ in range(3):
        y = a @ x
        x = torch.stack([F.cosine_similarity(y[n], own[n], dim=0) * y[n] for n in range(U + N)])
        total = total + x
    torch.testing.assert_close(torch.cat(model.encode().pick(slice(None), slice(None))), total, atol=1e-6, rtol=1e-5)
    model.train().begin_epoch(np.random.default_rng(0))
    kept = model.sampled.sparse()
    assert kept.nnz == 2 * round(0.5 * len(train)) and not torch.allclose(model.encode().users, total[:U])


def test_simgcl_noise_has_its_length_and_keeps_the_orthant(train):
    torch.manual_seed(0)
    model = models.SimGCL(train, dim=D, layers=1, noise=0.3)
    encoded = model.encode()
    clean = torch.cat([encoded.users, encoded.items])
    some = clean.abs().sum(1) > 0
    for view in (encoded.parts["one"], encoded.parts["other"]):
        torch.testing.assert_close((view - clean)[some].norm(dim=1), torch.full((int(some.sum()),), 0.3))
        assert (view.sign() == clean.sign())[some].all()
    assert not torch.equal(encoded.parts["one"], encoded.parts["other"]) and not model.eval().encode().parts


def test_freedom_gives_a_new_item_its_neighbours_ids(train, features):
    torch.manual_seed(0)
    model = models.FREEDOM(train, features=features, dim=D, neighbours=3, shares=(0.25, 0.75), prune=0.5).eval()
    graphs = [np.zeros((N, N)), np.zeros((N, N))]
    for c, m in enumerate(features.modalities):
        x = torch.from_numpy(features.tables[m].copy())
        here = np.flatnonzero(features.presence[:, c])
        for i in here:
            best = sorted(here, key=lambda j: -float(F.cosine_similarity(x[i], x[j], dim=0)))[:3]
            graphs[c][i, best] = 1 / 3
    s = 0.25 * graphs[0] + 0.75 * graphs[1]
    s[3] = graphs[0][3]  # it lacks the second: the first is all it is alike in
    np.testing.assert_allclose(model.item_graph.sparse().toarray(), s, atol=1e-6)
    ids = model.items.weight * model.warm[:, None]
    items = model.embed()[1]
    torch.testing.assert_close(items[-1], torch.tensor(s[-1], dtype=torch.float32) @ ids)
    assert (items[2] - ids[2]).abs().sum() > 0  # an item without content has its events alone
    model.train().begin_epoch(np.random.default_rng(1))
    assert not torch.allclose(model.encode().users, model.embed()[0])


def test_bm3_and_selfcf_need_no_negative_and_their_targets_stand_still(train, features):
    for model in (models.BM3(train, features=features, dim=D, dropout=0.0), models.SelfCF(train, dim=D, dropout=0.0)):
        torch.manual_seed(0)
        assert model.negatives == 0
        terms = model.loss(batch_of(train, negatives=0))
        online = (
            model._online()
            if isinstance(model, models.BM3)
            else model.graph(*model.trained(model.users.weight, model.items.weight))
        )
        batch = batch_of(train, negatives=0)
        u, i = online[0][batch.users], online[1][batch.items]
        cos = F.cosine_similarity
        naive = (1 - cos(model.predictor(u), i.detach())).mean() + (1 - cos(model.predictor(i), u.detach())).mean()
        share = 1 if isinstance(model, models.BM3) else 2
        torch.testing.assert_close(terms["bootstrap"], naive / share)
        wanted = [model.users.weight, model.predictor.weight]
        mine, theirs = (torch.autograd.grad(x, wanted, retain_graph=True) for x in (terms["bootstrap"], naive / share))
        torch.testing.assert_close(mine, theirs)


def test_selfcf_history_mixes_what_was_seen_last(train):
    torch.manual_seed(0)
    model = models.SelfCF(train, dim=D, target="history", momentum=0.25)
    batch = batch_of(train, negatives=0)
    assert (model.seen_users == 0).all()
    model.loss(batch)
    first = model.graph(*model.trained(model.users.weight, model.items.weight))[0].detach()
    torch.testing.assert_close(model.seen_users[batch.users], first[batch.users])
    model.users.weight.data.mul_(-2)
    second = model.graph(*model.trained(model.users.weight, model.items.weight))[0].detach()
    target = model._targets(*model.graph(*model.trained(model.users.weight, model.items.weight)), batch)[0]
    torch.testing.assert_close(target, 0.25 * first[batch.users] + 0.75 * second[batch.users])


def test_mgcn_leaves_out_what_an_item_lacks(train, features):
    torch.manual_seed(0)
    model = models.MGCN(train, features=features, dim=D, neighbours=3)
    views, behaviour = torch.randn(U + N, 2, D, requires_grad=True), torch.randn(U + N, D)
    present = torch.cat([torch.ones(U, 2, dtype=torch.bool), torch.tensor(features.presence)])
    side = model.fused(behaviour, views, present)
    (gradient,) = torch.autograd.grad((side**2).sum(), views)
    items = gradient[U:].abs().sum(-1) > 0
    assert items.tolist() == features.presence.tolist() and (gradient[:U].abs().sum(-1) > 0).all()
    scores = [float(model.attention(views[0, m])) for m in range(2)]
    w = torch.softmax(torch.tensor(scores), 0)
    shared = w[0] * views[0, 0] + w[1] * views[0, 1]
    parts = [torch.sigmoid(model.preferences[m](behaviour[0])) * (views[0, m] - shared) for m in range(2)]
    torch.testing.assert_close(side[0], (shared + parts[0] + parts[1]) / 3)


@pytest.mark.parametrize(
    "name, own", [("MGCN", "contrast"), ("SMORE", "contrast"), ("SLMRec", "alignment")], ids=lambda x: x
)
@pytest.mark.parametrize("loss", ["bpr", "softmax"])
def test_a_batch_is_fused_alone_to_the_same_loss_and_gradients(name, own, loss, train, features):
    torch.manual_seed(0)
    weight = {f"{own}_weight": 0.5}
    model = models.classes()[name](train, features=features, dim=D, loss=loss, **weight)
    batch = batch_of(train, negatives=model.negatives, size=5)
    every = model.encode()
    found = []
    for terms in (model.loss(batch), model.ranking(batch, every.pick) | model.auxiliary(batch, every)):
        total = torch.stack(list(terms.values())).sum()
        found.append((terms, torch.autograd.grad(total, list(model.parameters()), allow_unused=True)))
    assert set(found[0][0]) == set(found[1][0]) >= {loss, own}
    torch.testing.assert_close(found[0], found[1])


def test_lattice_learned_graph_is_its_dense_formula(train, features):
    torch.manual_seed(0)
    model = models.LATTICE(train, features=features, dim=D, neighbours=3, keep=0.3)
    x = torch.randn(N, D, requires_grad=True)
    outs = model.learned(model, [x] * len(model.modalities))
    for c, (m, layer) in enumerate(zip(model.modalities, model.learned.maps, strict=True)):
        here = torch.from_numpy(features.presence[:, c].copy())
        told = F.normalize(layer(model.rows(m)), dim=1)
        cosine = (told @ told.T).masked_fill(~(here[:, None] & here), -2.0)
        a = torch.zeros(N, N).scatter(1, cosine.topk(3, dim=1).indices, 1.0) * cosine.clamp(min=0)
        a = a * here[:, None]
        half = a.sum(1).clamp(min=1e-12).rsqrt() * here
        naive = 0.3 * (dense(model.modal_graphs[c].sparse()) @ x) + 0.7 * ((half[:, None] * a * half) @ x)
        torch.testing.assert_close(outs[c], naive, atol=1e-5, rtol=1e-4)
        wanted = [x, layer.weight]
        mine, theirs = (torch.autograd.grad((y**2).sum(), wanted, retain_graph=True) for y in (outs[c], naive))
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_lattice_chooses_neighbours_once_an_epoch_and_keeps_them_when_resumed(train, features):
    torch.manual_seed(0)
    model = models.LATTICE(train, features=features, dim=D, neighbours=3)
    before = model.learned.near0.clone()
    for layer in model.learned.maps:
        torch.nn.init.normal_(layer.weight)
    model.begin_epoch(np.random.default_rng(0), resumed=True)
    assert torch.equal(model.learned.near0, before) and "learned.near0" in model.state_dict()
    model.begin_epoch(np.random.default_rng(0))
    assert not torch.equal(model.learned.near0, before)


def test_mmgcn_layer_is_its_formula(train, features):
    torch.manual_seed(0)
    model = models.MMGCN(train, features=features, dim=D, layers=1, reg=0.5).eval()
    a, total = dense(mean_adjacency(train)), 0.0
    users, items = model.trained(*model.node.split([U, N]))
    ids = torch.cat([users, items])
    for m, preference, stack in zip(model.modalities, model.preferences, model.stacks, strict=True):
        x = torch.cat([F.normalize(preference) * model.known[:, None], F.normalize(model.rows(m))])
        layer = stack[0]
        h = F.leaky_relu(a @ (x @ layer.neighbour.weight.T))
        own = F.leaky_relu(layer.own(x)) + ids
        here = torch.cat([model.known, model.present(m) | model.warm])[:, None]
        total = total + F.leaky_relu(layer.join(torch.cat([h, own], 1))) * here
    encoded = model.encode()
    torch.testing.assert_close(torch.cat([encoded.users, encoded.items]), total, atol=1e-5, rtol=1e-4)
    frozen = models.MMGCN(train, features=features, dim=D, layers=1, train_ids=False)
    batch, nodes = batch_of(train), model.node
    items = torch.cat([batch.items, batch.negatives[:, 0]]) + U
    means = [nodes[batch.users], nodes[items], *(p[batch.users] for p in model.preferences)]
    torch.testing.assert_close(model.loss(batch)["reg"], 0.5 * sum(x.square().mean() for x in means))
    assert not frozen.node.requires_grad and set(frozen.loss(batch_of(train))) == {"bpr"}


def test_grcn_routing_moves_prototypes_and_the_code_s_variant_does_not(train, features):
    found = []
    for rounds in (0, 3):
        torch.manual_seed(0)
        found.append(models.GRCN(train, features=features, dim=D, routing=rounds).embed())
    assert not torch.allclose(found[0][0][:, :D], found[1][0][:, :D])  # edges follow the prototypes
    model = models.GRCN(train, features=features, dim=D)
    model.confidence.data.fill_(-1.0)
    users, items = model.embed()
    ids = F.normalize(model.users.weight) * model.known[:, None]
    torch.testing.assert_close(users[:, :D], ids)  # every edge is cut: nothing flows
    assert (items[-1, :D] == 0).all() and (items[-1, D:].abs().sum() > 0)


def test_lgmrec_scores_do_not_change_from_call_to_call(train, features):
    torch.manual_seed(0)
    model = models.LGMRec(train, features=features, dim=D)
    assert torch.equal(model.score(np.arange(U)), model.score(np.arange(U)))
    one, other = model.encode(), model.encode()
    assert not torch.equal(one.users, other.users)  # memberships are drawn while it trains
    members = torch.softmax(model.through(model.members)[0] / 0.2, dim=1)
    model.eval()
    expected = (members * model.present("image")[:, None]) @ (
        (members * model.present("image")[:, None]).T @ model.graph(*model.ids())[1]
    )
    parts = model.encode().parts
    torch.testing.assert_close(parts["image"][U:] @ parts["image edges"], expected, atol=1e-5, rtol=1e-4)


def test_lgmrec_contrasts_what_has_both_modalities_alone(train, features):
    torch.manual_seed(0)
    model = models.LGMRec(train, features=features, dim=D, dropout=0.0, contrast_weight=1.0)
    encoded, batch, t = model.encode(), batch_of(train), model.temperature
    wide = {m: F.normalize(encoded.parts[m] @ encoded.parts[f"{m} edges"], dim=1).detach() for m in ("image", "text")}
    items = [i for i in range(N) if features.presence[i].all() and train.item_counts[i]]
    users = [u for u in range(U) if set(train.csr[u].indices) & set(items)]
    assert 2 not in items and 3 not in items and N - 1 not in items and set(batch.items.tolist()) & {2, 3}
    total = 0.0
    for nodes, among, offset in ((batch.users, users, 0), (batch.items, items, U)):
        some = [n for n in nodes.tolist() if n in among]
        rows = wide["image"][[n + offset for n in some]] @ wide["text"][[n + offset for n in among]].T / t
        total += F.cross_entropy(rows, torch.tensor([among.index(n) for n in some]))
    torch.testing.assert_close(model.auxiliary(batch, encoded)["contrast"], total)


def test_mmssl_writes_what_users_have_not_taken_and_what_speaks_for_them(train, features):
    torch.manual_seed(0)
    model = models.MMSSL(train, features=features, dim=6, heads=2, top=N)
    taken = train.csr.toarray() > 0
    for u, written in enumerate(model.write()[0].tolist()):  # all of the others with an event, and -1 for want of more
        others = {i for i in range(N - 1) if not taken[u, i]} if train.user_counts[u] else set()
        assert {i for i in written if i >= 0} == others
    view, final = torch.randn(U, 6), torch.randn(U, 6)
    found = []
    for encoded in (model.encode(), model.encode()):  # its contrast is of a view against the final users, both ways in
        encoded.parts.update({f"users by {m}": view for m in model.modalities})
        encoded.users = final
        found.append(model.auxiliary(batch_of(train), encoded)["contrast"])
    some = batch_of(train).users.unique()
    within = F.normalize(view[some]) @ F.normalize(view[some]).T / 0.5
    across = F.normalize(view[some]) @ F.normalize(final[some]).T / 0.5
    within.fill_diagonal_(-torch.inf)
    each = torch.logsumexp(torch.cat([across, within], 1), 1) - across.diagonal()
    torch.testing.assert_close(found[0], 2 * 0.03 * each.mean())
    assert not [k for k in model.weights() if k.startswith("critic")] and any("critic" in k for k in model.state_dict())


def test_mentor_trains_its_mask_unless_told_to_do_as_its_code(train, features):
    torch.manual_seed(0)
    paper = models.MENTOR(train, features=features, dim=D, hidden=7, neighbours=3)
    code = models.MENTOR(train, features=features, dim=D, hidden=7, neighbours=3, train_mask=False)
    terms = paper.loss(batch_of(train))
    assert set(terms) == {"bpr", "reg", "align", "graph", "mask"} and "mask" not in code.loss(batch_of(train))
    torch.manual_seed(1)
    encoded = paper.encode()
    whole = encoded.parts["fused"]
    torch.manual_seed(2)
    mask = paper.auxiliary(batch_of(train), encoded)["mask"]
    torch.manual_seed(2)
    apart = []
    for nodes in (batch_of(train).users.unique(), batch_of(train).items.unique() + U):
        rows = whole[nodes]
        apart.append((1 - F.cosine_similarity(paper.decoder(rows), F.dropout(rows.detach(), 0.5), dim=-1)).mean())
    torch.testing.assert_close(mask, 1.5 * (apart[0] + apart[1]))
    moved = torch.autograd.grad(terms["mask"], [paper.decoder.weight, paper.personal])
    assert all(g.abs().sum() > 0 for g in moved)


def test_cohesion_gives_the_weak_channel_more(train, features):
    torch.manual_seed(0)
    model = models.COHESION(train, features=features, dim=D, hidden=7, neighbours=3)
    rows = torch.zeros(3, 3 * D)  # a user, a positive, a negative
    rows[0], rows[1, :D] = 1.0, 1.0  # the first channel alone tells them apart
    rows.requires_grad_()

    def vectors(u, i, j):
        return rows[0].expand(len(u), -1), rows[1].expand(len(i), -1), rows[2].expand(*j.shape, -1)

    model.reg = 0.0
    model.ranking(batch_of(train), vectors)["bpr"].backward()
    strength = rows.grad[1].view(3, D).abs().sum(1)
    assert strength[0] < strength[1] and strength[1] == pytest.approx(float(strength[2]), rel=1e-5)
    weights = 1 - torch.softmax(torch.tensor([float(D), 0.0, 0.0]), 0)
    torch.testing.assert_close(strength / strength.sum(), weights / weights.sum(), atol=1e-4, rtol=1e-3)


def test_dualgnn_and_dragon_add_their_companions(train, features):
    torch.manual_seed(0)
    model = models.DualGNN(train, features=features, dim=D, hidden=7, companions=2)
    c = dense(model.companions.sparse())
    torch.testing.assert_close(c.sum(1)[model.known], torch.ones(int(model.known.sum())))
    users, items = model.each(model.encoders)
    own = model.personal[:, :1] * users[:, 0] + model.personal[:, 1:] * users[:, 1]
    encoded = model.encode()
    torch.testing.assert_close(encoded.users, own + c @ own)
    torch.testing.assert_close(encoded.items, items[:, 0] + items[:, 1])


def test_smore_filter_is_a_circular_convolution():
    from mmllmrec.models.smore import SpectralFilter

    torch.manual_seed(0)
    shape = SpectralFilter(6)
    x = torch.randn(3, 6)
    kernel = torch.fft.irfft(torch.view_as_complex(shape.kernel), n=6)
    naive = torch.stack([sum(x[:, (d - k) % 6] * kernel[k] for k in range(6)) for d in range(6)], dim=1)
    torch.testing.assert_close(shape(torch.fft.rfft(x, norm="ortho")), naive, atol=1e-5, rtol=1e-4)


def test_diffusion_weights_are_the_loss_of_signal_to_noise():
    kept, betas = schedule(5, noise=0.1)
    ratio = kept.double() / (1 - kept.double())
    weights = [1.0, *(ratio[:-1] - ratio[1:]).tolist()]
    # computed apart from the schedule that Jiang et al. give: variances 1e-5 to 2e-3, the first step's share 1e-4
    np.testing.assert_allclose(weights, [1, 8326, 760, 285, 149], rtol=5e-3)
    assert betas[0] == 1e-4 and (kept.diff() < 0).all()


def test_diffmm_writes_a_graph_an_epoch(train, features):
    torch.manual_seed(0)
    model = models.DiffMM(train, features=features, dim=D, hidden=7, top=2)
    model.begin_epoch(np.random.default_rng(0))
    assert (model.written0 == -1).all()  # the denoisers have learnt nothing yet
    model.begin_epoch(np.random.default_rng(0))
    assert (model.written0 >= 0).all() and model.links[0].sparse().nnz > 2 * (U - 1) * 2
    assert model.warm[model.written0].all()  # no row of events says anything of an item without one
    model = models.DiffMM(train, features=features, dim=D, hidden=7, top=2, reg=0.5)
    squares = model.users.weight.square().sum() + model.items.weight.square().sum()
    torch.testing.assert_close(model.loss(batch_of(train))["reg"], 0.5 * squares)
    kept = model.written0.clone()
    for p in model.denoisers.parameters():
        torch.nn.init.normal_(p)
    model.begin_epoch(np.random.default_rng(0), resumed=True)
    assert torch.equal(model.written0, kept)


def test_alignrec_s_similarity_is_of_what_both_items_have(train, features):
    torch.manual_seed(0)
    model = models.AlignRec(train, features=features, dim=D, neighbours=3, similarity_weight=1.0)
    encoded, items = model.encode(), batch_of(train).items.unique()
    assert {2, 3} & set(items.tolist())
    k = torch.zeros(len(items), len(items))
    for a, i in enumerate(items.tolist()):
        for b, j in enumerate(items.tolist()):
            both = [m for m in model.modalities if model.present(m)[i] and model.present(m)[j]]
            sides = [F.cosine_similarity(model.rows(m)[i], model.rows(m)[j], dim=0) for m in both]
            k[a, b] = torch.stack(sides).mean() if both else 0.0
    rows = encoded.parts["side"][items + U]
    expected = (rows @ rows.T - k).norm() / len(items)
    torch.testing.assert_close(model.auxiliary(batch_of(train), encoded)["similarity"], expected)


def test_damrs_keeps_links_that_all_modalities_agree_on():
    from mmllmrec.models.damrs import agreeing, co_consumed

    first = np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    second = np.array([[1.0, 0], [0, 1], [0.1, 1], [0, 1]])  # 0 and 1 are alike in the first alone
    one, two = agreeing([first, second], np.ones((4, 2), bool), k=4)
    assert one[0, 1] == 0 and two[0, 1] == 0 and one[2, 3] == 1 and two[2, 3] == 1 and one[0, 0] == 1
    lacking = np.ones((4, 2), bool)
    lacking[1, 1] = False  # nothing speaks against it any more
    assert agreeing([first, second], lacking, k=4)[0][0, 1] == 1
    ids = IdMap(range(3), what="user id"), IdMap(range(4), what="item id")
    events = Interactions(np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 1, 2]), None, *ids)
    together = co_consumed(events, k=5).toarray()
    assert together[0, 1] == 1 and together[1, 2] == 0 and (np.diag(together) == 1).all()


def test_damrs_means_are_over_the_views_an_item_has(train, features):
    from mmllmrec.models.damrs import graded

    torch.manual_seed(0)
    model = models.DAMRS(train, features=features, dim=D, neighbours=3)
    views, content = (model.encode().parts[k] for k in ("views", "content"))
    assert model.has[:, 2].tolist() == [False, False, True] and model.has[:, 3].tolist() == [True, False, True]
    torch.testing.assert_close(content[2], views[2, 2])
    torch.testing.assert_close(content[3], (views[0, 3] + views[2, 3]) / 2)
    assert (views[:, N - 1] != 0).any() and not model.has[2, N - 1]  # nobody took it with anything
    batch = batch_of(train)
    kept, _ = model._weights(batch, model.encode())
    one = batch.items.tolist().index(2)
    u = model.encode().users[batch.users[one]]
    several = torch.randn(2, 40, D)
    has = torch.stack([torch.ones(40, dtype=torch.bool), torch.arange(40) % 2 == 0])
    cosine = F.normalize(several, dim=2) @ F.normalize(several, dim=2).transpose(1, 2)
    chance = [torch.softmax(cosine[0], 1), torch.softmax(cosine[1].masked_fill(~has[1], -torch.inf), 1)]
    costs = []
    for v in (0, 1):
        for a in has[v].nonzero()[:, 0].tolist():
            agreed, own = {}, {}
            for b in has[v].nonzero()[:, 0].tolist():
                shared = [w for w in (0, 1) if has[w, a] and has[w, b]]
                own[b] = float(chance[v][a, b])
                agreed[b] = 2 * np.mean([float(chance[w][a, b]) for w in shared]) + own[b]
            first = sorted(agreed, key=lambda b: -agreed[b])[:3]
            second = sorted((b for b in own if b not in first), key=lambda b: -own[b])[:3]
            weights = {b: float(torch.exp(cosine[v, a, b] / 0.2)) for b in own}
            total, near = sum(weights.values()), sum(weights[b] for b in first)
            costs.append(-np.log(near / total) - np.log(sum(weights[b] for b in second) / (total - near)))
    assert float(graded(several, has, k=3, temperature=0.2)) == pytest.approx(np.mean(costs), rel=1e-4)
    torch.testing.assert_close(kept[one], torch.sigmoid(F.normalize(views[2, 2], dim=0) @ u).detach())  # no variance


def test_llmrec_prunes_the_largest_losses_and_reads_what_was_written(train, features):
    pairs = np.full((U, 2), -1)
    pairs[0] = (1, 4)
    batch = batch_of(train)
    rows = [*zip(batch.users.tolist(), batch.items.tolist(), batch.negatives[:, 0].tolist(), strict=True)]

    def bpr(**options: object) -> tuple[float, list[float]]:
        torch.manual_seed(0)
        model = models.LLMRec(train, features=features, dim=D, mask_weight=0.0, **options)
        encoded = model.encode()
        written = [(0, 1, 4) for user, _, _ in rows if user == 0] if "pairs" in options else []
        gaps = [
            float(F.softplus(encoded.users[u] @ (encoded.items[j] - encoded.items[i])).detach())
            for u, i, j in [*rows, *written]
        ]
        return float(model.loss(batch)["bpr"].detach()), gaps

    ours, gaps = bpr(pruned=0.5)
    assert ours == pytest.approx(np.mean(sorted(gaps)[: len(gaps) // 2]), rel=1e-5)
    ours, gaps = bpr(pruned=0.0, pairs=pairs, pair_share=1.0)  # what was written is as good as what was seen
    assert len(gaps) > len(rows) and ours == pytest.approx(np.mean(gaps), rel=1e-5)
    torch.manual_seed(0)
    model = models.LLMRec(train, features=features, dim=D, mask=0.1)
    drawn = torch.stack([model.encode().parts["masked"] for _ in range(50)])
    assert drawn.any(1).all() and drawn[:, 0].float().mean() < 0.6 and not drawn[:, ~model.known].any()
    other = FeatureTable({m: np.roll(t, 1, axis=0) for m, t in features.tables.items()}, features.presence)
    before = model.profiles.clone()
    model._use(other)  # a template is of the features at hand, and what was written is not
    assert not torch.equal(model.profiles, before)
    written = models.LLMRec(train, features=features, dim=D, profiles=np.ones((U, 2), np.float32))
    written._use(other)
    assert (written.profiles == 1).all() and "profiles" in written.weights() and "profiles" not in model.weights()
    with pytest.raises(DataError, match="a row a user"):
        models.LLMRec(train, features=features, profiles=np.zeros((3, 2)))
    with pytest.raises(DataError, match="pairs are terms of BPR"):
        models.LLMRec(train, features=features, pairs=pairs, loss="softmax")


def test_the_critic_of_mmssl_is_told_as_published(train, features):
    """Wasserstein with a gradient penalty on rows between, in all columns, as the paper writes it."""
    model = mm.models.MMSSL(train, features=features, dim=8).double()
    rng, size = torch.Generator().manual_seed(0), (6, train.n_items)
    fake, real = (torch.rand(n * size[0], size[1], generator=rng, dtype=torch.float64) for n in (2, 1))
    own = list(model.critic.parameters())
    torch.manual_seed(1)
    found = model._critic(fake, real)
    torch.manual_seed(1)
    share = torch.rand(len(fake), 1).double()
    between = (share * real.repeat(2, 1) + (1 - share) * fake).requires_grad_()
    slopes = torch.autograd.grad(model.critic(between).sum(), between, create_graph=True)[0]
    steep = torch.stack([(row.norm() - 1) ** 2 for row in slopes]).mean()
    told = model.critic(fake).mean() - model.critic(real).mean() + 0.3 * steep
    torch.testing.assert_close(found, told)
    torch.testing.assert_close(torch.autograd.grad(found, own), torch.autograd.grad(told, own))


def test_the_critic_of_mmssl_and_the_model_move_apart(train, features):
    torch.manual_seed(0)
    model = models.MMSSL(train, features=features, dim=6, heads=2, top=3)
    terms = model.loss(batch_of(train))
    critic = {n for n, _ in model.named_parameters() if n.startswith("critic")}
    for name, own in (("adversarial", False), ("critic", True)):
        model.zero_grad()
        terms[name].backward(retain_graph=True)
        moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert moved and (moved <= critic) == own and bool(moved & critic) == own


def test_folded_users_stand_as_trained_ones_do(train):
    bpr = models.ImplicitBPR(train, dim=4, iterations=5)
    assert (bpr.folded(train.csr, np.arange(U))[:-1, -1] == 1).all() and (bpr.factors[0][:-1, -1] == 1).all()
    torch.manual_seed(0)
    model = models.SelfCF(train, dim=D, layers=1)
    emptied = Interactions(train.users[:0], train.items[:0], None, train.user_ids, train.item_ids)
    items = model.embed()[1]
    other = model.with_history(train.select(train.users != 0))  # others keep theirs
    torch.testing.assert_close(other.embed()[0][1:], model.embed()[0][1:])
    cells = train.csr.toarray().copy()
    cells[0] = cells[1]  # the first user's history is now the second's
    users, of = np.nonzero(cells)
    moved = model.with_history(Interactions(users, of, None, train.user_ids, train.item_ids)).embed()[0][0]
    mean = items[train.csr[1].indices].mean(0)
    torch.testing.assert_close(moved, torch.cat([mean[D:], mean[:D]]))
    assert (model.with_history(emptied).embed()[0] == 0).all()


def test_ials_folds_a_user_in_exactly_and_edlae_is_its_formula(train):
    model = models.IALS(train, dim=4, reg=0.3, alpha=3.0, iterations=600)
    users, items = model.factors
    y = items.astype(np.float64)
    x = model.folded(train.csr, np.arange(U))
    for user in range(U - 1):
        c = np.ones(N)
        p = train.csr.toarray()[user] > 0
        c[p] += 3.0
        exact = np.linalg.solve(y.T @ (c[:, None] * y) + 0.3 * np.eye(4), y.T @ (c * p))
        np.testing.assert_allclose(x[user], exact, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(users[user], exact, atol=1e-3)  # the library steps towards it
    g = train.csr.toarray().astype(np.float64)
    g = g.T @ g
    inverse = np.linalg.inv(g + 0.25 / 0.75 * np.diag(np.diag(g)) + 2.0 * np.eye(N))
    b = -inverse / np.diag(inverse)
    np.fill_diagonal(b, 0)
    np.testing.assert_allclose(models.EASE(train, reg=2.0, dropout=0.25).weight, b, atol=1e-6)


@pytest.fixture(scope="module")
def shop():
    data = mm.load_dataset("atelier", scale=0.06)
    return mm.splits.cold_items(data, fraction=0.2, seed=0)


def test_dvbpr_learns_from_pixels_and_a_missing_picture_is_a_zero_vector(shop):
    seed_everything(0)
    model = models.DVBPR(shop.train, catalog=shop.catalog, dim=8, size=32, width=8)
    start = [p.clone() for p in model.look.parameters()]
    batch = next(epoch(shop.train, batch_size=64, negatives=1, rng=np.random.default_rng(0)))
    terms = model.loss(batch)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.look.parameters())
    assert len(start) == 16
    seen = torch.from_numpy(shop.catalog.present("image"))
    items = model.embed()[1]
    assert (items[~seen] == 0).all() and (items[seen].abs().sum(1) > 0).all() and (~seen).any()
    blind = model.with_catalog(shop.catalog.without("image"))
    assert (blind.embed()[1] == 0).all() and torch.equal(model.embed()[1], items)
    with pytest.raises(DataError, match="image"):
        models.DVBPR(shop.train, catalog=_no_pictures(shop))
    other = mm.load_dataset("atelier", scale=0.05).catalog
    for call in (model.with_catalog, lambda c: models.DVBPR(shop.train, catalog=c)):
        with pytest.raises(DataError, match="not those of the training events"):
            call(other)


def test_dvbpr_learns_nothing_of_what_it_cannot_see_and_the_same_in_chunks(shop):
    seed_everything(0)
    model = models.DVBPR(shop.train, catalog=shop.catalog, dim=8, size=32, width=8, reg=0.0)
    unseen = ~torch.from_numpy(shop.catalog.present("image"))
    batch = next(epoch(shop.train, batch_size=len(shop.train), negatives=1, rng=np.random.default_rng(0)))
    blind = unseen[batch.items]
    assert blind.any()
    only = replace(batch, users=batch.users[blind], items=batch.items[blind], negatives=batch.negatives[blind])
    model.loss(only)["bpr"].backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
    small = next(epoch(shop.train, batch_size=64, negatives=1, rng=np.random.default_rng(0)))
    for part in model.look:
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # drawn for each chunk apart
    found, looked, looks = [], [], model._looks
    model._looks = lambda items: looked.append(len(items)) or looks(items)
    for chunk in (None, 16):
        model.zero_grad()
        looked.clear()
        model.loss(replace(small, chunk=chunk))["bpr"].backward()
        assert (max(looked) > 16) == (chunk is None)
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)
    same = model.same.numpy()
    assert len(set(same[unseen.numpy()])) == 1  # what shows nothing is alike


def _no_pictures(shop):
    catalog = shop.catalog
    return type(catalog)(catalog.dataset.remove_columns("image"), catalog.item_ids)

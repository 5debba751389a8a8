"""Content and IDs under one score: users as their histories say, what is absent, and what each term is."""

import datasets
import numpy as np
import pytest
import torch

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch, in_batch
from mmllmrec.encoders.heads import unit
from mmllmrec.encoders.history import HistoryEncoder, HistoryMean, Moments
from mmllmrec.features.table import FeatureTable
from mmllmrec.models import Recommender, TwoStage
from mmllmrec.seed import seed_everything
from tests.towers import tiny_world

D = 5


@pytest.fixture
def model():
    made = worlds_model()
    with torch.no_grad():
        made.history_tower.out.weight.normal_(std=0.3)
        made.user_ids.weight.normal_()
        made.item_ids.weight.normal_()
    return made


def events_of(model, pairs):
    users, items = (np.array(x, dtype=np.int64) for x in zip(*pairs, strict=True))
    return Interactions(users, items, None, model.train_data.user_ids, model.train_data.item_ids)


def test_the_discriminant_is_fishers():
    """On plenty of events it is the linear discriminant between a user's items and all, as scikit-learn finds it."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(4000, D)) @ rng.normal(size=(D, D))
    own = rng.normal(size=(3000, D)) @ np.linalg.cholesky(np.cov(items.T)).T + 0.3
    tower = HistoryEncoder(D, layers=0)
    with torch.no_grad():
        tower.log_ridge.fill_(-20.0)
        tower.log_shrink.fill_(-20.0)
    sums, counts = torch.tensor(own.sum(0))[None].float(), torch.tensor([3000.0])
    got = tower.discriminant(sums, counts, Moments.of(torch.tensor(items).float()))[0].detach().numpy()
    cov = np.cov(items.T, bias=True)
    np.testing.assert_allclose(got, np.linalg.solve(cov, own.mean(0) - items.mean(0)), rtol=1e-3, atol=1e-4)


def test_a_history_is_a_set_and_padding_is_nothing():
    seed_everything(1)
    tower = HistoryEncoder(8, heads=2)
    torch.nn.init.normal_(tower.out.weight)
    tokens, moments = torch.randn(3, 4, 8), Moments.of(torch.randn(13, 8))
    present = torch.arange(4) < torch.tensor([4, 2, 0])[:, None]

    def run(tokens, present):
        sums = (tokens * present[..., None]).sum(1)
        return tower(tokens, present, sums, present.sum(1).float(), moments)

    found = run(tokens, present)
    assert (found[2] == 0).all() and (found[:2] != 0).any(dim=1).all()
    torch.testing.assert_close(run(tokens.flip(1), present.flip(1)), found, atol=1e-5, rtol=1e-4)
    padded = tokens.masked_fill(~present[..., None], 99.0)
    torch.testing.assert_close(run(padded, present), found, atol=0, rtol=0)
    torch.testing.assert_close(run(tokens[:, :2], present[:, :2])[1], found[1], atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="history: tokens"):
        tower(tokens, present[:, :3], tokens.sum(1), present.sum(1).float(), moments)


def test_a_settled_model_reads_its_items_once(model, monkeypatch):
    known = model.train_data.union(events_of(model, [(3, 1), (3, 4)]))
    want, plain = model.with_history(known).embed(), model.embed()
    still = model.settled()
    monkeypatch.setattr(type(model), "content", lambda *anything: pytest.fail("read again"))
    for found, wanted in ((still.with_history(known).embed(), want), (still.embed(), plain)):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)
    monkeypatch.undo()
    still._use(model.features)  # other features are read, and the model itself goes on following its weights
    assert still.said is None and model.said is None


def test_a_new_user_is_what_its_events_say(model):
    """User 3 has no training event; given some, its vector is the tower's, computed from scratch."""
    known = events_of(model, [(3, 1), (3, 4)])
    users, items = model.with_history(model.train_data.union(known)).embed()
    model.eval()
    with torch.no_grad():
        content = unit(model.content(torch.arange(11)).fused)
        warm = model.item_present
        rows = content[[1, 4]]
        h = model.history_tower(
            rows[None],
            torch.ones(1, 2, dtype=torch.bool),
            rows.sum(0)[None],
            torch.tensor([2.0]),
            Moments.of(content[warm]),
        )
    torch.testing.assert_close(users[3, :-1], h[0], atol=1e-5, rtol=1e-4)
    before = model.embed()
    assert (before[0][3, :-1] == 0).all()
    torch.testing.assert_close(users[:3], before[0][:3], atol=1e-5, rtol=1e-4)  # others keep their events
    torch.testing.assert_close(items, before[1], atol=0, rtol=0)  # no cold item got an event


def test_a_cold_item_moves_towards_those_who_took_it(model):
    taken = model.train_data.union(events_of(model, [(0, 5), (1, 5)]))
    before, after = model.embed()[1], model.with_history(taken).embed()[1]
    rows = np.eye(11, dtype=bool)[[2, 4]]  # strangers meet the item where it has moved to
    again = model.with_history(taken)
    torch.testing.assert_close(again.score_from(rows), again.users_from(rows) @ after.T)
    moved = (before - after).abs().amax(1) > 1e-6
    assert moved.tolist() == [n == 5 for n in range(11)]
    p = model.embed()[0]
    gain = (p[:2] @ (after[5] - before[5])).mean() - (p @ (after[5] - before[5])).mean()
    assert gain > 0


def test_users_mix_id_and_history_by_its_length(model):
    def users(mix):
        model.mix = mix
        return model.embed()[0][:, :-1]

    alone, told = users(0.0), users(1e9)
    torch.testing.assert_close(alone[0], model.user_ids.weight[0].detach(), atol=1e-5, rtol=1e-4)
    n = float(model.user_count[0])
    torch.testing.assert_close(users(2.0)[0], (n * alone[0] + 2 * told[0]) / (n + 2), atol=1e-4, rtol=1e-4)


def test_the_history_term_never_sees_what_it_must_find(model):
    """With every event in the batch nothing is left to tell, and the softmax is that of the biases alone."""
    model.train()
    data = model.train_data
    batch = Batch(torch.tensor(data.users), torch.tensor(data.items), by_item=True)
    found = in_batch(data, batch)
    q, biases = torch.randn(len(found.items), 16), torch.randn(len(found.items))
    with torch.no_grad():
        model.bank.normal_()
    value = model._history_loss(batch, found, q, biases)
    blind = model._softmax(torch.zeros(len(batch), 16), q, biases, found)
    torch.testing.assert_close(value, blind)
    part = Batch(batch.users[::2], batch.items[::2])
    found = in_batch(data, part)
    q, biases = q[: len(found.items)], biases[: len(found.items)]
    assert model._history_loss(part, found, q, biases) != model._softmax(torch.zeros(len(part), 16), q, biases, found)


def test_terms_are_those_asked_for_and_each_has_a_gradient():
    train, _ = tiny_world()
    rng = np.random.default_rng(3)
    features = FeatureTable({"a": rng.normal(size=(11, 7)), "b": rng.normal(size=(11, 3))}, np.ones((11, 2), bool))
    weights = {"modality_weight": 0.1, "cross_weight": 0.1, "collaborative_weight": 0.1}
    model = TwoStage(train, features=features, dim=16, **weights).train()
    batch = Batch(torch.tensor(train.users[::2]), torch.tensor(train.items[::2]))
    terms = model.loss(batch)
    assert set(terms) == {"softmax", "reg", "history", "modality", "cross", "collaborative"}
    for name, term in terms.items():
        model.zero_grad()
        term.backward(retain_graph=True)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), name
    # the towers of one path hear of its own loss: with the fusion's weight on another one, too
    model.zero_grad()
    terms = model.loss(batch)
    terms["modality"].backward()
    assert model.heads.late["b"][0].weight.grad.abs().sum() > 0 and model.user_ids.weight.grad is None


def worlds_model(**options):
    train, _ = tiny_world()
    rng = np.random.default_rng(3)
    tables = {"a": rng.normal(size=(11, 7)), "b": rng.normal(size=(11, 3))}
    seed_everything(5)
    return TwoStage(train, features=FeatureTable(tables, rng.random((11, 2)) < 0.8), dim=16, **options)


def test_an_item_that_some_users_took_is_at_its_maximum_a_posteriori(model):
    """The gradient of what ``_folded`` maximises, at what it gives; the other items stay where they are."""
    new = int(torch.nonzero(~model.item_present)[0])
    took = [0, 2, 5]
    moved = model.with_history(model.train_data.union(events_of(model, [(u, new) for u in took])))
    before, after = model.embed()[1], moved.embed()[1]
    users = moved.embed()[0][:, :-1].double()
    known = users[model.user_count > 0]
    m, c = known.mean(0), torch.cov(known.T, correction=0)
    q = after[new, :-1].double().requires_grad_()
    content = before[new, :-1].double()
    posterior = (users[took] @ q).sum() - 3 * (m @ q + q @ c @ q / 2) - 2.0 * (q - content).square().sum()
    (slope,) = torch.autograd.grad(posterior, q)
    assert slope.abs().max() < 1e-4 * users[took].abs().sum() and (after[new] - before[new]).abs().max() > 0.01
    rest = np.arange(model.n_items) != new
    assert torch.equal(after[rest], before[rest])


def test_the_frozen_history_is_a_scaled_mean():
    model = worlds_model(history="mean", mix=1e9)
    users = model.with_history(model.train_data.union(events_of(model, [(3, 1), (3, 4)]))).embed()[0][:, :-1]
    model.eval()
    with torch.no_grad():
        content = unit(model.content(torch.arange(11)).fused)
    torch.testing.assert_close(users[3], 16 / 2 * (content[1] + content[4]) / 2)
    first = torch.from_numpy(model.train_data.csr[0].indices)
    torch.testing.assert_close(users[0], 8 * content[first].mean(0), atol=1e-4, rtol=1e-4)
    assert (model.embed()[0][3, :-1] == 0).all()  # without events


def test_the_frozen_history_is_of_the_discriminants_size():
    """Where content varies alike in all directions, the two differ by the shrinkage of the mean alone."""
    rng = np.random.default_rng(0)
    items = unit(torch.from_numpy(rng.normal(size=(20011, D))).float())
    mean, fisher = HistoryMean(), HistoryEncoder(D, layers=0)
    sums, counts = items[:2000].sum(0)[None] + 1500.0, torch.tensor([2000.0])
    tokens, present = items[None, :1], torch.ones(1, 1, dtype=torch.bool)
    a, b = (tower(tokens, present, sums, counts, Moments.of(items)) for tower in (mean, fisher))
    torch.testing.assert_close(a, b.detach(), rtol=0.05, atol=0)


@pytest.mark.parametrize(("history", "learned"), [("transformer", None), ("discriminant", 3), ("mean", 0)])
def test_histories_learn_what_they_have_and_come_back_from_a_folder(tmp_path, history, learned):
    model = worlds_model(history=history)
    batch = Batch(torch.tensor(model.train_data.users[::2]), torch.tensor(model.train_data.items[::2]))
    terms = model.train().loss(batch)
    assert ("history" in terms) == (history != "mean")
    sum(terms.values()).backward()
    own = [p for p in model.history_tower.parameters() if p.requires_grad]
    assert learned is None or sum(p.numel() for p in own) == learned
    model.save_pretrained(tmp_path / "mine")
    features = model.features
    rows = datasets.Dataset.from_dict({"item_id": model.train_data.item_ids.ids})
    tables = {m: features.tables[m] for m in features.modalities}
    catalog = Catalog(rows, model.train_data.item_ids, features=tables)
    loaded = Recommender.from_pretrained(tmp_path / "mine", catalog=catalog)
    assert loaded.config["history"] == history
    torch.testing.assert_close(loaded.score(np.arange(7)), model.score(np.arange(7)), atol=0, rtol=0)


def test_options_that_are_not_there_are_refused():
    with pytest.raises(DataError, match="history='median': one of"):
        worlds_model(history="median")
    with pytest.raises(TypeError, match="TwoStage got an unexpected keyword argument 'history_layers'"):
        worlds_model(history_layers=0)

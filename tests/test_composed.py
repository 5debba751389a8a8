"""Any encoder x fusion x loss: every part trains in every sensible company, and what has no meaning is refused."""

import numpy as np
import pytest
import torch

import mmllmrec as mm
from mmllmrec.data.interactions import DataError
from mmllmrec.data.sampling import epoch
from mmllmrec.fusion import FUSIONS
from mmllmrec.models.base import Recommender
from mmllmrec.models.composed import ENCODERS, EXTRAS, LOSSES, TIMINGS, Composed, Encoder, Fusion


@pytest.fixture(scope="module")
def shop():
    data = mm.load_dataset("atelier", scale=0.06)
    split = mm.splits.cold_items(data, fraction=0.2, seed=0)
    from mmllmrec.features.table import FeatureTable

    return split, FeatureTable.from_catalog(split.catalog, fit_on=split.warm_items).whiten(split.warm_items, 5)


def built(shop, **options):
    split, features = shop
    torch.manual_seed(0)
    return Composed(split.train, features=features, dim=6, **options)


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
    model = built(shop, encoder=Encoder(kind, neighbours=3), fusion=Fusion(timing, method))
    terms, silent = gradients(model, shop)
    # what is equal for a positive and its negative, such as a bias, has no gradient under BPR
    # an expert that no item of the batch chose has none either
    assert terms == {"bpr", "reg"} and not {n for n in silent if "bias" not in n and "experts" not in n}
    cold = torch.from_numpy(~shop[0].warm_items)
    assert (model.embed()[1][cold].abs().sum(1) > 0).float().mean() > 0.9, "cold items stand on their content"


@pytest.mark.parametrize("kind", ["residual", "hypergraph"])
def test_an_absent_channel_stays_absent_in_late_fusion(shop, kind):
    model = built(shop, encoder=Encoder(kind, neighbours=3), fusion=Fusion("late", "mean")).eval()
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

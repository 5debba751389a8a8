"""The planted world: calibrated, deterministic, and true to its word."""

import dataclasses

import numpy as np
import pytest

from mmllmrec.data import splits
from mmllmrec.data.atelier import Weights, atelier, recovery
from mmllmrec.data.interactions import DataError
from mmllmrec.evaluation.floors import Popularity
from mmllmrec.evaluation.ranking import rank
from tests.planted import Table

SMALL = {"n_items": 211, "n_users": 101, "n_events": 2000}


@pytest.fixture(scope="module")
def small():
    return atelier(**SMALL)


def ridge(data, train, alpha=450.0):
    """Per-user ridge regression of taken or not on true factors, their cross and log popularity: (U, I)."""
    x = np.concatenate([data.factor_features(), np.log1p(train.item_counts)[:, None]], axis=1).astype(np.float64)
    x = (x - x.mean(0)) / x.std(0)
    y = train.csr.toarray().astype(np.float64)
    y -= y.mean(1, keepdims=True)
    return y @ np.linalg.solve(x.T @ x + alpha * np.eye(x.shape[1]), x.T).T @ x.T


@pytest.mark.slow
@pytest.mark.parametrize("world", ["atelier", "atelier-b"])
def test_the_world_is_calibrated(world):
    data = atelier(world, modalities=())
    assert 29_000 < len(data.interactions) < 31_000
    split = splits.random_per_user(data, seed=0)
    seen = (split.train.csr + split.valid.csr).tocsr()

    def ndcg(scorer):
        return rank(scorer, split._test, seen=seen, k=20).per_user("ndcg@20").mean()

    ceiling = ndcg(data.oracle())
    assert 0.15 <= ndcg(Popularity(split.train)) / ceiling <= 0.30
    assert ndcg(data.oracle(without="image")) / ceiling <= 0.75
    assert ndcg(data.oracle(without="text")) / ceiling <= 0.75
    assert 0.50 <= ndcg(Table(ridge(data, split.train))) / ceiling <= 0.85
    everyone = np.arange(data.interactions.n_users)
    partial = data.terms["interaction"](everyone).var()
    assert partial / data.utilities(everyone).var() >= 0.15


def test_weights_are_shares_of_variance_and_zero_switches_off(small):
    everyone = np.arange(101)
    for field in dataclasses.fields(Weights):
        term = small.terms[field.name](everyone)
        assert term.var() == pytest.approx(getattr(Weights(), field.name), rel=0.05), field.name
        np.testing.assert_allclose(term.mean(1), term[0].mean() if field.name == "popularity" else 0.0, atol=1e-5)
    off = atelier(**SMALL, weights={"interaction": 0.0}, modalities=())
    assert (off.terms["interaction"](everyone) == 0).all() and off.terms["hue"](everyone).std() > 0.1


def test_the_interaction_is_out_of_reach_of_a_late_sum(small):
    """Any function of what is seen plus any function of what is read: one parameter a cell of each side."""
    t = small.table
    seen = np.unique(np.stack([t["hue"], t["backdrop"]]), axis=1, return_inverse=True)[1]
    read = np.unique(np.stack([t["material"], t["maker"]]), axis=1, return_inverse=True)[1]
    late = np.concatenate([np.eye(seen.max() + 1)[seen], np.eye(read.max() + 1)[read]], axis=1)
    cell = np.eye(4)[2 * t["backdrop"] + t["maker"]]
    target = small.terms["interaction"](np.arange(101)).T.astype(np.float64)

    def explained(x):
        rest = target - x @ np.linalg.lstsq(x, target, rcond=None)[0]
        return 1 - rest.var() / (target - target.mean(0)).var()

    # 24 parameters fitted to 211 items explain a ninth of anything by chance; the cross explains all of it
    assert explained(late) < 0.2 and explained(np.concatenate([late, cell], axis=1)) > 0.999
    large = atelier(n_items=6007, n_users=5, n_events=50, modalities=())
    t, target = large.table, large.terms["interaction"](np.arange(5)).T.astype(np.float64)
    sides = [
        np.unique(np.stack([t[a], t[b]]), axis=1, return_inverse=True)[1]
        for a, b in (("hue", "backdrop"), ("material", "maker"))
    ]
    assert explained(np.concatenate([np.eye(s.max() + 1)[s] for s in sides], axis=1)) < 0.02


def test_without_noise_the_oracle_is_perfect():
    data = atelier(**SMALL, noise=0.0, choice="top", arrivals=0.0, modalities=())
    split = splits.random_per_user(data, seed=1)
    seen = (split.train.csr + split.valid.csr).tocsr()
    result = rank(data.oracle(), split._test, seen=seen, k=50)
    assert (result.per_user("recall@50") == 1).all()
    np.testing.assert_allclose(result.per_user("ndcg@50"), 1.0, atol=1e-12)


def test_the_same_arguments_make_the_same_world(small):
    again, other = atelier(**SMALL), atelier(**SMALL, seed=1)
    assert (again.interactions.hash, again.catalog.hash) == (small.interactions.hash, small.catalog.hash)
    assert other.interactions.hash != small.interactions.hash and other.catalog.hash != small.catalog.hash


def test_no_item_is_taken_before_it_came():
    data = atelier(**SMALL, arrivals=0.3, modalities=())
    x = data.interactions
    assert x.times.min() >= 0 and x.times.max() < 366 * 24 * 3600
    tenths = np.bincount(x.times * 10 // (365 * 24 * 3600), minlength=10) / len(x)
    np.testing.assert_allclose(tenths, 0.1, atol=0.03)  # events are spread over the year
    early = set(x.items[x.times < 0.7 * 365 * 24 * 3600].tolist())
    late = set(range(211)) - early
    assert len(late) >= 0.25 * 211  # items of the last three tenths are not among the first seven
    assert len(splits.temporal(data, valid=0.1, test=0.2).warm_items) == 211


def test_what_is_seen_is_not_written_and_the_other_way_round(small):
    words = " ".join(f"{w['title']} {w['text']}" for w in small.catalog.words()).lower()
    v = small.vocabulary
    for hidden in (*v.hues, *v.patterns, *v.backdrops):
        assert hidden not in words.split(), hidden
    for said in (*v.kinds, *v.materials):
        assert said in words, said
    first = small.catalog.pixels(64)
    same = atelier(**SMALL)
    same.table["material"][:] = 0
    assert (same.catalog.pixels(64) == first).all()


def test_a_missing_text_hides_the_title_too():
    data = atelier(**SMALL, missing={"text": 0.5, "image": 0.25})
    gone = ~data.catalog.present("text")
    assert 0.4 < gone.mean() < 0.6 and 0.65 < data.catalog.present("image").mean() < 0.85
    assert all(data.catalog.titles[i] == f"Item {i}" for i in np.flatnonzero(gone))
    assert data.catalog.signal("audio").shape == (211, 4000) and data.catalog.signal("sensor").shape == (211, 16)
    assert not data.catalog.signal("sensor")[~data.catalog.present("sensor")].any()


def test_every_factor_can_be_perceived(small):
    """A nearest-mean classifier on raw content, trained on half, beats chance by far on the other half."""
    views = {
        "hue": small.catalog.pixels(64).reshape(211, -1).astype(float),
        "backdrop": small.catalog.pixels(64).reshape(211, -1).astype(float),
        "chime": np.abs(np.fft.rfft(small.catalog.signal("audio"))),
        "scent": small.catalog.signal("sensor").astype(float),
    }
    for name, x in views.items():
        modality = {"chime": "audio", "scent": "sensor"}.get(name, "image")
        here = np.flatnonzero(small.catalog.present(modality))
        train, test, y = here[::2], here[1::2], small.table[name]
        means = np.stack([x[train][y[train] == level].mean(0) for level in range(y.max() + 1)])
        guess = ((x[test][:, None] - means) ** 2).sum(2).argmin(1)
        assert (guess == y[test]).mean() > 2.0 / (y.max() + 1) * (0.75 if y.max() == 1 else 1), name


def test_recovery_finds_what_a_scorer_knows(small):
    everyone = np.arange(101)
    twin = small.oracle()
    blind = recovery(small.oracle(without="image"), small, relative_to=twin)
    assert (blind.loc[["hue", "pattern", "interaction"], "relative"] < 0.1).all()
    assert (blind.loc[["material", "occasion", "kind", "scent"], "relative"] > 0.9).all()
    only = recovery(Table(small.terms["interaction"](everyone)), small)
    assert (
        only.loc["interaction", "recovery"] == pytest.approx(1.0) and (only["recovery"].drop("interaction") < 0.1).all()
    )
    against = recovery(Table(-small.terms["interaction"](everyone)), small)
    assert against.loc["interaction", "recovery"] == 0.0


def test_scale_and_bad_arguments():
    data = atelier(scale=0.1, modalities=())
    assert (data.interactions.n_users, data.interactions.n_items) == (120, 150)
    with pytest.raises(DataError, match="unknown world 'shop'"):
        atelier("shop")
    with pytest.raises(DataError, match="hue is below 0"):
        atelier(weights={"hue": -1.0})
    with pytest.raises(DataError, match=r"without=\['taste'\]"):
        data.oracle(without="taste").score(np.arange(2))
